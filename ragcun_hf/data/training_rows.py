"""Training rows of three kinds: those of a table, those drawn from documents anew each epoch, and streamed ones.

Every row is `{"query": text, "positive": text, "negative": list of texts}`.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from .documents import text_digest

TrainingRow = Mapping[str, Any]


class TrainingRows(Protocol):
    """Rows to train on: `TableRows`, `DocumentRows`, or the `ShuffledStream` of `ragcun_hf.data.stream`."""

    @property
    def num_rows(self) -> int | None:
        """Rows of an epoch; None for a stream."""

    @property
    def stream_order(self) -> dict[str, int] | None:
        """The arguments that decide the order of a stream; None for other rows."""

    @property
    def documents(self) -> Sequence[str]:
        """The whole documents that training sees; none for a stream, which is read only once."""

    def known_pairs(self) -> tuple[list[str], list[str]] | None:
        """Return the queries and the documents of all rows, or None if another epoch has other rows."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to read, from 0."""

    def __iter__(self) -> Iterator[TrainingRow]: ...


class _IndexedRows(ABC):
    """A map-style dataset of rows, for `torch.utils.data.DataLoader`."""

    stream_order = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> TrainingRow: ...

    def __iter__(self) -> Iterator[TrainingRow]:
        return (self[index] for index in range(len(self)))

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return len(self)


class TableRows(_IndexedRows):
    """The rows of a list or a `datasets.Dataset`, the same in every epoch; a row may lack `negative`."""

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
        """The documents of all rows, negatives included."""
        _, positives, negatives = read_columns(self)
        return [*positives, *(text for texts in negatives for text in texts)]

    def known_pairs(self) -> tuple[list[str], list[str]]:
        """Return the queries and the documents of all rows."""
        return read_columns(self)[:2]

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: all epochs have the same rows."""


class DocumentRows(_IndexedRows):
    """Rows made of parts of documents; the base class of datasets that draw the parts anew each epoch.

    By default there is one row for each of the whole `documents`.
    """

    def __init__(self, documents: Sequence[str], seed: int = 0) -> None:
        self.documents, self.seed, self.epoch = documents, seed, 0

    def __len__(self) -> int:
        return len(self.documents)

    def known_pairs(self) -> None:
        """Return None: another epoch has other rows."""

    def set_epoch(self, epoch: int) -> None:
        """Draw anew; call this before each epoch (a loader's persistent workers do not notice it)."""
        self.epoch = epoch

    def generator(self, index: int) -> random.Random:
        """Return the random generator of one document in the current epoch."""
        return document_generator(self.seed, self.epoch, index if index >= 0 else index + len(self))


def document_generator(seed: int, epoch: int, index: int) -> random.Random:
    """Return the random generator of one document in one epoch, the same in every process and Python version."""
    return random.Random(f"{seed}/{epoch}/{index}")  # strings are seeded through SHA-512, not `hash`


def read_columns(rows: TrainingRows) -> tuple[list[str], list[str], list[list[str]]]:
    """Return the queries, the documents and the negatives of all rows of the current epoch."""
    read = list(rows)
    return (
        [row["query"] for row in read],
        [row["positive"] for row in read],
        [list(row.get("negative") or []) for row in read],
    )


def rows_digest(rows: TrainingRows) -> str:
    """Return a checksum of all texts in their order, as 32 hexadecimal digits."""
    queries, positives, negatives = read_columns(rows)
    flat_negatives = [part for texts in negatives for part in (str(len(texts)), *texts)]
    return text_digest(*(text_digest(*column).hex() for column in (queries, positives, flat_negatives))).hex()
