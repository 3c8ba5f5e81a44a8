"""Fit the lexical half of a model before a run, to the documents that the run knows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from ..distributed import broadcast_from_first
from ..errors import UserError

if TYPE_CHECKING:
    from ..model.modeling_isotropic_gaussian import IsotropicGaussianModel

logger = logging.getLogger(__name__)


def fit_lexical_half(
    model: IsotropicGaussianModel, documents: Callable[[], Sequence[str]], *, weight: float | None = None
) -> dict[str, float]:
    """Give an untrained model its lexical half, equal in all processes; return what the record says of it.

    Nothing happens if the model has one that is fitted. `documents` are read only if they are needed.
    """
    if model.lexical is not None and model.lexical.is_fitted:
        return {}
    if not model.is_untrained:
        logger.warning("The model's head was trained without a lexical half, and goes on without one.")
        return {}
    texts = documents()
    try:
        model.fit_lexical(texts, weight=weight, num_start_texts=0)
    except ValueError as error:
        raise UserError(f"--lexical: {error}") from error
    if model.lexical is not None:
        # Sums differ in their last digits from machine to machine, and the table is a part of the cache's key.
        own = (model.lexical.table.cpu(), model.config.lexical_weight)
        table, model.config.lexical_weight = broadcast_from_first(lambda: own)
        with torch.no_grad():
            model.lexical.table.copy_(table)
    return {"lexical_documents": len(texts), "lexical_weight": round(model.config.lexical_weight, 4)}
