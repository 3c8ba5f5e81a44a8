"""FSDP2 support: choose the modules to shard, and gather full weights to save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def prepare_sharding(accelerator: Any, model: Any) -> None:
    """Tell accelerate which layers to shard and what stays in float32; without FSDP2, do nothing."""
    if not accelerator.is_fsdp2:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy

    from ..model.modeling_isotropic_gaussian import encoder_layers

    plugin = accelerator.state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap is None:
        # The list of transformers lacks MPNet's layers, and a module of BERT on it would be sharded twice.
        plugin.transformer_cls_names_to_wrap = sorted(
            {type(layer).__name__ for layer in encoder_layers(model.encoder)}
        )
    if accelerator.mixed_precision == "bf16":
        # accelerate would also sum the gradients of the processes in bfloat16.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def whole_tensor(tensor: Any) -> Tensor:
    """Return a tensor, gathered if it is sharded; then every process has to call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_weights(accelerator: Any, model: Any) -> dict[str, Tensor] | None:
    """Gather the weights of a sharded model; every process has to call this.

    Returns name -> tensor in the main process and an empty dict in the others, or None if nothing is sharded.
    """
    return accelerator.get_state_dict(model) if accelerator.is_fsdp2 else None


def save_whole(model: Any, folder: Path, weights: dict[str, Tensor] | None) -> None:
    """Save a model with the weights from `whole_weights`."""
    if weights is None:
        model.save_pretrained(folder)
        return
    from ..model.modeling_isotropic_gaussian import IsotropicGaussianModel

    # torch changes the class of a sharded model, so a copy without weights is saved in its place.
    with torch.device("meta"):
        whole = IsotropicGaussianModel(model.config)
    whole.tokenizer = model.tokenizer
    whole.save_pretrained(folder, state_dict=weights)
