"""The report of a sweep: a table of settings and a plot of each argument."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..evaluation.plots import BLUE, GREY, ORANGE, PIXELS_PER_INCH, WIDTH_INCHES, label_axes, save_figure
from .records import SettingSummary
from .settings import Setting

_MOST_LABELS = 8  # more values of a number are drawn on an axis of numbers
_WIDE_RANGE = 20  # from this ratio of the largest to the smallest value, the axis is logarithmic
_COLUMNS = 3


def varied_names(settings: Sequence[Setting]) -> list[str]:
    """Name the fields that differ between settings, in their order."""
    names = dict.fromkeys(name for setting in settings for name in setting)
    return [name for name in names if len({str(setting.get(name)) for setting in settings}) > 1]


def markdown_table(rows: Sequence[Sequence[str]], *, num_numbers: int = 0) -> str:
    """Format a table in Markdown, its head first; the last `num_numbers` columns are aligned to the right."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|---" * (len(rows[0]) - num_numbers) + "|--:" * num_numbers + "|")
    return "\n".join(lines)


def format_mean(mean: float, spread: float) -> str:
    """Format a mean over seeds with its standard deviation."""
    return f"{mean:.4f} ± {spread:.4f}"


def format_settings(summaries: Sequence[SettingSummary], base: Mapping[str, float], select: str) -> str:
    """Format summaries as a Markdown table, below the figures of the frozen base; `select` is the first figure."""
    names = varied_names([summary.setting for summary in summaries])
    figures = [select, *sorted({name for each in summaries for name in each.means} - {select})]
    frozen = [f"{base[name]:.4f}" if name in base else "" for name in figures]
    rows = [["round", "steps", "seeds", *names, *figures], ["frozen base", *[""] * (len(names) + 2), *frozen]]
    for each in summaries:
        values = [each.setting.get(name) for name in names]
        missing = "" if each.means else "diverged"
        rows.append(
            [
                *(str(each.round_number + 1), str(each.steps), str(each.num_seeds)),
                *(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values),
                *(format_mean(each.means[n], each.spreads[n]) if n in each.means else missing for n in figures),
            ]
        )
    return markdown_table(rows)


def plot_sweep(
    summaries: Sequence[SettingSummary], base: Mapping[str, float], select: str, path: str | os.PathLike[str]
) -> None:
    """Plot the figure `select` of each setting against each argument that varies; the frozen base is a line.

    Settings that did not reach the last round are hollow. The file (PNG, SVG or PDF) is replaced as a whole.
    """
    names = varied_names([summary.setting for summary in summaries])
    drawn = [summary for summary in summaries if select in summary.means]
    if not names or not drawn:
        raise ValueError("expected settings that differ and have figures: there is nothing to draw")
    num_rows = -(-len(names) // _COLUMNS)
    num_columns = min(_COLUMNS, len(names))
    figure = Figure(figsize=(WIDTH_INCHES, 3.4 * num_rows), dpi=PIXELS_PER_INCH, layout="constrained")
    all_axes = list(figure.subplots(num_rows, num_columns, squeeze=False, sharey=True).flat)
    for axes, name in zip(all_axes, names, strict=False):
        _draw_panel(axes, drawn, name, select)
        if select in base:
            axes.axhline(base[select], color="black", linestyle="--", linewidth=1, label="frozen base")
        label_axes(axes, name, f"validation {select}" if axes is all_axes[0] else "")
    all_axes[0].legend(frameon=False, fontsize=8)
    for axes in all_axes[len(names) :]:
        axes.remove()
    save_figure(figure, path)


def _draw_panel(axes: Axes, summaries: Sequence[SettingSummary], name: str, select: str) -> None:
    positions = _positions(axes, [summary.setting.get(name) for summary in summaries])
    last = max(summary.round_number for summary in summaries)
    for number in range(last, -1, -1):
        chosen = [row for row, summary in enumerate(summaries) if summary.round_number == number]
        if not chosen:
            continue
        steps = [summaries[row].steps for row in chosen]
        fewest, most = min(steps), max(steps)
        axes.errorbar(
            [positions[row] for row in chosen],
            [summaries[row].means[select] for row in chosen],
            yerr=[summaries[row].spreads[select] for row in chosen],
            fmt="o",
            color=BLUE if number == last else GREY if number == 0 else ORANGE,
            markerfacecolor=None if number == last else "none",
            capsize=2,
            linewidth=1,
            label=f"{most} steps" if fewest == most else f"{fewest} to {most} steps",
        )


def _positions(axes: Axes, values: Sequence[Any]) -> list[float]:
    """Set up the horizontal axis for values, and return the position of each."""
    distinct = list(dict.fromkeys(values))
    numbers = [value for value in distinct if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(distinct) > _MOST_LABELS and len(numbers) == len(distinct):
        if min(numbers) > 0 and max(numbers) / min(numbers) >= _WIDE_RANGE:
            axes.set_xscale("log")
        return [float(value) for value in values]
    ordered = sorted(numbers) + [value for value in distinct if value not in numbers]
    axes.set_xticks(range(len(ordered)), [f"{v:g}" if v in numbers else str(v) for v in ordered])
    axes.set_xlim(-0.5, len(ordered) - 0.5)
    # Settings with the same value stand side by side, so that none hides another.
    seen: dict[Any, int] = {}
    positions = []
    for value in values:
        count = values.count(value)
        offset = (seen.get(value, 0) - (count - 1) / 2) / max(count, 8) * 0.7
        seen[value] = seen.get(value, 0) + 1
        positions.append(ordered.index(value) + offset)
    return positions
