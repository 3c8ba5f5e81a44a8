"""What a model card says of the model beside others, out of a file of `eval_beir.py --compare`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import UserError
from ..evaluation.comparison_report import comparison_rows
from .card_findings import BASE, METRIC, PREDICTOR
from .card_numbers import format_difference, format_figure, format_setting


def comparison_of_model(comparison: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Keep what a card needs: the rows that compare the model's systems with others, and no texts of queries.

    Args:
        comparison: The file's content, as from `compare_models`.
        name: The model's name in it.

    Returns:
        `command` and `rows`, each with the place and the figures of one comparison.

    Raises:
        UserError: If the file does not compare models by NDCG@10, or not this one.
    """
    if comparison.get("metric") != METRIC or not isinstance(comparison.get("datasets"), Mapping):
        raise UserError(
            f"--comparison expects a file that eval_beir.py --compare wrote, by {METRIC}, got another: write it anew"
        )
    if name not in comparison["systems"]:
        others = ", ".join(comparison["systems"])
        raise UserError(f"--comparison expects a file with the model {name!r}, got {others}: compare it first")
    return {"command": comparison["command"], "rows": list(_own_rows(comparison, name))}


def _own_rows(comparison: Mapping[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """Yield the comparisons over all data sets where there are several, else those of the one.

    Left out are the frozen base, which has its rows under the results already, and the predictors of other models.
    """
    label, entry = list(comparison_rows(comparison))[-1 if len(comparison["datasets"]) > 1 else 0]
    own = [name, f"{name}, {PREDICTOR}"]
    shown = [*own, *(other for other in comparison["systems"] if not other.endswith(f", {PREDICTOR}"))]
    for each in entry["comparisons"]:
        systems = {each["system"], each["reference"]}
        if systems & set(own) and systems <= set(shown) and BASE not in systems:
            figures = {part: entry["systems"][each[part]][METRIC] for part in ("system", "reference")}
            yield {"place": label, **each, "values": figures}


def comparison_cells(row: Mapping[str, Any]) -> list[str]:
    """Write one row: system, what it is compared with, both figures, difference, interval, p and outcomes by query."""
    return [
        row["system"],
        row["reference"],
        *(format_figure(row["values"][part]) for part in ("system", "reference")),
        format_difference(row["difference"]),
        f"{format_difference(row['low'])} to {format_difference(row['high'])}",
        format_figure(row["p_value"]),
        " / ".join(format_setting(row[outcome]) for outcome in ("wins", "ties", "losses")),
    ]
