"""What the feature cache holds, encoder by encoder, and how to let go of it."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .feature_cache import KEY_FILE

_ABANDONED_SECONDS = 24 * 3600  # a temporary file of that age has no writer any more


@dataclass(frozen=True)
class CachedEncoder:
    """The features of one key.

    Args:
        folder: Where they lie; its name is the key.
        parts: What the key stands for.
        num_texts: Texts in whole files; one that two writers encoded at once counts twice.
        num_bytes: On disk.
        last_used: Seconds since the epoch.
    """

    folder: Path
    parts: dict[str, Any]
    num_texts: int
    num_bytes: int
    last_used: float

    @property
    def key(self) -> str:
        """The key, 24 hexadecimal digits."""
        return self.folder.name


def list_cached_encoders(folder: str | Path) -> list[CachedEncoder]:
    """List what a feature cache holds, the most recently used first.

    Args:
        folder: The cache's folder; one that does not exist holds nothing.

    Returns:
        One entry per key. Folders that are not of this cache are left out.
    """
    keys = [path for path in Path(folder).glob("*") if re.fullmatch(r"[0-9a-f]{24}", path.name)]
    entries = [entry for path in keys if (entry := _describe(path)) is not None]
    return sorted(entries, key=lambda entry: -entry.last_used)


def _describe(folder: Path) -> CachedEncoder | None:
    key_file = folder / KEY_FILE
    try:
        parts = json.loads(key_file.read_text(encoding="utf-8"))
        last_used = key_file.stat().st_mtime
    except (OSError, ValueError):  # not ours, or being removed
        return None
    sizes = {}
    for path in folder.glob("[!.]*"):  # without what is being written
        with contextlib.suppress(FileNotFoundError):
            sizes[path.name] = path.stat().st_size
    shards = [re.fullmatch(r"(\d+)-[0-9a-f]+\.arrow", name) for name in sizes]
    return CachedEncoder(
        folder=folder,
        parts=parts,
        num_texts=sum(int(shard[1]) for shard in shards if shard),
        num_bytes=sum(sizes.values()),
        last_used=last_used,
    )


def remove_cached_encoder(entry: CachedEncoder) -> None:
    """Remove the features of one key; a process that uses them at this moment encodes again what it misses.

    Args:
        entry: What to remove.

    Raises:
        UserError: If the disk refuses.
    """
    doomed = entry.folder.with_name(f".{entry.key}.{uuid.uuid4().hex}.removed")
    try:
        entry.folder.rename(doomed)  # first, so that no writer adds to what is being removed
        shutil.rmtree(doomed)
    except FileNotFoundError:  # somebody else was faster
        return
    except OSError as error:
        raise UserError(f"expected a feature cache that can be pruned, got {error}: check its permissions") from error


def remove_abandoned_files(folder: str | Path) -> int:
    """Remove what killed writers left half-written, and killed prunings half-removed.

    Args:
        folder: The cache's folder.

    Returns:
        The number of files removed.
    """
    for path in Path(folder).glob(".*.removed"):
        shutil.rmtree(path, ignore_errors=True)
    oldest, count = time.time() - _ABANDONED_SECONDS, 0
    for path in Path(folder).glob("*/.*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < oldest:
                path.unlink()
                count += 1
    return count
