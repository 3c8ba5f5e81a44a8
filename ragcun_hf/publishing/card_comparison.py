"""What a model card says of the model beside others, out of a file of `eval_beir.py --compare`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import UserError
from .card_findings import METRIC, PREDICTOR
from .card_numbers import format_difference, format_figure, format_setting

_PARTS = {"command", "datasets", "models", "overall", "systems"}
_SAME = ("base_model", "output_dim", "projection_init", "projection_kind", "use_predictor", "similarity")


def comparison_of_model(comparison: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what a card needs: the rows that compare the model's systems with others, and no texts of queries.

    Args:
        comparison: The file's content, as `eval_beir.py --compare` writes it.
        model: The results file's facts on the model.

    Returns:
        `command`, `datasets` (what was searched, in words) and `rows`, each with the figures of one comparison.

    Raises:
        UserError: If the file does not compare models by NDCG@10, or not this one.
    """
    if comparison.get("metric") != METRIC or not comparison.keys() >= _PARTS:
        raise UserError(
            f"--comparison expects a file that eval_beir.py --compare wrote, by {METRIC}, got another: write it anew"
        )
    name = model["name"]
    found = comparison["models"].get(name)
    if found is None or any(found["model"].get(key) != model.get(key) for key in _SAME):
        others = ", ".join(comparison["models"])
        raise UserError(
            f"--comparison expects a file with the model {name!r} as in --results (by name, {', '.join(_SAME)}), got "
            f"{others}: compare it, or evaluate it under the same --run_name"
        )
    sets = [f"{dataset} {entry['split']}" for dataset, entry in comparison["datasets"].items()]
    rows = list(_own_rows(comparison, name))
    return {"command": comparison["command"], "datasets": ", ".join(sets), "rows": rows}


def _own_rows(comparison: Mapping[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """Yield the comparisons over all data sets where there are several, else those of the one.

    Left out are frozen bases, of which the model's own has its rows under the results already, and the predictors of
    other models.
    """
    own = [name, f"{name}, {PREDICTOR}"]
    shown = {*own, *comparison["models"]}
    several = len(comparison["datasets"]) > 1
    entry = comparison["overall"] if several else next(iter(comparison["datasets"].values()))
    for each in entry["comparisons"]:
        systems = {each["system"], each["reference"]}
        if systems & set(own) and systems <= shown:
            figures = {part: entry["systems"][each[part]][METRIC] for part in ("system", "reference")}
            yield {**each, "values": figures}


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
