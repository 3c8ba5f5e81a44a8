"""The documents of a BEIR folder, left on the disk where they are many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash
from tqdm.auto import tqdm

from ..errors import UserError
from .documents import document_id, document_text
from .file_rows import read_rows
from .mapped_column import MappedColumn

_LARGEST_IN_MEMORY = 2**26  # bytes of a file
_LAYOUT = 1  # of the columns on disk; one more with every change of what they hold


def read_corpus(path: Path) -> tuple[Sequence[str], Sequence[str]]:
    """Read corpus.jsonl.

    Args:
        path: The file. One of more than 64 MiB is written, once until it changes, to the cache of `datasets`
            (`HF_DATASETS_CACHE`), and read from there.

    Returns:
        Ids, and texts as `document_text` joins title and text; a text may be "". Slices of both are lists.

    Raises:
        UserError: If a line is malformed, an id comes twice, or there is no room for the copy.
    """
    ids: Sequence[str]
    texts: Sequence[str]
    if path.stat().st_size > _LARGEST_IN_MEMORY:
        files = _columns_on_disk(path)
        ids, texts = MappedColumn(files, "id"), MappedColumn(files, "text")
    else:
        documents = list(_documents(path))
        ids, texts = ([document[name] for document in documents] for name in ("id", "text"))
    _refuse_repeated_ids(path, ids)
    return ids, texts


def _columns_on_disk(path: Path) -> list[str]:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    facts = path.stat()
    inputs = {"path": str(path.resolve()), "layout": _LAYOUT, "size": facts.st_size, "changed": facts.st_mtime_ns}
    columns = datasets.Features({name: datasets.Value("string") for name in ("id", "text")})
    try:
        table = datasets.Dataset.from_generator(_rows_on_disk, features=columns, gen_kwargs=inputs)
    except (DatasetGenerationError, OSError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        if isinstance(cause, UserError):
            raise cause from None
        if not isinstance(cause, OSError):
            raise
        raise UserError(
            f"expected room for a copy of {path} in {datasets.config.HF_DATASETS_CACHE}, got {cause}: free some "
            "space, or set HF_DATASETS_CACHE to another folder"
        ) from error
    return [file["filename"] for file in table.cache_files]


def _rows_on_disk(path: str, **_: int) -> Iterator[dict[str, str]]:
    yield from tqdm(_documents(Path(path)), desc=f"Copying {Path(path).name}", unit=" documents")


def _documents(path: Path) -> Iterator[dict[str, str]]:
    for row in read_rows(path):
        text = document_text(row.optional_text("title"), row.optional_text("text"))
        yield {"id": document_id(row), "text": text}


def _refuse_repeated_ids(path: Path, ids: Sequence[str]) -> None:
    """Look for equal checksums, 8 bytes an id; where there are some, read the file again to name the line."""
    checksums = np.fromiter(map(_checksum, ids), dtype=np.uint64, count=len(ids))
    checksums.sort()
    suspects = set(checksums[1:][checksums[1:] == checksums[:-1]].tolist())
    seen: set[str] = set()
    for row in read_rows(path) if suspects else ():
        identifier = document_id(row)
        if identifier in seen:
            row.reject("_id", "an id that no earlier line has", "give every line its own id")
        if _checksum(identifier) in suspects:
            seen.add(identifier)


def _checksum(identifier: str) -> int:
    return xxhash.xxh3_64_intdigest(identifier.encode("utf-8"))
