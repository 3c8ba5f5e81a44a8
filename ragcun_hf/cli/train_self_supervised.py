"""Train on documents alone: one part of each is the query for the other part.

    python training/train_self_supervised.py --documents documents.json --use_predictor --split_method half

Documents are strings or rows {"text"[, "title"]} of a JSON, JSON Lines, CSV, Parquet or text file, the corpus of a
BEIR folder, or a Hub dataset id. --config training/recipes/unlabelled.yaml chooses all settings by the documents
themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..command_line import argument


@dataclass
class DocumentDataArguments:
    """Where the documents come from and how they are split."""

    documents: str | None = argument(None, "Documents: a file, a folder, a BEIR folder or a Hub dataset id.")
    text_column: str = argument("text", "Column with the text.")
    title_column: str = argument("title", "Column with the title; may be absent.")
    split: str = argument("train", "Split of a Hub dataset.")
    limit: int | None = argument(None, "Use only the first documents.")
    split_method: str = argument(
        "sentence",
        "half: first half against second; random: any point, shorter part asks; prefix / suffix: the first / last "
        "part asks; sentence: one random sentence against the rest, which gained "
        "most where it was measured (EXPERIMENTS.md).",
    )
    automatic: bool = argument(
        False,
        "Draw sentences, runs of words and keywords of each document, and let those of held-out documents choose "
        "start, head, length of training and blend, or nothing where nothing helps.",
    )
    split_fraction: float = argument(0.25, "Share of the words that prefix and suffix take, in (0, 1).")


def main(arguments: list[str] | None = None) -> None:
    """Train from the command line."""
    from ..trainer.run import train_from_command_line

    train_from_command_line(
        DocumentDataArguments,
        read_views,
        script="train_self_supervised",
        description=__doc__ or "",
        arguments=arguments,
    )


def read_views(parsed: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Read documents and split them; return training views, validation views and what the record says of them."""
    from ..data.splitting import SplitViews, splittable
    from ..errors import UserError
    from ..sweep.automatic import automatic_document_views
    from ..trainer.run import document_views

    if not parsed.data.documents:
        raise UserError(
            "--documents expects a file, a folder, a BEIR folder or a Hub dataset id, got nothing: name one"
        )

    if parsed.data.automatic:
        return automatic_document_views(parsed, {"sentence": 3, "span": 2, "keywords": 2})

    def make_views(texts: list[str]) -> SplitViews:
        method, fraction = parsed.data.split_method, parsed.data.split_fraction
        return SplitViews(texts, method, seed=parsed.training.seed, fraction=fraction)

    return document_views(parsed, make_views, usable=splittable, facts={"split_method": parsed.data.split_method})
