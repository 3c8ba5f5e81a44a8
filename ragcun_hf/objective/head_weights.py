"""The trainable weights of a model: copied, and blended with those of its start."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

_FIRST_LAYER = "mlp.0."  # of a residual branch, whose last layer starts at zero and decides how much the branch adds


def trainable_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copy the trainable weights of a model."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def blend_weights(start: Mapping[str, Tensor], trained: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Interpolate between the weights before training (a share of 0) and after it (1), by parameter name.

    For a head that starts at the identity, this interpolates the output of each part: that of the residual branch
    starts at zero, so only its last layer is scaled.

    Source:
        Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022, arXiv:2109.01903.
    """
    return {
        name: weight if _FIRST_LAYER in name else start[name].lerp(weight, share) for name, weight in trained.items()
    }
