"""What FSDP2 (torch's `fully_shard`, through accelerate) needs of a run: units to shard, and whole weights again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def prepare_sharding(accelerator: Any, model: Any) -> None:
    """Say what accelerate cannot know before it shards: which layers are units, and what stays in float32.

    Args:
        accelerator: The Trainer's; nothing happens where it does not shard.
        model: The whole model.
    """
    if not accelerator.is_fsdp2:
        return
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy

    from ..model.modeling_isotropic_gaussian import encoder_layers

    plugin = accelerator.state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap is None:
        # transformers' own list lacks the layers of MPNet, and has an embedding module of BERT inside which accelerate
        # would shard a second time.
        plugin.transformer_cls_names_to_wrap = sorted(
            {type(layer).__name__ for layer in encoder_layers(model.encoder)}
        )
    if accelerator.mixed_precision == "bf16":
        # accelerate would add up the processes' gradients in bfloat16, too.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def whole_weights(accelerator: Any, model: Any) -> dict[str, Tensor] | None:
    """Gather a sharded model's weights; every process has to call it.

    Args:
        accelerator: The Trainer's.
        model: The Trainer's.

    Returns:
        Name -> whole tensor on the main process, nothing in it on the others; None where nothing is sharded.
    """
    return accelerator.get_state_dict(model) if accelerator.is_fsdp2 else None


def whole_tensor(tensor: Any) -> Tensor:
    """Return a tensor as it is, or gathered where it is sharded, for which every process has to call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@contextmanager
def under_its_own_class(accelerator: Any, model: Any) -> Iterator[None]:
    """Give a sharded model its own class back for a while; torch puts one of its own in front.

    Saving writes the name of the class, and copies the file that it is defined in.

    Args:
        accelerator: The Trainer's; nothing happens where it does not shard.
        model: The Trainer's.
    """
    if not accelerator.is_fsdp2:
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    current = type(model)
    model.__class__ = next(each for each in current.__mro__ if not issubclass(each, FSDPModule))
    try:
        yield
    finally:
        model.__class__ = current
