"""Where a text's feature lies: sorted digests instead of a dictionary, 24 bytes a text instead of 200."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class DigestIndex:
    """Shard and row of each digest; of a digest that comes several times, any one.

    Digests lie in a few sorted runs. A new shard becomes a run, and runs of like length become one, so that each
    digest is sorted again only as often as their number doubles.

    Example:
        >>> index = DigestIndex()
        >>> index.add(0, b"a" * 16 + b"b" * 16)
        >>> index.add(1, b"c" * 16)
        >>> shards, rows = index.find([b"c" * 16, b"x" * 16, b"b" * 16])
        >>> shards.tolist(), rows.tolist()
        ([1, -1, 0], [0, -1, 1])
    """

    def __init__(self) -> None:
        self._runs: list[_Run] = []

    def add(self, shard: int, digests: bytes) -> None:
        """Take in the digests of a shard in the order of its rows, 16 bytes each, one after the other."""
        halves = _halves(digests)
        rows = np.arange(len(halves), dtype=np.int32)
        self._runs.append(_sorted([_Run(halves, np.full_like(rows, shard), rows)]))
        while len(self._runs) > 1 and len(self._runs[-2].rows) <= 2 * len(self._runs[-1].rows):
            self._runs[-2:] = [_sorted(self._runs[-2:])]

    def __len__(self) -> int:
        if not self._runs:
            return 0
        self._runs = [_sorted(self._runs)]
        halves = self._runs[0].halves
        is_repeated = (halves[1:] == halves[:-1]).all(axis=1)
        return len(halves) - int(is_repeated.sum())

    def find(self, digests: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Return the shard and the row of each digest, -1 where it is in none."""
        wanted = _halves(b"".join(digests))
        shards, rows = np.full(len(wanted), -1), np.full(len(wanted), -1)
        for run in self._runs:
            places = _places(run.halves, wanted)
            is_found = places >= 0
            shards[is_found], rows[is_found] = run.shards[places[is_found]], run.rows[places[is_found]]
        return shards, rows


class _Run(NamedTuple):
    halves: np.ndarray  # (N, 2) of each digest, rising
    shards: np.ndarray  # (N,)
    rows: np.ndarray  # (N,)


def _sorted(runs: Sequence[_Run]) -> _Run:
    """Make one run of several."""
    halves, shards, rows = (np.concatenate(column) for column in zip(*runs, strict=True))
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    return _Run(halves[order], shards[order], rows[order])


def _places(halves: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the place of each wanted digest among sorted ones, -1 where it is not among them."""
    found = np.full(len(wanted), -1)
    if not len(halves):
        return found
    places = np.searchsorted(halves[:, 0], wanted[:, 0])
    is_open = np.ones(len(wanted), dtype=bool)
    # One round, but for digests whose first halves agree.
    while is_open.any():
        is_open &= places < len(halves)
        candidates = halves[np.where(is_open, places, 0)]
        is_open &= candidates[:, 0] == wanted[:, 0]
        is_match = is_open & (candidates[:, 1] == wanted[:, 1])
        found[is_match] = places[is_match]
        is_open &= ~is_match
        places += 1
    return found


def _halves(digests: bytes) -> np.ndarray:
    return np.frombuffer(digests, dtype="<u8").reshape(-1, 2)
