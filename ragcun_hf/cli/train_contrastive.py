r"""Train on query-document pairs with contrastive + isotropy + predictive terms.

    python training/train_contrastive.py --train_data train.json --use_predictor --freeze_base \
        --output_dim 768 --epochs 3 --batch_size 32 --lambda_contrastive 1.0 --lambda_isotropy 1.5 \
        --lambda_predictive 1.2

Pairs are rows {"query", "positive"[, "negative"]} of a JSON, JSON Lines, CSV or Parquet file, the train judgements of
a BEIR folder, or a Hub dataset.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..command_line import argument
from ..data.documents import is_beir_folder
from ..errors import UserError
from ..files import source_name
from .training import train_from_command_line

if TYPE_CHECKING:
    from ..trainer.data import TrainingData
    from .training import ParsedArguments


@dataclass
class PairDataArguments:
    """Sources of the pairs."""

    train_data: list[str] = argument([], "Pairs to train on: one or more files, BEIR folders or Hub dataset ids.")
    documents: str | None = argument(
        None,
        "Documents without labels from the same collection: a file, a folder, a BEIR folder or a Hub dataset id. A "
        "head that is trained on them, as by the recipe unlabelled, is the start, and held-out queries search them.",
    )
    split: str = argument("train", "Split of a Hub dataset, or of the judgements of a BEIR folder, to train on.")
    query_column: str = argument("query", "Column with the query.")
    positive_column: str = argument("positive", "Column with the query's document.")
    negative_column: str = argument("negative", "Column with one hard negative or a list of them; may be absent.")
    streaming: bool = argument(
        False,
        "Read rows during training, as tokens, shuffled in a buffer; needs --max_steps. A pass ends when fewer rows "
        "are left than a step needs. JSON arrays and BEIR folders are still read as a whole.",
    )
    limit: int | None = argument(None, "Use only the first rows of each source.")


def main(arguments: list[str] | None = None) -> None:
    """Train from the command line."""
    train_from_command_line("train_contrastive", __doc__, PairDataArguments, read_data, arguments)


def read_data(parsed: ParsedArguments) -> TrainingData:
    """Read training and validation pairs."""
    from datasets import concatenate_datasets

    from ..data.documents import document_texts, read_documents
    from ..data.pairs import read_pairs
    from ..trainer.data import TrainingData

    data = parsed.data
    if not data.train_data:
        raise UserError("--train_data expects a file, a BEIR folder or a Hub dataset id, got nothing: name one")
    names = ("split", "query_column", "positive_column", "negative_column", "streaming", "limit")
    options = {name: getattr(data, name) for name in names}
    sources = [read_pairs(source, **options) for source in data.train_data]
    facts = {"train": [source_name(source) for source in data.train_data], "split": data.split}
    if data.streaming:
        if data.documents:
            raise UserError("--documents are for pairs that are known before training, got --streaming: leave one out")
        if parsed.model.freeze_base and parsed.training.feature_cache:
            raise UserError("--streaming trains from tokens, not from cached features: add --no_feature_cache")
        return TrainingData.of_stream(sources, parsed.held_out_pairs(), parsed.training, facts)
    read = TrainingData.of_pairs(concatenate_datasets(sources), parsed.held_out_pairs(), parsed.training, facts)
    if parsed.training.lexical:
        folders = filter(is_beir_folder, data.train_data)
        collection = [text for folder in folders for text in document_texts(read_documents(folder))]
        read = replace(read, collection=collection)
    if not data.documents:
        return read
    return read.starting_from(document_texts(read_documents(data.documents, unique_ids=False)))
