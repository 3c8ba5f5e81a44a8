"""Training rows of three kinds: known before training, drawn anew each epoch, or streamed.

Every row is `{"query": text, "positive": text, "negative": list of texts}`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from .documents import text_digest

TrainingRow = Mapping[str, Any]


class TrainingRows(Protocol):
    """Rows to train on: `KnownRows`, `DrawnRows`, or the `ShuffledStream` of `ragcun_hf.data.stream`."""

    @property
    def num_rows(self) -> int | None:
        """Rows of an epoch; None for a stream."""

    @property
    def stream_order(self) -> dict[str, int] | None:
        """The arguments that decide the order of a stream; None for other rows."""

    @property
    def documents(self) -> Sequence[str]:
        """The whole documents that training sees; none for a stream, which is not read a second time."""

    def known_pairs(self) -> tuple[list[str], list[str]] | None:
        """Return the queries and the documents of all rows, or None if another epoch has other rows."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to read, from 0."""

    def __iter__(self) -> Iterator[TrainingRow]: ...


class _CountedRows:
    """Rows that can be read one by one; a map-style dataset for `torch.utils.data.DataLoader`."""

    stream_order = None

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> TrainingRow:
        raise NotImplementedError

    def __iter__(self) -> Iterator[TrainingRow]:
        return (self[index] for index in range(len(self)))

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return len(self)


class KnownRows(_CountedRows):
    """The rows of a table, the same in every epoch.

    Args:
        table: A list of rows or a `datasets.Dataset`; a row may lack `negative`.
    """

    def __init__(self, table: Any) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> TrainingRow:
        return self._table[index]

    def __iter__(self) -> Iterator[TrainingRow]:
        return iter(self._table)

    @property
    def documents(self) -> list[str]:
        """The documents of all rows; a document seen as a negative is a document seen."""
        _, positives, negatives = columns(self)
        return [*positives, *(text for texts in negatives for text in texts)]

    def known_pairs(self) -> tuple[list[str], list[str]]:
        """Return the queries and the documents of all rows."""
        return columns(self)[:2]

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: all epochs have the same rows."""


class DrawnRows(_CountedRows):
    """Rows made of documents, drawn anew each epoch; the base class of `MaskedViews` and others.

    Attributes:
        documents: The whole documents, of which rows show parts.
    """

    documents: Sequence[str]

    def known_pairs(self) -> None:
        """Return None: another epoch has other rows."""

    def set_epoch(self, epoch: int) -> None:
        """Draw anew; the base class keeps its rows."""


def columns(rows: TrainingRows) -> tuple[list[str], list[str], list[list[str]]]:
    """Return the queries, the documents and the negatives of all rows of the current epoch."""
    read = list(rows)
    return (
        [row["query"] for row in read],
        [row["positive"] for row in read],
        [list(row.get("negative") or []) for row in read],
    )


def rows_digest(rows: TrainingRows) -> str:
    """Return a checksum of all texts in their order, as 32 hexadecimal digits."""
    queries, positives, negatives = columns(rows)
    flat_negatives = [part for texts in negatives for part in (str(len(texts)), *texts)]
    return text_digest(*(text_digest(*column).hex() for column in (queries, positives, flat_negatives))).hex()
