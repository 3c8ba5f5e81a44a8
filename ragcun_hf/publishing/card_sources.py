"""The files a model card was rendered from, kept in the model's folder so that the card can be checked anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..evaluation.results import read_results, write_json
from ..files import RECORD_FILE, weights_digest, write_whole
from .card_findings import METRIC
from .model_card import join_results, nothing_measured, read_json_object

if TYPE_CHECKING:
    from huggingface_hub import EvalResultEntry

SOURCES_FILE = "card_sources.json"
_RESULTS_FOLDER = "results"
_EVAL_RESULTS_FOLDER = ".eval_results"

# Data set of BEIR -> the benchmark on the Hub that lists models by it, and its task there; as mteb 2.26 names them.
_BENCHMARKS = {
    "arguana": ("mteb/arguana", "ArguAna"),
    "climate-fever": ("mteb/climate-fever", "ClimateFEVER"),
    "dbpedia-entity": ("mteb/dbpedia", "DBPedia"),
    "fever": ("mteb/fever", "FEVER"),
    "fiqa": ("mteb/fiqa", "FiQA2018"),
    "hotpotqa": ("mteb/hotpotqa", "HotpotQA"),
    "nfcorpus": ("mteb/nfcorpus", "NFCorpus"),
    "nq": ("mteb/nq", "NQ"),
    "quora": ("mteb/quora", "QuoraRetrieval"),
    "scidocs": ("mteb/scidocs", "SCIDOCS"),
    "scifact": ("mteb/scifact", "SciFact"),
    "trec-covid": ("mteb/trec-covid", "TRECCOVID"),
    "webis-touche2020": ("mteb/touche2020", "Touche2020"),
}


def keep_sources(
    folder: Path,
    results_paths: Sequence[Path] = (),
    *,
    comparison: Mapping[str, Any] | None = None,
    published: Mapping[str, Any] | None = None,
    repo_id: str | None = None,
) -> None:
    """Put what a card was rendered from into the model's folder: results, comparison, `.eval_results` of the Hub.

    Texts of queries, which a comparison quotes, stay out.

    Args:
        folder: The model's folder, its card rendered.
        results_paths: Files of `eval_beir.py`; those outside the folder are copied into its `results/`.
        comparison: Content of a file of `eval_beir.py --compare`, if the card shows it.
        published: The published figures that the card shows, if any.
        repo_id: Id on the Hub that the card names, if any.
    """
    files = [_kept(folder, path) for path in results_paths]
    compared = None if comparison is None else f"{_RESULTS_FOLDER}/comparison.json"
    if comparison is not None:
        write_json(folder / f"{_RESULTS_FOLDER}/comparison.json", _without_texts(comparison))
    content = {"results": files, "comparison": compared, "published": published, "repo_id": repo_id}
    write_json(folder / SOURCES_FILE, content)
    for stale in (folder / _EVAL_RESULTS_FOLDER).glob("*.yaml"):
        stale.unlink()
    for path, text in _eval_result_files(folder, [read_results(folder / file) for file in files]).items():
        write_whole(path, text)


def read_sources(folder: Path) -> dict[str, Any]:
    """Read them again, for `check_card_against`.

    Args:
        folder: The model's folder.

    Returns:
        `results`, `training_record`, `published` and `comparison`.

    Raises:
        UserError: If a file is missing, cannot be read, was changed, or is of other weights than those in the folder.
    """
    manifest = read_manifest(folder)
    results, digest = [], weights_digest(folder)
    for name in manifest["results"]:
        found = read_results(folder / name)
        _check_weights(found, digest, folder, name)
        results.append(found)
    _check_eval_results(folder, results)
    config = read_json_object(folder / "config.json")
    record = folder / RECORD_FILE
    return {
        "results": join_results(results) if results else nothing_measured(folder.resolve().name, config),
        "training_record": read_json_object(record) if record.is_file() else None,
        "published": manifest["published"],
        "comparison": read_json_object(folder / manifest["comparison"]) if manifest["comparison"] else None,
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read which files the card in a folder was rendered from; a `UserError` where there is none."""
    path = folder / SOURCES_FILE
    if not path.is_file():
        raise UserError(
            f"expected a model card with its sources in {folder}, found no {SOURCES_FILE}: evaluate the model, then "
            f"python training/render_card.py --model_path {folder} --results ... --repo_id organisation/name"
        )
    manifest = read_json_object(path)
    missing = {"results", "comparison", "published", "repo_id"} - manifest.keys()
    if missing:
        raise UserError(f"{path}: expected the key {sorted(missing)[0]!r}, got none: render the card again")
    return manifest


def _kept(folder: Path, path: Path) -> str:
    """Name a results file as seen from the folder, copying it there if it lies elsewhere."""
    if path.resolve().is_relative_to(folder.resolve()):
        return path.resolve().relative_to(folder.resolve()).as_posix()
    name = f"{_RESULTS_FOLDER}/{path.name}"
    write_json(folder / name, read_results(path))
    return name


def _without_texts(comparison: Mapping[str, Any]) -> dict[str, Any]:
    datasets = {
        name: {key: value for key, value in entry.items() if key != "changed_queries"}
        for name, entry in comparison.get("datasets", {}).items()
    }
    return {**comparison, "datasets": datasets}


def _check_weights(results: Mapping[str, Any], present: str | None, folder: Path, name: str) -> None:
    measured = results["model"].get("weights_sha256")
    if measured != present:
        raise UserError(
            f"{folder / name}: expected figures of the weights in {folder} (sha256 {str(present)[:12]}), got those of "
            f"{'unknown weights' if measured is None else measured[:12]}: evaluate this model, then render its card"
        )


def _check_eval_results(folder: Path, results: Sequence[Mapping[str, Any]]) -> None:
    expected = _eval_result_files(folder, results)
    present = {path: path.read_text(encoding="utf-8") for path in (folder / _EVAL_RESULTS_FOLDER).glob("*.yaml")}
    for path in sorted(expected.keys() | present.keys()):
        if expected.get(path) != present.get(path):
            raise UserError(f"{path}: expected what the results files say, got something else: render the card again")


def _eval_result_files(folder: Path, results: Sequence[Mapping[str, Any]]) -> dict[Path, str]:
    """Write down what the Hub's leaderboards read: a file for each data set that is a benchmark there."""
    from huggingface_hub import eval_result_entries_to_yaml

    files = {}
    for part in results:
        for name, entry in part["datasets"].items():
            found = _eval_result(name, entry, part)
            if found is not None:
                files[folder / _EVAL_RESULTS_FOLDER / f"{name}.yaml"] = _as_yaml(eval_result_entries_to_yaml([found]))
    return files


def _eval_result(name: str, entry: Mapping[str, Any], part: Mapping[str, Any]) -> EvalResultEntry | None:
    from huggingface_hub import EvalResultEntry

    value = entry["systems"].get("projection", {}).get(METRIC)
    if name not in _BENCHMARKS or entry["split"] != "test" or value is None:
        return None
    dataset_id, task = _BENCHMARKS[name]
    return EvalResultEntry(
        dataset_id=dataset_id,
        task_id=f"{task}_default_test",
        value=round(100 * value, 3),  # leaderboards count in hundredths
        date=part["created"],
        notes=f"{METRIC} by pytrec_eval, not by mteb: {' '.join(part['command'].split())}",
    )


def _as_yaml(entries: Sequence[Mapping[str, Any]]) -> str:
    import yaml

    return yaml.safe_dump(list(entries), sort_keys=False, allow_unicode=True)
