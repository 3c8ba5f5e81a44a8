"""Features on disk, by text: Arrow shards under a key of everything that changes a feature.

    <folder>/<key>/key.json               what the key stands for, for people
    <folder>/<key>/<rows>-<checksum>.arrow   one shard: text digests and their features

A shard is written to a temporary name and renamed when complete; its name carries the number of its rows and the
checksum of its content, so that a cut or damaged file is recognised and never read. Writers, be they threads,
processes or machines, never share a temporary file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from ..errors import UserError

logger = logging.getLogger(__name__)


class FeatureCache:
    """The features of one key: one encoder, one way to use it."""

    def __init__(self, folder: str | Path, key_parts: dict[str, Any], *, feature_dim: int) -> None:
        description = json.dumps(key_parts, sort_keys=True, indent=1)
        key = hashlib.blake2b(description.encode(), digest_size=12).hexdigest()
        self.folder = Path(folder) / key
        self.feature_dim = feature_dim
        self._make_folder(description)
        self._shards: list[np.ndarray] = []
        self._places: dict[bytes, tuple[int, int]] = {}
        for path in sorted(self.folder.glob("*.arrow")):
            self._open(path)

    def __len__(self) -> int:
        return len(self._places)

    def missing(self, digests: Sequence[bytes]) -> list[int]:
        """Return the positions of digests that have no feature yet."""
        return [position for position, digest in enumerate(digests) if digest not in self._places]

    def read(self, digests: Sequence[bytes]) -> np.ndarray:
        """Return (len(digests), H) float32 features; every digest must be present."""
        features = np.empty((len(digests), self.feature_dim), dtype=np.float32)
        places = np.array([self._places[digest] for digest in digests], dtype=np.int64).reshape(-1, 2)
        for shard in np.unique(places[:, 0]):
            rows = np.flatnonzero(places[:, 0] == shard)
            features[rows] = self._shards[shard][places[rows, 1]]
        return features

    def write(self, digests: Sequence[bytes], features: np.ndarray) -> None:
        """Add one shard, whole or not at all.

        Args:
            digests: What `text_digest` gives for each text.
            features: Shape (len(digests), H).

        Raises:
            UserError: If the disk has no room or refuses; nothing half-written stays.
        """
        from datasets import Features, List, Value
        from datasets.arrow_writer import ArrowWriter

        features = np.ascontiguousarray(features, dtype=np.float32)
        name = f"{len(digests)}-{_checksum(b''.join(digests), features)}.arrow"
        schema = Features({"text": Value("binary"), "feature": List(Value("float32"), length=self.feature_dim)})
        temporary = self.folder / f".{name}.{uuid.uuid4().hex}.tmp"
        try:
            with ArrowWriter(path=str(temporary), features=schema) as writer:
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
        self._open(self.folder / name)

    def _make_folder(self, description: str) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            key_file = self.folder / "key.json"
            if not key_file.exists():
                temporary = self.folder / f".key.{uuid.uuid4().hex}.tmp"
                temporary.write_text(description + "\n", encoding="utf-8")
                temporary.replace(key_file)
        except OSError as error:
            raise UserError(
                f"expected a feature cache folder that can be written, got {self.folder} ({error}): name another "
                "--feature_cache_dir, or use --no_feature_cache"
            ) from error

    def _open(self, path: Path) -> None:
        shard = _read_shard(path, self.feature_dim)
        if shard is None:
            logger.warning("%s is cut or damaged and will not be used; its texts are encoded again.", path)
            return
        digests, features = shard
        self._shards.append(features)
        number = len(self._shards) - 1
        self._places.update((digest, (number, row)) for row, digest in enumerate(digests))


def _as_table(digests: Sequence[bytes], features: np.ndarray, schema: pa.Schema) -> pa.Table:
    values = pa.array(features.reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(values, features.shape[1])
    return pa.table({"text": pa.array(list(digests), pa.binary()), "feature": column}).cast(schema)


def _read_shard(path: Path, feature_dim: int) -> tuple[list[bytes], np.ndarray] | None:
    """Map one shard into memory, or return None if it is not exactly what its name promises."""
    try:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_stream(source).read_all()
        digests = table.column("text").to_pylist()
        chunks = [chunk.flatten().to_numpy().reshape(-1, feature_dim) for chunk in table.column("feature").chunks]
    except (OSError, pa.ArrowException, KeyError, ValueError):
        return None
    features = chunks[0] if len(chunks) == 1 else np.concatenate([np.empty((0, feature_dim), np.float32), *chunks])
    is_whole = path.stem == f"{len(digests)}-{_checksum(b''.join(digests), features)}"
    return (digests, features) if is_whole and len(digests) == len(features) else None


def _checksum(digests: bytes, features: np.ndarray) -> str:
    checksum = xxhash.xxh3_64(digests)
    checksum.update(np.ascontiguousarray(features).tobytes())
    return checksum.hexdigest()
