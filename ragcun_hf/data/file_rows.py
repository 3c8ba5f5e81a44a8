"""Rows out of one file, each with the place it came from.

The readers of `datasets` are fast but name neither the line nor the field when a file is broken, so
text files are read here, line by line, and every row keeps its place ("train.jsonl, line 5000").
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UserError
from .rows import Origin, Row, shorten

KIND_OF_SUFFIX = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "txt",
    ".parquet": "parquet",
}


def file_kind(path: Path) -> str | None:
    """Return how a file of this name is read, or None if it cannot be.

    Args:
        path: Only its suffixes are looked at.

    Returns:
        "json", "csv", "tsv", "txt" or "parquet".

    Example:
        >>> file_kind(Path("train.jsonl.gz")), file_kind(Path("model.bin"))
        ('json', None)
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        kind = KIND_OF_SUFFIX.get(suffixes[-2]) if len(suffixes) > 1 else None
        return None if kind == "parquet" else kind
    return KIND_OF_SUFFIX.get(suffixes[-1]) if suffixes else None


def read_rows(path: Path) -> Iterator[Row]:
    """Read a file row by row; the whole file is never held unless it is one JSON array.

    Args:
        path: A file whose suffix is known (`KIND_OF_SUFFIX`), text files optionally gzipped. Whether a
            JSON file is one array or JSON Lines is seen from its first character. Strings, in JSON or
            as lines of a .txt file, become rows with the one field "text".

    Yields:
        Row: The rows, blank lines left out.

    Raises:
        UserError: If the file cannot be read, is not what its suffix says, or holds no row.
    """
    readers = {"json": _read_json, "csv": _read_csv, "tsv": _read_csv, "txt": _read_txt, "parquet": _read_parquet}
    kind = file_kind(path)
    if kind is None:
        raise UserError(f"expected a file ending in {known_suffixes()}, got {str(path)!r}: convert or rename the file")
    empty = True
    for row in readers[kind](path):
        empty = False
        yield row
    if empty:
        raise UserError(f"{path}: expected at least one row, got an empty file: check how it was written")


def known_suffixes() -> str:
    """List the file endings that can be read, for messages."""
    return ", ".join(KIND_OF_SUFFIX) + " (text forms also with .gz)"


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Decode a UTF-8 file line by line.

    Args:
        path: Text file, gzipped if it ends in .gz. A byte order mark is removed.

    Yields:
        tuple[int, str]: Line number (from 1) and the line with its line ending.

    Raises:
        UserError: If the file cannot be opened or a line is not UTF-8.
    """
    try:
        with _open_bytes(path) as file:
            # Bytes are split at \n alone: str.splitlines also breaks at U+2028, which JSON may hold.
            for number, raw in enumerate(file, start=1):
                if number == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                yield number, raw.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = error.object[error.start]
        raise UserError(
            f"{path}, line {number}: expected UTF-8 text, got byte 0x{bad:02x}: save the file as UTF-8"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"expected a readable file, got {str(path)!r} ({reason}): check path and content") from error


def _open_bytes(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _read_json(path: Path) -> Iterator[Row]:
    first = next((line.lstrip() for _, line in read_lines(path) if line.strip()), "")
    return _read_json_array(path) if first.startswith("[") else _read_json_lines(path)


def _read_json_lines(path: Path) -> Iterator[Row]:
    origin = Origin(str(path), "line")
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:  # not only JSONDecodeError: an integer can be too long
            raise UserError(
                f"{origin.place(number)}: expected one JSON object per line, got {shorten(line.strip())} ({error}): "
                "correct the line, or put the objects into one array [...]"
            ) from error
        yield Row(origin, number, _fields(value, origin, number))


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
        yield Row(origin, number, _fields(value, origin, number))


def _line_of_long_integer(text: str) -> int:
    """Return the line of the first integer, outside strings, that has more digits than Python converts."""
    string = r'"[^"\\]*(?:\\.[^"\\]*)*"'
    integer = rf"(?<![\d.])(?P<integer>\d{{{sys.get_int_max_str_digits() + 1},}})(?![\d.eE])"
    matches = re.finditer(f"{string}|{integer}", text, flags=re.DOTALL)
    start = next((match.start() for match in matches if match["integer"]), 0)
    return text.count("\n", 0, start) + 1


def _fields(value: Any, origin: Origin, number: int) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    if isinstance(value, str):
        return {"text": value}
    raise UserError(f"{origin.place(number)}: expected an object or a string, got {shorten(value)}: correct the row")


def _read_csv(path: Path) -> Iterator[Row]:
    tabs = file_kind(path) == "tsv"
    origin = Origin(str(path), "line")
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses documents above 128 KiB
    reader = csv.reader((line for _, line in read_lines(path)), delimiter="\t" if tabs else ",", strict=True)
    header: list[str] | None = None
    first_line = 1
    try:
        for values in reader:
            if header is None and values:
                header = _checked_header(values, origin)
            elif header is not None and values:
                yield Row(origin, first_line, _csv_fields(header, values, origin, first_line))
            first_line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{origin.place(first_line)}: not a valid CSV row ({error}): correct its quotes") from error


def _checked_header(values: list[str], origin: Origin) -> list[str]:
    header = [name.strip() for name in values]
    if "" in header or len(set(header)) < len(header):
        raise UserError(
            f"{origin.place(1)}: expected a header of distinct column names, got {shorten(header)}: add a header line"
        )
    return header


def _csv_fields(header: list[str], values: list[str], origin: Origin, line: int) -> dict[str, Any]:
    if len(values) != len(header):
        raise UserError(
            f"{origin.place(line)}: expected {len(header)} columns ({', '.join(header)}), got {len(values)}: "
            "put texts that hold the separator in double quotes"
        )
    return dict(zip(header, values, strict=True))


def _read_txt(path: Path) -> Iterator[Row]:
    origin = Origin(str(path), "line")
    for number, line in read_lines(path):
        if line.strip():
            yield Row(origin, number, {"text": line.strip()})


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    origin = Origin(str(path), "row")
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(origin, number, fields)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"expected a Parquet file, got {str(path)!r} ({error}): check how it was written") from error
