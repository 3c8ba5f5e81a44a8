"""Train on query-document pairs with contrastive + isotropy + predictive terms.

    python training/train_contrastive.py --train_data train.json --use_predictor --freeze_base \
        --output_dim 768 --epochs 3 --batch_size 32 --lambda_contrastive 1.0 --lambda_isotropy 1.5 \
        --lambda_predictive 1.2

Pairs are rows {"query", "positive"[, "negative"]} of a JSON, JSON Lines, CSV or Parquet file, the train judgements of
a BEIR folder, or a Hub dataset.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..command_line import argument
from ..errors import UserError
from ..files import source_name
from .training import train_from_command_line

if TYPE_CHECKING:
    from ..trainer.arguments import ParsedArguments
    from ..trainer.run import RunData

logger = logging.getLogger(__name__)


@dataclass
class PairDataArguments:
    """Sources of the pairs."""

    train_data: list[str] = argument([], "Pairs to train on: one or more files, BEIR folders or Hub dataset ids.")
    split: str = argument("train", "Split of a Hub dataset, or of the judgements of a BEIR folder, to train on.")
    query_column: str = argument("query", "Column with the query.")
    positive_column: str = argument("positive", "Column with the query's document.")
    negative_column: str = argument("negative", "Column with one hard negative or a list of them; may be absent.")
    streaming: bool = argument(
        False,
        "Read rows during training, as tokens, shuffled in a buffer; needs --max_steps. A pass ends when fewer rows "
        "are left than a step needs. JSON arrays and BEIR folders are still read as a whole.",
    )
    shuffle_buffer_size: int = argument(
        10_000, "With --streaming: rows in memory, from which the next row is drawn; 1 keeps the order of the source."
    )
    limit: int | None = argument(None, "Use only the first rows of each source.")


def main(arguments: list[str] | None = None) -> None:
    """Train from the command line."""
    train_from_command_line("train_contrastive", __doc__, PairDataArguments, read_data, arguments)


def read_data(parsed: ParsedArguments) -> RunData:
    """Read training and validation pairs."""
    from datasets import concatenate_datasets

    from ..data.held_out import hold_out_pairs
    from ..data.pairs import audit_pairs, drop_duplicate_rows, read_pairs
    from ..trainer.run import RunData

    data = parsed.data
    if not data.train_data:
        raise UserError("--train_data expects a file, a BEIR folder or a Hub dataset id, got nothing: name one")
    names = ("split", "query_column", "positive_column", "negative_column", "streaming", "limit")
    options = {name: getattr(data, name) for name in names}
    sources = [read_pairs(source, **options) for source in data.train_data]
    facts = {"train": [source_name(source) for source in data.train_data], "split": data.split}
    if data.streaming:
        return _stream_data(sources, parsed, facts)
    pairs, num_dropped = drop_duplicate_rows(concatenate_datasets(sources))
    train, validation = hold_out_pairs(pairs, **parsed.validation_options)
    counts = {"duplicate_rows_dropped": num_dropped, "validation_rows": len(validation or ())}
    audit = audit_pairs(train)
    if audit.distinct_queries < 2 or audit.distinct_positives < 2:
        logger.warning(
            "The training pairs have %d distinct queries and %d distinct positives: no row's document is a negative "
            "for another row, and without hard negatives (there are %d) the contrastive term is 0.",
            *(audit.distinct_queries, audit.distinct_positives, audit.negatives),
        )
    return RunData.of_pairs(train, validation, {**facts, **vars(audit), **counts})


def _stream_data(sources: list[Any], parsed: ParsedArguments, facts: dict[str, Any]) -> RunData:
    from ..data.held_out import drop_validation_negatives
    from ..data.pairs import read_pairs
    from ..data.stream import ShuffledStream, interleave
    from ..data.training_rows import TableRows
    from ..trainer.run import RunData

    buffer_size, options = parsed.data.shuffle_buffer_size, parsed.validation_options
    if buffer_size < 1:
        raise UserError(f"--shuffle_buffer_size must be at least 1, got {buffer_size}: 1 keeps the order")
    for name in ("dataloader_num_workers", "auto_find_batch_size", "restore_callback_states_from_checkpoint"):
        if getattr(parsed.training, name):
            raise UserError(f"--streaming reads in the process that trains and counts its rows: leave --{name} out")
    if parsed.training.max_steps <= 0:
        raise UserError("--streaming needs --max_steps, as the length of a stream is not known: add it")
    if parsed.uses_cached_features:
        raise UserError("--streaming trains from tokens, not from cached features: add --no_feature_cache")
    if options["val_fraction"] > 0:
        raise UserError("--streaming cannot hold out a --val_fraction of a stream: name --val_data, or leave it out")
    rows, validation = interleave(sources), None
    if options["val_data"]:
        held_out = read_pairs(options["val_data"], split=options["val_split"])
        rows, validation = drop_validation_negatives(rows, held_out), TableRows(held_out)
    stream = ShuffledStream(rows, buffer_size=buffer_size, seed=parsed.training.seed)
    return RunData(stream, validation, {**facts, "streamed": True})
