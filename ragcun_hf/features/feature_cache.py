"""Feature cache on disk: Arrow shards in one folder per key, where the key covers everything that changes a feature.

    <folder>/<key>/key.json                  what the key was computed from; its date is that of the last use
    <folder>/<key>/<rows>-<checksum>.arrow   one shard: text digests and their features

A shard is written under a temporary name and renamed when it is complete. Its name carries the number of rows and a
checksum of the content, so a cut or damaged file is recognized and never read. Writers (threads, processes, machines)
never share a temporary file. Shards are memory-mapped: memory holds the digests of all shards, and the features of the
shard that is being read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from ..errors import UserError
from ..files import write_whole
from .digest_index import DigestIndex
from .shard_file import ShardFile, write_shard

logger = logging.getLogger(__name__)

FEATURE_DTYPES = ("float32", "float16")
KEY_FILE = "key.json"
TEXTS_PER_SHARD = 4_096  # bounds the buffer in memory
SECONDS_PER_SHARD = 20.0  # at most this much work is lost when a process is killed


class FeatureCache:
    """The features under one key: one encoder, used in one way.

    Args:
        folder: The folder of all keys.
        key_parts: Everything that changes a feature, as JSON values.
        feature_dim: H.
        dtype: Storage dtype, `float32` or `float16`; part of the key. Features are read as float32.
        name: The encoder's name for people; not part of the key.
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
        parts = {**key_parts, "feature_dtype": dtype}
        key = hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=12).hexdigest()
        self.folder = Path(folder) / key
        self.feature_dim = feature_dim
        self._dtype = np.dtype(dtype)
        self._description = json.dumps({"name": name, **parts}, sort_keys=True, indent=1)
        self._shards: list[ShardFile] = []
        self._names: set[str] = set()  # of the files of these shards
        self._damaged: dict[str, int] = {}  # name of a damaged file -> time of its last change
        self._index = DigestIndex()
        self._make_folder()
        self._rescan()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def num_bytes(self) -> int:
        """Size of the shards on disk."""
        return sum(shard.num_bytes for shard in self._shards)

    def missing(self, digests: Sequence[bytes]) -> list[int]:
        """Return the positions of digests without a feature; checks every shard that holds one of the others."""
        is_rescanned = False
        while True:
            shards, _ = self._index.find(digests)
            used = [self._shards[number] for number in np.unique(shards[shards >= 0])]
            if unusable := {shard.path.name for shard in used if not self._is_usable(shard)}:
                self._forget(unusable)
            elif is_rescanned or (shards >= 0).all():
                return np.flatnonzero(shards < 0).tolist()
            else:
                self._rescan()
                is_rescanned = True

    def read(self, digests: Sequence[bytes]) -> np.ndarray:
        """Return the features of texts, shape (len(digests), H), float32.

        Raises KeyError if a digest is missing, or its shard was removed or damaged in the meantime.
        """
        features = np.empty((len(digests), self.feature_dim), dtype=np.float32)
        if missing := self.missing(digests):
            raise KeyError(f"{len(missing)} texts have no feature in {self.folder}: encode them first")
        shards, rows = self._index.find(digests)
        order = np.argsort(shards, kind="stable")
        numbers, starts = np.unique(shards[order], return_index=True)
        for number, start, end in zip(numbers, starts, [*starts[1:], len(order)], strict=False):
            places = order[start:end]
            try:
                features[places] = self._shards[number].features()[rows[places]]
            except OSError as error:
                self._forget({self._shards[number].path.name})
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
        self._make_folder()
        try:
            try:
                name = write_shard(self.folder, digests, stored)
            except FileNotFoundError:  # another process pruned the folder in this moment
                self._make_folder()
                name = write_shard(self.folder, digests, stored)
        except OSError as error:
            raise UserError(
                f"expected room for {stored.nbytes / 2**20:.0f} MiB of features in {self.folder}, got {error}: free "
                "some space, name another --feature_cache_dir, or use --no_feature_cache"
            ) from error
        self.open_shards([name])
        return name

    def open_shards(self, names: Iterable[str]) -> None:
        """Open shards that this or another process has written."""
        for name in names:
            if name not in self._names:
                self._open(self.folder / name)

    def _rescan(self) -> None:
        """Open shards that are new in the folder, and forget shards that are gone."""
        try:
            with os.scandir(self.folder) as entries:
                present = {entry.name for entry in entries if entry.name.endswith(".arrow")}
        except FileNotFoundError:  # pruned
            present = set()
        if gone := self._names - present:
            self._forget(gone)
        # A damaged file is tried again once it has changed: another process may have repaired it.
        unchanged = {name for name, changed in self._damaged.items() if changed == _changed_at(self.folder / name)}
        self.open_shards(sorted(present - unchanged))

    def _open(self, path: Path) -> None:
        try:
            self._add(ShardFile(path, self.feature_dim, self._dtype))
        except FileNotFoundError:  # removed in this moment
            return
        except (OSError, pa.ArrowException, KeyError, ValueError):
            self._note_damage(path)

    def _add(self, shard: ShardFile) -> None:
        # The precedence makes every process read the same copy where several writers encoded a text.
        self._index.add(shard.digests(), precedence=shard.checksum)
        self._shards.append(shard)
        self._names.add(shard.path.name)

    def _is_usable(self, shard: ShardFile) -> bool:
        if not shard.path.exists():
            return False
        if not shard.is_whole():
            self._note_damage(shard.path)
        return shard.is_whole()

    def _note_damage(self, path: Path) -> None:
        self._damaged[path.name] = _changed_at(path)
        logger.warning("%s is cut or damaged and will not be used; its texts are encoded again.", path)

    def _forget(self, names: set[str]) -> None:
        others = [shard for shard in self._shards if shard.path.name not in names]
        self._shards, self._names, self._index = [], set(), DigestIndex()
        for shard in others:
            with contextlib.suppress(OSError, pa.ArrowException):  # removed too
                self._add(shard)

    def _make_folder(self) -> None:
        """Make the folder, which may have been pruned, and update the date of the last use."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            key_file = self.folder / KEY_FILE
            if not key_file.exists():
                write_whole(key_file, self._description + "\n")
            os.utime(key_file)
        except OSError as error:
            raise UserError(
                f"expected a feature cache folder that can be written, got {self.folder} ({error}): name another "
                "--feature_cache_dir, or use --no_feature_cache"
            ) from error


def _changed_at(path: Path) -> int:
    """Return the time of a file's last change in nanoseconds, or 0 if it does not exist."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


class GrowingShard:
    """Buffer of features that writes a shard when it is full or old, and at the end; an interruption loses little.

    Attributes:
        names: Names of the written files.
    """

    def __init__(self, cache: FeatureCache) -> None:
        self.names: list[str] = []
        self._cache = cache
        self._begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._write()

    def _begin(self) -> None:
        self._digests: list[bytes] = []
        self._pieces: list[np.ndarray] = []
        self._started = time.monotonic()

    def add(self, digests: list[bytes], features: np.ndarray) -> None:
        """Add features, shape (len(digests), H)."""
        self._digests.extend(digests)
        self._pieces.append(features)
        if len(self._digests) >= TEXTS_PER_SHARD or time.monotonic() - self._started > SECONDS_PER_SHARD:
            self._write()

    def _write(self) -> None:
        digests, pieces = self._digests, self._pieces
        self._begin()  # first, so that features that cannot be written are not tried again
        if digests:
            self.names.append(self._cache.write(digests, np.concatenate(pieces)))
