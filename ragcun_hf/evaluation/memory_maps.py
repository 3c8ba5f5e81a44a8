"""Hints to the system about memory maps: what is read next, and what is not needed in memory any more."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np

_ROWS_AT_ONCE = 64


def will_need(matrix: Any, rows: slice) -> None:
    """Let the disk fetch some rows while the caller computes; nothing for what is no memory map."""
    found = _map_of(matrix)
    if found is None or not hasattr(mmap, "MADV_WILLNEED") or not len(matrix[rows]):
        return
    start = np.frombuffer(found, dtype=np.uint8).__array_interface__["data"][0]
    block = matrix[rows]
    if not block.flags.c_contiguous:
        return
    offset = block.__array_interface__["data"][0] - start
    page = offset // mmap.PAGESIZE * mmap.PAGESIZE  # where a hint may begin
    found.madvise(mmap.MADV_WILLNEED, page, offset + block.nbytes - page)


def release(matrix: Any) -> None:
    """Let go of a memory map's pages; they are read again when needed. Nothing for what is no memory map."""
    found = _map_of(matrix)
    if found is not None and hasattr(mmap, "MADV_DONTNEED"):
        found.madvise(mmap.MADV_DONTNEED)


def read_far_apart(matrix: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Read rows that lie far apart; of a memory map a few at a time, for the system maps much around each."""
    if _map_of(matrix) is None:
        return matrix[rows]
    found = np.empty((len(rows), *matrix.shape[1:]), dtype=matrix.dtype)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        found[start : start + _ROWS_AT_ONCE] = matrix[rows[start : start + _ROWS_AT_ONCE]]
        release(matrix)
    return found


def _map_of(matrix: Any) -> mmap.mmap | None:
    """Return the map under an array, unless its pages hold what nobody has saved (copy on write)."""
    if not isinstance(matrix, np.memmap) or matrix.mode == "c":
        return None
    base: Any = matrix
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, mmap.mmap) else None
