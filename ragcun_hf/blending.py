"""A head between its start and where training has brought it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

_FIRST_LAYER = "mlp.0."  # of a residual branch; its last layer starts at zero and alone says how much the branch adds


def head_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copy the trainable weights of a model."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def blended(start: Mapping[str, Tensor], trained: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Go part of the way from the start to the trained weights.

    For a head that starts at the identity the output of each part lies between that of the start and that of the
    trained one: linear parts are interpolated, and of a residual branch, which starts at zero, a share is added.

    Args:
        start: Parameter name -> weights before training.
        trained: The same after it.
        share: 0 gives what the start computes, 1 the trained weights.

    Returns:
        Parameter name -> weights.

    Source:
        Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022, arXiv:2109.01903.
    """
    return {
        name: weight if _FIRST_LAYER in name else start[name].lerp(weight, share) for name, weight in trained.items()
    }
