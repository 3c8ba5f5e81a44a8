"""The plots of a model card: those of its evaluation, copied beside it, and the learning curve of its training."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..evaluation.plots import plot_learning_curves
from ..files import replaced_file

CURVES = "Loss terms during training"


def draw_learning_curves(record: Mapping[str, Any], card: Path) -> dict[str, str]:
    """Draw the losses in the log of a training record beside a card.

    Args:
        record: The training record, with its log.
        card: Path of the card.

    Returns:
        Description -> address relative to the card; empty if the run was told to log nothing.
    """
    log = record.get("log_history", [])
    if not any("loss" in entry and "step" in entry for entry in log):
        return {}
    path = _beside(card, "learning_curves.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_learning_curves(log, path)
    return {CURVES: path.name}


def place_plots(found: Mapping[str, tuple[Path, str]], card: Path) -> dict[str, str]:
    """Copy plots that lie outside a card's folder into it.

    Args:
        found: Description -> file, and its name beside the card.
        card: Path of the card.

    Returns:
        Description -> address relative to the card.
    """
    plots: dict[str, str] = {}
    folder = card.resolve().parent
    for description, (plot, name) in found.items():
        if not plot.is_relative_to(folder):
            target = _beside(card.resolve(), name)
            target.parent.mkdir(parents=True, exist_ok=True)
            with replaced_file(target) as temporary:
                shutil.copyfile(plot, temporary)
            plot = target
        plots[description] = plot.relative_to(folder).as_posix()
    return plots


def _beside(card: Path, name: str) -> Path:
    """Return where a plot belongs; cards that share a folder have names of their own, and so have their plots."""
    return card.with_name(name if card.name == "README.md" else f"{card.stem}-{name}")
