"""Documents: one column of texts, with ids and titles, from any source.

Nothing here knows about queries. A document is its title and its text joined by `document_text`,
wherever it is encoded, compared or counted.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .rows import Row
from .sources import Source, build_table, open_source

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

ID_COLUMNS = ("_id", "id")


def document_text(title: str, text: str) -> str:
    """Join title and text into what is encoded, as BEIR does it.

    Args:
        title: The title, or "".
        text: The text, or "".

    Returns:
        `title + " " + text` without blanks at either end.

    Example:
        >>> document_text("", "One text."), document_text("Title", "One text.")
        ('One text.', 'Title One text.')
    """
    return (title + " " + text).strip()


def is_beir_folder(source: str | os.PathLike[str]) -> bool:
    """Tell whether a folder has BEIR's three parts: corpus.jsonl, queries.jsonl and qrels/."""
    folder = Path(source).expanduser()
    files = os.fspath(source) != "" and (folder / "corpus.jsonl").is_file() and (folder / "queries.jsonl").is_file()
    return files and (folder / "qrels").is_dir()


def text_digest(*texts: str) -> bytes:
    """Return 16 bytes that stand for these texts, to find repetitions without keeping the texts.

    Args:
        *texts: Valid Unicode; where one ends and the next begins matters.

    Returns:
        The digest: equal for equal texts in every process, otherwise different for all practical purposes.

    Example:
        >>> text_digest("ab", "c") == text_digest("a", "bc")
        False
    """
    digest = blake2b(digest_size=16)
    for text in texts:
        data = text.encode("utf-8")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def read_documents(
    source: str | os.PathLike[str],
    *,
    split: str = "train",
    text_column: str = "text",
    title_column: str = "title",
    streaming: bool = False,
    limit: int | None = None,
) -> Dataset | IterableDataset:
    """Read documents, every row checked and repeated ones left out.

    Args:
        source: A file or folder of strings or of rows with a text, a .txt file with one document per
            line, a BEIR folder (its corpus only), or a Hub id `org/name`.
        split: Part of a Hub dataset or folder.
        text_column: Column with the text.
        title_column: Column with the title; may be absent.
        streaming: Return an `IterableDataset`; finding repetitions then still costs about 100 bytes of
            memory per document.
        limit: Read only so many rows of the source; None reads all.

    Returns:
        A dataset with the columns `id` (the source's `_id` or `id`, else the row's position), `title`
        ("" where there is none) and `text`, all strings. A document whose joined text has come before
        is dropped and counted in the log; so is an empty document of a BEIR corpus, where releases have some.

    Raises:
        UserError: If the source cannot be read, a row has no text, or an id comes twice.
    """
    import datasets

    check_limit(limit)
    beir = is_beir_folder(source)
    if beir:
        opened = Source(os.fspath(source), files=(Path(source).expanduser() / "corpus.jsonl",))
    else:
        opened = open_source(source, split=split, streaming=streaming or limit is not None)
    columns = (text_column, title_column)
    features = datasets.Features({name: datasets.Value("string") for name in ("id", "title", "text")})
    return build_table(_distinct_documents, (opened, columns, limit, beir), features, streaming=streaming)


def check_limit(limit: int | None) -> None:
    """Refuse a limit below one row."""
    if limit is not None and limit < 1:
        raise UserError(f"expected a limit of at least 1 row, got {limit}: leave it out to read all rows")


def _distinct_documents(
    opened: Source, columns: tuple[str, str], limit: int | None, empty_allowed: bool
) -> Iterator[tuple[Row, dict[str, Any]]]:
    seen_texts: set[bytes] = set()
    seen_ids: set[bytes] = set()
    repeated = empty = 0
    for position, row in enumerate(islice(opened.rows(), limit)):
        document = _checked_document(row, columns, position, empty_allowed)
        joined = document_text(document["title"], document["text"])
        _refuse_known_id(row, document["id"], seen_ids)
        digest = text_digest(joined)
        if not joined:
            empty += 1
        elif digest in seen_texts:
            repeated += 1
        else:
            seen_texts.add(digest)
            yield row, document
    if not seen_texts:
        raise UserError(f"{opened.name}: expected at least one document that is not empty, got none: check the file")
    if repeated or empty:
        logger.warning("%s: dropped %d repeated and %d empty documents", opened.name, repeated, empty)
    logger.info("%s: %d distinct documents", opened.name, len(seen_texts))


def _checked_document(row: Row, columns: tuple[str, str], position: int, empty_allowed: bool) -> dict[str, str]:
    text_column, title_column = columns
    text = row.optional_text(text_column) if empty_allowed else row.text(text_column)
    return {"id": document_id(row, position), "title": row.optional_text(title_column), "text": text}


def document_id(row: Row, position: int | None = None) -> str:
    """Return a row's id as text; where it has none, its position, if one is given."""
    column = next((name for name in ID_COLUMNS if row.fields.get(name) is not None), None)
    if column is None:
        if position is None:
            row.reject(ID_COLUMNS[0], "an id", "add the field")
        return str(position)
    value = row.fields[column]
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        row.reject(column, "a string or whole number as id", "correct the row")
    return row.valid_unicode(column, str(value))


def _refuse_known_id(row: Row, identifier: str, seen_ids: set[bytes]) -> None:
    digest = text_digest(identifier)
    if digest in seen_ids:
        column = next((name for name in ID_COLUMNS if name in row.fields), ID_COLUMNS[0])
        row.reject(column, "an id that no earlier document has", "give every document its own id")
    seen_ids.add(digest)
