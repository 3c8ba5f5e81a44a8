"""Read the rows of one file, each with its place ("train.jsonl, line 5000"), which `datasets` does not report."""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterator
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


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file, without blank lines; an empty file is a UserError.

    The file is read row by row, except for a JSON array, which is read whole. The first character of a JSON file, not
    its name, decides whether it is an array. Strings become rows with the one field "text".
    """
    readers = {"json": _read_json, "csv": _read_csv, "tsv": _read_csv, "txt": _read_txt, "parquet": _read_parquet}
    is_empty = True
    for row in readers[str(file_kind(path))](path):
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
    first = next((line.lstrip() for _, line in read_lines(path) if line.strip()), "")
    return _read_json_array(path) if first.startswith("[") else _read_json_lines(path)


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
    if not isinstance(value, (dict, str)):
        place = origin.place(number)
        raise UserError(f"{place}: expected an object or a string, got {shorten(value)}: correct the row")
    return Row(origin, number, {"text": value} if isinstance(value, str) else value)


def _read_csv(path: Path) -> Iterator[Row]:
    origin = Origin(str(path), "line")
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses documents above 128 KiB
    separator = "\t" if file_kind(path) == "tsv" else ","
    reader = csv.reader((line for _, line in read_lines(path)), delimiter=separator, strict=True)
    header: list[str] | None = None
    first_line = 1
    try:
        for values in reader:
            if header is None and values:
                header = [name.strip() for name in values]
                if "" in header or len(set(header)) < len(header):
                    raise UserError(
                        f"{origin.place(1)}: expected a header of distinct column names, got {shorten(header)}: "
                        "add a header line"
                    )
            elif header is not None and values:
                if len(values) != len(header):
                    raise UserError(
                        f"{origin.place(first_line)}: expected {len(header)} columns ({', '.join(header)}), got "
                        f"{len(values)}: put texts that contain the separator in double quotes"
                    )
                yield Row(origin, first_line, dict(zip(header, values, strict=True)))
            first_line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{origin.place(first_line)}: not a valid CSV row ({error}): correct its quotes") from error


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
