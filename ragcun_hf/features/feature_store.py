"""Features of texts, each distinct text encoded at most once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.documents import text_digest
from ..data.mapped_column import take
from ..distributed import gather_objects, made_by_first, rank, world_size
from ..errors import UserError
from .digest_index import first_rows
from .encoder_backends import choose_dtype, feature_function
from .encoder_key import encoder_parts
from .encoder_loop import EncodingProgress, WorkShare, encode_in_batches
from .feature_cache import FeatureCache, GrowingShard

if TYPE_CHECKING:
    from torch import Tensor

    from ..model.modeling_isotropic_gaussian import IsotropicGaussianModel
    from .encoder_backends import ComputeFeatures

SAMPLE_ROWS = 4_096  # rows that represent a corpus where not all are needed
TEXTS_AT_ONCE = 32_768  # of a large corpus, in memory; batches of like length are formed among them
_TEXTS_PER_ROUND = 262_144  # after which processes wait for each other; so many that none waits long
_MOST_READINGS = 3  # of features that others keep removing


def default_cache_folder() -> Path:
    """The folder of the feature cache beside the other Hugging Face caches (`HF_HOME`)."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "ragcun_hf" / "features"


@dataclass(frozen=True)
class FeatureTable:
    """Features of some texts.

    Args:
        vectors: Shape (U, H), float32, one row per distinct text.
        rows: Shape (N,), int64, the row of each text asked for; equal texts have equal rows.
    """

    vectors: np.ndarray
    rows: np.ndarray

    def expanded(self) -> np.ndarray:
        """Return (N, H), one row per text asked for; `vectors` itself where no text came twice."""
        return self.vectors if len(self.rows) == len(self.vectors) else self.vectors[self.rows]


class FeatureStore:
    """Give the frozen encoder's features of texts, from the cache or by running it.

    The encoder and its tokenizer must not change while a store is in use: their checksums are taken once.

    Args:
        model: Whose encoder, tokenizer, pooling and length make the features.
        cache_folder: Where features are kept; None keeps nothing.
        dtype: Arithmetic of the encoder: `auto`, `float32` or `bfloat16`.
        backend: What runs the encoder: `torch` or `openvino`.
        feature_dtype: Of features on disk: `float32`, or `float16` for half the room.
        show_progress: Show a bar while encoding.
        is_shared: All processes that train together call `encode` and `features` with the same texts at the same
            time; each then encodes its part of them, and reads what the others wrote.

    Attributes:
        backend: As given.
        feature_dtype: As given.

    Example:
        >>> store = FeatureStore(model, cache_folder=None)  # doctest: +SKIP
        >>> store.features(["a text", "another", "a text"]).rows  # doctest: +SKIP
        array([0, 1, 0])
    """

    def __init__(
        self,
        model: IsotropicGaussianModel,
        *,
        cache_folder: str | Path | None,
        dtype: str = "auto",
        backend: str = "torch",
        feature_dtype: str = "float32",
        show_progress: bool = True,
        is_shared: bool = False,
    ) -> None:
        self._model = model
        self._is_shared = is_shared
        self._cache_folder = cache_folder
        self._dtype = choose_dtype(dtype, model.device)
        self.backend = backend
        self.feature_dtype = feature_dtype
        self._show_progress = show_progress
        self._caches: dict[str, FeatureCache] = {}
        self._encoder_parts: dict[str, Any] | None = None
        self._compute: ComputeFeatures | None = None
        self._num_asked = self._num_encoded = 0

    @property
    def dtype_name(self) -> str:
        """The arithmetic in use, `float32` or `bfloat16`."""
        return str(self._dtype).removeprefix("torch.")

    def settings(self) -> dict[str, str]:
        """Name what changes a feature beside the model, for records and results."""
        return {
            "encoder_dtype": self.dtype_name,
            "encoder_backend": self.backend,
            "feature_dtype": self.feature_dtype,
        }

    def features(self, texts: Sequence[str], *, prompt: str = "") -> FeatureTable:
        """Return the features of texts; the encoder runs for those never seen before.

        Args:
            texts: Any number, equal ones welcome.
            prompt: Put before every text; part of the cache's key.

        Returns:
            One row per distinct text, and the row of each text.
        """
        self.encode(texts, prompt=prompt)
        return self.read(texts, prompt=prompt)

    def encode(self, texts: Sequence[str], *, prompt: str = "") -> None:
        """See that the cache holds the features of texts, without reading them; without a cache, do nothing.

        Args:
            texts: Any number; memory holds 32,768 of them at once. Where the store is shared, all processes have to
                ask for the same.
            prompt: As for `features`.
        """
        if self._cache_folder is None:
            return
        with self._progress() as progress:
            for start in range(0, len(texts), _TEXTS_PER_ROUND):
                self._encode_round(texts, range(start, min(start + _TEXTS_PER_ROUND, len(texts))), prompt, progress)

    def read(self, texts: Sequence[str], *, prompt: str = "") -> FeatureTable:
        """Return the features of texts that `encode` has seen; processes may ask for different ones.

        Args:
            texts: Any number; what the cache does not hold is encoded here.
            prompt: As for `features`.

        Returns:
            As `features`.
        """
        first_rows: dict[str, int] = {}
        rows = np.array([first_rows.setdefault(text, len(first_rows)) for text in texts], dtype=np.int64)
        distinct = list(first_rows)
        if self._cache_folder is None:
            self._num_asked += len(distinct)
            return FeatureTable(vectors=self._encode(distinct, prompt), rows=rows)
        return FeatureTable(vectors=self._read_through(self._cache(prompt), distinct, prompt), rows=rows)

    def summary(self) -> str:
        """Say how many texts were encoded so far, how many were known, and what the cache holds."""
        known = self._num_asked - self._num_encoded
        line = f"Features: {self._num_encoded:,} texts encoded, {known:,} known before"
        if self._cache_folder is None:
            return f"{line}; none kept."
        held = sum(len(cache) for cache in self._caches.values())
        mebibytes = sum(cache.num_bytes for cache in self._caches.values()) / 2**20
        return f"{line}; the cache holds {held:,} of this encoder ({mebibytes:,.1f} MiB)."

    def _encode_round(self, texts: Sequence[str], rows: range, prompt: str, progress: EncodingProgress) -> None:
        """Encode what is missing of some of the texts; together with other processes, this one's part of it."""
        cache, share = self._cache(prompt), self._share()
        look = partial(self._missing, texts, rows, cache)
        # The first one's word counts: another may look later.
        num_distinct, missing = made_by_first(look) if self._is_shared else look()
        self._num_asked += num_distinct
        with GrowingShard(cache) as shard:
            for start in range(0, len(missing), TEXTS_AT_ONCE):
                window = [rows.start + place for place in missing[start : start + TEXTS_AT_ONCE].tolist()]
                num_later = len(missing) - start - len(window) + len(texts) - rows.stop
                progress.num_later = num_later // share.num_processes
                self._encode_into(shard, take(texts, window), prompt, progress, share)
        if self._is_shared:
            # Wait for the others, and open what they wrote by name: a folder on another machine may be listed late.
            cache.open_shards(name for names in gather_objects(shard.names) for name in names)

    def _missing(self, texts: Sequence[str], rows: range, cache: FeatureCache) -> tuple[int, np.ndarray]:
        """Return how many of some rows are distinct, and the places among them of each text that the cache lacks."""
        digests: list[bytes] = []
        for start in range(rows.start, rows.stop, TEXTS_AT_ONCE):
            digests += [text_digest(text) for text in texts[start : min(start + TEXTS_AT_ONCE, rows.stop)]]
        distinct = first_rows(digests)
        missing = distinct[cache.missing([digests[row] for row in distinct])]
        return len(distinct), missing

    def _read_through(self, cache: FeatureCache, texts: list[str], prompt: str) -> np.ndarray:
        digests = [text_digest(text) for text in texts]
        for _ in range(_MOST_READINGS):
            missing = cache.missing(digests)
            if missing:  # pruned meanwhile, or another machine's files do not lie here
                with self._progress() as progress, GrowingShard(cache) as shard:
                    self._encode_into(shard, take(texts, missing), prompt, progress)
            try:
                return cache.read(digests)
            except KeyError:  # pruned by another process in this moment
                continue
        raise UserError(
            f"expected the features to stay in {cache.folder}, got them removed {_MOST_READINGS} times while they "
            "were read: name another --feature_cache_dir"
        )

    def _encode_into(
        self,
        shard: GrowingShard,
        texts: list[str],
        prompt: str,
        progress: EncodingProgress,
        share: WorkShare | None = None,
    ) -> None:
        self._num_encoded += len(texts)
        for batch, features in self._batches(texts, prompt, progress, share):
            shard.add([text_digest(texts[position]) for position in batch], features.numpy())

    def _encode(self, texts: list[str], prompt: str) -> np.ndarray:
        self._num_encoded += len(texts)
        vectors = np.empty((len(texts), self._model.config.feature_dim), dtype=np.float32)
        with self._progress() as progress:
            for batch, features in self._batches(texts, prompt, progress):
                vectors[batch] = features.numpy()
        return vectors

    def _progress(self) -> EncodingProgress:
        return EncodingProgress(is_shown=self._show_progress and self._share().number == 0)

    def _share(self) -> WorkShare:
        """Begin to share work with those that encode together."""
        return WorkShare(rank(), world_size()) if self._is_shared else WorkShare()

    def _batches(
        self, texts: list[str], prompt: str, progress: EncodingProgress, share: WorkShare | None = None
    ) -> Iterator[tuple[list[int], Tensor]]:
        if not texts:
            return
        if self._compute is None:
            self._compute = feature_function(self._model, dtype=self._dtype, backend=self.backend)
        was_training = self._model.training
        self._model.eval()
        try:
            yield from encode_in_batches(
                self._model, texts, compute=self._compute, prompt=prompt, progress=progress, share=share
            )
        finally:
            self._model.train(was_training)

    def _cache(self, prompt: str) -> FeatureCache:
        if prompt not in self._caches:
            if self._encoder_parts is None:
                self._encoder_parts = encoder_parts(self._model)
            parts = {**self._encoder_parts, "prompt": prompt, "dtype": self.dtype_name, "backend": self.backend}
            if self._model.device.type != "cpu":
                parts["device"] = self._model.device.type
            self._caches[prompt] = FeatureCache(
                self._cache_folder or "",
                parts,
                feature_dim=self._model.config.feature_dim,
                dtype=self.feature_dtype,
                name=self._model.config.base_model_name,
            )
        return self._caches[prompt]
