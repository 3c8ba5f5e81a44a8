"""The sources of a model card: read from files, and kept beside the card so that it can be rendered again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..commands import command
from ..errors import UserError
from ..evaluation.results import (
    MAIN_METRIC,
    MODEL_SETTINGS,
    PROJECTION_SYSTEM,
    mean_over_datasets,
    read_json_object,
    read_record,
    read_results,
    write_json,
)
from ..files import RECORD_FILE, weights_digest, write_whole
from .card_content import BEIR_ON_THE_HUB

SOURCES_FILE = "card_sources.json"
PUBLISHED_FIGURES = Path(__file__).with_name("published.json")

_RESULTS_FOLDER = "results"
_EVAL_RESULTS_FOLDER = ".eval_results"
_MEASUREMENT_KEYS = ("created", "command", "commit", "versions", "machine", "settings")
_CARD_KEYS = {"published", "repo_id", "plots", "dataset_ids", "license_id", "languages"}
_MANIFEST_TYPES = {
    **dict.fromkeys(("results", "dataset_ids", "languages"), list),
    **dict.fromkeys(("training_record", "comparison", "repo_id", "license_id"), str | None),
    **{"plots": dict, "published": dict | None},
}
_MANIFEST_KEYS = {"results", "training_record", "comparison", *_CARD_KEYS}


def join_results(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the contents of results files of one model, each with other data sets.

    The isotropy and the rest are those of the first file; `measurements` says how each file was made.
    """
    if not results:
        raise UserError(
            f"--results expects at least one results file, got none: write one with {command('eval_beir')}"
        )
    first = results[0]
    datasets: dict[str, Any] = {}
    for part in results:
        if part["model"] != first["model"]:
            raise UserError(
                f"--results expects files of one model, got {first['model']['name']!r} and {part['model']['name']!r} "
                "with different settings: render a card for each"
            )
        twice = sorted(datasets.keys() & part["datasets"].keys())
        if twice:
            raise UserError(f"--results expects each data set once, got {twice[0]!r} twice: leave one file out")
        datasets |= part["datasets"]
    measurements = [{key: part[key] for key in _MEASUREMENT_KEYS} for part in results]
    return {**first, "datasets": datasets, "mean": mean_over_datasets(datasets), "measurements": measurements}


def nothing_measured(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return joined results without any figure, from a model's `config.json`: its card says "not measured"."""
    model = {setting: config[setting] for setting in MODEL_SETTINGS if setting in config}
    base, similarity = config.get("base_model_name"), config.get("similarity_fn_name", "cosine")
    model |= {"name": name, "path": name, "base_model": base, "similarity": similarity}
    empty: dict[str, Any] = {part: {} for part in ("datasets", "mean", "isotropy", "settings")}
    return {"model": {"use_predictor": False, **model}, "measurements": [], **empty}


def read_published(path: Path, recipe: str) -> dict[str, Any] | None:
    """Read what was published for a recipe: `figures` (`label`, `value`), `source`, `remark`; None if nothing was."""
    recipes = read_json_object(path).get("recipes")
    if not isinstance(recipes, Mapping):
        raise UserError(f"{path}: expected the key 'recipes', got none: see publishing/published.json of the package")
    if recipe not in recipes:
        return None
    if not isinstance(recipes[recipe], Mapping):
        raise UserError(f"{path}: expected an object for the recipe {recipe!r}, got another value: correct the file")
    return {"recipe": recipe, **recipes[recipe]}


def keep_sources(
    folder: Path,
    *,
    results: Sequence[Path] = (),
    training_record: Path | None = None,
    comparison: Mapping[str, Any] | None = None,
    published: Mapping[str, Any] | None = None,
    repo_id: str | None = None,
    plots: Mapping[str, str] | None = None,
    dataset_ids: Sequence[str] = (),
    license_id: str | None = None,
    languages: Sequence[str] = (),
) -> None:
    """Keep in a model's folder what its card was rendered from, and write the Hub's `.eval_results`.

    Arguments are those of `render_card`, but `results` and `training_record` are files. Files outside the folder are
    copied into its `results/`. The texts of queries in a comparison are not kept.
    """
    kept_comparison = None
    if comparison is not None:
        kept_comparison = f"{_RESULTS_FOLDER}/comparison.json"
        datasets = {
            name: {key: value for key, value in entry.items() if key != "changed_queries"}
            for name, entry in comparison["datasets"].items()
        }
        write_json(folder / kept_comparison, {**comparison, "datasets": datasets})
    manifest = {
        "results": [_kept(folder, path, path.name) for path in results],
        "training_record": None if training_record is None else _kept(folder, training_record, RECORD_FILE),
        "comparison": kept_comparison,
        "published": published,
        "repo_id": repo_id,
        "plots": dict(plots or {}),
        "dataset_ids": list(dataset_ids),
        "license_id": license_id,
        "languages": list(languages),
    }
    write_json(folder / SOURCES_FILE, manifest)
    for stale in (folder / _EVAL_RESULTS_FOLDER).glob("*.yaml"):
        stale.unlink()
    for path, text in _eval_results(folder, manifest).items():
        write_whole(path, text)


def _kept(folder: Path, path: Path, name: str) -> str:
    """Copy a JSON file into the results folder unless it is in the model's folder; return its path from there."""
    if path.resolve().is_relative_to(folder.resolve()):
        return path.resolve().relative_to(folder.resolve()).as_posix()
    write_json(folder / _RESULTS_FOLDER / name, read_json_object(path))
    return f"{_RESULTS_FOLDER}/{name}"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read which files, and what else, the card in a folder was rendered from."""
    path = folder / SOURCES_FILE
    if not path.is_file():
        raise UserError(
            f"expected a model card with its sources in {folder}, found no {SOURCES_FILE}: evaluate the model, then "
            f"{command('render_card', '--model_path', folder)} --results ... --repo_id organisation/name"
        )
    manifest = read_json_object(path)
    missing = _MANIFEST_KEYS - manifest.keys()
    if missing:
        raise UserError(f"{path}: expected the key {sorted(missing)[0]!r}, got none: render the card again")
    for key, kind in _MANIFEST_TYPES.items():
        parts = manifest[key] if isinstance(manifest[key], list) else []
        if not isinstance(manifest[key], kind) or not all(isinstance(part, str) for part in parts):
            raise UserError(f"{path}: expected another value of {key!r}: render the card again")
    return manifest


def read_sources(folder: Path) -> dict[str, Any]:
    """Read the arguments of `render_card` from a model's folder; refuse what does not fit its weights and files."""
    manifest = read_manifest(folder)
    results, present = [read_results(folder / name) for name in manifest["results"]], weights_digest(folder)
    for name, part in zip(manifest["results"], results, strict=True):
        measured = part["model"].get("weights_sha256")
        if measured != present:
            raise UserError(
                f"{folder / name}: expected figures of the weights in {folder} (sha256 {str(present)[:12]}), got "
                f"those of {'unknown weights' if measured is None else measured[:12]}: evaluate this model, then "
                "render its card"
            )
    expected = _eval_results(folder, manifest)
    found = {path: path.read_text(encoding="utf-8") for path in (folder / _EVAL_RESULTS_FOLDER).glob("*.yaml")}
    for listed in sorted(expected.keys() | found.keys()):
        if expected.get(listed) != found.get(listed):
            raise UserError(
                f"{listed}: expected what the results files say, got something else: render the card again"
            )
    if results:
        joined = join_results(results)
    else:
        joined = nothing_measured(folder.resolve().name, read_json_object(folder / "config.json"))
    sources = {**{key: manifest[key] for key in _MANIFEST_KEYS}, "results": joined}
    for name, read in (("training_record", read_record), ("comparison", read_json_object)):
        sources[name] = None if manifest[name] is None else read(folder / manifest[name])
    return sources


def _eval_results(folder: Path, manifest: Mapping[str, Any]) -> dict[Path, str]:
    """Return file -> content of what the Hub's leaderboards read, for each data set that is a benchmark there."""
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    files = {}
    for part in [read_results(folder / name) for name in manifest["results"]]:
        for name, entry in part["datasets"].items():
            value = entry["systems"].get(PROJECTION_SYSTEM, {}).get(MAIN_METRIC)
            dataset_id, task = BEIR_ON_THE_HUB.get(name, (None, None))
            if dataset_id is None or entry["split"] != "test" or value is None:
                continue
            listed = EvalResultEntry(
                dataset_id=dataset_id,
                task_id=f"{task}_default_test",
                value=round(100 * value, 3),  # leaderboards count in hundredths
                date=part["created"],
                notes=f"{MAIN_METRIC} by pytrec_eval, not by mteb: {' '.join(part['command'].split())}",
            )
            text = yaml.safe_dump(eval_result_entries_to_yaml([listed]), sort_keys=False, allow_unicode=True)
            files[folder / _EVAL_RESULTS_FOLDER / f"{name}.yaml"] = text
    return files
