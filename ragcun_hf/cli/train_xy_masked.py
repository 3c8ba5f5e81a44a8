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
from .training import read_document_texts, train_from_command_line

if TYPE_CHECKING:
    from ..data.pseudo_queries import PseudoQueryKind
    from ..trainer.data import TrainingData
    from .training import ParsedArguments

logger = logging.getLogger(__name__)

_DRAWN: dict[PseudoQueryKind, int] = {"keywords": 4}  # with --automatic, of each document


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
    mask_token: str | None = argument(
        None, "With --documents: replaces masked words. Default: the tokenizer's mask token; '' removes the words."
    )


def main(arguments: list[str] | None = None) -> None:
    """Train from the command line."""
    defaults = {"lambda_contrastive": 0.0}
    train_from_command_line("train_xy_masked", __doc__, MaskedDataArguments, read_data, arguments, **defaults)


def read_data(parsed: ParsedArguments) -> TrainingData:
    """Read masked pairs, or documents to mask."""
    data, training = parsed.data, parsed.training
    if bool(data.input_xy_pairs) == bool(data.documents):
        raise UserError("expected either --input_xy_pairs or --documents, got both or neither: give one of them")
    if training.automatic and (data.input_xy_pairs or training.lambda_contrastive == 0):
        raise UserError(
            "--automatic trains the contrastive term on --documents, got ready pairs or --lambda_contrastive 0: add "
            "--lambda_contrastive 1, or leave --automatic out"
        )
    if training.lambda_contrastive == 0 and not parsed.model.use_predictor:
        logger.warning("Without --use_predictor and with --lambda_contrastive 0, only isotropy is trained.")
    return _documents(parsed) if data.documents else _ready_pairs(parsed)


def _ready_pairs(parsed: ParsedArguments) -> TrainingData:
    from ..data.pairs import read_xy_pairs
    from ..trainer.data import TrainingData

    source = parsed.data.input_xy_pairs
    options = {name: getattr(parsed.data, name) for name in ("split", "x_column", "y_column", "limit")}
    pairs = read_xy_pairs(source, **options)
    return TrainingData.of_pairs(pairs, parsed.held_out_pairs(), parsed.training, {"train": [source_name(source)]})


def _documents(parsed: ParsedArguments) -> TrainingData:
    from ..data.masking import MaskedViews
    from ..model.base_models import load_base_tokenizer
    from ..trainer.data import TrainingData

    data, model = parsed.data, parsed.model
    mask_token = data.mask_token
    if mask_token is None and not parsed.training.automatic:
        # An encoder without a mask token loses the masked words instead.
        mask_token = load_base_tokenizer(model.base_model, revision=model.base_revision).mask_token or ""

    def mask(texts: list[str]) -> MaskedViews:
        seed = parsed.training.seed
        return MaskedViews(texts, data.mask_kind, data.mask_probability, seed=seed, mask_token=mask_token or "")

    documents, facts = read_document_texts(data)
    if not parsed.training.automatic:
        facts |= {"mask_kind": data.mask_kind, "mask_probability": data.mask_probability}
    held_out, drawn = parsed.held_out_pairs(), _DRAWN
    return TrainingData.of_documents(documents, held_out, parsed.training, facts, make_rows=mask, drawn=drawn)
