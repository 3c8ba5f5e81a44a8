"""Features on disk, by text: Arrow shards under a key of everything that changes a feature.

    <folder>/<key>/key.json               what the key stands for, for people; its date is that of the last use
    <folder>/<key>/<rows>-<checksum>.arrow   one shard: text digests and their features

A shard is written to a temporary name and renamed when complete; its name carries the number of its rows and the
checksum of its content, so that a cut or damaged file is recognised and never read. Writers, be they threads,
processes or machines, never share a temporary file. Shards are mapped, not loaded: memory holds the digests of all,
and the features of the one that is being read.
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


class FeatureCache:
    """The features of one key: one encoder, one way to use it.

    Args:
        folder: Where all keys lie.
        key_parts: Everything that changes a feature, as JSON values.
        feature_dim: H.
        dtype: Of the numbers on disk, `float32` or `float16`; part of the key. They are read as float32.
        name: What people call the encoder; not part of the key.
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
        self._make_folder()
        self._shards: list[ShardFile] = []
        self._names: set[str] = set()  # of the shards' files
        self._damaged: dict[str, int] = {}  # names of other files, and when they were written
        self._index = DigestIndex()
        self._look()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def num_bytes(self) -> int:
        """The size of the shards on disk."""
        return sum(shard.num_bytes for shard in self._shards)

    def missing(self, digests: Sequence[bytes]) -> list[int]:
        """Return the positions of digests that have no whole feature yet; damaged shards are found out here."""
        has_looked = False
        while True:
            shards, _ = self._index.find(digests)
            used = [self._shards[number] for number in np.unique(shards[shards >= 0])]
            if unusable := {shard.path.name for shard in used if not self._is_usable(shard)}:
                self._forget(unusable)
            elif has_looked or (shards >= 0).all():
                return np.flatnonzero(shards < 0).tolist()
            else:
                self._look()
                has_looked = True

    def read(self, digests: Sequence[bytes]) -> np.ndarray:
        """Look features up.

        Args:
            digests: What `text_digest` gives for each text.

        Returns:
            Shape (len(digests), H), float32.

        Raises:
            KeyError: If not every digest is present, or a shard was removed or damaged since.
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
        """Add one shard, whole or not at all.

        Args:
            digests: What `text_digest` gives for each text.
            features: Shape (len(digests), H).

        Returns:
            The name of its file.

        Raises:
            UserError: If the disk has no room or refuses (nothing half-written stays), or float16 is too small.
        """
        features = self._as_stored(features)
        self._make_folder()
        try:
            try:
                name = write_shard(self.folder, digests, features)
            except FileNotFoundError:  # pruned in this moment
                self._make_folder()
                name = write_shard(self.folder, digests, features)
        except OSError as error:
            raise UserError(
                f"expected room for {features.nbytes / 2**20:.0f} MiB of features in {self.folder}, got {error}: free "
                "some space, name another --feature_cache_dir, or use --no_feature_cache"
            ) from error
        self.open_shards([name])
        return name

    def open_shards(self, names: Iterable[str]) -> None:
        """Take in shards that were written, here or by other processes."""
        for name in names:
            if name not in self._names:
                self._open(name)

    def _look(self) -> None:
        """Take in what this and other processes wrote and removed since the last look."""
        try:
            with os.scandir(self.folder) as entries:
                present = {entry.name for entry in entries if entry.name.endswith(".arrow")}
        except FileNotFoundError:  # pruned
            present = set()
        if gone := self._names - present:
            self._forget(gone)
        for name in sorted(present - self._names):
            if name not in self._damaged or self._damaged[name] != _written_at(self.folder / name):
                self._open(name)

    def _open(self, name: str) -> None:
        path = self.folder / name
        try:
            self._add(ShardFile(path, self.feature_dim, self._dtype))
        except FileNotFoundError:  # removed in this moment
            return
        except (OSError, pa.ArrowException, KeyError, ValueError):
            self._note_damage(path)

    def _is_usable(self, shard: ShardFile) -> bool:
        """Tell whether a shard is still there and whole, and say so if it is damaged."""
        if not shard.path.exists():
            return False
        if not shard.is_whole():
            self._note_damage(shard.path)
        return shard.is_whole()

    def _note_damage(self, path: Path) -> None:
        self._damaged[path.name] = _written_at(path)
        logger.warning("%s is cut or damaged and will not be used; its texts are encoded again.", path)

    def _forget(self, names: set[str]) -> None:
        others = [shard for shard in self._shards if shard.path.name not in names]
        self._shards, self._names, self._index = [], set(), DigestIndex()
        for shard in others:
            with contextlib.suppress(OSError, pa.ArrowException):  # removed too
                self._add(shard)

    def _add(self, shard: ShardFile) -> None:
        # Of copies that several writers left, every process reads the same one.
        self._index.add(len(self._shards), shard.digests(), precedence=shard.checksum)
        self._shards.append(shard)
        self._names.add(shard.path.name)

    def _as_stored(self, features: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(features, dtype=self._dtype)
        if not np.isfinite(stored).all() and np.isfinite(features).all():
            raise UserError(
                f"--feature_dtype {self._dtype} expects features below {np.finfo(self._dtype).max:.0f}, got "
                f"{np.abs(features).max():.0f}: use --feature_dtype float32"
            )
        return stored

    def _make_folder(self) -> None:
        """Make the folder, which may have been pruned, and let its date say that it is in use."""
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


def _written_at(path: Path) -> int:
    """Return when a file was written, in nanoseconds; 0 where it is no more."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


_TEXTS_PER_SHARD = 4_096  # bounds the buffer in memory
_SECONDS_PER_SHARD = 20.0  # what a killed process loses at most


class GrowingShard:
    """Features that are not on disk yet; written when they are many or old enough, and at the end.

    What was encoded before an interruption is kept.

    Args:
        cache: Where they are written.

    Attributes:
        names: Of the files that were written.
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
        """Take in features, shape (len(digests), H)."""
        self._digests.extend(digests)
        self._pieces.append(features)
        if len(self._digests) >= _TEXTS_PER_SHARD or time.monotonic() - self._started > _SECONDS_PER_SHARD:
            self._write()

    def _write(self) -> None:
        digests, pieces = self._digests, self._pieces
        self._begin()  # first: what cannot be written is not tried again
        if digests:
            self.names.append(self._cache.write(digests, np.concatenate(pieces)))
