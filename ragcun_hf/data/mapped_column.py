"""A column of text on disk, mapped into memory only while it is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

_ROWS_AT_ONCE = 8_192


class MappedColumn(Sequence[str]):
    """A column of Arrow files written by `datasets`. Unlike a table that stays open, it keeps no text in memory."""

    def __init__(self, files: Sequence[str], name: str) -> None:
        self._files, self._name = tuple(files), name
        self._length = len(self._column())

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, rows: int) -> str: ...

    @overload
    def __getitem__(self, rows: slice | Sequence[int]) -> list[str]: ...

    def __getitem__(self, rows: Any) -> Any:
        return self._column()[rows]

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _ROWS_AT_ONCE):
            yield from self[start : start + _ROWS_AT_ONCE]

    def count_empty(self) -> int:
        """Return how many texts are ""; only their lengths are read."""
        import datasets
        import pyarrow.compute

        columns = (datasets.Dataset.from_file(file).data.column(self._name) for file in self._files)
        empty = (pyarrow.compute.equal(pyarrow.compute.binary_length(column), 0) for column in columns)
        return sum(pyarrow.compute.sum(each).as_py() or 0 for each in empty)

    def _column(self) -> Any:
        import datasets

        return datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in self._files])[self._name]


def take(texts: Sequence[str], rows: Sequence[int]) -> list[str]:
    """Return the texts of some rows, in this order; a column on disk is opened once for all of them."""
    if not isinstance(texts, MappedColumn):
        return [texts[row] for row in rows]
    # Consecutive rows are read as a slice, in less than half the time.
    is_run = len(rows) > 0 and list(rows) == list(range(rows[0], rows[0] + len(rows)))
    return texts[rows[0] : rows[0] + len(rows)] if is_run else texts[rows]
