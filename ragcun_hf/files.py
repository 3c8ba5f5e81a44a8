"""Text files that are there whole or not at all, and what tells one file of weights from another."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError

if TYPE_CHECKING:
    pass


def write_whole(path: Path, text: str) -> None:
    """Write UTF-8 text under a temporary name and rename it; the folder is made if needed.

    Args:
        path: The file, replaced at once when complete.
        text: With lines that end in a line feed alone, on every system.

    Raises:
        OSError: If the disk refuses; nothing half-written stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def weights_digest(folder: Path) -> str | None:
    """Tell the weights in a model folder from all others.

    Args:
        folder: With `*.safetensors` files; their order is that of their names.

    Returns:
        The SHA-256 of the one file (the Hub shows the same), or of the several files' digests; None without any.
    """
    digests = []
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    if len(digests) <= 1:
        return digests[0] if digests else None
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def source_name(source: str) -> str:
    """Name a data source by its last two parts, without the folders of this machine; a Hub id stays whole."""
    path = Path(source)
    return "/".join(path.absolute().parts[-2:]) if path.exists() else source


def check_writable(folder: Path) -> None:
    """Refuse an output folder in which nothing can be written, before any work is done.

    Args:
        folder: Need not exist yet.

    Raises:
        UserError: If it is a file, lies below one, or may not be written.
    """
    present = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not present.is_dir():
        raise UserError(f"--output_dir expects a folder, got {folder}, where {present} is a file: name another")
    if not os.access(present, os.W_OK):
        raise UserError(f"--output_dir expects a folder that can be written, got {folder}: name another")


@contextmanager
def disk_errors_explained(folder: Path) -> Iterator[None]:
    """Turn what libraries raise when the disk takes no more into one line.

    Args:
        folder: Where is written.

    Raises:
        UserError: If the disk is full or refuses.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not _is_disk_error(error):
            raise
        raise UserError(
            f"expected to be able to write to {folder}, got {error}: free some space, or name another --output_dir"
        ) from error


def _is_disk_error(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
    # safetensors and torch.save have no type of their own for it.
    return any(words in str(error) for words in ("I/O error", "inline_container", "PytorchStreamWriter"))


RECORD_FILE = "training_record.json"
"""Data sources and counts, arguments, seconds, steps, and the log."""

DOCUMENTS_FILE = "training_documents.txt"
"""One hexadecimal digest per distinct training document."""
