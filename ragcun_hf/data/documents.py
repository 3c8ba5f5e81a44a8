"""Read documents (id, title and text) from any source; their title and text are always joined by `document_text`."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .file_rows import path_of
from .rows import Row, name_unused_columns, warn_once
from .sources import Source, build_table, check_limit, open_source

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

ID_COLUMNS = ("_id", "id")


def document_text(title: str, text: str) -> str:
    """Join title and text with a space, as BEIR does, and strip the result.

    >>> document_text("", "One text."), document_text("Title", "One text.")
    ('One text.', 'Title One text.')
    """
    return (title + " " + text).strip()


def document_texts(documents: Iterable[Mapping[str, str]]) -> list[str]:
    """Return the text of each document of `read_documents`, with its title."""
    return [document_text(row["title"], row["text"]) for row in documents]


def is_beir_folder(source: str | os.PathLike[str]) -> bool:
    """Return whether this is a folder with corpus.jsonl, queries.jsonl and qrels/."""
    folder = path_of(source)
    files = os.fspath(source) != "" and (folder / "corpus.jsonl").is_file() and (folder / "queries.jsonl").is_file()
    return files and (folder / "qrels").is_dir()


def text_digest(*texts: str) -> bytes:
    """Return 16 bytes that identify these texts, in this order, in every process."""
    digest = blake2b(digest_size=16)
    for text in texts:
        data = text.encode("utf-8")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def text_position(*texts: str) -> float:
    """Hash texts to a number in [0, 1), uniformly; a text that is assigned to a split by it stays there."""
    return int.from_bytes(text_digest(*texts)[:8], "little") / 2**64


def read_documents(
    source: Any,
    *,
    split: str = "train",
    text_column: str = "text",
    title_column: str = "title",
    streaming: bool = False,
    limit: int | None = None,
    unique_ids: bool = True,
    name: str = "the dataset",
) -> Dataset | IterableDataset:
    """Read documents, check every row, and drop repeated texts.

    The source is a file or folder of strings or of rows with a text, a .txt file with one document per line, a BEIR
    folder (its corpus only), a Hub dataset `org/name`, or a dataset or list itself, which messages call `name`.
    `limit` is the number of rows to read. A stream, too, needs about 100 bytes per document to find repetitions.

    Returns string columns `id` (the source's `_id` or `id`, else the row's position), `title` ("" if missing) and
    `text`. Repeated documents are dropped, as are empty documents of a BEIR corpus, which some releases have. A
    source that cannot be read, a row without a text and two rows with the same id are a UserError; without
    `unique_ids`, such rows, which may be passages of one document, are read and counted in a warning.
    """
    import datasets

    is_beir = isinstance(source, (str, os.PathLike)) and is_beir_folder(source)
    if is_beir:
        check_limit(limit)
        opened = Source(os.fspath(source), files=(Path(source).expanduser() / "corpus.jsonl",), limit=limit)
    else:
        opened = open_source(source, split=split, streaming=streaming, limit=limit, name=name)
    return build_table(
        _distinct_documents,
        datasets.Features({name: datasets.Value("string") for name in ("id", "title", "text")}),
        streaming=streaming,
        opened=opened,
        columns=(text_column, title_column),
        is_beir=is_beir,
        unique_ids=unique_ids or is_beir,  # judgements name the documents of a BEIR corpus
    )


def _distinct_documents(
    opened: Source, columns: tuple[str, str], is_beir: bool, unique_ids: bool
) -> Iterator[dict[str, str]]:
    text_column, title_column = columns
    seen_texts: set[bytes] = set()
    seen_ids: set[bytes] = set()
    num_repeated = num_empty = num_shared_ids = 0
    is_read = frozenset((*ID_COLUMNS, *columns)).__contains__
    for position, row in enumerate(opened.rows(is_read)):
        if position == 0:
            name_unused_columns(row, is_read, "If they are meant, name them with --text_column and --title_column.")
        text = row.present_text(text_column) if is_beir else row.text(text_column)
        identifier, title = document_id(row, position), row.optional_text(title_column)
        if text_digest(identifier) in seen_ids:
            num_shared_ids += 1
            if unique_ids:
                _reject_repeated_id(row)
        seen_ids.add(text_digest(identifier))
        joined = document_text(title, text)
        digest = text_digest(joined)
        if not joined:
            num_empty += 1
        elif digest in seen_texts:
            num_repeated += 1
        else:
            seen_texts.add(digest)
            yield {"id": identifier, "title": title, "text": text}
    if not seen_texts:
        raise UserError(f"{opened.name}: expected at least one document that is not empty, got none: check the file")
    if num_shared_ids:
        warn_once(f"{opened.name}: {num_shared_ids} documents have the id of an earlier one; only texts are used here")
    if num_repeated or num_empty:
        logger.warning("%s: dropped %d repeated and %d empty documents", opened.name, num_repeated, num_empty)
    logger.info("%s: %d distinct documents", opened.name, len(seen_texts))


def _reject_repeated_id(row: Row) -> None:
    column = next((name for name in ID_COLUMNS if name in row.fields), ID_COLUMNS[0])
    row.reject(column, "an id that no earlier document has", "give every document its own id")


def document_id(row: Row, position: int | None = None) -> str:
    """Return the id of a row as text; a row without one is named by its position, or rejected if none is given."""
    column = next((name for name in ID_COLUMNS if row.fields.get(name) is not None), None)
    if column is None:
        if position is None:
            row.reject(ID_COLUMNS[0], "an id", "add the field")
        return str(position)
    value = row.fields[column]
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        row.reject(column, "a string or whole number as id", "correct the row")
    return row.valid_unicode(column, str(value))
