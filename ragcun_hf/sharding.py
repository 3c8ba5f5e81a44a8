"""What FSDP2 (torch's `fully_shard`, through accelerate) needs of a run: settings, refusals, whole weights again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .run_arguments import ParsedArguments

_FILE = "training/accelerate/fsdp2_trainable_encoder.yaml"


def check_sharding(parsed: ParsedArguments) -> None:
    """Refuse what does not go together with FSDP, where accelerate or `--fsdp` asks for it.

    Args:
        parsed: All arguments.

    Raises:
        UserError: On a frozen encoder, or settings of FSDP that a run would only fail with at its end.
    """
    plugin_args = parsed.training.fsdp_plugin_args
    if plugin_args is None and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(**(plugin_args or {}))
    if parsed.model.freeze_base:
        raise UserError(
            "FSDP shards an encoder that trains, got a frozen one: add --no_freeze_base, or launch with "
            "training/accelerate/one_machine_gpus.yaml"
        )
    # Checkpoints need the config beside whole weights, which only the full state dict puts there.
    wanted = {
        "fsdp_version": (plugin.fsdp_version, 2),
        "fsdp_state_dict_type": (plugin.state_dict_type.name, "FULL_STATE_DICT"),
        "fsdp_cpu_ram_efficient_loading": (plugin.cpu_ram_efficient_loading, False),
    }
    for name, (value, expected) in wanted.items():
        if value != expected:
            raise UserError(f"expected {name} {expected}, got {value}: launch with {_FILE}")
    if parsed.training.torch_compile:
        raise UserError("--torch_compile and FSDP are not tried together: leave one out")


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

    from .modeling_isotropic_gaussian import encoder_layers

    plugin = accelerator.state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap is None:
        # transformers' own list lacks the layers of MPNet, and has an embedding module of BERT inside which accelerate
        # would shard a second time.
        layers = encoder_layers(model.encoder)
        plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in layers})
    if accelerator.mixed_precision == "bf16":
        # accelerate would add up the processes' gradients in bfloat16, too.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def whole_weights(accelerator: Any, model: Any) -> dict[str, Tensor] | None:
    """Gather a sharded model's weights; every process has to call it.

    Args:
        accelerator: The Trainer's.
        model: The Trainer's.

    Returns:
        Name -> whole tensor, on the main process only; None where nothing is sharded.
    """
    return accelerator.get_state_dict(model) if accelerator.is_fsdp2 else None


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor as it is, or gathered where it is sharded, for which every process has to call it."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def under_its_own_class(model: nn.Module) -> Iterator[None]:
    """Give a sharded model its own class back for a while; torch puts one of its own in front.

    Saving writes the name of the class, and copies the file that it is defined in.
    """
    from torch.distributed.fsdp import FSDPModule

    current = type(model)
    own: Any = next(each for each in current.__mro__ if not issubclass(each, FSDPModule))
    model.__class__ = own
    try:
        yield
    finally:
        model.__class__ = current
