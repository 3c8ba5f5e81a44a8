"""Where a text's feature lies: sorted digests instead of a dictionary, 24 bytes a text instead of 200."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class DigestIndex:
    """Shard and row of each digest.

    Digests lie in a few sorted runs, each in one of them. The new ones of a shard become a run, and runs of like
    length are merged, so that each digest moves only as often as their number doubles. A merge takes 13 bytes a
    digest on top, for as long as it lasts.

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
        self._precedences: dict[int, int] = {}

    def add(self, shard: int, digests: bytes, *, precedence: int = 0) -> None:
        """Take in the digests of a shard.

        Args:
            shard: Its number.
            digests: In the order of its rows, 16 bytes each, one after the other.
            precedence: Of a digest in several shards, the one with the least is found, in whatever order they come.
        """
        self._precedences[shard] = precedence
        run = _sorted_run(shard, digests)
        for known in self._runs:
            places = _places(known, run.firsts, run.seconds)
            is_known = places >= 0
            if is_known.any():
                self._prefer(known, places[is_known], _Run(*(column[is_known] for column in run)))
                run = _Run(*(column[~is_known] for column in run))
        if not len(run.rows):
            return
        self._runs.append(run)
        while len(self._runs) > 1 and len(self._runs[-2].rows) <= 2 * len(self._runs[-1].rows):
            columns = [list(self._runs.pop(-2)), list(self._runs.pop())]
            self._runs.append(_merged(*columns))

    def __len__(self) -> int:
        return sum(len(run.rows) for run in self._runs)

    def find(self, digests: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Return the shard and the row of each digest, -1 where it is in none."""
        firsts, seconds = _halves(b"".join(digests))
        shards, rows = np.full(len(firsts), -1), np.full(len(firsts), -1)
        for run in self._runs:
            places = _places(run, firsts, seconds)
            is_found = places >= 0
            shards[is_found], rows[is_found] = run.shards[places[is_found]], run.rows[places[is_found]]
        return shards, rows

    def _prefer(self, known: _Run, places: np.ndarray, run: _Run) -> None:
        """Point to the new shard where what the places point to comes after it."""
        later = [self._precedences[shard] > self._precedences[int(run.shards[0])] for shard in known.shards[places]]
        known.shards[places[later]], known.rows[places[later]] = run.shards[later], run.rows[later]


def first_rows(digests: Sequence[bytes]) -> np.ndarray:
    """Return the rows at which a digest comes for the first time, rising, int32."""
    rows = _sorted_run(0, b"".join(digests)).rows
    rows.sort()
    return rows


class _Run(NamedTuple):
    """N digests, the first halves rising."""

    firsts: np.ndarray  # (N,), uint64
    seconds: np.ndarray  # (N,), uint64
    shards: np.ndarray  # (N,), int32
    rows: np.ndarray  # (N,), int32


def _sorted_run(shard: int, digests: bytes) -> _Run:
    firsts, seconds = _halves(digests)
    order = np.lexsort((seconds, firsts))
    firsts, seconds = firsts[order], seconds[order]
    is_new = np.ones(len(order), dtype=bool)
    is_new[1:] = (firsts[1:] != firsts[:-1]) | (seconds[1:] != seconds[:-1])
    rows = order[is_new].astype(np.int32)
    return _Run(firsts[is_new], seconds[is_new], np.full_like(rows, shard), rows)


def _merged(larger: list[np.ndarray], smaller: list[np.ndarray]) -> _Run:
    """Merge the columns of two runs, which are given up one by one to save memory."""
    places = np.searchsorted(larger[0], smaller[0])
    places += np.arange(len(places))
    is_larger = np.ones(len(larger[0]) + len(places), dtype=bool)
    is_larger[places] = False
    columns = []
    while larger:
        column = np.empty(len(is_larger), dtype=larger[0].dtype)
        column[places], column[is_larger] = smaller.pop(0), larger.pop(0)
        columns.append(column)
    return _Run(*columns)


def _places(run: _Run, firsts: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Return the place of each wanted digest in a run, -1 where it is not there."""
    found = np.full(len(firsts), -1)
    places = np.searchsorted(run.firsts, firsts)
    is_open = places < len(run.firsts)
    # One round, but for digests whose first halves agree.
    while is_open.any():
        candidates = np.where(is_open, places, 0)
        is_open &= run.firsts[candidates] == firsts
        is_match = is_open & (run.seconds[candidates] == seconds)
        found[is_match] = places[is_match]
        places += 1
        is_open &= ~is_match & (places < len(run.firsts))
    return found


def _halves(digests: bytes) -> tuple[np.ndarray, np.ndarray]:
    halves = np.frombuffer(digests, dtype="<u8").reshape(-1, 2)
    return np.ascontiguousarray(halves[:, 0]), np.ascontiguousarray(halves[:, 1])
