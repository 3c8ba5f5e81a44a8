"""Cache key of an encoder: everything in the model that changes a feature."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
import xxhash

if TYPE_CHECKING:
    from ..model.modeling_isotropic_gaussian import IsotropicGaussianModel


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
