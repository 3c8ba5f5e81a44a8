"""Several models on the same queries: who is better, by how much, by chance or not, and on which queries."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from .model_evaluation import PREDICTOR_SYSTEM, PROJECTION_SYSTEM, ModelEvaluation, seen_document_ids
from .retrieval import BASE_SYSTEM, PerQuery, RetrievalDataset, mean_metrics, split_queries_by_seen_documents
from .significance import Comparison, compare_over_datasets, compare_systems

_CHANGED_QUERIES = 5  # shown each way


@dataclass(frozen=True)
class ComparedDataset:
    """One data set with the figures of all systems.

    Args:
        name: Of the data set.
        split: Which judgements were used.
        texts: Query id -> text.
        per_query: System -> query id -> metric -> value; every system on the same queries.
        subsets: Name -> query ids, to be compared apart, as from `split_queries_by_seen_documents`.
    """

    name: str
    split: str
    texts: Mapping[str, str]
    per_query: Mapping[str, PerQuery]
    subsets: Mapping[str, Sequence[str]] = field(default_factory=dict)


def system_names(paths: Sequence[str]) -> list[str]:
    """Name models by the last part of their folders or ids, or by two parts where that is not enough.

    Args:
        paths: Folders or Hub ids.

    Returns:
        One name per path, all different.

    Raises:
        UserError: If fewer than two are given, or two cannot be told apart.

    Example:
        >>> system_names(["runs/a/final", "runs/b/final"])
        ['a/final', 'b/final']
    """
    if len(paths) < 2:
        raise UserError(f"--compare expects at least two models, got {len(paths)}: name another")
    parts = [Path(path).resolve().parts if Path(path).is_dir() else tuple(path.split("/")) for path in paths]
    for count in (1, 2, 3):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names) and BASE_SYSTEM not in names:
            return names
    raise UserError(f"--compare expects different models, got {', '.join(paths)}: leave one out")


def gather(
    datasets: Sequence[RetrievalDataset],
    evaluations: Mapping[str, ModelEvaluation],
    seen_digests: Mapping[str, Collection[str]],
) -> list[ComparedDataset]:
    """Bring the evaluations of several models together, data set by data set.

    Args:
        datasets: As they were evaluated.
        evaluations: Name of each model -> its evaluation of all data sets.
        seen_digests: Name of each model -> digests of the documents that it was trained on.

    Returns:
        The frozen base first, once where all models have the same; then every model's systems.
    """
    digests = set().union(*seen_digests.values())
    first, *others = ([each.per_query[BASE_SYSTEM] for each in found.evaluations] for found in evaluations.values())
    has_own_base = dict(zip(evaluations, [False, *(base != first for base in others)], strict=True))
    gathered = []
    for place, dataset in enumerate(datasets):
        per_query: dict[str, PerQuery] = {BASE_SYSTEM: first[place]}
        for name, evaluation in evaluations.items():
            found = evaluation.evaluations[place].per_query
            if has_own_base[name]:
                per_query[f"{BASE_SYSTEM} of {name}"] = found[BASE_SYSTEM]
            per_query[name] = found[PROJECTION_SYSTEM]
            if PREDICTOR_SYSTEM in found:
                per_query[f"{name}, {PREDICTOR_SYSTEM}"] = found[PREDICTOR_SYSTEM]
        judged = {query: dataset.qrels[query] for query in first[place]}
        known = seen_document_ids(dataset, digests)
        subsets = split_queries_by_seen_documents(judged, known) if known else {}
        gathered.append(ComparedDataset(dataset.name, dataset.split, dataset.queries, per_query, subsets))
    return gathered


def compare_models(datasets: Sequence[ComparedDataset], *, metric: str = "ndcg@10") -> dict[str, Any]:
    """Compare every system with every one before it.

    Args:
        datasets: All with the same systems, the reference first.
        metric: What decides.

    Returns:
        `metric`, `systems` (their order), `datasets` (name -> split, number of queries, figures of each system,
        comparisons, changed queries, subsets by seen documents) and `overall` (comparisons of the mean over data
        sets). A comparison names `system` and `reference`; its difference is system minus reference.

    Raises:
        ValueError: If there is no data set, or not all have the same systems.
    """
    orders = [list(dataset.per_query) for dataset in datasets]
    if not orders or any(order != orders[0] for order in orders):
        raise ValueError(f"expected the same systems on every data set, got {orders}: evaluate all on all")
    pairs = [(second, first) for first, second in itertools.combinations(orders[0], 2)]
    return {
        "metric": metric,
        "systems": orders[0],
        "datasets": {dataset.name: _dataset_entry(dataset, pairs, metric) for dataset in datasets},
        "overall": {
            "systems": _means_over_datasets(datasets, orders[0]),
            "comparisons": [
                _entry(system, reference, _overall(datasets, system, reference, metric)) for system, reference in pairs
            ],
        },
    }


def _dataset_entry(dataset: ComparedDataset, pairs: Sequence[tuple[str, str]], metric: str) -> dict[str, Any]:
    queries = list(next(iter(dataset.per_query.values())))
    entry = {"split": dataset.split, **_figures(dataset, queries, pairs, metric)}
    entry["changed_queries"] = [
        {"system": system, "reference": reference, **_changed(dataset, system, reference, metric)}
        for system, reference in pairs
    ]
    if dataset.subsets:
        parts = dataset.subsets.items()
        entry["subsets"] = {name: _figures(dataset, part, pairs, metric) for name, part in parts if part}
    return entry


def _figures(
    dataset: ComparedDataset, queries: Iterable[str], pairs: Sequence[tuple[str, str]], metric: str
) -> dict[str, Any]:
    part = {system: {query: values[query] for query in queries} for system, values in dataset.per_query.items()}
    return {
        "num_queries": len(next(iter(part.values()))),
        "systems": {system: mean_metrics(values) for system, values in part.items()},
        "comparisons": [
            _entry(system, reference, compare_systems(part[system], part[reference], metric))
            for system, reference in pairs
        ],
    }


def _entry(system: str, reference: str, comparison: Comparison) -> dict[str, Any]:
    return {"system": system, "reference": reference, **asdict(comparison)}


def _overall(datasets: Sequence[ComparedDataset], system: str, reference: str, metric: str) -> Comparison:
    parts = [(dataset.per_query[system], dataset.per_query[reference]) for dataset in datasets]
    return compare_over_datasets(parts, metric)


def _means_over_datasets(datasets: Sequence[ComparedDataset], systems: Sequence[str]) -> dict[str, dict[str, float]]:
    means = {}
    for system in systems:
        per_dataset = [mean_metrics(dataset.per_query[system]) for dataset in datasets]
        means[system] = {name: sum(each[name] for each in per_dataset) / len(per_dataset) for name in per_dataset[0]}
    return means


def _changed(dataset: ComparedDataset, system: str, reference: str, metric: str) -> dict[str, Any]:
    """Find the queries that gained and lost most, with their texts; those without a change are left out."""
    ours, theirs = dataset.per_query[system], dataset.per_query[reference]
    differences = {query: ours[query][metric] - theirs[query][metric] for query in ours}
    ordered = sorted(differences, key=lambda query: (differences[query], query))

    def shown(query: str) -> dict[str, Any]:
        return {
            "id": query,
            "text": dataset.texts[query],
            "system_value": ours[query][metric],
            "reference_value": theirs[query][metric],
        }

    return {
        "gained": [shown(query) for query in ordered[::-1][:_CHANGED_QUERIES] if differences[query] > 0],
        "lost": [shown(query) for query in ordered[:_CHANGED_QUERIES] if differences[query] < 0],
    }
