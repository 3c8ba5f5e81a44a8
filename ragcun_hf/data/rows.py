"""A row that knows where it came from.

It can turn any complaint about one of its fields into the one-line error that users see: file, line,
field, what was expected, what came.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from ..errors import UserError

_SHOWN_CHARACTERS = 60


def shorten(value: Any) -> str:
    """Show a value in an error message: its `repr`, cut to 60 characters.

    Args:
        value: Anything.

    Returns:
        One line of text.

    Example:
        >>> shorten("a" * 100)
        "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa..."
    """
    text = ascii(value) if _has_lone_surrogate(str(value)) else repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


@dataclass(frozen=True)
class Origin:
    """Where a row came from.

    Attributes:
        name: The file, or the Hub dataset with its split.
        unit: What its rows are counted in: "line" (from 1), "row" (from 1) or "row index" (from 0).
    """

    name: str
    unit: str

    def place(self, number: int) -> str:
        """Name one row, as in `train.jsonl, line 5000`."""
        return f"{self.name}, {self.unit} {number}"


class Row(NamedTuple):
    """One row as it was read, with the place it came from."""

    origin: Origin
    number: int
    fields: dict[str, Any]

    def reject(self, field: str, expected: str, advice: str) -> NoReturn:
        """Raise the error that names file, row, field and value."""
        found = (
            shorten(self.fields[field]) if field in self.fields else f"no such field (it has {self._field_names()})"
        )
        raise UserError(
            f"{self.origin.place(self.number)}, field '{field}': expected {expected}, got {found}: {advice}"
        )

    def text(self, field: str) -> str:
        """Return a field that has to hold text.

        Args:
            field: Name of the column.

        Returns:
            The text as it stands in the file, not blank and valid Unicode.

        Raises:
            UserError: If the field is missing, not a string, blank, or holds half a surrogate pair.
        """
        value = self.fields.get(field)
        if field not in self.fields:
            self.reject(field, "a text", "add it (a CSV file needs a header line), or name another column")
        if not isinstance(value, str) or not value.strip():
            self.reject(field, "a text that is not blank", "correct or remove the row")
        return self.valid_unicode(field, value)

    def optional_text(self, field: str) -> str:
        """Return a text that may be absent, null or blank; "" stands for all three."""
        value = self.fields.get(field)
        if value is None:
            return ""
        if not isinstance(value, str):
            self.reject(field, "a text or nothing", "correct or remove the row")
        return self.valid_unicode(field, value)

    def valid_unicode(self, field: str, value: str) -> str:
        """Return the text unless it holds half a surrogate pair, which no UTF-8 file can store."""
        if _has_lone_surrogate(value):
            self.reject(
                field, "valid Unicode", "a half surrogate pair (\\ud800-\\udfff) has to be removed or completed"
            )
        return value

    def _field_names(self) -> str:
        return ", ".join(repr(name) for name in list(self.fields)[:12]) or "none"


def _has_lone_surrogate(text: str) -> bool:
    if text.isascii():
        return False
    try:
        text.encode("utf-8")  # several times faster than looking for them with a pattern
    except UnicodeEncodeError:
        return True
    return False
