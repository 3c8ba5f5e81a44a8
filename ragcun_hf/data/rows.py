"""One row of a file or dataset, with its place, so that an error names file, line and field."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from ..errors import UserError, for_reader

logger = logging.getLogger(__name__)

_SHOWN_CHARACTERS = 60


def shorten(value: Any) -> str:
    """Return the `repr` of a value for an error message, cut to 60 characters."""
    text = ascii(value) if _has_lone_surrogate(str(value)) else repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


@dataclass(frozen=True)
class Origin:
    """The file or dataset that rows come from, and the unit in which messages count them."""

    name: str  # a file, or a Hub dataset with its split
    unit: str  # "line" or "row", counted from 1, or "row index", counted from 0

    def place(self, number: int) -> str:
        """Name one row, as in `train.jsonl, line 5000`."""
        return f"{self.name}, {self.unit} {number}"


class Row(NamedTuple):
    """One row as it was read, with its place."""

    origin: Origin
    number: int
    fields: dict[str, Any]

    def reject(self, field: str, expected: str, advice: str) -> NoReturn:
        """Raise a UserError that names file, row, field and value."""
        if field in self.fields:
            found = shorten(self.fields[field])
        else:
            names = ", ".join(shorten(name) for name in list(self.fields)[:12]) or "none"
            found = f"no such field (it has {names})"
        place = self.origin.place(self.number)
        raise UserError(f"{place}, field '{field}': expected {expected}, got {found}: {advice}")

    def text(self, field: str) -> str:
        """Return a required text: not blank, valid Unicode, exactly as it is in the file."""
        value = self.fields.get(field)
        if field not in self.fields:
            self.reject(field, "a text", "add it (a CSV file needs a header line), or name another column")
        if not isinstance(value, str) or not value.strip():
            self.reject(field, "a text that is not blank", "correct or remove the row")
        return self.valid_unicode(field, value)

    def present_text(self, field: str) -> str:
        """Return a text that may be blank or null, but not missing: a missing one may have another name."""
        if field not in self.fields:
            self.reject(field, "a text, which may be empty", "rename the field that holds it")
        return self.optional_text(field)

    def optional_text(self, field: str) -> str:
        """Return a text that may be blank; a missing or null one is returned as ""."""
        value = self.fields.get(field)
        if value is None:
            return ""
        if not isinstance(value, str):
            self.reject(field, "a text or nothing", "correct or remove the row")
        return self.valid_unicode(field, value)

    def valid_unicode(self, field: str, value: str) -> str:
        """Return the text, or reject the row if it contains half a surrogate pair, which UTF-8 cannot encode."""
        if _has_lone_surrogate(value):
            self.reject(field, "valid Unicode", "remove or complete the half surrogate pair (\\ud800-\\udfff)")
        return value


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, but not again when the same data are read again."""
    logger.warning(for_reader(message))


def name_unused_columns(row: Row, is_read: Callable[[str], bool], advice: str) -> None:
    """Name the fields of a file's first row that hold sentences, or lists, but are not read."""
    unused = [name for name, value in row.fields.items() if not is_read(name) and _looks_like_data(value)]
    if unused:
        warn_once(f"{row.origin.name}: not read: {', '.join(map(repr, unused[:12]))}. {advice}")


def _looks_like_data(value: Any) -> bool:
    if isinstance(value, list) and value:
        return isinstance(value[0], dict) or _looks_like_data(value[0])
    return isinstance(value, str) and len(value.split()) > 1


def _has_lone_surrogate(text: str) -> bool:
    try:
        text.encode("utf-8")  # several times faster than a regular expression
    except UnicodeEncodeError:
        return True
    return False
