"""What a run trains on: rows for training and for validation, whatever form the user's data have."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

from ..data.documents import document_texts, read_documents
from ..data.held_out import drop_validation_negatives, hold_out_pairs, hold_out_texts, usable_texts
from ..data.pairs import audit_pairs, drop_duplicate_rows, read_pairs
from ..data.pseudo_queries import PseudoQueryKind
from ..data.splitting import SplitViews
from ..data.stream import ShuffledStream, interleave
from ..data.training_rows import DocumentRows, TableRows, TrainingRows
from ..errors import UserError
from ..sweep.automatic import AutomaticData

if TYPE_CHECKING:
    from ..objective.arguments import IsotropicGaussianTrainingArguments

logger = logging.getLogger(__name__)

DRAWN: Mapping[PseudoQueryKind, int] = {
    "sentence": 3,
    "span": 2,
    "keywords": 2,
}  # pseudo-queries of a document, by kind


@dataclass(frozen=True)
class TrainingData:
    """Rows of a run."""

    train: TrainingRows
    validation: TrainingRows | None = None
    corpus: tuple[str, ...] = ()  # documents that validation searches besides its own
    documents: tuple[str, ...] = ()  # without labels, beside pairs: they give the head its start
    collection: Sequence[str] = ()  # all documents of the pairs' collection, if they are known, for a lexical half
    facts: dict[str, Any] = field(default_factory=dict)  # what the record says of the data
    automatic: AutomaticData | None = None  # of a run that chooses its settings

    @classmethod
    def of_datasets(
        cls, train: Any, validation: Any, corpus: Any, args: IsotropicGaussianTrainingArguments
    ) -> TrainingData:
        """Check datasets and take them, whatever their form; a wrong column, type or row is a UserError.

        `train` and `validation` are each a `Dataset`, an `IterableDataset` or a list of rows, or a dictionary of
        several. Rows have a `query`, a `positive` and optionally a `negative` or `negative_1`, `negative_2` and so
        on. Training rows with only a `text` are documents without labels. `corpus` is like the latter, or strings.
        """
        from datasets import IterableDataset

        sources = _sources(train, "train_dataset")
        if validation is not None and args.val_fraction:
            raise UserError("expected either an eval_dataset or a --val_fraction, got both: give one of them")
        held_out = None if validation is None else read_held_out(validation)
        facts = {"train": list(sources)}
        without_labels = {name: source for name, source in sources.items() if _has_only_texts(source)}
        of_pairs = {name: source for name, source in sources.items() if name not in without_labels}
        are_streams = {isinstance(source, IterableDataset) for source in of_pairs.values()}
        if not of_pairs:
            tables = [read_documents(source, name=name, unique_ids=False) for name, source in sources.items()]
            data = cls.of_documents(_joined(tables), held_out, args, facts)
        elif are_streams == {True} and not without_labels:
            streams = [read_pairs(source, name=name, streaming=True) for name, source in of_pairs.items()]
            data = cls.of_stream(streams, held_out, args, facts)
        elif True in are_streams:
            raise UserError("train_dataset: expected only streams or none, got both: leave one kind out")
        else:
            pairs = [read_pairs(source, name=name) for name, source in of_pairs.items()]
            data = cls.of_pairs(_joined(pairs), held_out, args, facts).starting_from(_texts(without_labels))
        return data if corpus is None else data.with_corpus(_texts(_sources(corpus, "corpus")), args)

    @classmethod
    def of_pairs(
        cls, pairs: Any, held_out: Any, args: IsotropicGaussianTrainingArguments, facts: dict[str, Any]
    ) -> Self:
        """Take a table of pairs, without duplicates; without a held-out table, hold out `args.val_fraction`."""
        pairs, num_dropped = drop_duplicate_rows(pairs)
        train, validation = hold_out_pairs(pairs, held_out, val_fraction=args.val_fraction, seed=args.seed)
        counts = {"duplicate_rows_dropped": num_dropped, "validation_rows": len(validation or ())}
        audit = audit_pairs(train)
        if audit.distinct_queries < 2 or audit.distinct_positives < 2:
            logger.warning(
                "The training pairs have %d distinct queries and %d distinct positives: no row's document is a "
                "negative for another row, and without hard negatives (there are %d) the contrastive term is 0.",
                *(audit.distinct_queries, audit.distinct_positives, audit.negatives),
            )
        return cls(TableRows(train), _table_rows(validation), facts={**facts, **vars(audit), **counts})

    @classmethod
    def of_stream(
        cls, streams: list[Any], held_out: Any, args: IsotropicGaussianTrainingArguments, facts: dict[str, Any]
    ) -> Self:
        """Take streams of pairs, which take turns and are read during training."""
        for name in ("dataloader_num_workers", "auto_find_batch_size", "restore_callback_states_from_checkpoint"):
            if getattr(args, name):
                raise UserError(f"a stream is read in the process that trains and counts its rows: leave --{name} out")
        if args.max_steps <= 0:
            raise UserError("a stream needs --max_steps, as its length is not known: add it")
        if args.val_fraction > 0:
            raise UserError("a stream cannot hold out a --val_fraction: name validation data, or leave it out")
        rows = interleave(streams)
        if held_out is not None:
            rows = drop_validation_negatives(rows, held_out)
        stream = ShuffledStream(rows, buffer_size=args.shuffle_buffer_size, seed=args.seed)
        return cls(stream, _table_rows(held_out), facts={**facts, "streamed": True})

    @classmethod
    def of_documents(
        cls,
        documents: Any,
        held_out: Any,
        args: IsotropicGaussianTrainingArguments,
        facts: dict[str, Any],
        *,
        make_rows: Callable[[list[str]], DocumentRows] | None = None,
        drawn: Mapping[PseudoQueryKind, int] = DRAWN,
    ) -> Self:
        """Take documents without labels; rows are made of their parts, by default as `args` say.

        With `args.automatic`, `drawn` counts pseudo-queries of each kind instead.
        """
        texts, counts = usable_texts(documents, name=", ".join(facts["train"]))
        facts = {**facts, **counts}
        if args.automatic:
            if held_out is not None or args.val_fraction:
                raise UserError("--automatic holds documents out itself: leave validation data out")
            automatic = AutomaticData.draw(texts, drawn, seed=args.seed)
            return cls(automatic.rows, facts={**facts, **automatic.facts}, automatic=automatic)
        if make_rows is None:
            facts["split_method"] = args.split_method

            def make_rows(texts: list[str]) -> DocumentRows:
                return SplitViews(texts, args.split_method, args.seed, fraction=args.split_fraction)

        fraction = args.val_fraction if held_out is None else 0.0
        train, validation = hold_out_texts(texts, make_rows, val_fraction=fraction, seed=args.seed)
        return cls(train, validation if held_out is None else TableRows(held_out), facts=facts)

    def starting_from(self, documents: Sequence[str]) -> TrainingData:
        """Let documents without labels give the head its start, and validation search them."""
        if not documents:
            return self
        texts = dict.fromkeys(documents)
        pairs = None if self.validation is None else self.validation.known_pairs()
        held_out = set() if pairs is None else set(pairs[1])
        seen = tuple(text for text in texts if text not in held_out)
        data = replace(self, documents=seen, facts={**self.facts, "documents_without_labels": len(seen)})
        return data if self.validation is None else data.searching(texts)

    def known_documents(self) -> Sequence[str]:
        """Return all distinct documents that the run knows, those of training first; for a stream, those beside it."""
        held_out = () if self.validation is None else self.validation.documents
        known = dict.fromkeys([*self.train.documents, *held_out, *self.documents, *self.corpus])
        if not known and not len(self.collection):
            raise UserError(
                "--lexical expects documents that are known before training, got a stream alone: name them with "
                "--val_corpus (in Python: corpus=)"
            )
        return list(dict.fromkeys([*known, *self.collection])) if len(self.collection) else list(known)

    def with_corpus(self, corpus: Sequence[str], args: IsotropicGaussianTrainingArguments) -> TrainingData:
        """Let validation search a corpus; without validation, it may serve a lexical half alone."""
        if self.validation is None and args.lexical:
            return replace(self, collection=[*self.collection, *corpus])
        return self.searching(corpus)

    def searching(self, corpus: Iterable[str]) -> TrainingData:
        """Let validation search a whole corpus."""
        if self.validation is None:
            raise UserError("a corpus is searched by validation queries, got none: add them, or --val_fraction")
        return replace(self, corpus=tuple(dict.fromkeys([*self.corpus, *corpus])))


def read_held_out(dataset: Any) -> Any:
    """Check held-out pairs, in any form of a training dataset, and return them as one table."""
    sources = _sources(dataset, "eval_dataset")
    return _joined([read_pairs(source, name=name) for name, source in sources.items()])


def _table_rows(table: Any) -> TableRows | None:
    return None if table is None else TableRows(table)


def _joined(tables: Sequence[Any]) -> Any:
    from datasets import concatenate_datasets

    return concatenate_datasets(list(tables))


def _sources(given: Any, argument: str) -> dict[str, Any]:
    """Return name -> dataset of what was given for an argument, or raise a UserError."""
    import datasets

    if isinstance(given, (datasets.DatasetDict, datasets.IterableDatasetDict)) and len(given) > 1:
        raise UserError(f"{argument}: expected one split, got {', '.join(given)}: name one, e.g. dataset['train']")
    sources = dict(given) if isinstance(given, Mapping) else {argument: given}
    if not sources:
        raise UserError(f"{argument}: expected a dataset, got an empty dictionary: add one")
    for name, source in sources.items():
        if not isinstance(source, (datasets.Dataset, datasets.IterableDataset, list, tuple)):
            raise UserError(
                f"{argument}: expected a Dataset, an IterableDataset or a list of rows, or a dictionary of them, got "
                f"{type(source).__name__}: load files with datasets.load_dataset, and a table with Dataset.from_pandas"
            )
        if not isinstance(source, datasets.IterableDataset) and len(source) == 0:
            raise UserError(f"{name}: expected rows, got an empty dataset: check how it was made")
    return sources


def _texts(sources: Mapping[str, Any]) -> list[str]:
    return [
        text
        for name, source in sources.items()
        for text in document_texts(read_documents(source, name=name, unique_ids=False))
    ]


def _has_only_texts(source: Any) -> bool:
    """Return whether rows are documents without labels; told from the first one."""
    first: Any = next(iter(source), {})
    if not isinstance(first, Mapping):
        return isinstance(first, str)
    return "text" in first and not {"query", "positive", "anchor"} & first.keys()
