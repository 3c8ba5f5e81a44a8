"""What a model card says, row by row, out of a results file, a training record and published figures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .card_findings import (
    BASE,
    METRIC,
    PREDICTOR,
    comparison_cells,
    describe_memory,
    describe_outcomes,
    list_outcomes,
    verdict,
)
from .card_numbers import NOT_MEASURED, format_difference, format_figure, format_setting

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

SYSTEM_NAMES = {BASE: "frozen base", "projection": "projection", PREDICTOR: PREDICTOR}
METRIC_NAMES = {
    "ndcg@10": "NDCG@10",
    "map@100": "MAP@100",
    "recall@100": "Recall@100",
    "mrr@10": "MRR@10",
}
# BEIR's collections that stand on the Hub under BeIR/<name>; other data sets keep their own names.
_ON_THE_HUB = frozenset(
    "arguana climate-fever cqadupstack dbpedia-entity fever fiqa hotpotqa msmarco nfcorpus nq quora scidocs scifact "
    "trec-covid webis-touche2020".split()
)
_TAGS = ["isotropic-gaussian", "sentence-transformers", "feature-extraction", "retrieval"]
_ISOTROPY = {
    "effective_rank": "effective rank (directions really used)",
    "iso_score": "IsoScore (1 is isotropic)",
    "mean_cosine": "mean cosine of two documents (0 is isotropic)",
    "embedding_std": "mean standard deviation (1 for a standard Gaussian)",
    "sigreg": "SIGReg statistic per document (smaller is closer to a standard Gaussian)",
}
_DATA_NAMES = {
    "train": "sources",
    "rows": "training pairs",
    "distinct_positives": "distinct documents",
    "duplicate_rows_dropped": "duplicate pairs dropped",
    "validation_rows": "pairs held out for validation",
}
_VALIDATED = {"start": "before training", "saved": "as saved"}
# What a reader looks for first; the record holds those that differ from the package's defaults.
_ESSENTIAL = (
    "lambda_contrastive",
    "lambda_isotropy",
    "lambda_predictive",
    "contrastive_kind",
    "isotropy_kind",
    "num_train_epochs",
    "per_device_train_batch_size",
    "learning_rate",
)
_HOUSEKEEPING = re.compile(r"(logging|save|eval|report|push|hub|dataloader|disable|load_best|run_name|use_cpu)\w*")


def card_metadata(
    results: Mapping[str, Any], *, name: str, dataset_ids: Sequence[str] = (), uses_prediction: bool = False
) -> ModelCardData:
    """Make the metadata block, with every figure of the model as a `model-index`.

    Args:
        results: As from `read_results`.
        name: The model's name in the index.
        dataset_ids: Hub ids of the training data; only the user knows which of its names are ids.
        uses_prediction: Whether a predictor was trained; adds the tag `jepa`.

    Returns:
        Metadata as `huggingface_hub` writes and validates it.
    """
    from huggingface_hub import ModelCardData

    base_model = results["model"]["base_model"] or ""
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="sentence-similarity",
        license="apache-2.0",
        base_model=base_model if re.fullmatch(r"[\w.-]+/[\w.-]+", base_model) else None,
        datasets=list(dataset_ids) or None,
        tags=[*_TAGS, *(["jepa"] if uses_prediction else [])],
        model_name=name,
        eval_results=list(evaluation_results(results)) or None,
    )


def evaluation_results(results: Mapping[str, Any]) -> Iterator[Any]:
    """Give one `huggingface_hub.EvalResult` per data set, system and metric; the base is another model's."""
    from huggingface_hub import EvalResult

    for name, entry in results["datasets"].items():
        for system, metrics in entry["systems"].items():
            if system == BASE:
                continue
            for metric in (metric for metric in METRIC_NAMES if metric in metrics):
                yield EvalResult(
                    task_type="information-retrieval",
                    task_name="Information Retrieval",
                    dataset_type=f"BeIR/{name}" if name in _ON_THE_HUB else name,
                    dataset_name=name,
                    dataset_split=entry["split"],
                    metric_type=metric.replace("@", "_at_"),
                    metric_name=f"{METRIC_NAMES[metric]} ({SYSTEM_NAMES.get(system, system)})",
                    metric_value=round(metrics[metric], 4),
                )


def card_sections(
    results: Mapping[str, Any],
    training_record: Mapping[str, Any] | None,
    published: Mapping[str, Any] | None,
    comparison: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Prepare everything the template shows; every value is a finished text.

    Args:
        results: As from `join_results`.
        training_record: As in a model folder, or None.
        published: One recipe's published figures, or None.
        comparison: As from `comparison_of_model`, or None.

    Returns:
        Template variables.
    """
    datasets = results["datasets"]
    return {
        "verdict": verdict(results),
        "metric_names": list(METRIC_NAMES.values()),
        "result_rows": result_rows(results),
        "subset_rows": subset_rows(datasets),
        "isotropy_rows": isotropy_rows(results["isotropy"]),
        "isotropy_systems": [SYSTEM_NAMES.get(system, system) for system in results["isotropy"]],
        "findings": describe_outcomes(list_outcomes(datasets)),
        "memory_findings": describe_memory(datasets),
        "comparison": comparison,
        "comparison_rows": [comparison_cells(row) for row in (comparison or {}).get("rows", [])],
        "training_rows": training_rows(training_record),
        "measurements": [_measurement(part) for part in results["measurements"]],
        "published_rows": [
            (figure["label"], format_figure(figure["value"])) for figure in (published or {}).get("figures", [])
        ],
    }


def result_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Lay out one row per data set and system, then the mean: place, system, metrics, comparison."""
    rows: list[list[str]] = []
    for name, entry in results["datasets"].items():
        rows += _rows(f"{name} {entry['split']} ({entry['num_queries']:,} queries)", entry)
    if len(results["datasets"]) > 1:
        rows += _rows("mean of the data sets", {"systems": results["mean"]})
    return rows


def subset_rows(datasets: Mapping[str, Any]) -> list[list[str]]:
    """Lay out the same for queries with and without a relevant document seen in training."""
    rows: list[list[str]] = []
    for name, entry in datasets.items():
        for subset, part in entry.get("subsets", {}).items():
            rows += _rows(f"{name}, {subset.replace('_', ' ')} ({part['num_queries']:,} queries)", part)
    return rows


def isotropy_rows(isotropy: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """Lay out one row per isotropy measure with a column per system."""
    measures = dict.fromkeys(measure for values in isotropy.values() for measure in values)
    ordered = [measure for measure in _ISOTROPY if measure in measures]
    ordered += [measure for measure in measures if measure not in _ISOTROPY]
    return [
        [_ISOTROPY.get(measure, measure), *(format_figure(values.get(measure)) for values in isotropy.values())]
        for measure in ordered
    ]


def training_rows(training_record: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Lay out data, settings and effort of the training as name and value."""
    if training_record is None:
        return []
    data = dict(training_record.get("data", {}))
    rows = [(_DATA_NAMES.get(key, key.replace("_", " ")), format_setting(value)) for key, value in data.items()]
    model = {key: value for key, value in training_record.get("model", {}).items() if value is not None}
    rows += [(f"`{key}`", format_setting(value)) for key, value in model.items()]
    arguments = training_record.get("training_arguments", {})
    for key in _ESSENTIAL:
        rows.append((f"`{key}`", format_setting(arguments[key]) if key in arguments else "the package's default"))
    for key, value in arguments.items():
        is_shown = key not in _ESSENTIAL and not _HOUSEKEEPING.fullmatch(key)
        if is_shown and not isinstance(value, Mapping) and value is not None:
            rows.append((f"`{key}`", format_setting(value)))
    rows.append(("optimizer steps", format_setting(training_record.get("steps"))))
    if training_record.get("blend", 1.0) != 1.0:
        rows.append(
            ("share of the way from the start to the trained weights", format_setting(training_record["blend"]))
        )
    for when, value in training_record.get("validation_ndcg@10", {}).items():
        rows.append((f"NDCG@10 on held-out pairs, {_VALIDATED.get(when, when)}", format_figure(value)))
    seconds = training_record.get("seconds", {})
    rows += [(f"seconds for {what}", format_setting(value)) for what, value in seconds.items()]
    energy = training_record.get("energy")
    rows.append(
        (f"kWh for encoding and training, an estimate by {energy['by']}", format_setting(energy["kwh"]))
        if energy
        else ("energy", NOT_MEASURED)
    )
    return rows


def _rows(place: str, entry: Mapping[str, Any]) -> list[list[str]]:
    systems = entry["systems"]
    rows = []
    for system in sorted(systems, key=lambda name: name != BASE):
        metrics = [format_figure(systems[system].get(metric)) for metric in METRIC_NAMES]
        rows.append([place, SYSTEM_NAMES.get(system, system), *metrics, *_comparison_cells(system, entry)])
    return rows


def _comparison_cells(system: str, entry: Mapping[str, Any]) -> list[str]:
    """Difference to the base, interval and p; blank for the base itself."""
    if system == BASE:
        return ["", "", ""]
    value, base_value = (entry["systems"].get(name, {}).get(METRIC) for name in (system, BASE))
    difference = None if value is None or base_value is None else value - base_value
    compared = entry.get("comparisons", {}).get(system, {})
    if compared.get("metric") != METRIC:
        return [format_difference(difference), NOT_MEASURED, NOT_MEASURED]
    interval = f"{format_difference(compared['low'])} to {format_difference(compared['high'])}"
    return [format_difference(difference), interval, format_figure(compared["p_value"])]


def _measurement(part: Mapping[str, Any]) -> dict[str, Any]:
    machine = part["machine"]
    names = [name for name in ("accelerator", "processor") if machine.get(name)]
    return {
        "created": format_setting(part["created"]),
        "command": " ".join(part["command"].split()),
        "commit": format_setting(part["commit"]),
        "versions": ", ".join(f"{package} {version}" for package, version in part["versions"].items()),
        "machine": ", ".join(format_setting(machine[name]) for name in names)
        + f", {machine['cores']} cores, Python {machine['python']}",
        "settings": [(key.replace("_", " "), format_setting(value)) for key, value in part["settings"].items()],
    }
