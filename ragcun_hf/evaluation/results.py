"""The results file: every number that a table, a plot or a model card may show, and how it was measured."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from ..command_line import format_table
from ..commands import command
from ..errors import UserError
from ..files import write_whole

SCHEMA_VERSION = 1
_FEW_DOCUMENTS = 500  # a search among fewer finds almost everything, so its figures say little
MAIN_METRIC = "ndcg@10"  # the metric of comparisons, and the one that chooses checkpoints
MODEL_SETTINGS = ("use_predictor", "output_dim", "projection_init", "projection_kind", "freeze_base", "lexical_dim")
BASE_SYSTEM, BM25_SYSTEM, FUSION_SYSTEM, CLOSED_FORM_SYSTEM = "base", "bm25", "fusion", "closed_form"
PROJECTION_SYSTEM, PREDICTOR_SYSTEM = "projection", "predictor"
MOVED_SYSTEM = f"{PROJECTION_SYSTEM}_{CLOSED_FORM_SYSTEM}"  # the projection, with known documents moved
MODEL_SYSTEM = "model"  # an encoder of another kind, which has no base
REFERENCES = (BASE_SYSTEM, BM25_SYSTEM)  # the other systems are compared with the first of these that was measured
BASELINES = (*REFERENCES, FUSION_SYSTEM, CLOSED_FORM_SYSTEM)  # without a head, in the order of tables


def remark_on_few_documents(num_documents: int, flag: str) -> str | None:
    """Return a line for figures of a search among too few documents, or None; `flag` names more of them."""
    if num_documents >= _FEW_DOCUMENTS:
        return None
    return (
        f"With fewer than {_FEW_DOCUMENTS} documents to search, these figures are far higher than in a real "
        f"collection, and differences may be chance: name all documents with {flag}."
    )


def model_settings(config: Any) -> dict[str, Any]:
    """Return what a results file says of a model's configuration."""
    similarity, base = config.similarity_fn_name, config.base_model_name
    return {
        "similarity": similarity,
        "base_model": base,
        **{setting: getattr(config, setting) for setting in MODEL_SETTINGS},
    }


# Shapes of the file's parts: a type, several types, or a dictionary of key -> shape.
_NUMBER = (int, float)
_OPEN = "..."  # a key: other keys are allowed, with any value
_EACH = "*"  # a key: any key is allowed, each value of this shape
_OPTIONAL = "?"  # prefix of a key that may be missing

_SYSTEMS = {_EACH: {_EACH: _NUMBER}}  # system -> metric -> value
_COMPARISONS = {
    _EACH: {
        "metric": str,
        **dict.fromkeys(("difference", "p_value", "low", "high"), _NUMBER),
        **dict.fromkeys(("wins", "ties", "losses"), int),
    }
}
_DATASET = {
    "split": str,
    "num_queries": int,
    "num_documents": int,
    "num_judgements": int,
    "systems": _SYSTEMS,
    "comparisons": _COMPARISONS,
    "?num_seen_queries": int,  # with a relevant document that was seen in training; missing if that is not known
    "?examples": {
        _EACH: {
            **dict.fromkeys(("query", "document_id", "document"), str),
            "score": _NUMBER,
            "is_relevant": bool,
        }
    },
    "?subsets": {_EACH: {"num_queries": int, "systems": _SYSTEMS, "?comparisons": _COMPARISONS}},
}
_SCHEMA = {
    "schema_version": int,
    "created": str,
    "command": str,
    "commit": (str, NoneType),
    "versions": {_EACH: str},
    "machine": {"processor": str, "cores": int, "python": str, _OPEN: object},
    "model": {
        **dict.fromkeys(("path", "name", "similarity"), str),
        "base_model": (str, NoneType),
        "use_predictor": bool,
        _OPEN: object,
    },
    "settings": {_OPEN: object},
    "datasets": {_EACH: _DATASET},
    "mean": _SYSTEMS,
    "isotropy": _SYSTEMS,
}


def write_results(path: str | os.PathLike[str], results: Mapping[str, Any]) -> None:
    """Check results against the schema and write them as JSON, replacing the file only when complete.

    Raises a UserError that names the key if one is missing, unknown or of the wrong type, or a number is not finite.
    """
    path = Path(path)
    _check(results, _SCHEMA, path, "")
    write_json(path, results)


def write_json(path: Path, content: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write JSON, replacing the file only when complete; makes its folder if needed, and refuses NaN."""
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json_object(path: Path, what: str = "a JSON file", remedy: str = "check the path") -> dict[str, Any]:
    """Read a JSON file that holds one object; a UserError calls the file `what`, and says how to get one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"expected {what}, could not read {path} ({error.strerror}): {remedy}") from error
    except (ValueError, RecursionError) as error:  # also a wrong encoding
        raise UserError(f"{path}: expected JSON, got something else ({error}): write it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got a {type(content).__name__}: write it again")
    return content


def read_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a results file; raises a UserError if it cannot be read or does not match the schema."""
    path = Path(path)
    results = read_json_object(path, "a results file", f"write one with {command('eval_beir')}")
    version = results.get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path}: expected schema_version {SCHEMA_VERSION}, got {version!r}: write it again with this version"
        )
    _check(results, _SCHEMA, path, "")
    return results


_RECORD = {
    **{f"?{part}": {_OPEN: object} for part in ("data", "model", "training_arguments")},
    "?blend": _NUMBER,
    "?seconds": {_EACH: _NUMBER},
    f"?validation_{MAIN_METRIC}": {_EACH: _NUMBER},
    "?essential": list,
    "?log_history": list,
    _OPEN: object,
}


def read_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a training record; raises a UserError if it cannot be read, or what a card shows of it has another form."""
    path = Path(path)
    record = read_json_object(path)
    _check(record, _RECORD, path, "")
    if record.get("energy") is not None:
        _check(record["energy"], {"kwh": _NUMBER, "by": str}, path, "energy")
    for place, name in enumerate(record.get("essential", [])):
        _check(name, str, path, f"essential.{place}")
    for place, entry in enumerate(record.get("log_history", [])):
        _check(entry, {"?step": _NUMBER, "?epoch": _NUMBER, _OPEN: object}, path, f"log_history.{place}")
        for name in (each for each in entry if "loss" in each):
            if not _is_number_in_text(entry[name]):  # transformers writes some so
                _check(entry[name], _NUMBER, path, f"log_history.{place}.{name}")
    return record


def _is_number_in_text(value: Any) -> bool:
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False


def _check(value: Any, shape: Any, path: Path, key: str) -> None:
    """Compare a value with its shape; `key` is its full name, such as `datasets.scifact.split`."""
    if not isinstance(shape, dict):
        _check_leaf(value, shape if isinstance(shape, tuple) else (shape,), path, key)
        return
    if not isinstance(value, Mapping):
        raise _wrong_value(path, key, "an object", value)
    if _EACH in shape:
        for each in value:
            _check(value[each], shape[_EACH], path, f"{key}.{each}")
        return
    prefix = f"{key}." if key else ""
    for name, part in shape.items():
        plain = name.removeprefix(_OPTIONAL)
        if plain in value:
            _check(value[plain], part, path, prefix + plain)
        elif plain == name != _OPEN:
            raise UserError(f"{path}: expected the key {prefix + name!r}, got none: write the file again")
    known = {name.removeprefix(_OPTIONAL) for name in shape}
    unknown = [name for name in value if name not in known]
    if unknown and _OPEN not in shape:
        raise UserError(f"{path}: expected only known keys, got {prefix + unknown[0]!r}: remove or rename it")


def _check_leaf(value: Any, allowed: tuple[Any, ...], path: Path, key: str) -> None:
    # In Python a bool is an int; in the file they are different things.
    is_wrong_bool = isinstance(value, bool) and bool not in allowed and object not in allowed
    if is_wrong_bool or not isinstance(value, allowed):
        names = " or ".join("null" if kind is NoneType else kind.__name__ for kind in allowed)
        raise _wrong_value(path, key, names, value)
    if isinstance(value, float) and not math.isfinite(value):
        raise _wrong_value(path, key, "a finite number", value)


def _wrong_value(path: Path, key: str, expected: str, value: Any) -> UserError:
    return UserError(
        f"{path}: expected {expected} at {key or 'the top'!r}, got {shorten(repr(value), 80)}: write the file again"
    )


def mean_over_datasets(datasets: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Average each system's metrics over the `datasets` part of the results, each data set with the same weight.

    Returns system -> metric -> mean, for the systems and metrics that every data set has.

    >>> easy, hard = {"base": {"mrr@10": 1.0}}, {"base": {"mrr@10": 0.5}}
    >>> mean_over_datasets({"easy": {"systems": easy}, "hard": {"systems": hard}})
    {'base': {'mrr@10': 0.75}}
    """
    entries = [entry["systems"] for entry in datasets.values()]
    means: dict[str, dict[str, float]] = {}
    for system, metrics in entries[0].items() if entries else ():
        if all(system in entry for entry in entries):
            means[system] = {
                metric: math.fsum(entry[system][metric] for entry in entries) / len(entries)
                for metric in metrics
                if all(metric in entry[system] for entry in entries)
            }
    return means


def reference_system(systems: Collection[str]) -> str | None:
    """Return the system that the others are compared with: the base, or BM25, or None if neither was measured."""
    return next((system for system in REFERENCES if system in systems), None)


def system_order(name: str) -> int:
    """Return where a system stands in a table: the base first, then the other baselines, then all others."""
    return BASELINES.index(name) if name in BASELINES else len(BASELINES)


def format_results_table(results: Mapping[str, Any]) -> str:
    """Format results as a table for the terminal, under 100 columns: NDCG@10 with its comparison, and recall@100."""
    return format_table(results_rows(results), num_names=2)


def results_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the cells of a table of results, the header first.

    There is one row per data set (and subset) and system, the base first, then the mean of several data sets.
    """
    references = {reference_system(entry["systems"]) for entry in results["datasets"].values()} - {None}
    against = f"vs {' or '.join(sorted(map(str, references)))}" if references else "vs base"
    head = ("data set (queries)", "system", MAIN_METRIC.upper(), against, "95% interval", "p", "R@100")
    rows: list[tuple[str, ...]] = [head]
    for name, entry in results["datasets"].items():
        rows += _table_rows(f"{name} {entry['split']} ({entry['num_queries']})", entry)
        for subset, part in entry.get("subsets", {}).items():
            rows += _table_rows(f"  {subset.replace('_', ' ')} ({part['num_queries']})", part)
    if len(results["datasets"]) > 1:
        rows += _table_rows("mean of data sets", {"systems": results["mean"]})
    return rows


def _table_rows(label: str, entry: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for system, value, difference, tested in compared_systems(entry, reference_system(entry["systems"])):
        recall = entry["systems"][system].get("recall@100")
        yield (
            shorten(label, 28),
            shorten(system, 12),
            "-" if value is None else f"{value:.4f}",
            "" if difference is None else f"{difference:+.4f}",
            f"[{tested['low']:+.4f}, {tested['high']:+.4f}]" if tested else "",
            f"{tested['p_value']:.4f}" if tested else "",
            "-" if recall is None else f"{recall:.4f}",
        )
        label = ""


def compared_systems(
    entry: Mapping[str, Any], reference: str | None = BASE_SYSTEM
) -> Iterator[tuple[str, Any, Any, Any]]:
    """Yield name, NDCG@10, difference to the reference and entry in `comparisons` of each system, the base first.

    What an entry of the results file does not have, has by another metric or with another reference, is None.
    """
    systems = entry["systems"]
    compared = entry.get("comparisons", {}) if reference == reference_system(systems) else {}
    other = systems.get(reference, {}).get(MAIN_METRIC)
    for system in sorted(systems, key=system_order):  # stable: the others keep their order
        value = systems[system].get(MAIN_METRIC)
        tested = compared.get(system, {})
        has_difference = system != reference and value is not None and other is not None
        is_tested = tested.get("metric") == MAIN_METRIC
        yield system, value, value - other if has_difference else None, tested if is_tested else None


def shorten(text: str, width: int) -> str:
    """Cut a text to a width; an ellipsis marks the cut."""
    return text if len(text) <= width else text[: width - 1] + "…"
