"""Train to predict a text from a masked copy of it.

    python training/train_xy_masked.py --input_xy_pairs xy_masked_documents.json --use_predictor --epochs 3

Pairs are rows {"x", "y"}: x is the original, y the masked text. With --documents, texts are masked during training.
The masked text is the query and the original the document. As published, the loss is purely predictive
(--lambda_contrastive 0), with the isotropy term against a collapse.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..command_line import argument
from ..errors import UserError
from ..files import source_name
from .training import automatic_document_data, document_data, train_from_command_line

if TYPE_CHECKING:
    from ..trainer.arguments import ParsedArguments
    from ..trainer.run import RunData

logger = logging.getLogger(__name__)


@dataclass
class MaskedDataArguments:
    """Source of the masked pairs."""

    input_xy_pairs: str | None = argument(None, "Pairs of originals and masked texts: a file or a Hub dataset id.")
    documents: str | None = argument(None, "Documents to mask during training: a file, folder, BEIR folder or Hub id.")
    x_column: str = argument("x", "Column with the original text.")
    y_column: str = argument("y", "Column with the masked text.")
    text_column: str = argument("text", "With --documents: column with the text.")
    title_column: str = argument("title", "With --documents: column with the title; may be absent.")
    split: str = argument("train", "Split of a Hub dataset.")
    limit: int | None = argument(None, "Use only the first rows.")
    mask_kind: str = argument("word", "With --documents: mask single words (word) or runs of words (span).")
    mask_probability: float = argument(0.3, "With --documents: fraction of the words to mask, in (0, 1).")
    automatic: bool = argument(
        False,
        "With --documents: mask all but some rare words of each document. Pseudo-queries of held-out documents choose "
        "initialization, head, length of training and blend, or keep the base if nothing helps.",
    )
    mask_token: str | None = argument(
        None, "With --documents: replaces masked words. Default: the tokenizer's mask token; '' removes the words."
    )


def main(arguments: list[str] | None = None) -> None:
    """Train from the command line."""
    defaults = {"lambda_contrastive": 0.0}
    train_from_command_line("train_xy_masked", __doc__, MaskedDataArguments, read_data, arguments, **defaults)


def read_data(parsed: ParsedArguments) -> RunData:
    """Read masked pairs, or documents to mask."""
    data = parsed.data
    if bool(data.input_xy_pairs) == bool(data.documents):
        raise UserError("expected either --input_xy_pairs or --documents, got both or neither: give one of them")
    if data.automatic and (data.input_xy_pairs or parsed.training.lambda_contrastive == 0):
        raise UserError(
            "--automatic trains the contrastive term on --documents, got ready pairs or --lambda_contrastive 0: add "
            "--lambda_contrastive 1, or leave --automatic out"
        )
    if parsed.training.lambda_contrastive == 0 and not parsed.model.use_predictor:
        logger.warning("Without --use_predictor and with --lambda_contrastive 0, only isotropy is trained.")
    return _documents(parsed) if data.documents else _ready_pairs(parsed)


def _ready_pairs(parsed: ParsedArguments) -> RunData:
    from ..data.held_out import hold_out_pairs
    from ..data.pairs import read_xy_pairs
    from ..trainer.run import RunData

    source = parsed.data.input_xy_pairs
    options = {name: getattr(parsed.data, name) for name in ("split", "x_column", "y_column", "limit")}
    train, validation = hold_out_pairs(read_xy_pairs(source, **options), **parsed.validation_options)
    facts = {"train": [source_name(source)], "rows": len(train), "validation_rows": len(validation or ())}
    return RunData.of_pairs(train, validation, facts)


def _documents(parsed: ParsedArguments) -> RunData:
    from ..data.masking import MaskedViews
    from ..model.base_models import load_base_tokenizer

    data, model = parsed.data, parsed.model
    if data.automatic:
        return automatic_document_data(parsed, {"keywords": 4})
    mask_token = data.mask_token
    if mask_token is None:
        # An encoder without a mask token loses the masked words instead.
        mask_token = load_base_tokenizer(model.base_model, revision=model.base_revision).mask_token or ""

    def mask(texts: list[str]) -> MaskedViews:
        options = {"seed": parsed.training.seed, "mask_token": mask_token}
        return MaskedViews(texts, data.mask_kind, data.mask_probability, **options)

    facts = {"mask_kind": data.mask_kind, "mask_probability": data.mask_probability}
    return document_data(parsed, mask, facts=facts)
