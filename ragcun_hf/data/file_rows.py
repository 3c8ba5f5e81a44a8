"""Read the rows of one file, each with its place ("train.jsonl, line 5000"), which `datasets` does not report."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ..errors import UserError
from .rows import Origin, Row, shorten

_KIND_OF_SUFFIX = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "txt",
    ".parquet": "parquet",
}
KNOWN_SUFFIXES = ", ".join(_KIND_OF_SUFFIX) + " (text forms also with .gz)"


def file_kind(path: Path) -> str | None:
    """Return json, csv, tsv, txt or parquet by the suffixes of a path, or None if no reader fits.

    >>> file_kind(Path("train.jsonl.gz")), file_kind(Path("model.bin"))
    ('json', None)
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        kind = _KIND_OF_SUFFIX.get(suffixes[-2]) if len(suffixes) > 1 else None
        return None if kind == "parquet" else kind
    return _KIND_OF_SUFFIX.get(suffixes[-1]) if suffixes else None


def path_of(source: str | os.PathLike[str]) -> Path:
    """Return the path that a data argument names, with `~` resolved; a name that no file can have is a UserError."""
    name = os.fspath(source)
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"expected an existing file or folder, or a Hub dataset 'org/name', got {shorten(name)} ({reason}): check "
            "the path"
        ) from error
    return path


def read_rows(path: Path, is_read: Callable[[str], bool] | None = None) -> Iterator[Row]:
    """Yield the rows of a file, without blank lines; an empty file is a UserError.

    Of a Parquet file, only columns that `is_read` are decoded; the first row has the names of all.

    The file is read row by row, except for a JSON array, which is read whole. The first character of a JSON file, not
    its name, decides whether it is an array, unless its lines are lists. Strings become rows with the one field
    "text"; lists of texts become a query, a positive, and negatives.
    """
    readers = {"json": _read_json, "csv": _read_table, "tsv": _read_table, "txt": _read_txt}
    kind, is_empty = str(file_kind(path)), True
    for row in _read_parquet(path, is_read) if kind == "parquet" else readers[kind](path):
        is_empty = False
        yield row
    if is_empty:
        raise UserError(f"{path}: expected at least one row, got an empty file: check how it was written")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number (from 1) and the text, with its ending, of each line of a UTF-8 file, which may be gzipped."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            # Bytes are split at \n alone; str.splitlines would also split at U+2028, which may occur in JSON.
            for number, raw in enumerate(file, start=1):
                if number == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")  # byte order mark
                yield number, raw.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = error.object[error.start]
        raise UserError(
            f"{path}, line {number}: expected UTF-8 text, got byte 0x{bad:02x}: save the file as UTF-8"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"expected a readable file, got {str(path)!r} ({reason}): check path and content") from error


def _read_json(path: Path) -> Iterator[Row]:
    lines = list(islice((line.strip() for _, line in read_lines(path) if line.strip()), 2))
    is_array = bool(lines) and lines[0].startswith("[")
    if is_array and len(lines) == 2 and all(line.startswith("[") and line.endswith("]") for line in lines):
        is_array = False  # lines of the form ["query", "positive"]
    return _read_json_array(path) if is_array else _read_json_lines(path)


def _read_json_lines(path: Path) -> Iterator[Row]:
    origin = Origin(str(path), "line")
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: also an integer with too many digits
            raise UserError(
                f"{origin.place(number)}: expected one JSON object per line, got {shorten(line.strip())} ({error}): "
                "correct the line, or put the objects into one array [...]"
            ) from error
        yield _json_row(origin, number, value)


def _read_json_array(path: Path) -> Iterator[Row]:
    origin = Origin(str(path), "row")
    text = "".join(line for _, line in read_lines(path))
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}: expected a JSON array, got broken JSON "
            f"({error.msg}, column {error.colno}): correct the file"
        ) from error
    except ValueError as error:
        raise UserError(
            f"{path}, line {_line_of_long_integer(text)}: expected a JSON array, got a number that cannot be read "
            f"({error}): write it as a string or remove it"
        ) from error
    except RecursionError as error:
        raise UserError(f"{path}: expected an array of objects or strings, got deeper nesting: flatten it") from error
    for number, value in enumerate(values, start=1):
        yield _json_row(origin, number, value)


def _line_of_long_integer(text: str) -> int:
    """Return the line of the first integer, outside strings, with more digits than Python converts."""
    string = r'"[^"\\]*(?:\\.[^"\\]*)*"'
    integer = rf"(?<![\d.])(?P<integer>\d{{{sys.get_int_max_str_digits() + 1},}})(?![\d.eE])"
    matches = re.finditer(f"{string}|{integer}", text, flags=re.DOTALL)
    start = next((match.start() for match in matches if match["integer"]), 0)
    return text.count("\n", 0, start) + 1


def _json_row(origin: Origin, number: int, value: Any) -> Row:
    if isinstance(value, list) and len(value) > 1 and all(isinstance(text, str) for text in value):
        value = {"query": value[0], "positive": value[1], "negative": value[2:]}
    if not isinstance(value, (dict, str)):
        raise UserError(
            f"{origin.place(number)}: expected an object or a string, got {shorten(value)}: correct the row (a list "
            "is read if it holds texts: query, positive and negatives)"
        )
    return Row(origin, number, {"text": value} if isinstance(value, str) else value)


def _read_table(path: Path) -> Iterator[Row]:
    origin = Origin(str(path), "line")
    header: list[str] | None = None
    for number, values in (_tsv_records if file_kind(path) == "tsv" else _csv_records)(path):
        if header is None:
            header = [name.strip() for name in values]
            if "" in header or len(set(header)) < len(header):
                raise UserError(
                    f"{origin.place(1)}: expected a header of distinct column names, got {shorten(header)}: "
                    "add a header line"
                )
            continue
        if len(values) != len(header):
            raise UserError(
                f"{origin.place(number)}: expected {len(header)} columns ({', '.join(header)}), got "
                f"{len(values)}: put texts that contain the separator in double quotes"
            )
        yield Row(origin, number, dict(zip(header, values, strict=True)))


def _csv_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses documents above 128 KiB
    lines = (line for _, line in read_lines(path))
    header = next(lines, "")
    # Spreadsheets write semicolons where a comma is the decimal sign.
    delimiter = ";" if ";" in header and "," not in header else ","
    reader = csv.reader(chain([header], lines), delimiter=delimiter, strict=True)
    first_line = 1
    try:
        for values in reader:
            if values:
                yield first_line, values
            first_line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {first_line}: not a valid CSV row ({error}): correct its quotes") from error


def _tsv_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the first line and the fields of each record of a TSV file.

    Most TSV files are written without quoting, and a text of theirs may begin with a quote; a reader of CSV would take
    it and all lines to the next quote for one field. So a line with as many tabs as the header is a record, unless the
    quote of its last field is closed in a line with fewer tabs.
    """
    num_tabs, held, first, is_whole = -1, "", 0, False
    for number, line in read_lines(path):
        num_tabs = line.count("\t") if num_tabs < 0 and line.strip() else num_tabs
        if is_whole and line.count("\t") == num_tabs:
            yield from _tsv_lines(held, first)
            held = ""
        if not held:
            first, is_whole = number, line.count("\t") == num_tabs > 0
        is_open = bool(held) and '"' not in line  # as it was before
        held += line
        fields = None if is_open else _tsv_fields(held, num_tabs)
        if fields is not None:
            if fields != [""]:
                yield first, fields
            held, is_whole = "", False
    if held and not is_whole:
        raise UserError(f"{path}, line {first}: expected a quote that closes, got none: close it, or double it")
    yield from _tsv_lines(held, first)


def _tsv_lines(text: str, number: int) -> Iterator[tuple[int, list[str]]]:
    """Yield lines as records of their own: the quote that seemed to hold them together is part of a text."""
    for line in text.split("\n"):
        if line.strip():
            yield number, [_unquoted(field) for field in line.removesuffix("\r").split("\t")]
        number += 1


# A field in quotes, one whose quotes are still open, or one without quotes around it.
_IN_QUOTES = r'[^"]*(?:""[^"]*)*'
_TSV_FIELD = re.compile(rf'"{_IN_QUOTES}"(?=\t|\Z)|"{_IN_QUOTES}\Z|[^\t]*')
_QUOTED_FIELD = re.compile(rf'"({_IN_QUOTES})"')
_OPEN_FIELD = re.compile(rf'"{_IN_QUOTES}')


def _tsv_fields(text: str, num_tabs: int) -> list[str] | None:
    """Split a record at its tabs, or at those outside quotes if their number is wrong; None if a quote is open."""
    text = text.removesuffix("\n").removesuffix("\r")
    fields = text.split("\t")
    if len(fields) != num_tabs + 1:
        fields, start = [], 0
        while start <= len(text):
            field: Any = _TSV_FIELD.match(text, start)  # matches everywhere: the last kind may be empty
            fields.append(field[0])
            start = field.end() + 1
    return None if _OPEN_FIELD.fullmatch(fields[-1]) else [_unquoted(field) for field in fields]


def _unquoted(field: str) -> str:
    quoted = _QUOTED_FIELD.fullmatch(field)
    return field if quoted is None else quoted[1].replace('""', '"')


def _read_txt(path: Path) -> Iterator[Row]:
    origin = Origin(str(path), "line")
    for number, line in read_lines(path):
        if line.strip():
            yield Row(origin, number, {"text": line.strip()})


def _read_parquet(path: Path, is_read: Callable[[str], bool] | None) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    origin = Origin(str(path), "row")
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns, first = _parquet_columns(file, is_read)
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(origin, number, first | fields if number == 1 else fields)
    # The others are of texts that are no UTF-8, and of dates and time zones that Python does not have.
    except (OSError, pyarrow.ArrowException, ValueError, OverflowError, LookupError) as error:
        raise UserError(f"expected a Parquet file, got {str(path)!r} ({error}): check how it was written") from error


def _parquet_columns(file: Any, is_read: Callable[[str], bool] | None) -> tuple[list[str] | None, dict[str, Any]]:
    """Return the columns to read, and the names of all with the texts of the first row."""
    types = {field.name: field.type for field in file.schema_arrow}
    if is_read is None:
        return None, {}
    texts = [name for name, kind in types.items() if not is_read(name) and holds_text(kind)]
    rows = next(file.iter_batches(batch_size=1, columns=texts), None) if texts else None
    first = dict.fromkeys(types) | (rows.to_pylist()[0] if rows is not None and rows.num_rows else {})
    return [name for name in types if is_read(name)], first


def holds_text(kind: Any) -> bool:
    """Return whether an Arrow type is that of texts, or of lists of texts."""
    from pyarrow import types

    kind = kind.value_type if types.is_list(kind) or types.is_large_list(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind)
