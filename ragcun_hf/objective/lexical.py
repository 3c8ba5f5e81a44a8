"""Give a model its lexical half before a run: fitted to the documents that the run knows, or that of a checkpoint."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from ..command_line import say
from ..distributed import broadcast_from_first, world_size
from ..errors import UserError
from ..model.lexical_isotropic_gaussian import LexicalHalf

if TYPE_CHECKING:
    from ..model.modeling_isotropic_gaussian import IsotropicGaussianModel

logger = logging.getLogger(__name__)

_FIELDS = ("lexical_dim", "lexical_weight", "lexical_scale")


def prepare_lexical_half(
    model: IsotropicGaussianModel,
    documents: Callable[[], Sequence[str]],
    *,
    is_wanted: bool,
    fields: Mapping[str, Any],
    checkpoint: str | None = None,
) -> dict[str, float]:
    """Give an untrained model the lexical half that is wanted, equal in all processes; return facts for the record.

    A configuration with a `lexical_dim` asks for it, too. `fields` may set `lexical_dim` and `lexical_weight`. A run
    that is resumed takes what its checkpoint has. `documents` are read only if they are needed.
    """
    if is_wanted and {**vars(model.config), **fields}["freeze_documents"]:
        say("Exact words are left out: documents keep the vectors of the frozen encoder, which have none.")
        return {}
    is_empty = model.lexical is not None and not model.lexical.is_fitted
    if model.lexical is not None and not is_empty:
        return {}
    if not model.is_untrained:
        if is_wanted:
            logger.warning("The model's head was trained without a lexical half, and goes on without one.")
        return {}
    if not is_wanted and not is_empty:
        return {}
    if checkpoint is not None and _resume(model, Path(checkpoint)):
        return {"lexical_weight": round(model.config.lexical_weight, 4)}
    texts = documents()
    try:
        model.fit_lexical(
            texts, dim=fields.get("lexical_dim") or None, weight=fields.get("lexical_weight"), num_start_texts=0
        )
    except ValueError as error:
        raise UserError(f"--lexical: {error}") from error
    _make_equal(model)
    if model.lexical is None:
        say("Exact words are left out: the documents have too many words for the directions of a lexical half.")
    return {"lexical_documents": len(texts), "lexical_weight": round(model.config.lexical_weight, 4)}


def _make_equal(model: IsotropicGaussianModel) -> None:
    """Take the lexical half of the first process: sums differ in their last digits, and the cache's key has them."""
    if world_size() == 1:
        return
    config, table = model.config, None if model.lexical is None else model.lexical.table.cpu()
    own = (table, {name: getattr(config, name) for name in _FIELDS})
    table, values = broadcast_from_first(lambda: own)
    _take(model, table, values)


def _resume(model: IsotropicGaussianModel, checkpoint: Path) -> bool:
    """Take the lexical half of a checkpoint; False if it has none in one file."""
    weights, name = checkpoint / "model.safetensors", "lexical.table"
    if not weights.is_file():
        return False
    with safe_open(weights, framework="pt") as file:
        if name not in file.keys():  # noqa: SIM118 (not a dictionary)
            return False
        table = file.get_tensor(name)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    _take(model, table, {name: config[name] for name in _FIELDS})
    return True


def _take(model: IsotropicGaussianModel, table: torch.Tensor | None, values: Mapping[str, Any]) -> None:
    model.reset_head(**values)
    if table is None:
        model.lexical = None
        return
    model.lexical = LexicalHalf(*table.shape).to(model.device)
    model.lexical.table.copy_(table)
