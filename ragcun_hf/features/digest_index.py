"""Index from text digests to shards and rows: one sorted array, 24 bytes a text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Big-endian numbers sort as their bytes do, so a record sorts as a string of 24 bytes: by digest, shard and row.
_RECORD = np.dtype([("digest", "S16"), ("shard", ">u4"), ("row", ">u4")])


class DigestIndex:
    """Shard and row of each digest. The array grows and is sorted in place: memory never holds it twice."""

    def __init__(self) -> None:
        self._records = np.empty(0, dtype=_RECORD)
        self._is_sorted = True
        self._precedences: list[int] = []

    def __len__(self) -> int:
        digests = self._sorted()["digest"]
        return min(1, len(digests)) + int((digests[1:] != digests[:-1]).sum())

    def add(self, digests: bytes, *, precedence: int = 0) -> None:
        """Add the next shard: its digests, 16 bytes each, in the order of its rows.

        Of several shards that hold a digest, the one with the lowest precedence is found, in whatever order they came.
        """
        start, count = len(self._records), len(digests) // 16
        self._records.resize(start + count, refcheck=False)  # safe: no view outlives the method that made it
        new = self._records[start:]
        new["digest"] = np.frombuffer(digests, dtype="S16")
        new["shard"], new["row"] = len(self._precedences), np.arange(count)
        self._precedences.append(precedence)
        self._is_sorted = False

    def find(self, digests: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Return the shard and the row of each digest, counted from 0; -1 for a digest that no shard holds."""
        records, precedences = self._sorted(), np.array(self._precedences, dtype=np.uint64)
        wanted = np.zeros(len(digests), dtype=_RECORD)  # zeros sort before every record of the same digest
        wanted["digest"] = np.frombuffer(b"".join(digests), dtype="S16")
        order = np.argsort(wanted.view("S24"))  # sorted digests are found several times faster than random ones
        places = np.empty(len(wanted), dtype=np.int64)
        places[order] = np.searchsorted(records.view("S24"), wanted[order].view("S24"))
        shards, rows = np.full(len(wanted), -1), np.full(len(wanted), -1)
        is_open = places < len(records)
        while is_open.any():  # one round, and one more for every copy
            asked = np.flatnonzero(is_open)
            found = records[places[asked]]
            is_match = found["digest"] == wanted["digest"][asked]
            is_open[asked] = is_match
            asked, found = asked[is_match], found[is_match]
            is_better = (shards[asked] < 0) | (precedences[found["shard"]] < precedences[shards[asked]])
            shards[asked[is_better]], rows[asked[is_better]] = found["shard"][is_better], found["row"][is_better]
            places[asked] += 1
            is_open &= places < len(records)
        return shards, rows

    def _sorted(self) -> np.ndarray:
        if not self._is_sorted:
            self._records.view("S24").sort(kind="stable")  # Timsort, which is fast where most records are in order
            self._is_sorted = True
        return self._records
