"""What a sweep says at its end: a table, a plot of each setting, and the flags of the best one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from .records import SettingSummary
from .settings import Setting

_UNKNOWN = "diverged"


def varied_names(settings: Sequence[Setting]) -> list[str]:
    """Name the fields that differ between settings, in their order."""
    names = dict.fromkeys(name for setting in settings for name in setting)
    return [name for name in names if len({str(setting.get(name)) for setting in settings}) > 1]


def format_table(summaries: Sequence[SettingSummary], base: Mapping[str, float], select: str) -> str:
    """Lay summaries out as a Markdown table, in their order.

    Args:
        summaries: One per setting, as `SweepRecords.summaries` orders them.
        base: Figures of the frozen base.
        select: The figure that decides; other figures follow it.

    Returns:
        The table: figures as mean and standard deviation over seeds.
    """
    names = varied_names([summary.setting for summary in summaries])
    figures = [select, *sorted({name for each in summaries for name in each.means} - {select})]
    head = ["round", "steps", "seeds", *names, *figures]
    frozen = [f"{base[name]:.4f}" if name in base else "" for name in figures]
    rows = [["frozen base", *[""] * (len(names) + 2), *frozen]]
    for each in summaries:
        values = [_cell(each.setting.get(name)) for name in names]
        cells = [
            f"{each.means[name]:.4f} ± {each.spreads[name]:.4f}" if name in each.means else _missing(each)
            for name in figures
        ]
        rows.append([str(each.round_number + 1), str(each.steps), str(each.num_seeds), *values, *cells])
    lines = [f"| {' | '.join(row)} |" for row in [head, *rows]]
    lines.insert(1, "|---" * len(head) + "|")
    return "\n".join(lines)


def _missing(summary: SettingSummary) -> str:
    return "" if summary.means else _UNKNOWN


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def changed_fields(arguments: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that differ from their defaults."""
    changed = {}
    for field in dataclasses.fields(arguments):
        default = field.default_factory() if callable(field.default_factory) else field.default
        if getattr(arguments, field.name) != default:
            changed[field.name] = getattr(arguments, field.name)
    return changed
