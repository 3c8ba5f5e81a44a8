"""How numbers look in a model card, and the check that each of them stems from a file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UserError

NOT_MEASURED = "not measured"

_FIGURE_DIGITS = 4
_LARGE_FIGURE = 10  # effective ranks and the like need no four decimals

# Decimals count wherever they stand; whole numbers only where they cannot be part of a name (NDCG@10, L6-v2).
_DECIMAL = r"\d+(?:,\d{3})*\.\d+(?:e[+-]?\d+)?|\.\d+|\d+e-\d+"
_WHOLE = r"(?<![\w@/.-])\d{1,3}(?:,\d{3})+(?![\w-])|(?<![\w@/.-])\d{3,}(?![\w-])"
_NUMBER = re.compile(rf"(?:(?<![\w.)\]])[+-])?(?:{_DECIMAL})|{_WHOLE}")
_ADDRESS = re.compile(r"https?://[^\s)>\"]+|arXiv:\d+\.\d+|\]\([^)\s]*\)")


@dataclass(frozen=True)
class AllowedNumbers:
    """What a card may show."""

    numbers: frozenset[str]
    """Numbers, written as the card writes them."""
    texts: tuple[str, ...]
    """Texts of the files that hold digits (versions, dates, commands), longest first; quoted whole."""


def format_figure(value: float | None) -> str:
    """Write a measured figure.

    Args:
        value: The figure, or None if there is none.

    Returns:
        Four decimals below 10, one from there on; "not measured" for None.

    Example:
        >>> format_figure(0.65), format_figure(100.46), format_figure(None)
        ('0.6500', '100.5', 'not measured')
    """
    if value is None:
        return NOT_MEASURED
    return f"{value:.1f}" if abs(value) >= _LARGE_FIGURE else f"{value:.{_FIGURE_DIGITS}f}"


def format_difference(value: float | None) -> str:
    """Write a difference.

    Args:
        value: The difference, or None if there is none.

    Returns:
        Four decimals with the sign; "not measured" for None.

    Example:
        >>> format_difference(0.01), format_difference(-0.00001)
        ('+0.0100', '+0.0000')
    """
    if value is None:
        return NOT_MEASURED
    return f"{round(value, _FIGURE_DIGITS) + 0.0:+.{_FIGURE_DIGITS}f}"  # + 0.0 turns -0.0 into 0.0


def format_setting(value: Any) -> str:
    """Write a setting or a count as a person would.

    Args:
        value: Out of a JSON file.

    Returns:
        One line that is safe inside a table.

    Example:
        >>> format_setting(10000), format_setting(0.0005), format_setting([True, None])
        ('10,000', '0.0005', 'yes, not recorded')
    """
    if value is None:
        return "not recorded"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(format_setting(item) for item in value) or "none"
    return " ".join(str(value).split()).replace("|", "\\|")


def allowed_numbers(
    results: Mapping[str, Any],
    training_record: Mapping[str, Any] | None = None,
    published: Mapping[str, Any] | None = None,
    *,
    comparison: Mapping[str, Any] | None = None,
    repo_id: str | None = None,
) -> AllowedNumbers:
    """Collect what a card may show: every number of the files, in the forms the card writes numbers in.

    The training log is left out: among thousands of losses any invented figure would find its like.

    Args:
        results: As from `read_results`.
        training_record: As in a model folder, or None.
        published: One recipe's published figures, or None.
        comparison: As from `comparison_of_model`, or None.
        repo_id: Id on the Hub that the card names; it may hold a version number.

    Returns:
        Numbers and texts, differences to the base included.
    """
    record = {key: value for key, value in (training_record or {}).items() if key != "log_history"}
    names = [repo_id, repo_id.split("/")[-1]] if repo_id else []
    sources = (results, record, published or {}, comparison or {}, names)
    numbers: set[str] = set()
    texts: set[str] = set()
    for value in (leaf for source in sources for leaf in _leaves(source)):
        if isinstance(value, bool) or value is None:
            continue
        if isinstance(value, int | float):
            numbers |= _forms(value)
        elif any(character.isdigit() for character in str(value)):
            texts |= {format_setting(value), " ".join(str(value).split())}
    for difference in _differences(results):
        numbers |= {format_difference(difference)}
    return AllowedNumbers(frozenset(numbers), tuple(sorted(texts, key=lambda text: (-len(text), text))))


def check_card_numbers(card_text: str, allowed: AllowedNumbers) -> None:
    """Refuse a card with a number that no file holds.

    Looked at is the body, below the metadata: every decimal number, every whole number of three digits or more,
    and every percentage but the interval's 95 %. Addresses of links are skipped.

    Args:
        card_text: The card, with or without metadata.
        allowed: As from `allowed_numbers`.

    Raises:
        UserError: Naming the number and its line.

    Example:
        >>> allowed = allowed_numbers({"mean": {"base": {"ndcg@10": 0.65}}})
        >>> check_card_numbers("NDCG@10 of the base: 0.6500", allowed)
        >>> check_card_numbers("NDCG@10 of the base: 0.7500", allowed)
        Traceback (most recent call last):
            ...
        ragcun_hf.errors.UserError: model card, line 1: expected only numbers from the results, got 0.7500 \
in 'NDCG@10 of the base: 0.7500': measure it, or render the card again
    """
    for line_number, line in body_lines(card_text):
        for number in _numbers_outside_texts(line, allowed.texts):
            if number not in allowed.numbers:
                raise UserError(
                    f"model card, line {line_number}: expected only numbers from the results, got {number} in "
                    f"{_shorten(line)!r}: measure it, or render the card again"
                )


def body_lines(card_text: str) -> Iterator[tuple[int, str]]:
    """Give the lines below the metadata block, with their numbers in the file, from 1."""
    lines = card_text.splitlines()
    start = 0
    if lines and lines[0].strip() == "---" and "---" in lines[1:]:
        start = lines.index("---", 1) + 1
    yield from enumerate(lines[start:], start=start + 1)


def _numbers_outside_texts(line: str, texts: Iterable[str]) -> list[str]:
    line = _ADDRESS.sub(" ", line)
    for text in texts:
        if text in line:
            # Only as a whole: the version 2.1 must not hide the start of 2.15.
            line = re.sub(rf"(?<![\w.]){re.escape(text)}(?!\w|\.\d)", " ", line)
    percentages = [f"{number} %" for number in re.findall(r"(?<![\d.,])(\d{1,2})\s?%", line) if number != "95"]
    return [match.group() for match in _NUMBER.finditer(line)] + percentages


def _forms(value: float) -> set[str]:
    """Every form in which the card may write one number of a file."""
    forms = {format_setting(value), format_figure(value), format_difference(value), str(value)}
    # In a sentence the sign is left out where words say "below".
    return forms | {format_figure(abs(value))}


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield str(key)
            yield from _leaves(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _differences(results: Mapping[str, Any]) -> Iterator[float]:
    """Give every system's difference to the base, metric by metric, where the file holds only the two figures."""
    entries = list(results.get("datasets", {}).values())
    entries += [part for entry in entries for part in entry.get("subsets", {}).values()]
    for systems in [entry["systems"] for entry in entries] + [results.get("mean", {})]:
        base = systems.get("base", {})
        for metrics in systems.values():
            yield from (value - base[metric] for metric, value in metrics.items() if metric in base)


def _shorten(line: str, width: int = 80) -> str:
    return line if len(line) <= width else line[: width - 1] + "…"
