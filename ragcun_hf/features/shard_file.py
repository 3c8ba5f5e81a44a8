"""One Arrow file of the feature cache: text digests and features, named `<rows>-<checksum>.arrow`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from ..files import replaced_file


def write_shard(folder: Path, digests: Sequence[bytes], features: np.ndarray) -> str:
    """Write features, shape (len(digests), H), in their dtype, as a whole or not at all; return the file's name."""
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    name = f"{len(digests)}-{_checksum(b''.join(digests), features)}.arrow"
    dim = features.shape[1]
    schema = Features({"text": Value("binary"), "feature": List(Value(features.dtype.name), length=dim)})
    column = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), dim)
    table = pa.table({"text": pa.array(list(digests), pa.binary()), "feature": column}).cast(schema.arrow_schema)
    # Not synced: the checksum reveals what a power cut damages, and those texts are encoded again.
    with (
        replaced_file(folder / name, is_synced=False) as temporary,
        ArrowWriter(path=str(temporary), features=schema, writer_batch_size=len(digests)) as writer,
    ):
        writer.write_table(table)
        writer.finalize()
    return name


class ShardFile:
    """A shard on disk; none of its content stays in memory. `checksum` is that in its name.

    An unreadable file is an OSError; another dtype or another number of rows than in its name is a ValueError.
    """

    def __init__(self, path: Path, feature_dim: int, dtype: np.dtype) -> None:
        self.path = path
        self._dim, self._dtype = feature_dim, dtype
        digests, features = self.read()
        num_rows, _, checksum = path.stem.partition("-")
        if num_rows != str(len(features)) or len(digests) != 16 * len(features):
            raise ValueError(f"{path}: expected the number of rows that its name says")
        self.checksum = int(checksum, 16)
        self.num_bytes = path.stat().st_size

    @cached_property
    def is_whole(self) -> bool:
        """Whether the content has the checksum in the name; computed once."""
        try:
            digests, features = self.read()
        except (OSError, pa.ArrowException):  # removed or cut since it was opened
            return False
        return self.path.stem == f"{len(features)}-{_checksum(digests, features)}"

    def read(self) -> tuple[bytes, np.ndarray]:
        """Return the text digests, 16 bytes a row, and the features, (rows, H), mapped into memory while in use."""
        with pa.memory_map(str(self.path)) as source:
            table = pa.ipc.open_stream(source).read_all()
        column = table.column("feature")
        if column.type.value_type != pa.from_numpy_dtype(self._dtype):
            raise ValueError(f"{self.path}: expected {self._dtype} features")
        digests = b"".join(table.column("text").to_pylist())
        blocks = [chunk.flatten().to_numpy().reshape(-1, self._dim) for chunk in column.chunks]
        return digests, blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def _checksum(digests: bytes, features: np.ndarray) -> str:
    checksum = xxhash.xxh3_64(digests)
    checksum.update(np.ascontiguousarray(features).reshape(-1).view(np.uint8).data)
    return checksum.hexdigest()
