"""Everything that a model card shows, as finished texts, and its metadata."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..commands import command
from ..errors import UserError
from ..evaluation.results import (
    BASE_SYSTEM,
    BASELINES,
    BM25_SYSTEM,
    CLOSED_FORM_SYSTEM,
    FUSION_SYSTEM,
    MAIN_METRIC,
    MOVED_SYSTEM,
    PREDICTOR_SYSTEM,
    compared_systems,
)
from .card_findings import (
    NOT_MEASURED,
    compare_with_base,
    describe,
    describe_baselines,
    describe_memory,
    describe_unseen,
    format_difference,
    format_figure,
    format_setting,
    format_text,
    verdict,
    without_folders,
)
from .card_package import PACKAGE, package_facts

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

METRIC_NAMES = {MAIN_METRIC: "NDCG@10", "map@100": "MAP@100", "recall@100": "Recall@100", "mrr@10": "MRR@10"}
# Collections that the Hub has under BeIR/<name>, with the benchmark whose leaderboard lists models and its task, if
# there is one (names of mteb 2.26). Other data sets keep their own names.
BEIR_ON_THE_HUB = {
    "arguana": ("mteb/arguana", "ArguAna"),
    "climate-fever": ("mteb/climate-fever", "ClimateFEVER"),
    "cqadupstack": (None, None),
    "dbpedia-entity": ("mteb/dbpedia", "DBPedia"),
    "fever": ("mteb/fever", "FEVER"),
    "fiqa": ("mteb/fiqa", "FiQA2018"),
    "hotpotqa": ("mteb/hotpotqa", "HotpotQA"),
    "msmarco": (None, None),
    "nfcorpus": ("mteb/nfcorpus", "NFCorpus"),
    "nq": ("mteb/nq", "NQ"),
    "quora": ("mteb/quora", "QuoraRetrieval"),
    "scidocs": ("mteb/scidocs", "SCIDOCS"),
    "scifact": ("mteb/scifact", "SciFact"),
    "trec-covid": ("mteb/trec-covid", "TRECCOVID"),
    "webis-touche2020": ("mteb/touche2020", "Touche2020"),
}

_SYSTEM_NAMES = {
    BASE_SYSTEM: "frozen base",
    BM25_SYSTEM: "BM25",
    FUSION_SYSTEM: "fusion of both",
    CLOSED_FORM_SYSTEM: "closed form",
    MOVED_SYSTEM: "projection + closed form",
}
_ISOTROPY_NAMES = {
    "effective_rank": "effective rank (number of directions in use)",
    "iso_score": "IsoScore (1 is isotropic)",
    "mean_cosine": "mean cosine of two documents (0 is isotropic)",
    "embedding_std": "mean standard deviation (1 for a standard Gaussian)",
    "sigreg": "SIGReg statistic per document (smaller is closer to a standard Gaussian)",
}
_DATA_NAMES = {
    "train": "training data",
    "rows": "training pairs",
    "distinct_positives": "distinct documents",
    "query_is_positive": "pairs whose query equals the document",
    "duplicate_rows": "duplicate pairs",
    "duplicate_rows_dropped": "duplicate pairs dropped",
    "validation_rows": "pairs held out for validation",
}
_VALIDATED = {"start": "before training", "saved": "as saved"}
# Arguments inherited from transformers that say nothing about the model.
_HOUSEKEEPING = re.compile(r"(logging|save|eval|report|push|hub|dataloader|disable|load_best|run_name|use_cpu)\w*")


def card_metadata(
    results: Mapping[str, Any],
    *,
    name: str,
    dataset_ids: Sequence[str] = (),
    license_id: str | None = None,
    languages: Sequence[str] = (),
    is_plain: bool = False,
) -> ModelCardData:
    """Make the metadata block, with every figure of the model as a `model-index`."""
    from huggingface_hub import ModelCardData

    tags = ["isotropic-gaussian", "sentence-transformers", "transformers", "feature-extraction", "retrieval"]
    if is_plain:
        tags.remove("transformers")  # whose AutoModel would return the encoder alone
    return ModelCardData(
        # The Hub's snippet for this library embeds texts; that for transformers ends with a loaded model.
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        license=license_id,
        language=list(languages) or None,
        base_model=hub_id(results["model"]["base_model"]),
        datasets=list(dataset_ids) or None,
        tags=[*tags, "jepa"] if results["model"]["use_predictor"] else tags,
        model_name=name,
        eval_results=list(_evaluation_results(results["datasets"])) or None,
    )


def hub_id(base_model: str | None) -> str | None:
    """Return the name of a base if it has the form of a Hub id; that of a local folder has one part, or a root."""
    return base_model if base_model and re.fullmatch(r"\w[\w.-]*/[\w.-]+", base_model) else None


def _evaluation_results(datasets: Mapping[str, Any]) -> Iterator[EvalResult]:
    from huggingface_hub import EvalResult

    for name, entry in datasets.items():
        for system, metrics in entry["systems"].items():
            if system in (*BASELINES, MOVED_SYSTEM):  # not figures of this model alone
                continue
            for metric in (metric for metric in METRIC_NAMES if metric in metrics):
                yield EvalResult(
                    task_type="information-retrieval",
                    task_name="Information Retrieval",
                    dataset_type=f"BeIR/{name}" if name in BEIR_ON_THE_HUB else name,
                    dataset_name=name,
                    dataset_split=entry["split"],
                    metric_type=metric.replace("@", "_at_"),
                    metric_name=f"{METRIC_NAMES[metric]} ({system})",
                    metric_value=round(metrics[metric], 4),
                )


def card_sections(
    results: Mapping[str, Any],
    training_record: Mapping[str, Any] | None,
    published: Mapping[str, Any] | None,
    comparison: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Prepare the template's variables from the sources of a card, as `render_card` takes them."""
    datasets = results["datasets"]
    compared = None if comparison is None else _comparison_of_model(comparison, results["model"])
    outcomes, figures = compare_with_base(datasets), (published or {}).get("figures", [])
    places = {f"{name} {entry['split']} ({entry['num_queries']:,} queries)": entry for name, entry in datasets.items()}
    if len(places) > 1:
        places["mean of the data sets"] = {"systems": results["mean"]}
    subsets = {
        f"{name}, {subset.replace('_', ' ')} ({part['num_queries']:,} queries)": part
        for name, entry in datasets.items()
        for subset, part in entry.get("subsets", {}).items()
    }
    return {
        "model": {**results["model"], "base_model": without_folders(results["model"]["base_model"] or "")},
        "settings": results["settings"],
        "package": package_facts(_version_of_package(results["measurements"])),
        "verdict": verdict(outcomes),
        "metric_names": list(METRIC_NAMES.values()),
        "result_rows": [row for place, entry in places.items() for row in _rows(place, entry)],
        "subset_rows": [row for place, entry in subsets.items() for row in _rows(place, entry)],
        "unseen": describe_unseen(datasets, has_lexical=bool(results["model"].get("lexical_dim"))),
        "example_rows": [row for name, entry in datasets.items() for row in _example_rows(name, entry)],
        "isotropy_rows": _isotropy_rows(results["isotropy"]),
        "isotropy_systems": [_SYSTEM_NAMES.get(system, system) for system in results["isotropy"]],
        "findings": [*describe(outcomes), *describe_baselines(datasets), *describe_memory(datasets)],
        "about_bm25": _about_bm25(results["settings"]),
        "comparison": compared,
        "has_record": training_record is not None,
        "training_rows": [] if training_record is None else _training_rows(training_record),
        "measurements": [_measurement(part) for part in results["measurements"]],
        "published": published,
        "published_rows": [(figure["label"], format_figure(figure["value"])) for figure in figures],
    }


def _version_of_package(measurements: Sequence[Mapping[str, Any]]) -> str | None:
    return measurements[0]["versions"].get(PACKAGE) if measurements else None


def _rows(place: str, entry: Mapping[str, Any]) -> Iterator[list[str]]:
    """Make a row for each system, the base first: metrics, then the difference to the base, its interval and p."""
    for system, _, difference, tested in compared_systems(entry):
        if system == BASE_SYSTEM:
            compared = ["", "", ""]
        elif tested is None:
            compared = [format_difference(difference), NOT_MEASURED, NOT_MEASURED]
        else:
            compared = [format_difference(difference), _interval(tested), format_figure(tested["p_value"])]
        metrics = [format_figure(entry["systems"][system].get(metric)) for metric in METRIC_NAMES]
        yield [place, _SYSTEM_NAMES.get(system, system), *metrics, *compared]


def _example_rows(name: str, entry: Mapping[str, Any]) -> Iterator[list[str]]:
    """Make a row for each example: data set, query, best document, score, and whether it is judged relevant."""
    for each in entry.get("examples", {}).values():
        texts = (format_text(each["query"]), format_text(each["document"]))
        yield [name, *texts, format_figure(each["score"]), "yes" if each["is_relevant"] else "no"]


def _about_bm25(settings: Mapping[str, Any]) -> str:
    if "bm25" not in settings:
        return ""
    about = f"BM25 ranks by the words that document and query share ({settings['bm25']})."
    return about + (f" The fusion ranks by both ({settings['fusion']})." if "fusion" in settings else "")


def _interval(tested: Mapping[str, Any]) -> str:
    return f"{format_difference(tested['low'])} to {format_difference(tested['high'])}"


def _isotropy_rows(isotropy: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """Make a row for each measure, with a column for each system."""
    measured = [measure for values in isotropy.values() for measure in values]
    return [
        [_ISOTROPY_NAMES.get(measure, measure), *(format_figure(values.get(measure)) for values in isotropy.values())]
        for measure in dict.fromkeys([*_ISOTROPY_NAMES, *measured])
        if measure in measured
    ]


def _training_rows(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Lay out data, settings and effort of the training, the arguments that the record calls essential first."""
    rows: list[tuple[str, Any]] = [
        (_DATA_NAMES.get(key, key.replace("_", " ")), value) for key, value in record.get("data", {}).items()
    ]
    rows += [(f"`{key}`", value) for key, value in record.get("model", {}).items() if value is not None]
    arguments, essential = record.get("training_arguments", {}), record.get("essential", [])
    others = [
        key
        for key, value in arguments.items()
        if key not in essential and not _HOUSEKEEPING.fullmatch(key) and not isinstance(value, Mapping | None)
    ]
    rows += [(f"`{key}`", arguments.get(key)) for key in [*essential, *others]]
    rows.append(("optimizer steps", record.get("steps")))
    if record.get("blend", 1.0) != 1.0:
        rows.append(("blend of the initial with the trained weights (share of the trained ones)", record["blend"]))
    for when, value in record.get(f"validation_{MAIN_METRIC}", {}).items():
        rows.append((f"NDCG@10 on held-out pairs, {_VALIDATED.get(when, when)}", format_figure(value)))
    rows += [(f"seconds for {what}", value) for what, value in record.get("seconds", {}).items()]
    energy = record.get("energy") or {"by": None, "kwh": NOT_MEASURED}
    estimated = f", in kWh, estimated by {energy['by']}" if energy["by"] else ""
    rows.append((f"energy for encoding and training{estimated}", energy["kwh"]))
    return [(name, format_setting(value)) for name, value in rows]


def _measurement(part: Mapping[str, Any]) -> dict[str, Any]:
    """Say how one results file was made."""
    machine = part["machine"]
    names = [format_setting(machine[name]) for name in ("accelerator", "processor") if machine.get(name)]
    return {
        "created": format_setting(part["created"]),
        "command": " ".join(part["command"].split()),
        "commit": format_setting(part["commit"]),
        "versions": ", ".join(f"{package} {version}" for package, version in part["versions"].items()),
        "machine": f"{', '.join(names)}, {machine['cores']} cores, Python {machine['python']}",
        "settings": [(key.replace("_", " "), format_setting(value)) for key, value in part["settings"].items()],
    }


# Comparison with other models

_PARTS = {"command", "datasets", "models", "overall", "systems"}
_SAME = ("base_model", "output_dim", "projection_init", "projection_kind", "use_predictor", "similarity")


def _comparison_of_model(comparison: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """Take the rows of this model out of a file of `eval_beir.py --compare`, with what was searched and how."""
    if comparison.get("metric") != MAIN_METRIC or not comparison.keys() >= _PARTS:
        raise UserError(
            f"--comparison expects a file that {command('eval_beir')} --compare wrote, by {MAIN_METRIC}, got another: "
            "write it again"
        )
    try:
        return _rows_of_model(comparison, model)
    except (KeyError, TypeError, AttributeError, StopIteration) as error:
        raise UserError(
            f"--comparison expects a file that {command('eval_beir')} --compare wrote, got one without {error}: write "
            "it again"
        ) from error


def _rows_of_model(comparison: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    name = model["name"]
    found = comparison["models"].get(name)
    if found is None or any(found["model"].get(key) != model.get(key) for key in _SAME):
        raise UserError(
            f"--comparison expects a file with the model {name!r} as in --results (by name, {', '.join(_SAME)}), got "
            f"{', '.join(comparison['models'])}: compare it, or evaluate it under the same --run_name"
        )
    return {
        "command": comparison["command"],
        "datasets": ", ".join(f"{dataset} {entry['split']}" for dataset, entry in comparison["datasets"].items()),
        "rows": list(_comparison_rows(comparison, name)),
    }


def _comparison_rows(comparison: Mapping[str, Any], name: str) -> Iterator[list[str]]:
    """Lay out the comparisons by the mean over data sets or, of a single data set, by its own figures.

    Frozen bases are left out, as the model's own is in the table of results, and so are other models' predictors.
    The other baselines are kept.
    """
    own = {name, f"{name}, {PREDICTOR_SYSTEM}"}
    kept = {*comparison["models"], *BASELINES} - {BASE_SYSTEM}
    entry = comparison["overall"] if len(comparison["datasets"]) > 1 else next(iter(comparison["datasets"].values()))
    for each in entry["comparisons"]:
        systems = (each["system"], each["reference"])
        if own & {*systems} and {*systems} <= own | kept:
            yield [
                *systems,
                *(format_figure(entry["systems"][system][MAIN_METRIC]) for system in systems),
                format_difference(each["difference"]),
                _interval(each),
                format_figure(each["p_value"]),
                " / ".join(format_setting(each[outcome]) for outcome in ("wins", "ties", "losses")),
            ]
