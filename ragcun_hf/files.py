"""Text files that are there whole or not at all, and what tells one file of weights from another."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


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
