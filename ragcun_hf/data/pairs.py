"""Read pairs: the columns query, positive (a document that answers it) and negative (a list, often empty)."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import UserError
from .beir_folder import load_beir_folder
from .documents import is_beir_folder, text_digest
from .rows import Row, name_unused_columns, warn_once
from .sources import Source, build_table, check_limit, open_source

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

logger = logging.getLogger(__name__)


def pair_features() -> Features:
    """Return the columns that every reader of pairs returns."""
    import datasets

    text = datasets.Value("string")
    return datasets.Features({"query": text, "positive": text, "negative": datasets.List(text)})


def read_pairs(
    source: Any,
    *,
    split: str = "train",
    query_column: str = "query",
    positive_column: str = "positive",
    negative_column: str = "negative",
    streaming: bool = False,
    limit: int | None = None,
    name: str = "the dataset",
) -> Dataset | IterableDataset:
    """Read pairs, check every row, and return the columns `query`, `positive` and `negative`.

    The source is a file, a folder of files of one kind, a Hub dataset `org/name`, a dataset or list of rows (which
    messages call `name`), or a BEIR folder, whose relevant judgements (score above 0) of `split` become pairs without
    negatives. The column of negatives holds a document or a list of documents; further ones can be in `negative_1`,
    `negative_2` and so on. It may be missing or empty, but if another name than "negative" is given, some row must
    have it (not checked when streaming). `limit` is the number of rows to read, or of pairs from a BEIR folder.

    Where `positive` is missing, `pos` and `neg` are read, each a list, as in the files of FlagEmbedding. With a column
    `label` or `score`, whose values are 0 and 1, only documents with 1 become pairs; those with 0 are negatives of a
    pair of the same query in the row before or above them.

    A source that cannot be read and a query or document that is missing, blank or not a text are a UserError.

    >>> import pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp(), "pairs.jsonl")
    >>> _ = file.write_text('{"query": "who?", "positive": "she", "negative": "he"}')
    >>> read_pairs(file)[0]
    {'query': 'who?', 'positive': 'she', 'negative': ['he']}
    """
    if isinstance(source, (str, os.PathLike)) and is_beir_folder(source):
        check_limit(limit)
        pairs = tuple(islice(_beir_pairs(os.fspath(source), split), limit))
        return build_table(_known_pairs, pair_features(), streaming=streaming, pairs=pairs)
    return build_table(
        _checked_pairs,
        pair_features(),
        streaming=streaming,
        opened=open_source(source, split=split, streaming=streaming, limit=limit, name=name),
        columns=(query_column, positive_column, negative_column),
        # A stream would notice a missing column only at its end, when training is over.
        must_have_negatives=negative_column != "negative" and not streaming,
    )


def _known_pairs(pairs: tuple[dict[str, Any], ...]) -> Iterator[dict[str, Any]]:
    yield from pairs


def _beir_pairs(folder: str, split: str) -> Iterator[dict[str, Any]]:
    collection = load_beir_folder(folder, split)
    judged = {document for judgements in collection.qrels.values() for document in judgements}
    documents = zip(collection.corpus_ids, collection.corpus_texts, strict=True)
    texts = {identifier: text for identifier, text in documents if identifier in judged}
    num_absent = num_kept = 0
    for query_id, judgements in collection.qrels.items():
        for document, score in judgements.items():
            if score > 0 and texts.get(document):
                num_kept += 1
                yield {"query": collection.queries[query_id], "positive": texts[document], "negative": []}
            elif score > 0:
                num_absent += 1
    if num_absent:
        logger.warning("%s: skipped %d judgements of missing or empty documents", folder, num_absent)
    if not num_kept:
        raise UserError(
            f"{folder}: expected a relevant judgement of a document in the corpus in {split!r}, got none: check it"
        )


_LABELS = ("label", "labels", "score")
_OTHER_NAMES = {"positive": "pos", "negative": "neg"}  # of the files of FlagEmbedding


class _JudgedRow(NamedTuple):
    """The documents of one row: those that answer its query, those labelled 0, and those named as negatives."""

    query: str
    answers: list[str]
    others: list[str]
    negatives: list[str]


def _checked_pairs(
    opened: Source, columns: tuple[str, str, str], must_have_negatives: bool
) -> Iterator[dict[str, Any]]:
    present: dict[str, None] = {}
    yield from _joined_pairs(_judged_rows(opened, columns, present), opened.name)
    if must_have_negatives and present and columns[2] not in present:
        raise UserError(
            f"{opened.name}: expected the column {columns[2]!r} with negatives, got only the columns "
            f"{', '.join(map(repr, list(present)[:12]))}: correct --negative_column, or leave it out"
        )


def _judged_rows(opened: Source, columns: tuple[str, str, str], present: dict[str, None]) -> Iterator[_JudgedRow]:
    """Read the documents of every row, and add the names of its columns to `present`."""
    names = {*columns, *_LABELS, *_OTHER_NAMES.values()}
    numbered = re.compile(re.escape(columns[2]) + r"_\d+")

    def is_read(name: str) -> bool:
        return name in names or numbered.fullmatch(name) is not None

    for row in opened.rows(is_read):
        if not present:
            advice = "If they are meant, name them with --query_column, --positive_column and --negative_column."
            name_unused_columns(row, is_read, advice)
        present.update(dict.fromkeys(row.fields))
        yield _judged_row(row, columns)


def _judged_row(row: Row, columns: tuple[str, str, str]) -> _JudgedRow:
    query = row.text(columns[0])
    positive, negative = (_name_in(row, column) for column in columns[1:])
    is_list = isinstance(row.fields.get(positive), list)
    documents = _texts(row, positive) if is_list else [row.text(positive)]
    if not documents:
        row.reject(positive, "a text, or a list with at least one", "correct or remove the row")
    negatives = _negatives(row, negative)
    named = [name for name in _LABELS if name not in columns]  # a user's own text column may be called so
    labels = _labels(row, named, len(documents) if is_list else None, is_score_of_pair=not negatives)
    answers = [text for text, label in zip(documents, labels, strict=True) if label]
    others = [text for text, label in zip(documents, labels, strict=True) if not label]
    return _JudgedRow(query, answers, others, negatives)


def _name_in(row: Row, column: str) -> str:
    other = _OTHER_NAMES.get(column)
    return other if other in row.fields and column not in row.fields else column


def _labels(row: Row, names: Sequence[str], num_documents: int | None, *, is_score_of_pair: bool) -> list[bool]:
    """Return for each document of a row whether it answers the query; `num_documents` is None if it is no list."""
    for name in names:
        value: Any = row.fields.get(name)
        value = value.tolist() if hasattr(value, "tolist") else value  # of a dataset in torch's or NumPy's format
        # Beside negatives, and in a list beside one document, `score` has the similarities of a search for negatives.
        is_of_search = name == "score" and (
            not is_score_of_pair or (isinstance(value, list) and num_documents is None)
        )
        if value is None or is_of_search:
            continue
        labels = value if isinstance(value, list) else [value]
        known = [_LABEL_VALUES.get(str(label).strip().lower()) for label in labels]
        if None in known or len(known) != (num_documents or 1):
            row.reject(
                name,
                "1 for each document that answers its query and 0 for others",
                "keep the rows with such pairs, and leave the column out",
            )
        return [bool(label) for label in known]
    return [True] * (num_documents or 1)


_LABEL_VALUES = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}


def _joined_pairs(rows: Iterable[_JudgedRow], name: str) -> Iterator[dict[str, Any]]:
    """Yield a pair for each answer; documents labelled 0 are negatives of the last pair, if it has their query."""
    pair: dict[str, Any] | None = None
    num_left_out = num_rows = 0
    for row in rows:
        num_rows += 1
        for answer in row.answers:
            if pair is not None:
                yield pair
            pair = {"query": row.query, "positive": answer, "negative": [*row.negatives]}
        if pair is not None and pair["query"] == row.query:
            pair["negative"] += row.others
        else:
            num_left_out += len(row.others)
    if num_rows and pair is None:
        raise UserError(f"{name}: expected a document with the label 1, got {num_left_out} with 0: add pairs")
    if pair is not None:
        yield pair
    if num_left_out:
        warn_once(
            f"{name}: left out {num_left_out} documents with the label 0 that do not stand below a pair of their query"
        )


def _negatives(row: Row, column: str) -> list[str]:
    numbered = re.compile(re.escape(column) + r"_\d+")
    names = (column, *(each for each in row.fields if numbered.fullmatch(each)))
    return [text for name in names for text in _texts(row, name)]


def _texts(row: Row, name: str) -> list[str]:
    """Return the texts of a field that holds one, a list of them, or nothing."""
    value = row.fields.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        row.reject(name, "a text, a list of texts that are not blank, or nothing", "correct or remove the row")
    return [row.valid_unicode(name, text) for text in texts]


def read_xy_pairs(
    source: str | os.PathLike[str],
    *,
    split: str = "train",
    x_column: str = "x",
    y_column: str = "y",
    streaming: bool = False,
    limit: int | None = None,
) -> Dataset | IterableDataset:
    """Read masked pairs: the masked text (`y_column`) becomes the query, the original (`x_column`) the positive.

    The other arguments, the result and the errors are those of `read_pairs`; a BEIR folder has no masked texts.
    """
    opened = open_source(source, split=split, streaming=streaming, limit=limit)
    columns = (x_column, y_column)
    return build_table(_checked_xy_pairs, pair_features(), streaming=streaming, opened=opened, columns=columns)


def _checked_xy_pairs(opened: Source, columns: tuple[str, str]) -> Iterator[dict[str, Any]]:
    x_column, y_column = columns
    num_unmasked = 0
    for row in opened.rows():
        original, masked = row.text(x_column), row.text(y_column)
        num_unmasked += original == masked
        yield {"query": masked, "positive": original, "negative": []}
    if num_unmasked:
        logger.warning("%s: %d rows have the same text in %r and %r", opened.name, num_unmasked, x_column, y_column)


@dataclass(frozen=True)
class PairAudit:
    """Counts over a table of pairs."""

    rows: int
    distinct_queries: int
    distinct_positives: int  # fewer than rows: positives of other rows can be false negatives in a batch
    query_is_positive: int  # rows whose two texts are equal, which teach nothing
    duplicate_rows: int  # rows whose query and positive both occur in an earlier row
    negatives: int  # over all rows

    def __str__(self) -> str:
        return (
            f"{self.rows} pairs, {self.distinct_queries} distinct queries, "
            f"{self.distinct_positives} distinct positives, {self.query_is_positive} with query equal to positive, "
            f"{self.duplicate_rows} exact duplicates, {self.negatives} negatives"
        )


def audit_pairs(pairs: Dataset) -> PairAudit:
    """Count what a table of pairs contains; needs about 100 bytes of memory per row."""
    queries: set[bytes] = set()
    positives: set[bytes] = set()
    rows: set[bytes] = set()
    num_rows = num_same = num_negatives = 0
    for row in pairs:
        query, positive = row["query"], row["positive"]
        queries.add(text_digest(query))
        positives.add(text_digest(positive))
        rows.add(text_digest(query, positive))
        num_rows += 1
        num_same += query == positive
        num_negatives += len(row["negative"])
    return PairAudit(num_rows, len(queries), len(positives), num_same, num_rows - len(rows), num_negatives)


def drop_duplicate_rows(pairs: Dataset) -> tuple[Dataset, int]:
    """Keep the first row of each (query, positive), with the negatives of all such rows.

    Returns the kept rows, in order, and the number of dropped rows.
    """
    places: dict[bytes, int] = {}
    kept: list[int] = []
    more: dict[int, list[str]] = {}
    for index, row in enumerate(pairs):
        digest = text_digest(row["query"], row["positive"])
        if digest not in places:
            places[digest] = len(kept)
            kept.append(index)
        elif row["negative"]:
            more.setdefault(places[digest], []).extend(row["negative"])
    distinct = pairs.select(kept)
    if more:
        options: dict[str, Any] = {"with_indices": True, "input_columns": "negative", "fn_kwargs": {"more": more}}
        distinct = distinct.map(_with_more_negatives, features=pair_features(), **options)
    return distinct, len(pairs) - len(kept)


def _with_more_negatives(negatives: list[str], index: int, more: dict[int, list[str]]) -> dict[str, list[str]]:
    return {"negative": [*dict.fromkeys([*negatives, *more.get(index, [])])]}
