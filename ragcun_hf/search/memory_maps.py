"""Hints to the system about memory maps: what is read next, and what is not needed in memory any more."""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError

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


_LARGEST_IN_MEMORY = 2**27  # bytes


def new_matrix(num_rows: int, width: int, folder: Path) -> np.ndarray[Any, Any]:
    """Make room for vectors: in memory, or in a file without a name, which goes when nothing uses it any more.

    Args:
        num_rows: Rows.
        width: Numbers in each.
        folder: Where the file lies, if there has to be one (above 128 MiB).

    Returns:
        Shape (num_rows, width), float32, not filled yet.

    Raises:
        UserError: If the folder cannot be written to, or has no room for all of it.
    """
    num_bytes = 4 * num_rows * width
    if num_bytes <= _LARGEST_IN_MEMORY:
        return np.empty((num_rows, width), dtype=np.float32)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):  # now, for later a full disk would end the process without a word
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            else:
                file.truncate(num_bytes)
            return np.memmap(file, dtype=np.float32, mode="r+", shape=(num_rows, width))
    except OSError as error:
        raise UserError(
            f"expected room for {num_bytes / 2**30:.1f} GiB of vectors in {folder}, got {error}: free some space, or "
            "name another --output_dir"
        ) from error
