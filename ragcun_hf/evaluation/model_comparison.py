"""Compare several models on the same queries: differences, their significance, a table and a plot."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from ..command_line import format_table
from ..data.beir_folder import BeirDataset
from ..errors import UserError
from .metrics.retrieval.trec_scores import average_scores
from .model_evaluation import ModelEvaluation, seen_document_ids
from .plots import BLUE, GREY, ORANGE, label_axes, make_panels, save_figure, whisker
from .results import BASE_SYSTEM, BASELINES, BM25_SYSTEM, MAIN_METRIC, PROJECTION_SYSTEM, mean_over_datasets, shorten
from .retrieval import PerQuery, select_queries, split_queries_by_seen_documents
from .significance import compare_over_datasets, compare_systems

Pair = tuple[str, str]  # a system and the reference that it is compared with

_CHANGED_QUERIES = 5  # shown in each direction
_PANEL_COLUMNS = 3
_MOST_PANELS = 9  # with more pairs, only those against the first system are drawn
_TEXT_WIDTH = 76


@dataclass(frozen=True)
class ComparedDataset:
    """One data set with the figures of all systems, each on the same queries."""

    name: str
    split: str
    texts: Mapping[str, str]  # query id -> text
    per_query: Mapping[str, PerQuery]  # by system, the reference of all comparisons first
    subsets: Mapping[str, Sequence[str]] = field(default_factory=dict)  # name -> query ids to compare separately


def system_names(paths: Sequence[str]) -> list[str]:
    """Name models by the last part of their folder or Hub id, or by the last two or three parts if names repeat.

    Raises a UserError for fewer than two models, or models that still have the same name.

    >>> system_names(["runs/a/final", "runs/b/final"])
    ['a/final', 'b/final']
    """
    if len(paths) < 2:
        raise UserError(f"--compare expects at least two models, got {len(paths)}: name another")
    parts = [Path(path).resolve().parts if Path(path).is_dir() else tuple(path.split("/")) for path in paths]
    for count in (1, 2, 3):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names) and not {*BASELINES} & {*names}:
            return names
    raise UserError(f"--compare expects different models, got {', '.join(paths)}: leave one out")


def gather_systems(
    datasets: Sequence[BeirDataset], evaluations: Mapping[str, ModelEvaluation], seen_digests: Collection[str]
) -> list[ComparedDataset]:
    """Collect the systems of several models, by name, data set by data set.

    The first model's frozen base comes first, then BM25 and the fusion, if they were measured, and then every model's
    systems, with its own base and fusion if they differ. Digests are those of the documents that any of the models was
    trained on.
    """
    first, *others = ([each.per_query[BASE_SYSTEM] for each in found.evaluations] for found in evaluations.values())
    has_own_base = dict(zip(evaluations, [False, *(base != first for base in others)], strict=True))
    gathered = []
    for place, dataset in enumerate(datasets):
        per_query: dict[str, PerQuery] = {BASE_SYSTEM: first[place]}
        for name, evaluation in evaluations.items():
            for system, values in evaluation.evaluations[place].per_query.items():
                if system == PROJECTION_SYSTEM:
                    per_query[name] = values
                elif system == BM25_SYSTEM:
                    per_query[system] = values  # the same for every model
                elif system in BASELINES:
                    per_query[f"{system} of {name}" if has_own_base[name] else system] = values
                else:
                    per_query[f"{name}, {system}"] = values
        judged = {query: dataset.qrels[query] for query in first[place]}
        known = seen_document_ids(dataset, seen_digests)
        subsets = split_queries_by_seen_documents(judged, known) if known else {}
        gathered.append(ComparedDataset(dataset.name, dataset.split, dataset.queries, per_query, subsets))
    return gathered


def compare_models(datasets: Sequence[ComparedDataset]) -> dict[str, Any]:
    """Compare every system with every system before it, by NDCG@10, on data sets with the same systems in one order.

    The result has the `metric`, the `systems`, `datasets` by name, and `overall` for the mean over data sets. A
    comparison names `system` and `reference`; its difference is system minus reference.
    """
    orders = [list(dataset.per_query) for dataset in datasets]
    if not orders or any(order != orders[0] for order in orders):
        raise ValueError(f"expected the same systems on every data set, got {orders}: evaluate all on all")
    pairs = [(second, first) for first, second in itertools.combinations(orders[0], 2)]
    entries: dict[str, dict[str, Any]] = {}
    for dataset in datasets:
        changed = [{"system": a, "reference": b, **_changed_queries(dataset, a, b)} for a, b in pairs]
        entry = {"split": dataset.split, **_figures(dataset.per_query, pairs), "changed_queries": changed}
        if dataset.subsets:
            entry["subsets"] = {
                name: _figures(select_queries(dataset.per_query, queries), pairs)
                for name, queries in dataset.subsets.items()
                if queries
            }
        entries[dataset.name] = entry
    overall = []
    for a, b in pairs:
        figures = [(dataset.per_query[a], dataset.per_query[b]) for dataset in datasets]
        overall.append({"system": a, "reference": b, **asdict(compare_over_datasets(figures, MAIN_METRIC))})
    return {
        "metric": MAIN_METRIC,
        "systems": orders[0],
        "datasets": entries,
        "overall": {"systems": mean_over_datasets(entries), "comparisons": overall},
    }


def _figures(per_query: Mapping[str, PerQuery], pairs: Sequence[Pair]) -> dict[str, Any]:
    return {
        "num_queries": len(next(iter(per_query.values()))),
        "systems": {system: average_scores(values) for system, values in per_query.items()},
        "comparisons": [
            {"system": a, "reference": b, **asdict(compare_systems(per_query[a], per_query[b], MAIN_METRIC))}
            for a, b in pairs
        ],
    }


def _changed_queries(dataset: ComparedDataset, system: str, reference: str) -> dict[str, Any]:
    """Find the queries that gained and lost most, with their texts; leave out queries without a change."""
    ours, theirs = dataset.per_query[system], dataset.per_query[reference]
    differences = {query: ours[query][MAIN_METRIC] - theirs[query][MAIN_METRIC] for query in ours}
    ordered = sorted(differences, key=lambda query: (differences[query], query))

    def describe(query: str) -> dict[str, Any]:
        values = {"system_value": ours[query][MAIN_METRIC], "reference_value": theirs[query][MAIN_METRIC]}
        return {"id": query, "text": dataset.texts[query], **values}

    return {
        "gained": [describe(query) for query in ordered[::-1][:_CHANGED_QUERIES] if differences[query] > 0],
        "lost": [describe(query) for query in ordered[:_CHANGED_QUERIES] if differences[query] < 0],
    }


def _labelled_entries(comparison: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield a label and an entry for every data set, its subsets if there are several, and the mean of several."""
    for name, entry in comparison["datasets"].items():
        subsets = entry.get("subsets", {})
        note = f", {next(iter(subsets)).replace('_', ' ')}" if len(subsets) == 1 else ""
        yield f"{name} {entry['split']} ({entry['num_queries']:,}{note})", entry
        for subset, part in subsets.items() if len(subsets) > 1 else ():
            yield f"  {subset.replace('_', ' ')} ({part['num_queries']:,})", part
    if len(comparison["datasets"]) > 1:
        yield "mean of data sets", comparison["overall"]


def format_comparison(comparison: Mapping[str, Any]) -> str:
    """Format the result of `compare_models`: a row per data set (or subset) and pair, then the changed queries."""
    metric = comparison["metric"]
    head = ("data set (queries)", "system", "against", metric.upper(), "difference", "95% interval", "p", "w/t/l")
    rows: list[tuple[str, ...]] = [head]
    for label, entry in _labelled_entries(comparison):
        for each in entry["comparisons"]:
            value = entry["systems"][each["system"]][metric]
            interval = f"[{each['low']:+.4f}, {each['high']:+.4f}]"
            counts = f"{each['wins']}/{each['ties']}/{each['losses']}"
            figures = (f"{value:.4f}", f"{each['difference']:+.4f}", interval, f"{each['p_value']:.4f}", counts)
            rows.append((label, each["system"], each["reference"], *figures))
            label = ""
    lines = [format_table(rows, num_names=3)]
    for name, entry in comparison["datasets"].items():
        for changed in entry["changed_queries"]:
            queries = [*changed["gained"], *changed["lost"]]
            if changed["reference"] != comparison["systems"][0] or not queries:
                continue
            lines += ["", f"{name}, {changed['system']} against {changed['reference']}: queries that changed most"]
            for query in queries:
                text = shorten(" ".join(query["text"].split()), _TEXT_WIDTH)
                lines.append(f"  {query['reference_value']:.2f} -> {query['system_value']:.2f}  {query['id']}: {text}")
    return "\n".join(lines)


def plot_model_comparison(comparison: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw the differences of `compare_models` with their intervals, one panel per pair of systems."""
    rows = list(_labelled_entries(comparison))
    pairs = [(each["system"], each["reference"]) for each in rows[0][1]["comparisons"]]
    if len(pairs) > _MOST_PANELS:
        pairs = [pair for pair in pairs if pair[1] == comparison["systems"][0]]
    height, columns = 1.4 + 0.32 * len(rows), min(_PANEL_COLUMNS, len(pairs))
    figure, all_axes = make_panels(len(pairs), columns, height, share=True)
    for axes, pair in zip(all_axes, pairs, strict=True):
        _draw_pair(axes, [entry for _, entry in rows], pair, comparison["metric"])
    all_axes[0].set_yticks(range(len(rows)), [label for label, _ in rows])
    all_axes[0].set_ylim(len(rows) - 0.5, -0.5)  # the first row at the top
    save_figure(figure, path)


def _draw_pair(axes: Axes, entries: Sequence[Mapping[str, Any]], pair: Pair, metric: str) -> None:
    for place, entry in enumerate(entries):
        each = next(each for each in entry["comparisons"] if (each["system"], each["reference"]) == pair)
        is_certain = each["low"] > 0 or each["high"] < 0
        colour = GREY if not is_certain else BLUE if each["difference"] > 0 else ORANGE
        ends, marker = whisker(each["difference"], each["low"], each["high"]), "o" if is_certain else "s"
        axes.errorbar(each["difference"], place, xerr=ends, fmt=marker, color=colour, capsize=3, linewidth=1.5)
    axes.axvline(0, color="black", linewidth=1, linestyle=":")
    label_axes(axes, f"difference in {metric.upper()}", "", f"{pair[0]}\nagainst {pair[1]}")
