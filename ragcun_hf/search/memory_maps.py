"""Memory maps for vectors: hints to the system about which pages it needs, and files for large new matrices."""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError

LARGEST_IN_MEMORY = 2**27  # bytes of a new matrix; a larger one is put into a file
_ROWS_AT_ONCE = 64


def will_need(matrix: Any, rows: slice) -> None:
    """Let the disk fetch some rows while the caller computes; does nothing for arrays in memory."""
    found = _map_of(matrix)
    if found is None or not hasattr(mmap, "MADV_WILLNEED") or not len(matrix[rows]):
        return
    start = np.frombuffer(found, dtype=np.uint8).__array_interface__["data"][0]
    block = matrix[rows]
    if not block.flags.c_contiguous:
        return
    offset = block.__array_interface__["data"][0] - start
    page = offset // mmap.PAGESIZE * mmap.PAGESIZE  # a hint must begin at a page
    found.madvise(mmap.MADV_WILLNEED, page, offset + block.nbytes - page)


def release(matrix: Any) -> None:
    """Free the memory of a memory map's pages, which are read again when needed; does nothing for other arrays."""
    found = _map_of(matrix)
    if found is not None and hasattr(mmap, "MADV_DONTNEED"):
        found.madvise(mmap.MADV_DONTNEED)


def read_far_apart(matrix: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Read scattered rows; from a memory map a few at a time, because the system maps many pages around each row."""
    if _map_of(matrix) is None:
        return matrix[rows]
    found = np.empty((len(rows), *matrix.shape[1:]), dtype=matrix.dtype)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        found[start : start + _ROWS_AT_ONCE] = matrix[rows[start : start + _ROWS_AT_ONCE]]
        release(matrix)
    return found


def _map_of(matrix: Any) -> mmap.mmap | None:
    """Return the map under an array, or None; also None for copy-on-write maps, whose changes are saved nowhere."""
    if not isinstance(matrix, np.memmap) or matrix.mode == "c":
        return None
    base: Any = matrix
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, mmap.mmap) else None


def new_matrix(num_rows: int, width: int, folder: Path) -> np.ndarray[Any, Any]:
    """Allocate a float32 matrix (num_rows, width): in memory, or above 128 MiB in an unnamed file in `folder`.

    The system deletes the file when nothing uses the matrix. A folder with too little room is a UserError.
    """
    num_bytes = 4 * num_rows * width
    if num_bytes <= LARGEST_IN_MEMORY:
        return np.empty((num_rows, width), dtype=np.float32)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            # Reserve the room: writing to a map on a full disk would kill the process without a message.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            else:
                file.truncate(num_bytes)
            return np.memmap(file, dtype=np.float32, mode="r+", shape=(num_rows, width))
    except OSError as error:
        raise UserError(
            f"expected room for {num_bytes / 2**30:.1f} GiB of vectors in {folder}, got {error}: free some space, or "
            "name another --output_dir"
        ) from error
