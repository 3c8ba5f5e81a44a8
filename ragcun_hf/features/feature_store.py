"""Features of texts: the encoder runs at most once for each distinct text."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash

from ..errors import UserError
from .encoder_backends import (
    WORTH_A_GRAPH,
    choose_dtype,
    feature_function,
    is_openvino_faster,
    lexical_function,
)
from .text_vectors import QuickestVectors, TextVectors

if TYPE_CHECKING:
    from ..model.modeling_isotropic_gaussian import IsotropicGaussianModel
    from .encoder_backends import ComputeFeatures

logger = logging.getLogger(__name__)

SAMPLE_ROWS = 4_096  # rows that represent a corpus where not all are needed


def default_cache_folder() -> Path:
    """Return the feature cache's folder, beside the other Hugging Face caches (`HF_HOME`)."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "ragcun_hf" / "features"


@dataclass(frozen=True)
class FeatureTable:
    """Features of N texts, U of them distinct."""

    vectors: np.ndarray  # (U, H + L), float32
    rows: np.ndarray  # (N,), int64: the row of each text; equal texts have equal rows

    def expanded(self) -> np.ndarray:
        """Return one row per text, shape (N, H + L); `vectors` itself if all texts are distinct."""
        return self.vectors if len(self.rows) == len(self.vectors) else self.vectors[self.rows]


class FeatureStore:
    """Returns the features of texts, from the cache or by running the encoder.

    The lexical half of a model that has one is cached apart, so that another fit costs no encoding, and joined when
    features are read, so that its weight may change. The checksums of encoder, tokenizer and lexical half are computed
    once: none of them may change while a store is in use. Without a `cache_folder`, nothing is kept. `dtype` (auto,
    float32, bfloat16, float16) is the arithmetic of the encoder, and `backend` (torch, openvino, auto) runs it; `auto`
    is OpenVINO for much text where it is faster, and PyTorch otherwise. Features are stored in `feature_dtype`
    (float32, float16). With `is_shared`, all processes call `encode` and `features` with the same texts; each
    encodes a part and reads what the others wrote. With `is_interactive`, for a few texts again and again, the
    prepared encoder is kept, and on a processor a feature does not depend on the texts that come with it.
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
        is_interactive: bool = False,
    ) -> None:
        self._model = model
        self._dtype = choose_dtype(dtype, model.device, family=model.config.encoder_config.model_type)
        self._backend = backend
        self.feature_dtype = feature_dtype
        self._options: dict[str, Any] = {
            "dtype": feature_dtype,
            "cache_folder": cache_folder,
            "description": model.config.base_model_name,
            "is_shown": show_progress,
            "is_shared": is_shared,
            "is_padded": not is_interactive,
        }
        self._is_interactive = is_interactive
        self._encoder_parts: dict[str, Any] | None = None
        self._encoder = self._encoder_vectors()
        self._lexical: TextVectors | None = None
        self._kept_functions: dict[str, ComputeFeatures] = {}

    @property
    def backend(self) -> str:
        """Libraries that have computed features so far: `torch`, `openvino` or both, if there was a choice."""
        if isinstance(self._encoder, TextVectors):
            return "torch" if self._backend == "auto" else self._backend
        used = [name for name, is_used in zip(("torch", "openvino"), self._encoder.are_used, strict=True) if is_used]
        return " + ".join(used) or "torch"

    @property
    def dtype_name(self) -> str:
        """Arithmetic in use: `float32`, `bfloat16` or `float16`."""
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
        for half in self._halves():
            half.fill(texts, prompt=prompt)

    def read(self, texts: Sequence[str], *, prompt: str = "") -> FeatureTable:
        """Return the features of texts, which may differ between processes; encode here what the cache still lacks."""
        row_of_text: dict[str, int] = {}
        rows = np.array([row_of_text.setdefault(text, len(row_of_text)) for text in texts], dtype=np.int64)
        halves = [half.read(list(row_of_text), prompt=prompt) for half in self._halves()]
        if len(halves) == 1:
            return FeatureTable(halves[0], rows)
        return FeatureTable(self._model.join_features(*map(torch.from_numpy, halves)).numpy(), rows)

    def summary(self) -> str:
        """Report the number of texts encoded so far, those already known, and the size of the cache."""
        known = self._encoder.num_asked - self._encoder.num_computed
        line = f"Features: {self._encoder.num_computed:,} texts encoded, {known:,} known before"
        if self._options["cache_folder"] is None:
            return f"{line}; none kept."
        num_texts, num_bytes = self._encoder.held
        return f"{line}; the cache holds {num_texts:,} of this encoder ({num_bytes / 2**20:,.1f} MiB)."

    def _encoder_vectors(self) -> TextVectors | QuickestVectors:
        def vectors(backend: str) -> TextVectors:
            key_parts = partial(self.key_parts, backend=backend)
            dim, function = self._model.config.encoder_dim, partial(self._encoder_function, backend)
            return TextVectors(self._model, function, key_parts, dim=dim, **self._options)

        if self._backend != "auto":
            return vectors(self._backend)
        if not is_openvino_faster(self._model.device, self._dtype):
            return vectors("torch")
        is_shared = self._options["is_shared"]
        both = vectors("torch"), vectors("openvino")
        return QuickestVectors(*both, self._prepare_openvino, worth_it=WORTH_A_GRAPH, is_shared=is_shared)

    def _prepare_openvino(self) -> bool:
        was_training = self._model.training
        self._model.eval()
        try:
            self._encoder_function("openvino")
        except UserError as error:
            logger.info("PyTorch encodes all texts: %s", error)
            return False
        except Exception as error:  # noqa: BLE001 (whatever fails in OpenVINO, nobody has asked for it)
            reason = f"{type(error).__name__}: {error}"
            logger.warning(
                "PyTorch encodes all texts, as OpenVINO failed (%s): repair it, or use --encoder_backend torch", reason
            )
            return False
        finally:
            self._model.train(was_training)
        return True

    def _encoder_function(self, backend: str) -> ComputeFeatures:
        compute = self._kept_functions.get(backend) or feature_function(
            self._model, dtype=self._dtype, backend=backend
        )
        # Compiling a graph takes seconds; casting weights takes as long as a short query.
        if self._is_interactive or backend == "openvino":
            self._kept_functions[backend] = compute
        return compute

    def _halves(self) -> list[TextVectors | QuickestVectors]:
        lexical = self._model.lexical
        if lexical is None:
            return [self._encoder]
        if self._lexical is None:
            parts = {**_lexical_parts(self._model), "table": _checksum(lexical.state_dict())}
            self._lexical = TextVectors(
                self._model,
                lambda: lexical_function(self._model, lexical),
                lambda prompt: {**parts, "prompt": prompt},
                dim=self._model.config.lexical_dim,
                **self._options,
            )
        return [self._encoder, self._lexical]

    def key_parts(self, prompt: str, *, backend: str | None = None) -> dict[str, Any]:
        """Return all that changes the encoder's part of features with this prompt: equal parts give equal features."""
        if self._encoder_parts is None:
            self._encoder_parts = encoder_parts(self._model)
        parts = {
            **self._encoder_parts,
            "prompt": prompt,
            "dtype": self.dtype_name,
            "backend": backend or self._backend,
        }
        if self._model.device.type != "cpu":
            parts["device"] = self._model.device.type
        return parts


def encoder_parts(model: IsotropicGaussianModel) -> dict[str, Any]:
    """Describe everything in the model that changes a feature, with checksums of the weights and the tokenizer."""
    config = model.config
    # Only where there are such layers, so that the keys of other encoders stay.
    layers = {} if model.pooled_layers is None else {"layers": config.pooled_layers}
    if model.pooled_layers is not None:
        layers["weights_of_layers"] = _checksum(model.pooled_layers.state_dict())
    return {
        **layers,
        "layout": 2,
        "encoder": config.encoder_config.model_type,
        "weights": _weights_checksum(model.encoder),
        "tokenizer": _tokenizer_checksum(model.tokenizer),
        "max_length": config.max_length,
        "pooling": config.pooling,
        "normalize_features": config.normalize_features,
    }


def _weights_checksum(encoder: Any) -> str:
    checksum = _hash_of(encoder.state_dict())
    # Equal weights give other features under another activation, normalization or position scheme.
    settings = encoder.config.to_diff_dict()
    for without_effect in ("_name_or_path", "transformers_version", "architectures", "dtype", "use_cache"):
        settings.pop(without_effect, None)
    checksum.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return checksum.hexdigest()


def _lexical_parts(model: IsotropicGaussianModel) -> dict[str, Any]:
    """Describe everything but the table that changes a lexical half."""
    tokenizer, max_length = _tokenizer_checksum(model.tokenizer), model.config.max_length
    return {"layout": 1, "half": "lexical", "tokenizer": tokenizer, "max_length": max_length}


def _checksum(weights: Mapping[str, Any]) -> str:
    return _hash_of(weights).hexdigest()


def _hash_of(weights: Mapping[str, Any]) -> Any:
    checksum = xxhash.xxh3_128()
    for name, tensor in sorted(weights.items()):
        checksum.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        checksum.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return checksum


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
    description["sides"] = [tokenizer.truncation_side, "right"]  # the model pads there, whatever the tokenizer does
    return xxhash.xxh3_128(json.dumps(description, sort_keys=True).encode()).hexdigest()
