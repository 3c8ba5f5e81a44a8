"""The report of the ablations: a table and a plot."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from ablation_changes import PART_OF_THE_WAY, Effect
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ragcun_hf.evaluation.plots import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PIXELS_PER_INCH,
    WIDTH_INCHES,
    label_axes,
    save_figure,
)
from ragcun_hf.sweep.report import format_mean, markdown_table

_FIGURES = {
    "start": "before",
    "projection": "projection",
    "predictor": "predictor",
    "blended": f"{PART_OF_THE_WAY:g} of the way",
}
_LOOKS = {"start": (GREY, "x"), "projection": (BLUE, "o"), "predictor": (ORANGE, "s"), "blended": (GREEN, "D")}
_BLANKS = [""] * (len(_FIGURES) - 1)
_ROW_INCHES = 0.22
_LOSS_SHOWN = 0.1  # a figure further below the base is written as a number at the edge


def format_ablations(effects: Mapping[str, Sequence[Effect]], bases: Mapping[str, float]) -> str:
    """Format the effects as a Markdown table.

    Args:
        effects: Data set -> effects, the same changes in the same order for each.
        bases: Data set -> NDCG@10 of the frozen base.

    Returns:
        One line per change, four figures per data set: mean and standard deviation over seeds.
    """
    rows = [
        ["", "change", *(f"{name}: {label}" for name in effects for label in _FIGURES.values())],
        ["", "frozen base", *(cell for name in effects for cell in (f"{bases[name]:.4f}", *_BLANKS))],
    ]
    group = ""
    for row in zip(*effects.values(), strict=True):
        means = [(effect.mean(name), effect.spread(name)) for effect in row for name in _FIGURES]
        cells = ["" if mean is None else format_mean(mean, spread) for mean, spread in means]
        rows.append([row[0].group if row[0].group != group else "", row[0].change, *cells])
        group = row[0].group
    return markdown_table(rows, num_numbers=len(rows[0]) - 2)


def plot_ablations(
    effects: Mapping[str, Sequence[Effect]], bases: Mapping[str, float], path: str | os.PathLike[str]
) -> None:
    """Draw a panel per data set and a row per change, with the spread over seeds; the frozen base is a line.

    Args:
        effects: As for `format_ablations`.
        bases: As for `format_ablations`.
        path: PNG, SVG or PDF file to write, replaced as a whole.
    """
    num_rows = max(len(each) for each in effects.values())
    size = (WIDTH_INCHES, 1.2 + _ROW_INCHES * num_rows)
    figure = Figure(figsize=size, dpi=PIXELS_PER_INCH, layout="constrained")
    all_axes = figure.subplots(1, len(effects), squeeze=False, sharey=True)[0]
    for axes, (name, of_set) in zip(all_axes, effects.items(), strict=True):
        edge = bases[name] - _LOSS_SHOWN
        for figure_name in _FIGURES:
            _draw(axes, of_set, figure_name, edge)
        if axes.texts:  # after everything is drawn: setting one end fixes the other
            axes.set_xlim(left=edge)
        axes.axvline(bases[name], color="black", linestyle="--", linewidth=1, label="frozen base")
        label_axes(axes, "NDCG@10, held-out documents", "", name)
        axes.grid(axis="x", alpha=0.3)
    labels = [f"{effect.group}: {effect.change}" for effect in next(iter(effects.values()))]
    all_axes[0].set_yticks(range(num_rows), labels, fontsize=8)
    all_axes[0].invert_yaxis()
    all_axes[0].legend(frameon=False, fontsize=8, loc="best")
    save_figure(figure, path)


def _draw(axes: Axes, effects: Sequence[Effect], name: str, edge: float) -> None:
    means = {row: mean for row, effect in enumerate(effects) if (mean := effect.mean(name)) is not None}
    colour, marker = _LOOKS[name]
    for row, mean in means.items():
        if mean < edge:
            axes.text(edge, row, f"← {mean:.3f}", color=colour, fontsize=7, va="center")
    rows = [row for row, mean in means.items() if mean >= edge]
    axes.errorbar(
        [means[row] for row in rows],
        rows,
        xerr=[effects[row].spread(name) for row in rows],
        fmt=marker,
        color=colour,
        markersize=4,
        linewidth=1,
        capsize=2,
        label=_FIGURES[name],
    )
