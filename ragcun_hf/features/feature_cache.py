"""Features on disk, by text: Arrow shards under a key of everything that changes a feature.

    <folder>/<key>/key.json               what the key stands for, for people; its date is that of the last use
    <folder>/<key>/<rows>-<checksum>.arrow   one shard: text digests and their features

A shard is written to a temporary name and renamed when complete; its name carries the number of its rows and the
checksum of its content, so that a cut or damaged file is recognised and never read. Writers, be they threads,
processes or machines, never share a temporary file. Shards are mapped, not loaded: memory holds the digests of all,
and the features of the one that is being read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from ..errors import UserError
from .digest_index import DigestIndex

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
        self._shards: list[_Shard] = []
        self._known_names: set[str] = set()  # of files that were opened, also of the damaged ones
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
            unusable = [self._shards[number] for number in np.unique(shards[shards >= 0]) if not self._usable(number)]
            if unusable:
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
                self._forget([self._shards[number]])
                raise KeyError(f"features were removed from {self.folder}: encode them again") from error
        return features

    def write(self, digests: Sequence[bytes], features: np.ndarray) -> None:
        """Add one shard, whole or not at all.

        Args:
            digests: What `text_digest` gives for each text.
            features: Shape (len(digests), H).

        Raises:
            UserError: If the disk has no room or refuses (nothing half-written stays), or float16 is too small.
        """
        from datasets import Features, List, Value
        from datasets.arrow_writer import ArrowWriter

        features = self._as_stored(features)
        self._make_folder()
        name = f"{len(digests)}-{_checksum(b''.join(digests), features)}.arrow"
        schema = Features({"text": Value("binary"), "feature": List(Value(self._dtype.name), length=self.feature_dim)})
        temporary = self.folder / f".{name}.{uuid.uuid4().hex}.tmp"
        try:
            with ArrowWriter(path=str(temporary), features=schema, writer_batch_size=len(digests)) as writer:
                writer.write_table(_as_table(digests, features, schema.arrow_schema))
                writer.finalize()
            temporary.replace(self.folder / name)
        except OSError as error:
            raise UserError(
                f"expected room for {features.nbytes / 2**20:.0f} MiB of features in {self.folder}, got {error}: free "
                "some space, name another --feature_cache_dir, or use --no_feature_cache"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
        if name not in self._known_names or all(shard.path.name != name for shard in self._shards):
            self._open(name)  # what was damaged under this name is whole now

    def _look(self) -> None:
        """Take in what this and other processes wrote and removed since the last look."""
        try:
            with os.scandir(self.folder) as entries:
                present = {entry.name for entry in entries if entry.name.endswith(".arrow")}
        except FileNotFoundError:  # pruned
            present = set()
        if gone := [shard for shard in self._shards if shard.path.name not in present]:
            self._forget(gone)
        self._known_names &= present  # under the name of what is gone there may be a new file later
        for name in sorted(present - self._known_names):
            self._open(name)

    def _open(self, name: str) -> None:
        try:
            self._add(_Shard(self.folder / name, self.feature_dim, self._dtype))
        except FileNotFoundError:  # removed in this moment
            return
        except (OSError, pa.ArrowException, KeyError, ValueError):
            _warn_of_damage(self.folder / name)
        self._known_names.add(name)

    def _forget(self, shards: list[_Shard]) -> None:
        others = [shard for shard in self._shards if shard not in shards]
        self._known_names -= {shard.path.name for shard in shards if not shard.path.exists()}
        self._shards, self._index = [], DigestIndex()
        for shard in others:
            try:
                self._add(shard)
            except (OSError, pa.ArrowException):  # removed too
                self._known_names.discard(shard.path.name)

    def _add(self, shard: _Shard) -> None:
        # Of copies that several writers left, every process reads the same one.
        self._index.add(len(self._shards), shard.digests(), precedence=shard.checksum)
        self._shards.append(shard)

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
                temporary = self.folder / f".key.{uuid.uuid4().hex}.tmp"
                temporary.write_text(self._description + "\n", encoding="utf-8")
                temporary.replace(key_file)
            os.utime(key_file)
        except OSError as error:
            raise UserError(
                f"expected a feature cache folder that can be written, got {self.folder} ({error}): name another "
                "--feature_cache_dir, or use --no_feature_cache"
            ) from error

    def _usable(self, number: int) -> bool:
        """Tell whether a shard is still there and whole, and say so if it is damaged."""
        shard = self._shards[number]
        is_there = shard.path.exists()
        if is_there and not shard.is_whole():
            _warn_of_damage(shard.path)
        return is_there and shard.is_whole()


class _Shard:
    """One file, of which nothing stays in memory. Raises if its frame is not that of a shard."""

    def __init__(self, path: Path, feature_dim: int, dtype: np.dtype) -> None:
        self.path = path
        self._dim, self._dtype = feature_dim, dtype
        digests, features = self._read()
        if path.stem.split("-")[0] != str(len(features)) or len(digests) != 16 * len(features):
            raise ValueError(f"{path}: expected the number of rows that its name says")
        self.checksum = int(path.stem.split("-")[1], 16)
        self.num_bytes = path.stat().st_size
        self._is_whole: bool | None = None

    def digests(self) -> bytes:
        """Read the digests, 16 bytes each, in the order of the rows."""
        return self._read()[0]

    def features(self) -> np.ndarray:
        """Map the features, shape (rows, H); they leave memory when the array does."""
        return self._read()[1]

    def is_whole(self) -> bool:
        """Tell whether the content is exactly what the name promises; looked at once."""
        if self._is_whole is None:
            try:
                digests, features = self._read()
            except (OSError, pa.ArrowException):  # removed or cut since it was opened
                self._is_whole = False
            else:
                self._is_whole = self.path.stem == f"{len(features)}-{_checksum(digests, features)}"
        return self._is_whole

    def _read(self) -> tuple[bytes, np.ndarray]:
        with pa.memory_map(str(self.path)) as source:
            table = pa.ipc.open_stream(source).read_all()
        column = table.column("feature")
        if column.type.value_type != pa.from_numpy_dtype(self._dtype):
            raise ValueError(f"{self.path}: expected {self._dtype} features")
        digests = b"".join(table.column("text").to_pylist())
        blocks = [chunk.flatten().to_numpy().reshape(-1, self._dim) for chunk in column.chunks]
        return digests, blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def _warn_of_damage(path: Path) -> None:
    logger.warning("%s is cut or damaged and will not be used; its texts are encoded again.", path)


def _as_table(digests: Sequence[bytes], features: np.ndarray, schema: pa.Schema) -> pa.Table:
    values = pa.array(features.reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(values, features.shape[1])
    return pa.table({"text": pa.array(list(digests), pa.binary()), "feature": column}).cast(schema)


def _checksum(digests: bytes, features: np.ndarray) -> str:
    checksum = xxhash.xxh3_64(digests)
    checksum.update(np.ascontiguousarray(features).reshape(-1).view(np.uint8).data)
    return checksum.hexdigest()
