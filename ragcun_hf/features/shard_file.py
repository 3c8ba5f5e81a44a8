"""One file of the feature cache: text digests and features, named `<rows>-<checksum>.features`.

    header    80 bytes: magic, key of the cache, dtype, rows, width, checksum of the features, checksum of the rest
    digests   16 bytes a row
    features  rows x width numbers, little-endian

Nothing is used before its checksum is right, and nothing is mapped into memory, where a file that another process cuts
would end this one. Header and digests have a checksum of their own, so that a shard is opened without its features.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from ..files import replaced_file

SUFFIX = ".features"
_MAGIC = b"RAGCUNF1"
_FEW = 32  # a whole file is read as fast as this part of its rows, one by one
_HEADER = struct.Struct("<8s 24s 8s Q Q Q Q 8x")  # the last number is the checksum of what stands before it


class DamagedShardError(Exception):
    """A file of the cache differs from its checksum, or belongs to another key."""


def write_shard(folder: Path, digests: Sequence[bytes], features: np.ndarray, *, key: str) -> str:
    """Write features, shape (len(digests), H), in their dtype, as a whole or not at all; return the file's name."""
    joined, stored = b"".join(digests), _little_endian(features)
    of_features = xxhash.xxh3_64_intdigest(stored.reshape(-1).view(np.uint8).data)
    facts = (_MAGIC, key.encode(), features.dtype.name.encode(), len(digests), features.shape[1], of_features)
    header = _HEADER.pack(*facts, _checksum_of_rest(facts, joined))
    name = f"{len(digests)}-{_checksum_in_name(joined, of_features)}{SUFFIX}"
    # Not synced: the checksums reveal what a power cut damages, and those texts are encoded again.
    with replaced_file(folder / name, is_synced=False) as temporary, temporary.open("wb") as file:
        file.write(header)
        file.write(joined)
        file.write(stored.reshape(-1).view(np.uint8).data)
    return name


class ShardFile:
    """A shard on disk; none of its content stays in memory. `checksum` is that in its name.

    A file that is gone or unreadable is an OSError. One that is damaged, of another key, dtype or width, or no plain
    file is a `DamagedShardError`, here and in `features`.
    """

    def __init__(self, path: Path, feature_dim: int, dtype: np.dtype, *, key: str) -> None:
        self.path = path
        self._dim, self._dtype, self._key = feature_dim, dtype, key
        self._num_rows, self._checksum_of_features = 0, 0
        self._checked: tuple[int, ...] | None = None  # the file's state when its features had their checksum
        with _opened(path) as file:
            self.num_bytes = os.fstat(file.fileno()).st_size
            facts, digests = self._read_head(file)
        self._num_rows, self._checksum_of_features = facts[3], facts[5]
        if path.stem != f"{self._num_rows}-{_checksum_in_name(digests, self._checksum_of_features)}":
            raise DamagedShardError(f"{path}: expected the checksum in its name")
        self.checksum = int(path.stem.partition("-")[2], 16)

    def digests(self) -> bytes:
        """Return the text digests, 16 bytes a row."""
        with _opened(self.path) as file:
            facts, digests = self._read_head(file)
        self._check_same(facts)
        return digests

    def features(self) -> np.ndarray:
        """Return the features, (rows, H), a copy in memory."""
        with _opened(self.path) as file:
            facts, _ = self._read_head(file)
            self._check_same(facts)
            state, content = _state(file), file.read()
        if xxhash.xxh3_64_intdigest(content) != self._checksum_of_features:
            raise DamagedShardError(f"{self.path}: expected features with their checksum")
        self._checked = state
        return np.frombuffer(content, dtype=self._stored_dtype).reshape(self._num_rows, self._dim)

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Return some rows of the features, (len(numbers), H); of a checked, unchanged file, few are read alone."""
        with _opened(self.path) as file:
            is_checked = self._checked is not None and self._checked == _state(file)
            if is_checked and len(numbers) * _FEW < self._num_rows:
                start, size = _HEADER.size + 16 * self._num_rows, self._dim * self._dtype.itemsize
                content = bytearray()
                for number in numbers.tolist():
                    file.seek(start + number * size)
                    content += file.read(size)
                return np.frombuffer(content, dtype=self._stored_dtype).reshape(len(numbers), self._dim)
        return self.features()[numbers]

    @property
    def _stored_dtype(self) -> np.dtype:
        return self._dtype.newbyteorder("<")

    def _read_head(self, file: BinaryIO) -> tuple[tuple[Any, ...], bytes]:
        header, size = file.read(_HEADER.size), os.fstat(file.fileno()).st_size
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise DamagedShardError(f"{self.path}: expected a file of this cache")
        *facts, checksum = _HEADER.unpack(header)
        num_rows, dim = facts[3], facts[4]
        row_bytes = 16 + dim * self._dtype.itemsize
        if size != _HEADER.size + num_rows * row_bytes:  # before anything of that size is read
            raise DamagedShardError(f"{self.path}: expected the size that its header says")
        digests = file.read(16 * num_rows)
        if checksum != _checksum_of_rest(tuple(facts), digests):
            raise DamagedShardError(f"{self.path}: expected a header with its checksum")
        own = (self._key.encode(), self._dtype.name.encode().ljust(8, b"\0"), self._dim)
        if (facts[1], facts[2], dim) != own:
            raise DamagedShardError(f"{self.path}: expected features of the encoder {self._key}")
        return tuple(facts), digests

    def _check_same(self, facts: tuple[Any, ...]) -> None:
        if (facts[3], facts[5]) != (self._num_rows, self._checksum_of_features):
            raise DamagedShardError(f"{self.path}: expected the features that it held when it was opened")


def check_shard(path: Path) -> None:
    """Read a whole shard of any key, dtype and width, or raise as `ShardFile` does; its folder is its key."""
    with _opened(path) as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise DamagedShardError(f"{path}: expected a file of this cache")
    _, _, name, _, dim, *_ = _HEADER.unpack(header)
    dtype = {b"float32": np.float32, b"float16": np.float16}.get(name.rstrip(b"\0"))
    if dtype is None:
        raise DamagedShardError(f"{path}: expected float32 or float16 features")
    ShardFile(path, dim, np.dtype(dtype), key=path.parent.name).features()


def _opened(path: Path) -> BinaryIO:
    """Open a plain file; a pipe would let the reader wait."""
    file = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise DamagedShardError(f"{path}: expected a plain file")
    return file


def _state(file: BinaryIO) -> tuple[int, ...]:
    """Return what changes when a file is written or replaced."""
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _little_endian(features: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(features, dtype=features.dtype.newbyteorder("<"))


def _checksum_of_rest(facts: tuple[Any, ...], digests: bytes) -> int:
    checksum = xxhash.xxh3_64(_HEADER.pack(*facts, 0))
    checksum.update(digests)
    return checksum.intdigest()


def _checksum_in_name(digests: bytes, of_features: int) -> str:
    checksum = xxhash.xxh3_64(digests)
    checksum.update(struct.pack("<Q", of_features))
    return checksum.hexdigest()
