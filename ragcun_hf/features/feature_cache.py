"""Feature cache on disk: shards in one folder per key, where the key covers everything that changes a feature.

    <folder>/<key>/key.json                     what the key was computed from; its date is that of the last use
    <folder>/<key>/<rows>-<checksum>.features   one shard: text digests and their features

A shard is written under a temporary name of its own and renamed when it is complete. It has its key and checksums, so
a cut, damaged or misplaced file is recognized, set aside under the suffix .damaged and never used. Memory holds the
digests of all shards, and the features of the shard that is being read. A cache that may only be read can be used as
long as it holds all texts.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np

from ..errors import UserError
from ..files import remove_leftovers, write_whole
from .digest_index import DigestIndex
from .shard_file import SUFFIX, DamagedShardError, ShardFile, check_shard, write_shard

logger = logging.getLogger(__name__)

FEATURE_DTYPES = ("float32", "float16")
_KEY_FILE = "key.json"
TEXTS_PER_SHARD = 4_096  # bounds the memory of features that are not written yet
SECONDS_PER_SHARD = 20.0  # at most this much work is lost when a process is killed
_MAX_PRUNINGS = 20  # of a folder, while one file is written into it
_ABANDONED_SECONDS = 24 * 3600  # no writer is at work on a temporary file of this age

P = ParamSpec("P")
Result = TypeVar("Result")


def key_folder(folder: str | Path, key_parts: dict[str, Any], *, dtype: str) -> Path:
    """Return the folder of a cache that holds the features with these key parts, stored in a dtype."""
    parts = _all_parts(key_parts, dtype)
    return Path(folder) / hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=12).hexdigest()


def _all_parts(key_parts: dict[str, Any], dtype: str) -> dict[str, Any]:
    return {**key_parts, "feature_dtype": dtype}


class FeatureCache:
    """The features under one key of the cache: one encoder, used in one way.

    The key follows from `key_parts`, which hold everything that changes a feature, and from `dtype`, in which features
    are stored; they are read as float32. `name` describes the encoder and is not part of the key.
    """

    def __init__(
        self,
        folder: str | Path,
        key_parts: dict[str, Any],
        *,
        feature_dim: int,
        dtype: str = "float32",
        name: str | None = None,
    ) -> None:
        if dtype not in FEATURE_DTYPES:
            raise UserError(
                f"expected a feature dtype of {' or '.join(FEATURE_DTYPES)}, got {dtype!r}: change the flag"
            )
        self.folder = key_folder(folder, key_parts, dtype=dtype)
        self.feature_dim = feature_dim
        self._dtype = np.dtype(dtype)
        self._description = json.dumps({"name": name, **_all_parts(key_parts, dtype)}, sort_keys=True, indent=1)
        self._shards: dict[str, ShardFile] = {}  # by the name of the file, in the order of the index
        self._checked: set[str] = set()  # names of files whose features had their checksum
        self._damaged: dict[str, int] = {}  # name of a damaged file -> time of its last change
        self._index = DigestIndex()
        self._make_folder(is_needed=False)
        remove_leftovers(self.folder)
        self._rescan()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def num_bytes(self) -> int:
        """Size of the shards on disk."""
        return sum(shard.num_bytes for shard in self._shards.values())

    def missing(self, digests: Sequence[bytes]) -> list[int]:
        """Return the positions of digests without a feature; checks every shard that holds one of the others."""
        is_rescanned = False
        while True:
            shards, _ = self._index.find(digests)
            names = list(self._shards)
            used = [names[number] for number in np.unique(shards[shards >= 0])]
            if unusable := {name for name in used if not self._is_usable(self._shards[name])}:
                self._forget(unusable)
            elif is_rescanned or (shards >= 0).all():
                return np.flatnonzero(shards < 0).tolist()
            else:
                self._rescan()
                is_rescanned = True

    def read(self, digests: Sequence[bytes]) -> np.ndarray:
        """Return features, (len(digests), H) float32; a missing one, or one that was removed, is a KeyError."""
        features = np.empty((len(digests), self.feature_dim), dtype=np.float32)
        if missing := self.missing(digests):
            raise KeyError(f"{len(missing)} texts have no feature in {self.folder}: encode them first")
        shards, rows = self._index.find(digests)
        order = np.argsort(shards, kind="stable")
        numbers, starts = np.unique(shards[order], return_index=True)
        opened = list(self._shards.values())
        for number, places in zip(numbers, np.split(order, starts[1:]), strict=False):
            try:
                features[places] = opened[number].rows(rows[places])
            except (OSError, DamagedShardError) as error:
                self._forget({opened[number].path.name})
                raise KeyError(f"features were removed from {self.folder}: encode them again") from error
        return features

    def write(self, digests: Sequence[bytes], features: np.ndarray) -> str:
        """Write features, shape (len(digests), H), as one shard, and return the name of its file."""
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(features, dtype=self._dtype)
        if not np.isfinite(stored).all() and np.isfinite(features).all():
            raise UserError(
                f"--feature_dtype {self._dtype} expects features below {np.finfo(self._dtype).max:.0f}, got "
                f"{np.abs(features).max():.0f}: use --feature_dtype float32"
            )
        try:
            name = _while_pruned(self._written, digests, stored)
        except OSError as error:
            raise UserError(
                f"expected room for {stored.nbytes / 2**20:.0f} MiB of features in {self.folder}, got {error}: free "
                "some space, name another --feature_cache_dir, or use --no_feature_cache"
            ) from error
        self.open_shards([name])
        return name

    def _written(self, digests: Sequence[bytes], stored: np.ndarray) -> str:
        self._make_folder()
        return write_shard(self.folder, digests, stored, key=self.folder.name)

    def write_as_computed(self, batches: Iterable[tuple[list[bytes], np.ndarray]]) -> list[str]:
        """Write batches of digests and features while they are computed, and return the names of the files.

        A shard is written when it is full or old, at the end, and after an interruption, so that little work is lost.
        """
        names: list[str] = []
        digests: list[bytes] = []
        pieces: list[np.ndarray] = []
        started = time.monotonic()
        try:
            for new_digests, features in batches:
                digests += new_digests
                pieces.append(features)
                if len(digests) >= TEXTS_PER_SHARD or time.monotonic() - started > SECONDS_PER_SHARD:
                    # Emptied before writing: features that cannot be written are not tried again below.
                    shard, digests, pieces = (digests, np.concatenate(pieces)), [], []
                    names.append(self.write(*shard))
                    started = time.monotonic()
        finally:
            if digests:
                names.append(self.write(digests, np.concatenate(pieces)))
        return names

    def open_shards(self, names: Iterable[str]) -> None:
        """Open shards that this or another process has written."""
        for name in names:
            if name in self._shards:
                continue
            path = self.folder / name
            try:
                self._add(ShardFile(path, self.feature_dim, self._dtype, key=self.folder.name))
            except FileNotFoundError:  # removed in this moment
                continue
            except (OSError, DamagedShardError):
                self._note_damage(path)

    def _add(self, shard: ShardFile) -> None:
        # The precedence makes every process read the same copy where several writers encoded a text.
        self._index.add(shard.digests(), precedence=shard.checksum)
        self._shards[shard.path.name] = shard

    def _rescan(self) -> None:
        """Open shards that are new in the folder, and forget shards that are gone."""
        try:
            with os.scandir(self.folder) as entries:
                present = {entry.name for entry in entries if entry.name.endswith(SUFFIX)}
        except FileNotFoundError:  # pruned, or never made
            present = set()
        if gone := self._shards.keys() - present:
            self._forget(gone)
        # A damaged file is tried again once it has changed: another process may have repaired it.
        unchanged = {name for name, changed in self._damaged.items() if changed == _changed_at(self.folder / name)}
        self.open_shards(sorted(present - unchanged))

    def _is_usable(self, shard: ShardFile) -> bool:
        if shard.path.name in self._checked:
            return shard.path.exists()
        try:
            shard.features()
        except FileNotFoundError:
            return False
        except (OSError, DamagedShardError):
            self._note_damage(shard.path)
            return False
        self._checked.add(shard.path.name)
        return True

    def _note_damage(self, path: Path) -> None:
        self._damaged[path.name] = _changed_at(path)
        self._checked.discard(path.name)
        aside = set_aside(path)
        where = f"set aside as {aside.name}" if aside else "not used"
        logger.warning("%s is cut or damaged and is %s; its texts are encoded again.", path, where)

    def _forget(self, names: set[str]) -> None:
        others = [shard for name, shard in self._shards.items() if name not in names]
        self._shards, self._index = {}, DigestIndex()
        self._checked -= names
        for shard in others:
            with contextlib.suppress(OSError, DamagedShardError):  # removed too
                self._add(shard)

    def _make_folder(self, *, is_needed: bool = True) -> None:
        """Make the folder, which may have been pruned, and update the date of the last use.

        Unless it `is_needed`, a folder that is there and may only be read stays as it is.
        """
        try:
            _while_pruned(self._make_key_file)
        except OSError as error:
            if not is_needed and self.folder.is_dir() and os.access(self.folder, os.R_OK | os.X_OK):
                return
            raise UserError(
                f"expected a feature cache folder that can be written, got {self.folder} ({error}): name another "
                "--feature_cache_dir, or use --no_feature_cache"
            ) from error

    def _make_key_file(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        key_file = self.folder / _KEY_FILE
        if not key_file.exists():
            write_whole(key_file, self._description + "\n")
        os.utime(key_file)


def _while_pruned(act: Callable[P, Result], *args: P.args, **options: P.kwargs) -> Result:
    """Do what needs the folder of a key, again if another process pruned it in this moment."""
    for _ in range(_MAX_PRUNINGS):
        # The latter is what `mkdir(exist_ok=True)` makes of a folder that was there and is gone.
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            return act(*args, **options)
    return act(*args, **options)


def set_aside(path: Path) -> Path | None:
    """Give a damaged shard a name under which it is not used; None if that is not allowed, or it is gone."""
    aside = path.with_suffix(".damaged")
    try:
        path.replace(aside)
    except OSError:
        return None
    return aside


def check_cache(folder: str | Path) -> tuple[int, list[Path]]:
    """Compare every shard with its checksums; return how many are whole, and the paths of the others."""
    num_whole, damaged = 0, []
    for path in sorted(Path(folder).glob(f"*/*{SUFFIX}")):
        try:
            check_shard(path)
            num_whole += 1
        except FileNotFoundError:  # pruned in this moment
            continue
        except (OSError, DamagedShardError):
            damaged.append(path)
    return num_whole, damaged


def _changed_at(path: Path) -> int:
    """Return the time of a file's last change in nanoseconds, or 0 if it does not exist."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


@dataclass(frozen=True)
class CachedEncoder:
    """The features under one key of the cache."""

    folder: Path  # holds the shards; its name is the key
    parts: dict[str, Any]  # what the key was computed from (`key.json`)
    num_texts: int  # rows of finished shards; a text that two writers encoded at the same time counts twice
    num_bytes: int
    last_used: float  # seconds since the epoch


def list_cached_encoders(folder: str | Path) -> list[CachedEncoder]:
    """List the keys of a feature cache, most recently used first; folders of another origin are left out."""
    folders = [path for path in Path(folder).glob("*") if re.fullmatch(r"[0-9a-f]{24}", path.name)]
    entries = [entry for path in folders if (entry := _describe(path)) is not None]
    return sorted(entries, key=lambda entry: -entry.last_used)


def _describe(folder: Path) -> CachedEncoder | None:
    key_file = folder / _KEY_FILE
    try:
        last_used = key_file.stat().st_mtime
    except OSError:  # of another origin, or removed in this moment
        return None
    try:
        parts = json.loads(key_file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        parts = None
    if not isinstance(parts, dict):  # damaged: it can still be pruned
        parts = {"name": "unknown (damaged key.json)"}
    sizes = {}
    for path in folder.glob("[!.]*"):  # skips the temporary files of writers
        with contextlib.suppress(FileNotFoundError):
            sizes[path.name] = path.stat().st_size
    shards = [re.fullmatch(rf"([0-9]{{1,9}})-[0-9a-f]+{re.escape(SUFFIX)}", name) for name in sizes]
    num_texts = sum(int(shard[1]) for shard in shards if shard)
    return CachedEncoder(folder, parts, num_texts, sum(sizes.values()), last_used)


def remove_cached_encoder(entry: CachedEncoder) -> None:
    """Remove the features under one key; a process that is using them encodes again the ones it misses."""
    trash = entry.folder.with_name(f".{entry.folder.name}.{uuid.uuid4().hex}.removed")
    try:
        entry.folder.rename(trash)  # first, so that no writer adds a file to a folder that is being removed
        for _ in range(_MAX_PRUNINGS):
            try:
                return shutil.rmtree(trash)
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:  # a writer that had the folder before it was renamed adds a file
                    raise
    except FileNotFoundError:  # another process was faster
        return
    except OSError as error:
        raise UserError(f"expected a feature cache that can be pruned, got {error}: check its permissions") from error


def remove_abandoned_files(folder: str | Path) -> None:
    """Remove the files of killed writers and killed prunings."""
    for path in Path(folder).glob(".*.removed"):
        shutil.rmtree(path, ignore_errors=True)
    for path in Path(folder).glob("*/*.damaged"):
        path.unlink(missing_ok=True)
    for path in Path(folder).glob("*"):
        remove_leftovers(path)
    oldest = time.time() - _ABANDONED_SECONDS
    for path in Path(folder).glob("*/.*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < oldest:
                path.unlink()
