"""The results file: every number that a table, a plot or a model card may show, and how it was measured."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from ..command_line import format_table
from ..errors import UserError
from ..files import write_whole

SCHEMA_VERSION = 1
MAIN_METRIC = "ndcg@10"  # the metric of comparisons, and the one that chooses checkpoints
BASE_SYSTEM, PROJECTION_SYSTEM, PREDICTOR_SYSTEM = "base", "projection", "predictor"

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


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, replacing the file only when complete; makes its folder if needed, and refuses NaN."""
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a results file; raises a UserError if it cannot be read or does not match the schema."""
    path = Path(path)
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"expected a results file, could not read {path} ({error.strerror}): write one with training/eval_beir.py"
        ) from error
    except ValueError as error:  # also a wrong encoding
        raise UserError(f"{path}: expected JSON, got something else ({error}): write it again") from error
    version = results.get("schema_version", SCHEMA_VERSION) if isinstance(results, dict) else SCHEMA_VERSION
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path}: expected schema_version {SCHEMA_VERSION}, got {version!r}: write it again with this version"
        )
    _check(results, _SCHEMA, path, "")
    return results


def _check(value: Any, shape: Any, path: Path, key: str) -> None:
    """Compare a value with its shape; `key` is its full name, such as `datasets.scifact.split`."""
    if not isinstance(shape, dict):
        _check_leaf(value, shape if isinstance(shape, tuple) else (shape,), path, key)
        return
    if not isinstance(value, Mapping):
        raise _wrong_value(path, key, "an object", value)
    for name, part in shape.items():
        plain = name.removeprefix(_OPTIONAL)
        if name == _EACH:
            for each in value:
                _check(value[each], part, path, _join(key, each))
        elif plain in value:
            _check(value[plain], part, path, _join(key, plain))
        elif name not in (_OPEN, _OPTIONAL + plain):
            raise UserError(f"{path}: expected the key {_join(key, plain)!r}, got none: write the file again")
    if _EACH not in shape and _OPEN not in shape:
        known = {name.removeprefix(_OPTIONAL) for name in shape}
        unknown = [name for name in value if name not in known]
        if unknown:
            raise UserError(f"{path}: expected only known keys, got {_join(key, unknown[0])!r}: remove or rename it")


def _check_leaf(value: Any, allowed: tuple[Any, ...], path: Path, key: str) -> None:
    # In Python a bool is an int; in the file they are different things.
    is_wrong_bool = isinstance(value, bool) and bool not in allowed and object not in allowed
    if is_wrong_bool or not isinstance(value, allowed):
        names = " or ".join("null" if kind is NoneType else kind.__name__ for kind in allowed)
        raise _wrong_value(path, key, names, value)
    if isinstance(value, float) and not math.isfinite(value):
        raise _wrong_value(path, key, "a finite number", value)


def _wrong_value(path: Path, key: str, expected: str, value: Any) -> UserError:
    return UserError(f"{path}: expected {expected} at {key or 'the top'!r}, got {value!r}: write the file again")


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


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


def format_results_table(results: Mapping[str, Any]) -> str:
    """Format results as a table for the terminal, under 100 columns: NDCG@10 with its comparison, and recall@100.

    There is one row per data set (and subset) and system, the base first, then the mean of several data sets.
    """
    rows: list[tuple[str, ...]] = [
        ("data set (queries)", "system", MAIN_METRIC.upper(), "vs base", "95% interval", "p", "R@100")
    ]
    for name, entry in results["datasets"].items():
        rows += _table_rows(f"{name} {entry['split']} ({entry['num_queries']})", entry)
        for subset, part in entry.get("subsets", {}).items():
            rows += _table_rows(f"  {subset.replace('_', ' ')} ({part['num_queries']})", part)
    if len(results["datasets"]) > 1:
        rows += _table_rows("mean of data sets", {"systems": results["mean"]})
    return format_table(rows, num_names=2)


def _table_rows(label: str, entry: Mapping[str, Any]) -> list[tuple[str, ...]]:
    systems = entry["systems"]
    base = systems.get(BASE_SYSTEM, {}).get(MAIN_METRIC)
    rows: list[tuple[str, ...]] = []
    for system in sorted(systems, key=lambda name: name != BASE_SYSTEM):  # stable: the others keep their order
        value, recall = systems[system].get(MAIN_METRIC), systems[system].get("recall@100")
        compared = entry.get("comparisons", {}).get(system, {})
        is_tested = compared.get("metric") == MAIN_METRIC
        has_difference = system != BASE_SYSTEM and value is not None and base is not None
        rows.append(
            (
                shorten("" if rows else label, 28),
                shorten(system, 12),
                "-" if value is None else f"{value:.4f}",
                f"{value - base:+.4f}" if has_difference else "",
                f"[{compared['low']:+.4f}, {compared['high']:+.4f}]" if is_tested else "",
                f"{compared['p_value']:.4f}" if is_tested else "",
                "-" if recall is None else f"{recall:.4f}",
            )
        )
    return rows


def shorten(text: str, width: int) -> str:
    """Cut a text to a width, with three dots at the end."""
    return text if len(text) <= width else text[: width - 1] + "…"
