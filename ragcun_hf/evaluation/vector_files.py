"""Room for vectors that need not fit in memory."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError

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
