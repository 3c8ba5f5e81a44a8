"""Train to predict a text from a masked copy of itself.

    python training/train_xy_masked.py --input_xy_pairs xy_masked_documents.json --use_predictor --epochs 3

Pairs are rows {"x", "y"}: x the original, y the masked text. With --documents, texts are masked on the fly. The
masked text takes the query's place and the original the document's: from what is left, predict the whole. As
published, the loss is purely predictive (--lambda_contrastive 0), with isotropy against a collapse.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from ..command_line import argument

logger = logging.getLogger(__name__)


@dataclass
class MaskedDataArguments:
    """Where the masked pairs come from."""

    input_xy_pairs: str | None = argument(None, "Ready pairs of originals and masked texts: a file or Hub dataset id.")
    documents: str | None = argument(None, "Documents to mask on the fly: a file, folder, BEIR folder or Hub id.")
    x_column: str = argument("x", "Column with the original text.")
    y_column: str = argument("y", "Column with the masked text.")
    text_column: str = argument("text", "With --documents: column with the text.")
    title_column: str = argument("title", "With --documents: column with the title; may be absent.")
    split: str = argument("train", "Split of a Hub dataset.")
    limit: int | None = argument(None, "Use only the first rows.")
    mask_kind: str = argument("word", "With --documents: mask single words (word) or runs of them (span).")
    mask_probability: float = argument(0.3, "With --documents: share of the words to mask, in (0, 1).")
    automatic: bool = argument(
        False,
        "With --documents: mask all but some rare words of each document, and let pseudo-queries of held-out "
        "documents choose start, head, length of training and blend, or nothing where nothing helps.",
    )
    mask_token: str | None = argument(
        None, "With --documents: what stands for masked words. Default: the tokenizer's own; '' removes them."
    )


def main(arguments: list[str] | None = None) -> None:
    """Train from the command line."""
    from ..trainer.run import train_from_command_line

    train_from_command_line(
        MaskedDataArguments,
        read_views,
        script="train_xy_masked",
        description=__doc__ or "",
        arguments=arguments,
        defaults={"lambda_contrastive": 0.0},
    )


def read_views(parsed: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Read or make masked views; return training views, validation views and what the record says of them."""
    from ..errors import UserError

    if bool(parsed.data.input_xy_pairs) == bool(parsed.data.documents):
        raise UserError("expected either --input_xy_pairs or --documents, got both or neither: give one of them")
    if parsed.data.automatic and (parsed.data.input_xy_pairs or parsed.training.lambda_contrastive == 0):
        raise UserError(
            "--automatic trains the contrastive term on --documents, got ready pairs or --lambda_contrastive 0: add "
            "--lambda_contrastive 1, or leave --automatic out"
        )
    if parsed.training.lambda_contrastive == 0 and not parsed.model.use_predictor:
        logger.warning("Without --use_predictor and with --lambda_contrastive 0, only isotropy is trained.")
    return _masked_documents(parsed) if parsed.data.documents else _ready_pairs(parsed)


def _ready_pairs(parsed: Any) -> tuple[Any, Any, dict[str, Any]]:
    from ..data.held_out import hold_out_pairs
    from ..data.pairs import read_xy_pairs
    from ..trainer.run import source_name

    source = parsed.data.input_xy_pairs
    options = {name: getattr(parsed.data, name) for name in ("split", "x_column", "y_column", "limit")}
    pairs = read_xy_pairs(source, **options)
    train, validation = hold_out_pairs(
        pairs,
        val_data=parsed.validation.val_data,
        val_split=parsed.validation.val_split or parsed.data.split,
        val_fraction=parsed.validation.val_fraction,
        seed=parsed.training.seed,
    )
    num_validation_rows = 0 if validation is None else len(validation)
    return (
        train,
        validation,
        {"train": [source_name(source)], "rows": len(train), "validation_rows": num_validation_rows},
    )


def _masked_documents(parsed: Any) -> tuple[Any, Any, dict[str, Any]]:
    from ..data.masking import MaskedViews, maskable
    from ..model.base_models import load_base_tokenizer
    from ..sweep.automatic import automatic_document_views
    from ..trainer.run import document_views

    if parsed.data.automatic:
        return automatic_document_views(parsed, {"keywords": 4})
    mask_token = parsed.data.mask_token
    if mask_token is None:
        # Encoders without a mask token of their own lose the words instead.
        mask_token = load_base_tokenizer(parsed.model.base_model, revision=parsed.model.base_revision).mask_token or ""

    def make_views(texts: list[str]) -> MaskedViews:
        kind, probability = parsed.data.mask_kind, parsed.data.mask_probability
        return MaskedViews(texts, kind, probability, seed=parsed.training.seed, mask_token=mask_token)

    facts = {"mask_kind": parsed.data.mask_kind, "mask_probability": parsed.data.mask_probability}
    return document_views(parsed, make_views, usable=maskable, facts=facts)
