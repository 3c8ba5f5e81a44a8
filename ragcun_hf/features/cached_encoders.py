"""List the encoders in a feature cache, and remove their features."""

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

_ABANDONED_SECONDS = 24 * 3600  # no writer is at work on a temporary file of this age


@dataclass(frozen=True)
class CachedEncoder:
    """The features under one key of the cache."""

    folder: Path  # holds the shards; its name is the key
    parts: dict[str, Any]  # what the key was computed from (`key.json`)
    num_texts: int  # rows of finished shards; a text that two writers encoded at the same time counts twice
    num_bytes: int
    last_used: float  # seconds since the epoch

    @property
    def key(self) -> str:
        """The key, 24 hexadecimal digits."""
        return self.folder.name


def list_cached_encoders(folder: str | Path) -> list[CachedEncoder]:
    """List the keys of a feature cache, most recently used first; folders of another origin are left out."""
    folders = [path for path in Path(folder).glob("*") if re.fullmatch(r"[0-9a-f]{24}", path.name)]
    entries = [entry for path in folders if (entry := _describe(path)) is not None]
    return sorted(entries, key=lambda entry: -entry.last_used)


def _describe(folder: Path) -> CachedEncoder | None:
    key_file = folder / KEY_FILE
    try:
        parts = json.loads(key_file.read_text(encoding="utf-8"))
        last_used = key_file.stat().st_mtime
    except (OSError, ValueError):  # of another origin, or removed in this moment
        return None
    sizes = {}
    for path in folder.glob("[!.]*"):  # skips the temporary files of writers
        with contextlib.suppress(FileNotFoundError):
            sizes[path.name] = path.stat().st_size
    shards = [re.fullmatch(r"(\d+)-[0-9a-f]+\.arrow", name) for name in sizes]
    num_texts = sum(int(shard[1]) for shard in shards if shard)
    return CachedEncoder(folder, parts, num_texts, sum(sizes.values()), last_used)


def remove_cached_encoder(entry: CachedEncoder) -> None:
    """Remove the features under one key; a process that is using them encodes again the ones it misses."""
    trash = entry.folder.with_name(f".{entry.key}.{uuid.uuid4().hex}.removed")
    try:
        entry.folder.rename(trash)  # first, so that no writer adds a file to a folder that is being removed
        shutil.rmtree(trash)
    except FileNotFoundError:  # another process was faster
        return
    except OSError as error:
        raise UserError(f"expected a feature cache that can be pruned, got {error}: check its permissions") from error


def remove_abandoned_files(folder: str | Path) -> int:
    """Remove the files of killed writers and killed prunings; return how many temporary files were removed."""
    for path in Path(folder).glob(".*.removed"):
        shutil.rmtree(path, ignore_errors=True)
    oldest, count = time.time() - _ABANDONED_SECONDS, 0
    for path in Path(folder).glob("*/.*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < oldest:
                path.unlink()
                count += 1
    return count
