"""Pairs of a query and a document that answers it, with optional negatives.

Every reader of training data ends in the same three columns: query, positive (texts) and negative (a
list of texts, often empty).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .beir_folder import load_beir_folder
from .documents import check_limit, is_beir_folder, text_digest
from .rows import Row
from .sources import Source, build_table, open_source

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairAudit:
    """What a set of pairs consists of, in numbers of rows unless said otherwise.

    Attributes:
        rows: All rows.
        distinct_queries: Different query texts.
        distinct_positives: Different positive texts; fewer than rows means that other rows' positives
            can be false negatives in a batch.
        query_is_positive: Rows whose query equals their positive, which teach nothing.
        duplicate_rows: Rows whose query and positive both came before, together.
        negatives: Negative texts over all rows.
    """

    rows: int
    distinct_queries: int
    distinct_positives: int
    query_is_positive: int
    duplicate_rows: int
    negatives: int

    def __str__(self) -> str:
        return (
            f"{self.rows} pairs, {self.distinct_queries} distinct queries, "
            f"{self.distinct_positives} distinct positives, {self.query_is_positive} with query equal to positive, "
            f"{self.duplicate_rows} exact duplicates, {self.negatives} negatives"
        )


def pair_features() -> Features:
    """Return the columns that every reader of pairs gives: query, positive, negative."""
    import datasets

    text = datasets.Value("string")
    return datasets.Features({"query": text, "positive": text, "negative": datasets.List(text)})


def read_pairs(
    source: str | os.PathLike[str],
    *,
    split: str = "train",
    query_column: str = "query",
    positive_column: str = "positive",
    negative_column: str = "negative",
    streaming: bool = False,
    limit: int | None = None,
) -> Dataset | IterableDataset:
    """Read pairs, every row checked.

    Args:
        source: A file, a folder of files of one kind, a Hub id `org/name`, or a BEIR folder, whose
            relevant judgements (score above 0) of `split` become pairs.
        split: Part of a Hub dataset, folder, or BEIR folder.
        query_column: Column with the query.
        positive_column: Column with the document that answers it.
        negative_column: Column with a document, or a list of documents, that do not; may be absent or
            empty, but a name other than "negative" has to be in some row (not checked when streaming).
            A BEIR folder gives none.
        streaming: Return an `IterableDataset`, which reads and checks while it is walked through.
        limit: Read only so many rows (BEIR: pairs); None reads all.

    Returns:
        A dataset with the columns `query`, `positive` (strings) and `negative` (list of strings).

    Raises:
        UserError: If the source cannot be read, a text is missing, blank or not a text (the message names
            file, line or row, and field), or no row has the named column of negatives.

    Example:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp(), "pairs.jsonl")
        >>> _ = file.write_text('{"query": "who?", "positive": "she", "negative": "he"}')
        >>> read_pairs(file)[0]
        {'query': 'who?', 'positive': 'she', 'negative': ['he']}
    """
    check_limit(limit)
    if is_beir_folder(source):
        pairs = list(islice(_beir_pairs(os.fspath(source), split), limit))
        return build_table(_without_rows, (tuple(pairs),), pair_features(), streaming=streaming)
    opened = open_source(source, split=split, streaming=streaming or limit is not None)
    columns = (query_column, positive_column, negative_column)
    # A stream would tell only at its end, when training is over.
    is_named = negative_column != "negative" and not streaming
    return build_table(_checked_pairs, (opened, columns, limit, is_named), pair_features(), streaming=streaming)


def audit_pairs(pairs: Dataset) -> PairAudit:
    """Count what a set of pairs holds.

    Args:
        pairs: Columns query, positive, negative.

    Returns:
        The counts; about 100 bytes of memory per row are needed to find repetitions.
    """
    queries: set[bytes] = set()
    positives: set[bytes] = set()
    rows: set[bytes] = set()
    count = same = negatives = 0
    for row in pairs:
        query, positive = row["query"], row["positive"]
        queries.add(text_digest(query))
        positives.add(text_digest(positive))
        rows.add(text_digest(query, positive))
        count += 1
        same += query == positive
        negatives += len(row["negative"])
    return PairAudit(count, len(queries), len(positives), same, count - len(rows), negatives)


def drop_duplicate_rows(pairs: Dataset) -> tuple[Dataset, int]:
    """Keep the first row of each query-and-positive.

    Args:
        pairs: Columns query, positive, negative.

    Returns:
        The rows that stay, in their order, and how many were dropped.
    """
    seen: set[bytes] = set()
    kept = []
    for index, row in enumerate(pairs.select_columns(["query", "positive"])):
        digest = text_digest(row["query"], row["positive"])
        if digest not in seen:
            seen.add(digest)
            kept.append(index)
    return pairs.select(kept), len(pairs) - len(kept)


def _checked_pairs(
    opened: Source, columns: tuple[str, str, str], limit: int | None, is_negative_named: bool
) -> Iterator[tuple[Row, dict[str, Any]]]:
    query_column, positive_column, negative_column = columns
    present: dict[str, None] = {}
    for row in islice(opened.rows(), limit):
        present.update(dict.fromkeys(row.fields))
        pair = {
            "query": row.text(query_column),
            "positive": row.text(positive_column),
            "negative": _negatives(row, negative_column),
        }
        yield row, pair
    if is_negative_named and present and negative_column not in present:
        raise UserError(
            f"{opened.name}: expected the column {negative_column!r} with negatives, got only the columns "
            f"{', '.join(map(repr, list(present)[:12]))}: correct --negative_column, or leave it out"
        )


def _negatives(row: Row, column: str) -> list[str]:
    value = row.fields.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        row.reject(column, "a text, a list of texts that are not blank, or nothing", "correct or remove the row")
    return [row.valid_unicode(column, text) for text in texts]


def _without_rows(pairs: tuple[dict[str, Any], ...]) -> Iterator[tuple[None, dict[str, Any]]]:
    for pair in pairs:
        yield None, pair


def _beir_pairs(folder: str, split: str) -> Iterator[dict[str, Any]]:
    collection = load_beir_folder(folder, split)
    judged = {document for judgements in collection.qrels.values() for document in judgements}
    documents = zip(collection.corpus_ids, collection.corpus_texts, strict=True)
    texts = {identifier: text for identifier, text in documents if identifier in judged}
    absent = kept = 0
    for query_id, judgements in collection.qrels.items():
        for document, score in judgements.items():
            if score > 0 and texts.get(document):
                kept += 1
                yield {"query": collection.queries[query_id], "positive": texts[document], "negative": []}
            elif score > 0:
                absent += 1
    if absent:
        logger.warning("%s: skipped %d judgements to absent or empty documents", folder, absent)
    if not kept:
        raise UserError(
            f"{folder}: expected a relevant judgement of a present document in {split!r}, got none: check it"
        )


def read_xy_pairs(
    source: str | os.PathLike[str],
    *,
    split: str = "train",
    x_column: str = "x",
    y_column: str = "y",
    streaming: bool = False,
    limit: int | None = None,
) -> Dataset | IterableDataset:
    """Read masked pairs, every row checked.

    Args:
        source: A file, a folder of files of one kind, or a Hub id `org/name`.
        split: Part of a Hub dataset or folder.
        x_column: Column with the original text.
        y_column: Column with the masked text.
        streaming: Return an `IterableDataset`, which reads and checks while it is walked through.
        limit: Read only so many rows; None reads all.

    Returns:
        A dataset with the columns `query` (y), `positive` (x) and `negative` (always empty).

    Raises:
        UserError: If the source cannot be read, or a text is missing, blank or not a text.

    Example:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp(), "xy.json")
        >>> _ = file.write_text('[{"x": "a red fox", "y": "a [MASK] fox"}]')
        >>> read_xy_pairs(file)[0]
        {'query': 'a [MASK] fox', 'positive': 'a red fox', 'negative': []}
    """
    check_limit(limit)
    opened = open_source(source, split=split, streaming=streaming or limit is not None)
    return build_table(_checked, (opened, x_column, y_column, limit), pair_features(), streaming=streaming)


def _checked(opened: Source, x_column: str, y_column: str, limit: int | None) -> Iterator[tuple[Row, dict[str, Any]]]:
    unmasked = 0
    for row in islice(opened.rows(), limit):
        original, masked = row.text(x_column), row.text(y_column)
        unmasked += original == masked
        yield row, {"query": masked, "positive": original, "negative": []}
    if unmasked:
        logger.warning("%s: %d rows have the same text in %r and %r", opened.name, unmasked, x_column, y_column)
