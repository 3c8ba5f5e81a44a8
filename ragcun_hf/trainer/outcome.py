"""What training has come to: finite weights, part of the way back, and better than the start or not."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..command_line import say
from ..errors import UserError
from .sharding import whole_tensor

if TYPE_CHECKING:
    from .trainer import IsotropicGaussianTrainer

logger = logging.getLogger(__name__)

_METRIC = "eval_ndcg@10"


def finish_training(trainer: IsotropicGaussianTrainer, start: Mapping[str, Tensor], blend: float) -> dict[str, float]:
    """Turn the trained weights into those that are saved, and say so where the start was better.

    Args:
        trainer: After training; its model is changed where a blend is asked for.
        start: The head's weights before training; needed for a blend.
        blend: How far the saved weights lie from the start to the trained ones.

    Returns:
        NDCG@10 of held-out pairs, `start` and `saved`, as far as they were measured.

    Raises:
        UserError: If a weight is not finite.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    _check_finite(model)
    measured = [entry[_METRIC] for entry in trainer.state.log_history if _METRIC in entry and entry["step"] == 0]
    figures = {"start": measured[0]} if measured else {}
    if blend < 1:
        model.load_state_dict(blended(start, head_weights(model), blend), strict=False)
    if trainer.validation is not None:
        # What is saved itself: neither the last nor the best evaluation need be of these weights, and one more by the
        # Trainer may cast the model for good.
        figures["saved"] = trainer.validation(model)["ndcg@10"]
        say(f"Validation NDCG@10 of the saved model: {figures['saved']:.4f}.")
    if figures.get("saved", 1.0) < figures.get("start", 0.0):
        logger.warning(
            "Validation NDCG@10 was %.4f before training and is %.4f after it: on these data the untrained start is "
            "the better choice. Try fewer epochs, a lower learning rate, a smaller --blend, or other pairs.",
            *(figures["start"], figures["saved"]),
        )
    return figures


def _check_finite(model: nn.Module) -> None:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    broken = [name for name, parameter in trained.items() if not whole_tensor(parameter.detach()).isfinite().all()]
    if broken:
        raise UserError(
            f"expected finite weights after training, got NaN or infinity in {broken[0]}: nothing was saved, lower "
            "--learning_rate"
        )


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
