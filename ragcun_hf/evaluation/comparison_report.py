"""A comparison of models as a table for the terminal and as a plot."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .plots import BLUE, GREY, ORANGE, PIXELS_PER_INCH, WIDTH_INCHES, label_axes, save_figure

OVERALL = "mean of data sets"
_COLUMNS = 3
_MOST_PANELS = 9  # with more pairs, those against the first system are drawn
_TEXT_WIDTH = 76


def comparison_rows(comparison: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield a label and the entry (systems, comparisons) of every data set, its subsets, and the mean of several.

    A subset that is the whole set is named in the label, as its figures are the same.
    """
    for name, entry in comparison["datasets"].items():
        subsets = entry.get("subsets", {})
        note = f", {next(iter(subsets)).replace('_', ' ')}" if len(subsets) == 1 else ""
        yield f"{name} {entry['split']} ({entry['num_queries']:,}{note})", entry
        for subset, part in subsets.items() if len(subsets) > 1 else ():
            yield f"  {subset.replace('_', ' ')} ({part['num_queries']:,})", part
    if len(comparison["datasets"]) > 1:
        yield OVERALL, comparison["overall"]


def format_comparison(comparison: Mapping[str, Any]) -> str:
    """Lay a comparison out for the terminal.

    Args:
        comparison: As from `compare_models`.

    Returns:
        A table with a row per data set (and subset) and pair of systems, then the queries that changed most against
        the first system.
    """
    metric = comparison["metric"]
    head = ("data set (queries)", "system", "against", metric.upper(), "difference", "95% interval", "p", "w/t/l")
    rows: list[tuple[str, ...]] = [head]
    for label, entry in comparison_rows(comparison):
        for each in entry["comparisons"]:
            rows.append((label, *_cells(each, entry, metric)))
            label = ""
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [_line(row, widths) for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    for name, entry in comparison["datasets"].items():
        for changed in entry["changed_queries"]:
            if changed["reference"] == comparison["systems"][0]:
                lines += _changed_lines(name, changed)
    return "\n".join(lines)


def _cells(each: Mapping[str, Any], entry: Mapping[str, Any], metric: str) -> tuple[str, ...]:
    return (
        each["system"],
        each["reference"],
        f"{entry['systems'][each['system']][metric]:.4f}",
        f"{each['difference']:+.4f}",
        f"[{each['low']:+.4f}, {each['high']:+.4f}]",
        f"{each['p_value']:.4f}",
        f"{each['wins']}/{each['ties']}/{each['losses']}",
    )


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [cell.ljust(width) for cell, width in zip(row[:3], widths[:3], strict=True)]
    cells += [cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True)]
    return "  ".join(cells).rstrip()


def _changed_lines(name: str, changed: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for direction in ("gained", "lost"):
        for query in changed[direction]:
            if not lines:
                lines = ["", f"{name}, {changed['system']} against {changed['reference']}: queries that changed most"]
            text = " ".join(query["text"].split())
            text = text if len(text) <= _TEXT_WIDTH else text[: _TEXT_WIDTH - 1] + "…"
            lines.append(f"  {query['reference_value']:.2f} -> {query['system_value']:.2f}  {query['id']}: {text}")
    return lines


def plot_comparison_of_models(comparison: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw the differences with their intervals, one panel per pair of systems.

    Args:
        comparison: As from `compare_models`.
        path: PNG, SVG or PDF file to write; replaced at once when complete.
    """
    rows = list(comparison_rows(comparison))
    pairs = [(each["system"], each["reference"]) for each in rows[0][1]["comparisons"]]
    if len(pairs) > _MOST_PANELS:
        pairs = [pair for pair in pairs if pair[1] == comparison["systems"][0]]
    columns = min(_COLUMNS, len(pairs))
    num_rows = -(-len(pairs) // columns)
    size = (WIDTH_INCHES, num_rows * (1.4 + 0.32 * len(rows)))
    figure = Figure(figsize=size, dpi=PIXELS_PER_INCH, layout="constrained")
    all_axes = list(figure.subplots(num_rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for axes, pair in zip(all_axes, pairs, strict=False):
        _draw_pair(axes, rows, *pair, metric=comparison["metric"])
    for axes in all_axes[len(pairs) :]:
        axes.remove()
    all_axes[0].set_yticks(range(len(rows)), [label for label, _ in rows])
    all_axes[0].set_ylim(len(rows) - 0.5, -0.5)  # the first row on top
    save_figure(figure, path)


def _draw_pair(
    axes: Axes, rows: Sequence[tuple[str, Mapping[str, Any]]], system: str, reference: str, *, metric: str
) -> None:
    for place, (_, entry) in enumerate(rows):
        each = next(c for c in entry["comparisons"] if (c["system"], c["reference"]) == (system, reference))
        is_certain = each["low"] > 0 or each["high"] < 0
        colour = GREY if not is_certain else BLUE if each["difference"] > 0 else ORANGE
        # Rounding may put an end on the wrong side of the mean by 1e-17, which matplotlib refuses.
        ends = [[max(each["difference"] - each["low"], 0)], [max(each["high"] - each["difference"], 0)]]
        marker = "o" if is_certain else "s"
        axes.errorbar(each["difference"], place, xerr=ends, fmt=marker, color=colour, capsize=3, linewidth=1.5)
    axes.axvline(0, color="black", linewidth=1, linestyle=":")
    label_axes(axes, f"difference in {metric.upper()}", "", f"{system}\nagainst {reference}")
