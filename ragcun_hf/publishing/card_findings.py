"""What the figures say in words: better or worse than the frozen base, and on what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from .card_numbers import format_difference, format_figure, format_setting

METRIC, METRIC_NAME = "ndcg@10", "NDCG@10"
BASE, PREDICTOR = "base", "predictor"

_OUTCOMES = {
    "below": "is below the frozen base on",
    "above": "is above the frozen base on",
    "alike": "cannot be told from the frozen base (the 95 % interval of the difference includes zero) on",
    "untested": "differs from the frozen base, without a test, on",
}

_VERDICTS = {
    frozenset({"below"}): "On every data set measured here the frozen base alone retrieves better than this model.",
    frozenset({"above"}): "On every data set measured here this model retrieves better than its frozen base.",
    frozenset({"alike"}): "On the data sets measured here this model cannot be told from its frozen base.",
    frozenset({"below", "alike"}): (
        "On no data set measured here is this model better than its frozen base, and on some it is worse."
    ),
    frozenset({"above", "alike"}): (
        "This model is better than its frozen base on some data sets measured here, and worse on none."
    ),
}


@dataclass(frozen=True)
class Outcome:
    """How one system stands to the frozen base on one set of queries."""

    place: str  # data set, or data set and subset
    system: str
    base_value: float
    value: float
    kind: str  # a key of _OUTCOMES

    def in_words(self) -> str:
        """Name the place with both figures."""
        change = format_difference(self.value - self.base_value)
        return f"{self.place} ({format_figure(self.value)} against {format_figure(self.base_value)}, {change})"


def list_outcomes(places: Mapping[str, Mapping[str, Any]]) -> list[Outcome]:
    """Compare every system with the base.

    Args:
        places: Name -> an entry of the results file with `systems` and perhaps `comparisons`.

    Returns:
        One outcome per place and system, in order; places without a figure of the base are left out.

    Example:
        >>> entry = {"systems": {"base": {"ndcg@10": 0.5}, "projection": {"ndcg@10": 0.4}}, "comparisons":
        ...     {"projection": {"metric": "ndcg@10", "difference": -0.1, "low": -0.2, "high": -0.05}}}
        >>> [(outcome.system, outcome.kind) for outcome in list_outcomes({"scifact": entry})]
        [('projection', 'below')]
    """
    return [outcome for place, entry in places.items() for outcome in _outcomes(place, entry)]


def describe_outcomes(outcomes: Sequence[Outcome], *, queries: str = "") -> list[str]:
    """Put outcomes into sentences, one per system and kind, losses first.

    Args:
        outcomes: As from `list_outcomes`.
        queries: Which queries, as the start of each sentence; empty means all.

    Returns:
        Sentences, perhaps none.
    """
    sentences = []
    for kind, words in _OUTCOMES.items():
        for system in dict.fromkeys(outcome.system for outcome in outcomes):
            found = [outcome.in_words() for outcome in outcomes if (outcome.kind, outcome.system) == (kind, system)]
            if found:
                start = f"{queries}, {METRIC_NAME}" if queries else METRIC_NAME
                sentences.append(f"{start} of the {system} {words} {_joined(found)}.")
    return sentences


def verdict(results: Mapping[str, Any]) -> str:
    """Say in one sentence whether to use the model or its frozen base, as far as the figures go.

    Args:
        results: As from `read_results`.

    Returns:
        A sentence; it looks at the projection and, if measured, the predictor on every data set.
    """
    outcomes = list_outcomes(results.get("datasets", {}))
    if not outcomes:
        return "Whether this model retrieves better than its frozen base was not measured."
    kinds = frozenset(outcome.kind for outcome in outcomes)
    if {"below", "above"} <= kinds:
        return "Against its frozen base this model wins on some of what was measured here and loses on some."
    if kinds == {"untested"}:
        return "No difference from the frozen base was tested here, so which of the two is better is not known."
    if "untested" in kinds:
        return "Not every difference from the frozen base was tested here, so no single verdict can be given."
    return _VERDICTS[kinds]


def comparison_sentences(results: Mapping[str, Any]) -> list[str]:
    """Give all that a card must say of the model and its frozen base.

    Args:
        results: As from `read_results`.

    Returns:
        The verdict, then all data sets, then seen and unseen documents.
    """
    datasets = results.get("datasets", {})
    return [verdict(results), *describe_outcomes(list_outcomes(datasets)), *describe_memory(datasets)]


def describe_memory(datasets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say how queries fare whose relevant documents were, and were not, among the training documents."""
    sentences = []
    for subset, queries in (
        ("unseen_documents", "For queries with no relevant document among the training documents"),
        ("seen_documents", "For queries with a relevant document among the training documents"),
    ):
        places = {name: entry["subsets"][subset] for name, entry in datasets.items() if _has(entry, subset)}
        sentences += describe_outcomes(list_outcomes(places), queries=queries)
    if sentences:
        sentences.append("A gain on seen documents is partly memory; the unseen ones show what new texts can expect.")
    return sentences


def _has(entry: Mapping[str, Any], subset: str) -> bool:
    return subset in entry.get("subsets", {})


def _outcomes(place: str, entry: Mapping[str, Any]) -> Iterator[Outcome]:
    base_value = entry["systems"].get(BASE, {}).get(METRIC)
    for system, metrics in entry["systems"].items():
        value = metrics.get(METRIC)
        if system == BASE or value is None or base_value is None:
            continue
        yield Outcome(place, system, base_value, value, _kind(entry.get("comparisons", {}).get(system, {})))


def _kind(comparison: Mapping[str, Any]) -> str:
    if comparison.get("metric") != METRIC:
        return "untested"
    if comparison["high"] < 0:
        return "below"
    return "above" if comparison["low"] > 0 else "alike"


def _joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


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
