"""Features of texts, each distinct text encoded at most once."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash

from ..data.documents import text_digest
from ..distributed import gather_objects, rank, world_size
from ..errors import UserError
from .encoder_backends import choose_dtype, feature_function
from .encoder_loop import encode_in_batches
from .feature_cache import FeatureCache

if TYPE_CHECKING:
    from torch import Tensor

    from ..modeling_isotropic_gaussian import IsotropicGaussianModel
    from .encoder_backends import ComputeFeatures

_TEXTS_PER_SHARD = 4_096  # bounds the buffer in memory
_MOST_READINGS = 3  # of features that others keep removing
_SECONDS_PER_SHARD = 20.0  # what a killed process loses at most


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
        is_shared: All processes that train together ask for the same texts at the same time; each then encodes its
            part of them, and reads what the others wrote.

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

    def features(self, texts: Sequence[str], *, prompt: str = "", rows: slice | None = None) -> FeatureTable:
        """Return the features of texts; the encoder runs for those never seen before.

        Args:
            texts: Any number, equal ones welcome.
            prompt: Put before every text; part of the cache's key.
            rows: Only those of these texts are read, where a process needs a part of what all encode.

        Returns:
            One row per distinct text, and the row of each text.
        """
        was_training = self._model.training
        self._model.eval()
        try:
            if self._cache_folder is not None and self._is_shared and world_size() > 1:
                self._encode_together(list(dict.fromkeys(texts)), prompt)
            first_rows: dict[str, int] = {}
            asked = texts if rows is None else texts[rows]
            numbers = np.array([first_rows.setdefault(text, len(first_rows)) for text in asked], dtype=np.int64)
            distinct = list(first_rows)
            # With a cache, of all processes together; without one each encodes what it asks for.
            self._num_asked += len(distinct) if rows is None or self._cache_folder is None else len(set(texts))
            if self._cache_folder is None:
                vectors = self._encode(distinct, prompt)
            else:
                vectors = self._read_through(self._cache(prompt), distinct, prompt)
        finally:
            self._model.train(was_training)
        return FeatureTable(vectors=vectors, rows=numbers)

    def summary(self) -> str:
        """Say how many texts were encoded so far, how many were known, and what the cache holds."""
        known = self._num_asked - self._num_encoded
        line = f"Features: {self._num_encoded:,} texts encoded, {known:,} known before"
        if self._cache_folder is None:
            return f"{line}; none kept."
        held = sum(len(cache) for cache in self._caches.values())
        mebibytes = sum(cache.num_bytes for cache in self._caches.values()) / 2**20
        return f"{line}; the cache holds {held:,} of this encoder ({mebibytes:,.1f} MiB)."

    def _read_through(self, cache: FeatureCache, texts: list[str], prompt: str) -> np.ndarray:
        digests = [text_digest(text) for text in texts]
        for _ in range(_MOST_READINGS):
            self._write(cache, cache.missing(digests), digests, texts, prompt)
            try:
                return cache.read(digests)
            except KeyError:  # pruned by another process in this moment
                continue
        raise UserError(
            f"expected the features to stay in {cache.folder}, got them removed {_MOST_READINGS} times while they "
            "were read: name another --feature_cache_dir"
        )

    def _encode_together(self, texts: list[str], prompt: str) -> None:
        """Encode this process's part of what is missing, and wait for the others.

        Where their files do not lie on this machine, what cannot be read is encoded here after all.
        """
        cache = self._cache(prompt)
        digests = [text_digest(text) for text in texts]
        # The first one's word counts: another may have looked a moment later.
        missing = gather_objects(cache.missing(digests) if rank() == 0 else None)[0]
        self._write(cache, missing, digests, texts, prompt, share=(rank(), world_size()))
        gather_objects(None)

    def _write(
        self,
        cache: FeatureCache,
        missing: list[int],
        digests: list[bytes],
        texts: list[str],
        prompt: str,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self._num_encoded += len(missing)
        shard = _ShardInProgress(cache)
        try:
            for batch, features in self._batches([texts[position] for position in missing], prompt, share):
                shard.add([digests[missing[position]] for position in batch], features.numpy())
        finally:
            # What was encoded before an interruption is kept.
            shard.write()

    def _encode(self, texts: list[str], prompt: str) -> np.ndarray:
        self._num_encoded += len(texts)
        vectors = np.empty((len(texts), self._model.config.feature_dim), dtype=np.float32)
        for batch, features in self._batches(texts, prompt):
            vectors[batch] = features.numpy()
        return vectors

    def _batches(
        self, texts: list[str], prompt: str, share: tuple[int, int] = (0, 1)
    ) -> Iterable[tuple[list[int], Tensor]]:
        if not texts:
            return ()
        if self._compute is None:
            self._compute = feature_function(self._model, dtype=self._dtype, backend=self.backend)
        return encode_in_batches(
            self._model,
            texts,
            compute=self._compute,
            prompt=prompt,
            show_progress=self._show_progress and share[0] == 0,
            share=share,
        )

    def _cache(self, prompt: str) -> FeatureCache:
        if prompt not in self._caches:
            if self._encoder_parts is None:
                self._encoder_parts = _encoder_parts(self._model)
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


class _ShardInProgress:
    """Features that are not on disk yet; written when they are many or old enough."""

    def __init__(self, cache: FeatureCache) -> None:
        self._cache = cache
        self._begin()

    def _begin(self) -> None:
        self._digests: list[bytes] = []
        self._pieces: list[np.ndarray] = []
        self._started = time.monotonic()

    def add(self, digests: list[bytes], features: np.ndarray) -> None:
        self._digests.extend(digests)
        self._pieces.append(features)
        if len(self._digests) >= _TEXTS_PER_SHARD or time.monotonic() - self._started > _SECONDS_PER_SHARD:
            self.write()

    def write(self) -> None:
        digests, pieces = self._digests, self._pieces
        self._begin()  # first: what cannot be written is not tried again
        if digests:
            self._cache.write(digests, np.concatenate(pieces))


def _encoder_parts(model: IsotropicGaussianModel) -> dict[str, Any]:
    """Name everything about the model that changes a feature; weights and tokenizer by checksum."""
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
    # What acts on the weights matters as much as they do: activation, norms, positions.
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
        # Padding and truncation are set anew by every call.
        description.pop("padding", None)
        description.pop("truncation", None)
    description["sides"] = [tokenizer.truncation_side, tokenizer.padding_side]
    return xxhash.xxh3_128(json.dumps(description, sort_keys=True).encode()).hexdigest()
