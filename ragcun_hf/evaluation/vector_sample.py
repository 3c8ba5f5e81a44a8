"""The document vectors that the measures of isotropy and the plots look at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .memory_maps import read_far_apart
from .shards import Shard, gather_rows_by_number

_MOST_ROWS = 4_096


def sample_rows(num_documents: int) -> np.ndarray:
    """Return the rows to look at, rising: 4,096 of them, or all where there are fewer."""
    if num_documents <= _MOST_ROWS:
        return np.arange(num_documents)
    return np.sort(np.random.default_rng(0).choice(num_documents, _MOST_ROWS, replace=False, shuffle=False))


class VectorSample:
    """Rows of several data sets, drawn from all their documents together, and from all processes.

    Args:
        shards: This process's documents of each data set, in order.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = list(shards)
        self._starts = np.cumsum([0, *(shard.num_documents for shard in shards)])
        self._chosen = sample_rows(int(self._starts[-1]))
        self._rows: dict[str, list[np.ndarray]] = {}

    def add(self, system: str, documents: np.ndarray) -> None:
        """Keep the sample's rows of a system's vectors of the next data set, those that lie here."""
        rows = self._rows.setdefault(system, [])
        shard = self._shards[len(rows)]
        rows.append(read_far_apart(documents, self._numbers(len(rows)) - self._starts[len(rows)] - shard.start))

    def vectors(self) -> dict[str, np.ndarray]:
        """Return each system's sample, with the rows of all processes, in the order of the data sets."""
        numbers = np.concatenate([self._numbers(dataset) for dataset in range(len(self._shards))])
        return {system: gather_rows_by_number(numbers, np.concatenate(rows)) for system, rows in self._rows.items()}

    def _numbers(self, dataset: int) -> np.ndarray:
        shard, start = self._shards[dataset], self._starts[dataset]
        first, last = np.searchsorted(self._chosen, (start + shard.start, start + shard.stop))
        return self._chosen[first:last]
