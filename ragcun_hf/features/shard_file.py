"""One Arrow file of features: text digests and vectors under a name that says what is in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from ..files import replaced_file


def write_shard(folder: Path, digests: Sequence[bytes], features: np.ndarray) -> str:
    """Write a file, whole or not at all.

    Args:
        folder: Where.
        digests: What `text_digest` gives for each text.
        features: Shape (len(digests), H), of the dtype that they are to have on disk.

    Returns:
        Its name.

    Raises:
        OSError: If the folder is not there, or the disk refuses.
    """
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    name = f"{len(digests)}-{_checksum(b''.join(digests), features)}.arrow"
    schema = Features({"text": Value("binary"), "feature": List(Value(features.dtype.name), length=features.shape[1])})
    # Not waited for: what a power cut damages is noticed by its checksum, and encoded again.
    with (
        replaced_file(folder / name, is_synced=False) as temporary,
        ArrowWriter(path=str(temporary), features=schema, writer_batch_size=len(digests)) as writer,
    ):
        writer.write_table(_as_table(digests, features, schema.arrow_schema))
        writer.finalize()
    return name


class ShardFile:
    """One file, of which nothing stays in memory.

    Args:
        path: `<rows>-<checksum>.arrow`.
        feature_dim: H.
        dtype: Of the features.

    Raises:
        OSError: If it cannot be read.
        ValueError: If its frame is not that of a shard.

    Attributes:
        path: As given.
        checksum: Of the content, as the name says.
        num_bytes: The size of the file.
    """

    def __init__(self, path: Path, feature_dim: int, dtype: np.dtype) -> None:
        self.path = path
        self._dim, self._dtype = feature_dim, dtype
        digests, features = self._read()
        num_rows, _, checksum = path.stem.partition("-")
        if num_rows != str(len(features)) or len(digests) != 16 * len(features):
            raise ValueError(f"{path}: expected the number of rows that its name says")
        self.checksum = int(checksum, 16)
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


def _as_table(digests: Sequence[bytes], features: np.ndarray, schema: pa.Schema) -> pa.Table:
    values = pa.array(features.reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(values, features.shape[1])
    return pa.table({"text": pa.array(list(digests), pa.binary()), "feature": column}).cast(schema)


def _checksum(digests: bytes, features: np.ndarray) -> str:
    checksum = xxhash.xxh3_64(digests)
    checksum.update(np.ascontiguousarray(features).reshape(-1).view(np.uint8).data)
    return checksum.hexdigest()
