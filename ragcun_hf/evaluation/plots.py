"""Plots of training, isotropy and results, 1200 pixels wide and readable without colour vision.

The suffix of a path, such as PNG, SVG or PDF, decides the format; a file is replaced only when complete.

Shape letters used in this file: N = vectors, D = vector width, K = random directions.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..files import replaced_file
from .metrics.isotropy.measures import Vectors, covariance_eigenvalues
from .results import (
    BASE_SYSTEM,
    BM25_SYSTEM,
    CLOSED_FORM_SYSTEM,
    FUSION_SYSTEM,
    MAIN_METRIC,
    MOVED_SYSTEM,
    PREDICTOR_SYSTEM,
    PROJECTION_SYSTEM,
    reference_system,
)

# Okabe and Ito (2008): distinguishable with every common form of colour blindness.
BLUE, ORANGE, GREEN, GREY, PURPLE = "#0072B2", "#D55E00", "#009E73", "#7F7F7F", "#CC79A7"
_SYSTEM_COLOURS = {
    BASE_SYSTEM: GREY,
    BM25_SYSTEM: GREEN,
    FUSION_SYSTEM: "#F0E442",
    CLOSED_FORM_SYSTEM: "#56B4E9",
    PROJECTION_SYSTEM: BLUE,
    PREDICTOR_SYSTEM: ORANGE,
    MOVED_SYSTEM: PURPLE,
}
_OTHER_COLOURS = ("#E69F00", "#000000")
_HATCHES = {
    BM25_SYSTEM: "--",
    FUSION_SYSTEM: "xx",
    CLOSED_FORM_SYSTEM: "||",
    PROJECTION_SYSTEM: "//",
    PREDICTOR_SYSTEM: "..",
    MOVED_SYSTEM: "++",
}  # so that bars differ in a grey print too

_LOSS_PANELS = {
    "loss": "total loss (weighted sum)",
    "loss/contrastive": "contrastive loss (nats)",
    "loss/isotropy": "isotropy loss (no unit)",
    "loss/predictive": "predictive loss (no unit)",
}
_NUM_DIRECTIONS = 6
_NUM_PAIRS = 20_000
PIXELS_PER_INCH = 120
WIDTH_INCHES = 10.0  # times the pixels per inch: 1200 pixels


def plot_learning_curves(log_history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draw one panel per logged loss term, the total, and NDCG@10 on held-out data if it was logged.

    `log_history` is that of the `TrainerState`; keys of held-out data start with `eval_`. Raises a ValueError if
    nothing that can be drawn was logged.
    """
    panels = [(key, label) for key, label in _LOSS_PANELS.items() if _points(log_history, key)[0]]
    endings = (MAIN_METRIC, f"{MAIN_METRIC}_predictor")
    quality_keys = sorted(
        {key for entry in log_history for key in entry if key.startswith("eval_") and key.endswith(endings)}
    )
    num_panels = len(panels) + bool(quality_keys)
    if num_panels == 0:
        raise ValueError("expected a log history with losses, got none: train with logging_steps above 0")
    figure, all_axes = make_panels(num_panels, 2 if num_panels == 4 else min(num_panels, 3), 3.2)
    for axes, (key, label) in zip(all_axes, panels, strict=False):
        _draw_term(axes, log_history, key, label)
    if quality_keys:
        axes = all_axes[-1]
        for key, colour, marker in zip(quality_keys, (BLUE, ORANGE, GREEN, GREY, PURPLE), "osD^v", strict=False):
            data, _, system = key.removeprefix("eval_").rpartition(MAIN_METRIC)
            name = ", ".join([data.strip("_/") or "held out", *filter(None, [system.strip("_")])])
            axes.plot(*_points(log_history, key), color=colour, marker=marker, linewidth=2, label=name)
        axes.legend(frameon=False)
        label_axes(axes, "optimizer step", "NDCG@10 (0 to 1)")
    save_figure(figure, path)


def _points(log_history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    entries = [entry for entry in log_history if key in entry and "step" in entry]
    return [float(entry["step"]) for entry in entries], [float(entry[key]) for entry in entries]


def _draw_term(axes: Axes, log_history: Sequence[Mapping[str, Any]], key: str, label: str) -> None:
    steps, values = _points(log_history, key)
    held_out_steps, held_out = _points(log_history, f"eval_{key}")
    is_noisy = len(values) > 40
    marker = "o" if len(values) < 5 else ""  # a line of one point would not be seen
    axes.plot(
        steps, values, color=BLUE, alpha=0.35 if is_noisy else 1.0, linewidth=1 if is_noisy else 2, marker=marker
    )
    if is_noisy:
        window = max(3, len(values) // 20)
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        centres = steps[(window - 1) // 2 :][: len(smooth)]
        axes.plot(centres, smooth, color=BLUE, linewidth=2, label=f"mean of {window} logs")
    if held_out:
        axes.plot(held_out_steps, held_out, color=ORANGE, linewidth=2, linestyle="--", marker="o", label="held out")
    if is_noisy or held_out:
        axes.legend(frameon=False)
    label_axes(axes, "optimizer step", label)


def plot_isotropy(before: Vectors, after: Vectors, path: str | os.PathLike[str]) -> None:
    """Draw how evenly vectors (N, D), N >= 2, of the base and the projection fill their spaces.

    The panels show the spectrum of the covariance (flat = isotropic), projections on random directions beside the
    density of N(0, 1), after scaling to mean variance 1, and the cosines of random pairs (around 0 = isotropic).
    """
    figure, (spectrum_axes, projection_axes, cosine_axes) = make_panels(3, 3, 3.9)
    for vectors, label, colour, style in ((before, BASE_SYSTEM, GREY, "--"), (after, PROJECTION_SYSTEM, BLUE, "-")):
        # NumPy has no bfloat16 and cannot read a tensor with a gradient.
        array = vectors if isinstance(vectors, np.ndarray) else vectors.detach().cpu().float().numpy()
        x_ND = np.asarray(array, dtype=np.float32)
        line: dict[str, Any] = {"color": colour, "linestyle": style}
        eigenvalues_D = covariance_eigenvalues(x_ND)
        draw_spectrum(spectrum_axes, eigenvalues_D, **line, linewidth=2, label=label)
        scale = 1 / np.sqrt(max(eigenvalues_D.mean(), 1e-30))
        generator = np.random.default_rng(0)
        _draw_projections(projection_axes, x_ND * scale, generator, f"{label} (× {scale:.3g})", line)
        cosines = random_pair_cosines(x_ND, generator)
        name = f"{label}, mean {cosines.mean():.2f}"
        cosine_axes.hist(cosines, bins=60, density=True, histtype="step", **line, linewidth=2, label=name)
    spectrum_axes.axhline(1, color="black", linewidth=1, linestyle=":", label="isotropic")
    spectrum_axes.set_yscale("log")
    label_axes(spectrum_axes, "principal direction (rank)", "variance / mean variance (log)", "Spectrum")
    knots = np.linspace(-4, 4, 200)
    density = np.exp(-(knots**2) / 2) / np.sqrt(2 * np.pi)
    projection_axes.plot(knots, density, color="black", linewidth=2, linestyle=":", label="N(0, 1)")
    projection_axes.set_xlim(-4, 4)
    title = f"Projections on {_NUM_DIRECTIONS} random directions"
    label_axes(projection_axes, "value on the direction (std)", "density", title)
    label_axes(cosine_axes, "cosine similarity", "density", "Random pairs")
    for axes in (spectrum_axes, projection_axes, cosine_axes):
        axes.legend(frameon=False, fontsize=9, loc="lower left" if axes is spectrum_axes else "best")
    for axes in (projection_axes, cosine_axes):
        axes.set_ylim(0, axes.get_ylim()[1] * 1.3)  # room for the legend above the curves
    save_figure(figure, path)


def draw_spectrum(axes: Axes, eigenvalues_D: np.ndarray[Any, Any], **line: Any) -> None:
    """Draw the variances along the principal directions relative to their mean, for a logarithmic axis."""
    relative_D = eigenvalues_D / max(eigenvalues_D.mean(), 1e-30)
    # Values below this are rounding errors, which would stretch the axis over nothing.
    relative_D = np.where(relative_D > 1e-7, relative_D, np.nan)
    axes.plot(np.arange(1, len(relative_D) + 1), relative_D, **line)


def _draw_projections(
    axes: Axes, x_ND: np.ndarray[Any, Any], generator: np.random.Generator, label: str, line: dict[str, Any]
) -> None:
    directions_DK = generator.standard_normal((x_ND.shape[1], _NUM_DIRECTIONS))
    projected_NK = x_ND @ (directions_DK / np.linalg.norm(directions_DK, axis=0))
    edges = np.linspace(-4, 4, 41)
    middles = (edges[1:] + edges[:-1]) / 2
    for direction in range(_NUM_DIRECTIONS):
        # Values beyond the edges count too, unlike with density=True.
        density = np.histogram(projected_NK[:, direction], bins=edges)[0] / (len(x_ND) * (edges[1] - edges[0]))
        axes.plot(middles, density, **line, linewidth=1, alpha=0.8, label=label if direction == 0 else "")


def random_pair_cosines(x_ND: np.ndarray[Any, Any], generator: np.random.Generator) -> np.ndarray[Any, Any]:
    """Return the cosines of 20,000 random pairs of different rows, shape (20000,); a zero row has cosine 0."""
    first = generator.integers(0, len(x_ND), size=_NUM_PAIRS)
    # An offset of 1 to N - 1 never pairs a vector with itself.
    second = (first + generator.integers(1, len(x_ND), size=_NUM_PAIRS)) % len(x_ND)
    norms = np.linalg.norm(x_ND, axis=1)
    unit_ND = x_ND / np.where(norms > 0, norms, 1)[:, None]
    return np.einsum("pd,pd->p", unit_ND[first], unit_ND[second])


def plot_comparison(results: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw the NDCG@10 of every data set of the results as a group of bars, one bar per system, the base first.

    If the whisker of a difference does not reach the dashed line of the base (or of BM25, without a base),
    chance is an unlikely explanation.
    """
    datasets = results["datasets"]
    if not datasets:
        raise ValueError("expected results of at least one data set, got none: evaluate one first")
    names = {system: None for entry in datasets.values() for system in entry["systems"]}
    known = list(_SYSTEM_COLOURS)
    systems = sorted(names, key=lambda name: known.index(name) if name in known else len(known))
    spare = iter(_OTHER_COLOURS * len(systems))
    colours = {system: _SYSTEM_COLOURS.get(system) or next(spare) for system in systems}
    figure, (axes,) = make_panels(1, 1, 4.6)
    width = 0.8 / len(systems)
    for place, system in enumerate(systems):
        label = system
        for group, entry in enumerate(datasets.values()):
            if MAIN_METRIC in entry["systems"].get(system, {}):
                x = group + (place - (len(systems) - 1) / 2) * width
                _draw_bar(axes, x, width * 0.92, entry, system, color=colours[system], label=label)
                label = ""  # one entry in the legend
    for group, entry in enumerate(datasets.values()):
        value = entry["systems"].get(reference_system(entry["systems"]), {}).get(MAIN_METRIC)
        if value is not None:
            axes.hlines(value, group - 0.42, group + 0.42, color="black", linestyle="--", linewidth=1)
    labels = [f"{name}\n{entry['num_queries']} queries" for name, entry in datasets.items()]
    axes.set_xticks(range(len(datasets)), labels)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.12)
    axes.legend(frameon=False, ncols=len(systems) + 1, loc="upper left")
    axes.tick_params(axis="x", length=0)
    reference = " or ".join(dict.fromkeys(str(reference_system(entry["systems"])) for entry in datasets.values()))
    label_axes(axes, f"whiskers: 95% interval of the difference to {reference}", f"{MAIN_METRIC.upper()} (0 to 1)")
    save_figure(figure, path)


def _draw_bar(axes: Axes, x: float, width: float, entry: Mapping[str, Any], system: str, **bar: Any) -> None:
    value = top = entry["systems"][system][MAIN_METRIC]
    axes.bar(x, value, width, hatch=_HATCHES.get(system), edgecolor="white", linewidth=0, **bar)
    compared = entry.get("comparisons", {}).get(system, {})
    if compared.get("metric") == MAIN_METRIC:
        base = value - compared["difference"]
        ends = whisker(value, base + compared["low"], base + compared["high"])
        axes.errorbar(x, value, yerr=ends, color="black", capsize=4, linewidth=1.5)
        top = max(value, base + compared["high"])
    # The white box keeps the number legible where the base's dashed line runs through it.
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.9}
    axes.annotate(
        f"{value:.3f}", (x, top), (0, 4), textcoords="offset points", ha="center", fontsize=9, zorder=5, bbox=box
    )


def make_panels(num_panels: int, columns: int, height: float, *, share: bool = False) -> tuple[Figure, list[Axes]]:
    """Make a figure of panels in rows of this height in inches; they may share the ranges of their axes."""
    num_rows = -(-num_panels // columns)
    figure = Figure(figsize=(WIDTH_INCHES, height * num_rows), dpi=PIXELS_PER_INCH, layout="constrained")
    all_axes = list(figure.subplots(num_rows, columns, squeeze=False, sharex=share, sharey=share).flat)
    for axes in all_axes[num_panels:]:
        axes.remove()
    return figure, all_axes[:num_panels]


def whisker(value: float, low: float, high: float) -> list[list[float]]:
    """Return the lengths below and above a value; rounding may make one -1e-17, which matplotlib refuses."""
    return [[max(value - low, 0)], [max(high - value, 0)]]


def label_axes(axes: Axes, x_label: str, y_label: str, title: str = "") -> None:
    """Label a panel, with a light grid and without a frame."""
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title, fontsize=11)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure in the format of the path's suffix, replacing the file only when complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip(".") or "png")
