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
from .training import read_document_texts, train_from_command_line

if TYPE_CHECKING:
    from ..trainer.data import TrainingData
    from .training import ParsedArguments


@dataclass
class DocumentDataArguments:
    """Source of the documents."""

    documents: str | None = argument(None, "Documents: a file, a folder, a BEIR folder or a Hub dataset id.")
    text_column: str = argument("text", "Column with the text.")
    title_column: str = argument("title", "Column with the title; may be absent.")
    split: str = argument("train", "Split of a Hub dataset.")
    limit: int | None = argument(None, "Use only the first documents.")


def main(arguments: list[str] | None = None) -> None:
    """Train from the command line."""
    train_from_command_line("train_self_supervised", __doc__, DocumentDataArguments, read_data, arguments)


def read_data(parsed: ParsedArguments) -> TrainingData:
    """Read documents and split them."""
    from ..trainer.data import TrainingData

    if not parsed.data.documents:
        raise UserError(
            "--documents expects a file, a folder, a BEIR folder or a Hub dataset id, got nothing: name one"
        )
    documents, facts = read_document_texts(parsed.data)
    return TrainingData.of_documents(documents, parsed.held_out_pairs(), parsed.training, facts)
