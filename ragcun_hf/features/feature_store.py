"""Features of texts: the encoder runs at most once for each distinct text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash

from ..data.documents import text_digest
from ..data.mapped_column import take
from ..distributed import broadcast_from_first, gather_objects, rank, world_size
from ..errors import UserError
from .encoder_backends import choose_dtype, feature_function
from .encoder_loop import EncodingProgress, WorkShare, encode_in_batches
from .feature_cache import FeatureCache

if TYPE_CHECKING:
    from ..model.modeling_isotropic_gaussian import IsotropicGaussianModel
    from .encoder_backends import ComputeFeatures

SAMPLE_ROWS = 4_096  # rows that represent a corpus where not all are needed
TEXTS_AT_ONCE = 32_768  # texts of a large corpus in memory; batches of similar length are formed among them
TEXTS_PER_ROUND = 262_144  # processes wait for each other after a round; long rounds keep that wait small
_MAX_READS = 3  # of features that another process keeps removing


def default_cache_folder() -> Path:
    """Return the feature cache's folder, beside the other Hugging Face caches (`HF_HOME`)."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "ragcun_hf" / "features"


@dataclass(frozen=True)
class FeatureTable:
    """Features of N texts, U of them distinct."""

    vectors: np.ndarray  # (U, H), float32
    rows: np.ndarray  # (N,), int64: the row of each text; equal texts have equal rows

    def expanded(self) -> np.ndarray:
        """Return one row per text, shape (N, H); `vectors` itself if all texts are distinct."""
        return self.vectors if len(self.rows) == len(self.vectors) else self.vectors[self.rows]


class FeatureStore:
    """Returns the frozen encoder's features of texts, from the cache or by running the encoder.

    The checksums of encoder and tokenizer are computed once, so neither may change while a store is in use. Without a
    `cache_folder`, nothing is kept. `dtype` (auto, float32, bfloat16) is the arithmetic of the encoder, and `backend`
    (torch, openvino) runs it. Features are stored in `feature_dtype` (float32, float16). With `is_shared`, all
    processes call `encode` and `features` with the same texts; each encodes a part and reads what the others wrote.
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
        """Arithmetic in use: `float32` or `bfloat16`."""
        return str(self._dtype).removeprefix("torch.")

    def settings(self) -> dict[str, str]:
        """Return the settings, other than the model, that change a feature; for records and results."""
        return {"encoder_dtype": self.dtype_name, "encoder_backend": self.backend, "feature_dtype": self.feature_dtype}

    def features(self, texts: Sequence[str], *, prompt: str = "") -> FeatureTable:
        """Return the features of texts, each with the prompt prepended; encode the ones that the cache lacks."""
        self.encode(texts, prompt=prompt)
        return self.read(texts, prompt=prompt)

    def encode(self, texts: Sequence[str], *, prompt: str = "") -> None:
        """Fill the cache with the features of texts, without reading them. Without a cache, do nothing."""
        if self._cache_folder is None:
            return
        with self._progress() as progress:
            for start in range(0, len(texts), TEXTS_PER_ROUND):
                self._encode_round(texts, range(start, min(start + TEXTS_PER_ROUND, len(texts))), prompt, progress)

    def read(self, texts: Sequence[str], *, prompt: str = "") -> FeatureTable:
        """Return the features of texts, which may differ between processes; encode here what the cache still lacks."""
        row_of_text: dict[str, int] = {}
        rows = np.array([row_of_text.setdefault(text, len(row_of_text)) for text in texts], dtype=np.int64)
        distinct = list(row_of_text)
        if self._cache_folder is not None:
            return FeatureTable(self._read_through(self._cache(prompt), distinct, prompt), rows)
        self._num_asked += len(distinct)
        vectors = np.empty((len(distinct), self._model.config.feature_dim), dtype=np.float32)
        with self._progress() as progress:
            for batch, features in self._batches(distinct, prompt, progress):
                vectors[batch] = features
        return FeatureTable(vectors, rows)

    def summary(self) -> str:
        """Report the number of texts encoded so far, those already known, and the size of the cache."""
        known = self._num_asked - self._num_encoded
        line = f"Features: {self._num_encoded:,} texts encoded, {known:,} known before"
        if self._cache_folder is None:
            return f"{line}; none kept."
        held = sum(len(cache) for cache in self._caches.values())
        mebibytes = sum(cache.num_bytes for cache in self._caches.values()) / 2**20
        return f"{line}; the cache holds {held:,} of this encoder ({mebibytes:,.1f} MiB)."

    def _encode_round(self, texts: Sequence[str], rows: range, prompt: str, progress: EncodingProgress) -> None:
        """Encode the rows that the cache lacks; of several processes, each encodes its part of them."""
        cache = self._cache(prompt)
        share = WorkShare(rank(), world_size()) if self._is_shared else WorkShare()
        find_missing = partial(self._missing, texts, rows, cache)
        # All processes use the answer of the first: a file written a moment later would change it.
        num_distinct, missing = broadcast_from_first(find_missing) if self._is_shared else find_missing()
        self._num_asked += num_distinct
        num_later = len(texts) - rows.stop
        names = cache.write_as_computed(self._encoded(texts, missing, prompt, progress, share, num_later))
        if self._is_shared:
            # Wait for the others, and open their files by name: a shared folder may list new files late.
            cache.open_shards(name for written in gather_objects(names) for name in written)

    def _missing(self, texts: Sequence[str], rows: range, cache: FeatureCache) -> tuple[int, list[int]]:
        """Return the number of distinct texts in the rows, and the first row of each one that the cache lacks."""
        digests: list[bytes] = []
        for start in range(rows.start, rows.stop, TEXTS_AT_ONCE):
            digests += [text_digest(text) for text in texts[start : min(start + TEXTS_AT_ONCE, rows.stop)]]
        _, places = np.unique(np.frombuffer(b"".join(digests), dtype="S16"), return_index=True)
        places.sort()
        missing = places[cache.missing([digests[place] for place in places])]
        return len(places), (rows.start + missing).tolist()

    def _read_through(self, cache: FeatureCache, texts: list[str], prompt: str) -> np.ndarray:
        digests = [text_digest(text) for text in texts]
        for _ in range(_MAX_READS):
            if missing := cache.missing(digests):  # pruned, or written by a machine whose files are not visible here
                with self._progress() as progress:
                    cache.write_as_computed(self._encoded(texts, missing, prompt, progress, WorkShare()))
            try:
                return cache.read(digests)
            except KeyError:  # pruned by another process in this moment
                continue
        raise UserError(
            f"expected the features to stay in {cache.folder}, but they were removed {_MAX_READS} times while they "
            "were read: name another --feature_cache_dir"
        )

    def _encoded(
        self,
        texts: Sequence[str],
        rows: list[int],
        prompt: str,
        progress: EncodingProgress,
        share: WorkShare,
        num_later: int = 0,
    ) -> Iterator[tuple[list[bytes], np.ndarray]]:
        """Encode rows; yield digests and features. Up to `num_later` texts follow in later rounds."""
        for start in range(0, len(rows), TEXTS_AT_ONCE):
            window = take(texts, rows[start : start + TEXTS_AT_ONCE])
            progress.num_upcoming = (len(rows) - start - len(window) + num_later) // share.num_processes
            for batch, features in self._batches(window, prompt, progress, share):
                yield [text_digest(window[position]) for position in batch], features

    def _batches(
        self, texts: list[str], prompt: str, progress: EncodingProgress, share: WorkShare | None = None
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """Encode texts in evaluation mode; yield positions and features."""
        if not texts:
            return
        self._num_encoded += len(texts)
        if self._compute is None:
            self._compute = feature_function(self._model, dtype=self._dtype, backend=self.backend)
        was_training = self._model.training
        self._model.eval()
        try:
            for batch, features in encode_in_batches(
                self._model, texts, compute=self._compute, prompt=prompt, progress=progress, share=share
            ):
                yield batch, features.numpy()
        finally:
            self._model.train(was_training)

    def _progress(self) -> EncodingProgress:
        is_first = not self._is_shared or rank() == 0
        return EncodingProgress(is_shown=self._show_progress and is_first)

    def key_parts(self, prompt: str) -> dict[str, Any]:
        """Return everything that changes the features of texts with this prompt: equal parts give equal features."""
        if self._encoder_parts is None:
            self._encoder_parts = encoder_parts(self._model)
        parts = {**self._encoder_parts, "prompt": prompt, "dtype": self.dtype_name, "backend": self.backend}
        if self._model.device.type != "cpu":
            parts["device"] = self._model.device.type
        return parts

    def _cache(self, prompt: str) -> FeatureCache:
        if prompt not in self._caches:
            parts = self.key_parts(prompt)
            dim, name = self._model.config.feature_dim, self._model.config.base_model_name
            self._caches[prompt] = FeatureCache(
                self._cache_folder or "", parts, feature_dim=dim, dtype=self.feature_dtype, name=name
            )
        return self._caches[prompt]


def encoder_parts(model: IsotropicGaussianModel) -> dict[str, Any]:
    """Describe everything in the model that changes a feature, with checksums of the weights and the tokenizer."""
    config = model.config
    return {
        "layout": 2,
        "encoder": config.encoder_config.model_type,
        "weights": _weights_checksum(model.encoder),
        "tokenizer": _tokenizer_checksum(model.tokenizer),
        "max_length": config.max_length,
        "pooling": config.pooling,
        "normalize_features": config.normalize_features,
    }


def _weights_checksum(encoder: Any) -> str:
    checksum = xxhash.xxh3_128()
    for name, tensor in sorted(encoder.state_dict().items()):
        checksum.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        checksum.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    # Equal weights give other features under another activation, normalization or position scheme.
    settings = encoder.config.to_diff_dict()
    for machine_dependent in ("_name_or_path", "transformers_version", "architectures", "dtype"):
        settings.pop(machine_dependent, None)
    checksum.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return checksum.hexdigest()


def _tokenizer_checksum(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        description = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab(), "special": special}
    else:
        description = json.loads(backend.to_str())
        # Every call sets padding and truncation anew.
        description.pop("padding", None)
        description.pop("truncation", None)
    description["sides"] = [tokenizer.truncation_side, tokenizer.padding_side]
    return xxhash.xxh3_128(json.dumps(description, sort_keys=True).encode()).hexdigest()
