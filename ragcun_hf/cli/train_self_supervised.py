"""Train on documents alone: a part of each document is the query for the rest of it.

    python training/train_self_supervised.py --documents documents.json --use_predictor --split_method half

Documents are strings or rows {"text"[, "title"]} of a JSON, JSON Lines, CSV, Parquet or text file, the corpus of a
BEIR folder, or a Hub dataset. With --recipe unlabelled, the settings are chosen automatically,
by how well held-out documents are retrieved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..command_line import argument
from ..errors import UserError
from .training import automatic_document_data, document_data, train_from_command_line

if TYPE_CHECKING:
    from ..trainer.arguments import ParsedArguments
    from ..trainer.run import RunData


@dataclass
class DocumentDataArguments:
    """Source of the documents, and how they are split."""

    documents: str | None = argument(None, "Documents: a file, a folder, a BEIR folder or a Hub dataset id.")
    text_column: str = argument("text", "Column with the text.")
    title_column: str = argument("title", "Column with the title; may be absent.")
    split: str = argument("train", "Split of a Hub dataset.")
    limit: int | None = argument(None, "Use only the first documents.")
    split_method: str = argument(
        "sentence",
        "Which part is the query. half: the first half; random: the shorter part of a split at any point; prefix or "
        "suffix: the first or last part; sentence: one random sentence, which gained most where it was measured "
        "(EXPERIMENTS.md).",
    )
    automatic: bool = argument(
        False,
        "Draw sentences, runs of words and keywords of each document as queries. Those of held-out documents choose "
        "initialization, head, length of training and blend, or keep the base if nothing helps.",
    )
    split_fraction: float = argument(0.25, "Fraction of the words that prefix and suffix take, in (0, 1).")


def main(arguments: list[str] | None = None) -> None:
    """Train from the command line."""
    train_from_command_line("train_self_supervised", __doc__, DocumentDataArguments, read_data, arguments)


def read_data(parsed: ParsedArguments) -> RunData:
    """Read documents and split them."""
    from ..data.splitting import SplitViews

    data = parsed.data
    if not data.documents:
        raise UserError(
            "--documents expects a file, a folder, a BEIR folder or a Hub dataset id, got nothing: name one"
        )
    if data.automatic:
        return automatic_document_data(parsed, {"sentence": 3, "span": 2, "keywords": 2})

    def split(texts: list[str]) -> SplitViews:
        return SplitViews(texts, data.split_method, seed=parsed.training.seed, fraction=data.split_fraction)

    return document_data(parsed, split, facts={"split_method": data.split_method})
