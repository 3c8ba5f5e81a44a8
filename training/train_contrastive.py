"""Train on query-document pairs with contrastive + isotropy + predictive terms.

    python training/train_contrastive.py --train_data train.json --use_predictor --freeze_base \
        --output_dim 768 --epochs 3 --batch_size 32 --lambda_contrastive 1.0 --lambda_isotropy 1.5 \
        --lambda_predictive 1.2

Pairs are rows {"query", "positive"[, "negative"]} of a JSON, JSON Lines, CSV or Parquet file, a BEIR folder (its
train judgements become pairs), or a Hub dataset id.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ragcun_hf.command_line import argument, default_output_folder, parse_arguments, run_script


@dataclass
class PairDataArguments:
    """Where the pairs come from."""

    train_data: list[str] = argument([], "Pairs to train on: one or more files, BEIR folders or Hub dataset ids.")
    val_data: str | None = argument(
        None, "Held-out pairs: eval_loss and NDCG@10 while training, best checkpoint kept."
    )
    val_fraction: float = argument(
        0.0, "Without --val_data: share of the documents (with their queries) held out for validation, in [0, 0.5]."
    )
    split: str = argument("train", "Split of a Hub dataset, or of a BEIR folder's judgements, to train on.")
    val_split: str | None = argument(None, "The same for --val_data. Default: as --split.")
    query_column: str = argument("query", "Column with the query.")
    positive_column: str = argument("positive", "Column with its document.")
    negative_column: str = argument("negative", "Column with one hard negative or a list of them; may be absent.")
    streaming: bool = argument(
        False, "Read rows while training, from tokens; needs --max_steps, and shuffles in a buffer."
    )
    limit: int | None = argument(None, "Use only the first rows of each source.")


def main(arguments: list[str] | None = None) -> None:
    """Parse, read, train, save, and say what comes next."""
    from ragcun_hf.training_arguments import IsotropicGaussianTrainingArguments
    from ragcun_hf.training_run import (
        FeatureArguments,
        ModelArguments,
        RunArguments,
        check_output_folder,
        report_saved_model,
        run_training,
    )

    data_args, model_args, feature_args, run_args, training_args = parse_arguments(
        [PairDataArguments, ModelArguments, FeatureArguments, RunArguments, IsotropicGaussianTrainingArguments],
        description=__doc__ or "",
        arguments=arguments,
        defaults={"output_dir": default_output_folder("train_contrastive", arguments)},
    )
    check_output_folder(training_args, overwrite=run_args.overwrite)
    train, validation, facts = read_data(data_args, training_args)
    trainer = run_training(
        train,
        validation,
        model_args=model_args,
        feature_args=feature_args,
        training_args=training_args,
        data_facts=facts,
    )
    report_saved_model(trainer)


def read_data(data_args: PairDataArguments, training_args: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Read training and validation pairs; return them with what the record says of them."""
    from datasets import concatenate_datasets

    from ragcun_hf.data.held_out import split_by_document
    from ragcun_hf.data.pairs import audit_pairs, drop_duplicate_rows, read_pairs
    from ragcun_hf.errors import UserError

    if not data_args.train_data:
        raise UserError("--train_data expects a file, a BEIR folder or a Hub dataset id, got nothing: name one")
    columns = {name: getattr(data_args, name) for name in ("query_column", "positive_column", "negative_column")}
    if data_args.streaming:
        return _stream(data_args, training_args, columns)
    sources = [
        read_pairs(source, split=data_args.split, limit=data_args.limit, **columns) for source in data_args.train_data
    ]
    train, num_dropped = drop_duplicate_rows(concatenate_datasets(sources))
    validation = None
    if data_args.val_data:
        validation = read_pairs(data_args.val_data, split=data_args.val_split or data_args.split, **columns)
    elif data_args.val_fraction > 0:
        train, validation = split_by_document(train, data_args.val_fraction, seed=training_args.seed)
    facts = {
        "train": [_name(source) for source in data_args.train_data],
        "split": data_args.split,
        "rows": vars(audit_pairs(train)),
        "duplicate_rows_dropped": num_dropped,
        "validation_rows": 0 if validation is None else len(validation),
    }
    return train, validation, facts


def _stream(
    data_args: PairDataArguments, training_args: Any, columns: dict[str, str]
) -> tuple[Any, Any, dict[str, Any]]:
    from datasets import interleave_datasets

    from ragcun_hf.data.pairs import read_pairs
    from ragcun_hf.errors import UserError

    if training_args.max_steps <= 0:
        raise UserError("--streaming needs --max_steps, as the length of a stream is not known: add it")
    if data_args.val_fraction > 0:
        raise UserError("--streaming cannot hold out a --val_fraction of a stream: name --val_data, or leave it out")
    streams = [
        read_pairs(source, split=data_args.split, streaming=True, limit=data_args.limit, **columns)
        for source in data_args.train_data
    ]
    train = streams[0] if len(streams) == 1 else interleave_datasets(streams, stopping_strategy="all_exhausted")
    validation = None
    if data_args.val_data:
        validation = read_pairs(data_args.val_data, split=data_args.val_split or data_args.split, **columns)
    facts = {"train": [_name(source) for source in data_args.train_data], "split": data_args.split, "streamed": True}
    return train.shuffle(seed=training_args.seed, buffer_size=10_000), validation, facts


def _name(source: str) -> str:
    """Name a source without the folders of this machine."""
    from pathlib import Path

    path = Path(source)
    return "/".join(path.parts[-2:]) if path.exists() else source


if __name__ == "__main__":
    run_script(main)
