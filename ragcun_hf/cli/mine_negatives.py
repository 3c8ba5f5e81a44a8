"""Add hard negatives to pairs: documents that the encoder ranks high for a query, but that do not answer it.

    python training/mine_negatives.py --train_data pairs.jsonl --corpus documents.jsonl --output mined.jsonl

The output is a file for train_contrastive.py. Features are cached, so training encodes nothing again.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..command_line import argument, parse_arguments, quiet_libraries, say
from ..data.writing import refuse_existing, write_json_rows
from ..errors import UserError
from ..features.arguments import FeatureArguments
from ..model.arguments import BaseArguments
from ..model.base_models import DEFAULT_BASE_MODEL


@dataclass
class MiningArguments(BaseArguments):
    """The pairs, the documents to search, and which of those found become negatives."""

    train_data: list[str] = argument([], "Pairs: one or more files, BEIR folders or Hub dataset ids.")
    corpus: str | None = argument(
        None,
        "Documents to search beside those of the pairs: a file, folder or Hub id. Default: the corpus of every BEIR "
        "folder in --train_data.",
    )
    output: str | None = argument(None, "File to write, ending in .json or .jsonl.")
    overwrite: bool = argument(False, "Replace an existing output.")
    split: str = argument("train", "Split of a Hub dataset, or of the judgements of a BEIR folder.")
    base_model: str = argument(DEFAULT_BASE_MODEL, "The encoder that ranks: Hub id, folder, or the word embedded.")
    model_path: str | None = argument(None, "Instead: a trained model, whose projection ranks.")
    num_negatives: int = argument(1, "Negatives to add per pair.")
    range_min: int = argument(10, "First rank of the candidates, from 0: higher ones often answer the query.")
    range_max: int = argument(100, "Rank after that of the last candidate.")
    relative_margin: float = argument(0.05, "Share by which a candidate must score below the pair's own document.")
    seed: int = argument(42, "Seed of the draw among candidates.")


def main(arguments: list[str] | None = None) -> None:
    """Mine and write."""
    args, features = parse_arguments(
        [MiningArguments, FeatureArguments], description=__doc__ or "", arguments=arguments
    )
    if not args.train_data or not args.output:
        raise UserError("expected --train_data and --output, got one or none: name both")
    refuse_existing(args.output, overwrite=args.overwrite)
    quiet_libraries()
    from accelerate import PartialState
    from datasets import concatenate_datasets

    from ..data.pairs import drop_duplicate_rows, read_pairs
    from ..features.hard_negatives import mine_hard_negatives
    from ..model.base_models import load_base_model, load_trained_model

    fields = args.base_fields(beside=args.model_path)
    sources = [read_pairs(source, split=args.split) for source in args.train_data]
    pairs, _ = drop_duplicate_rows(concatenate_datasets(sources))
    corpus = _documents_to_search(args)
    model = load_trained_model(args.model_path) if args.model_path else load_base_model(args.base_model, **fields)
    if not args.model_path:  # an encoder ranks as its makers let it
        model.config.similarity_fn_name = model.config.encoder_similarity
    model.to(PartialState().device)  # the features are cached for the device where training needs them
    store = features.store(model)
    names = ("num_negatives", "range_min", "range_max", "relative_margin", "seed")
    mined = mine_hard_negatives(pairs, corpus, model, store, **{name: getattr(args, name) for name in names})
    say(store.summary())
    write_json_rows((dict(row) for row in mined), args.output)
    num_added = sum(map(len, mined["negative"])) - sum(map(len, pairs["negative"]))
    say(f"Added {num_added:,} negatives to {len(pairs):,} pairs: wrote {args.output}.")


def _documents_to_search(args: MiningArguments) -> list[str]:
    """Read the documents besides those of the pairs, and say what is searched."""
    from ..data.documents import document_texts, is_beir_folder, read_documents

    sources = [args.corpus] if args.corpus else [*filter(is_beir_folder, args.train_data)]
    texts = [text for source in sources for text in document_texts(read_documents(source, unique_ids=False))]
    if sources:
        say(f"Searching the {len(texts):,} documents of {', '.join(sources)}, and those of the pairs.")
    else:
        say("Searching only the documents of the pairs: name all documents with --corpus.")
    return texts
