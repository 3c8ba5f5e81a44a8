"""Train on query-document pairs with contrastive + isotropy + predictive terms.

    python training/train_contrastive.py --train_data train.json --use_predictor --freeze_base \
        --output_dim 768 --epochs 3 --batch_size 32 --lambda_contrastive 1.0 --lambda_isotropy 1.5 \
        --lambda_predictive 1.2

Pairs are rows {"query", "positive"[, "negative"]} of a JSON, JSON Lines, CSV or Parquet file, a BEIR folder (its
train judgements become pairs), or a Hub dataset id.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from ..command_line import argument

logger = logging.getLogger(__name__)


@dataclass
class PairDataArguments:
    """Where the pairs come from."""

    train_data: list[str] = argument([], "Pairs to train on: one or more files, BEIR folders or Hub dataset ids.")
    split: str = argument("train", "Split of a Hub dataset, or of a BEIR folder's judgements, to train on.")
    query_column: str = argument("query", "Column with the query.")
    positive_column: str = argument("positive", "Column with its document.")
    negative_column: str = argument("negative", "Column with one hard negative or a list of them; may be absent.")
    streaming: bool = argument(
        False,
        "Read rows while training, from tokens, shuffled in a buffer; needs --max_steps. A pass ends where fewer rows "
        "are left than a step takes. JSON arrays and BEIR folders are read whole all the same.",
    )
    shuffle_buffer_size: int = argument(
        10_000, "With --streaming: rows in memory, among which the next one is drawn; 1 keeps the order of the source."
    )
    limit: int | None = argument(None, "Use only the first rows of each source.")


def main(arguments: list[str] | None = None) -> None:
    """Train from the command line."""
    from ..trainer.run import train_from_command_line

    train_from_command_line(
        PairDataArguments, read_views, script="train_contrastive", description=__doc__ or "", arguments=arguments
    )


def read_views(parsed: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Read training and validation pairs; return them with what the record says of them."""
    from datasets import concatenate_datasets

    from ..data.held_out import hold_out_pairs
    from ..data.pairs import audit_pairs, drop_duplicate_rows
    from ..errors import UserError
    from ..trainer.run import source_name

    if not parsed.data.train_data:
        raise UserError("--train_data expects a file, a BEIR folder or a Hub dataset id, got nothing: name one")
    facts = {"train": [source_name(source) for source in parsed.data.train_data], "split": parsed.data.split}
    sources = _read_sources(parsed)
    if parsed.data.streaming:
        return *_stream_with_validation(sources, parsed), {**facts, "streamed": True}
    train, num_dropped = drop_duplicate_rows(concatenate_datasets(sources))
    train, validation = hold_out_pairs(train, **_validation_options(parsed))
    num_validation_rows = 0 if validation is None else len(validation)
    counts = {"duplicate_rows_dropped": num_dropped, "validation_rows": num_validation_rows}
    audit = audit_pairs(train)
    _warn_without_contrast(audit)
    return train, validation, {**facts, **vars(audit), **counts}


def _warn_without_contrast(audit: Any) -> None:
    if audit.distinct_queries < 2 or audit.distinct_positives < 2:
        logger.warning(
            "The training pairs have %d distinct queries and %d distinct positives: no row's document is a negative "
            "for another row, and without hard negatives (there are %d) the contrastive term is 0.",
            *(audit.distinct_queries, audit.distinct_positives, audit.negatives),
        )


def _read_sources(parsed: Any) -> list[Any]:
    from ..data.pairs import read_pairs

    names = ("split", "query_column", "positive_column", "negative_column", "streaming", "limit")
    options = {name: getattr(parsed.data, name) for name in names}
    return [read_pairs(source, **options) for source in parsed.data.train_data]


def _validation_options(parsed: Any) -> dict[str, Any]:
    return {
        "val_data": parsed.validation.val_data,
        "val_split": parsed.validation.val_split or parsed.data.split,
        "val_fraction": parsed.validation.val_fraction,
        "seed": parsed.training.seed,
    }


def _stream_with_validation(sources: list[Any], parsed: Any) -> tuple[Any, Any]:
    from ..data.held_out import drop_validation_negatives_of_stream
    from ..data.stream import ShuffledStream

    stream, validation = _stream(sources, parsed), _validation_of_stream(parsed)
    if validation is not None:
        stream = drop_validation_negatives_of_stream(stream, validation)
    buffer_size, seed = parsed.data.shuffle_buffer_size, parsed.training.seed
    return ShuffledStream(stream, buffer_size=buffer_size, seed=seed), validation


def _stream(sources: list[Any], parsed: Any) -> Any:
    from ..errors import UserError

    if parsed.data.shuffle_buffer_size < 1:
        raise UserError(
            f"--shuffle_buffer_size must be at least 1, got {parsed.data.shuffle_buffer_size}: 1 keeps the order"
        )
    for name in ("dataloader_num_workers", "auto_find_batch_size", "restore_callback_states_from_checkpoint"):
        if getattr(parsed.training, name):
            raise UserError(f"--streaming reads in the process that trains and counts its rows: leave --{name} out")
    if parsed.training.max_steps <= 0:
        raise UserError("--streaming needs --max_steps, as the length of a stream is not known: add it")
    if parsed.model.freeze_base and parsed.features.feature_cache:
        raise UserError("--streaming trains from tokens, not from cached features: add --no_feature_cache")
    return _interleaved(sources)


def _interleaved(sources: list[Any]) -> Any:
    """Let sources take turns, each row once: of a short one nothing comes again while a long one goes on."""
    from datasets import interleave_datasets

    if len(sources) == 1:
        return sources[0]
    return interleave_datasets(sources, stopping_strategy="all_exhausted_without_replacement")


def _validation_of_stream(parsed: Any) -> Any:
    from ..data.pairs import read_pairs
    from ..errors import UserError

    if parsed.validation.val_fraction > 0:
        raise UserError("--streaming cannot hold out a --val_fraction of a stream: name --val_data, or leave it out")
    options = _validation_options(parsed)
    return read_pairs(options["val_data"], split=options["val_split"]) if options["val_data"] else None
