"""The results file: every number that a table, a plot or a model card may show, and how it was made."""

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
from .environment import environment_facts

__all__ = [
    "SCHEMA_VERSION",
    "environment_facts",
    "format_results_table",
    "mean_over_datasets",
    "read_results",
    "write_results",
]

SCHEMA_VERSION = 1
MAIN_METRIC = "ndcg@10"  # the metric of comparisons, and the one that chooses checkpoints

_NUMBER = (int, float)
_OPEN = "..."  # key of a shape: other keys may be there, with any value
_EACH = "*"  # key of a shape: any key, each value of this shape
_OPTIONAL = "?"  # prefix of a key that may be missing

_SYSTEMS = {_EACH: {_EACH: _NUMBER}}  # system -> metric -> value
_COMPARISONS = {
    _EACH: {
        "metric": str,
        "difference": _NUMBER,
        "p_value": _NUMBER,
        "low": _NUMBER,
        "high": _NUMBER,
        "wins": int,
        "ties": int,
        "losses": int,
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
        "path": str,
        "name": str,
        "similarity": str,
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
    """Check results against the schema and write them as JSON, whole or not at all.

    Args:
        path: File to write; its folder is made if needed.
        results: What the schema (version 1) asks for: `schema_version`, `created`, `command`, `commit`,
            `versions`, `machine`, `model`, `settings`, `datasets`, `mean` and `isotropy`.

    Raises:
        UserError: If a key is missing, unknown, or of the wrong type, or a number is not finite.
    """
    path = Path(path)
    _check(results, _SCHEMA, path, "")
    write_json(path, results)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON whole or not at all, making the folder if needed; NaN is refused."""
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a results file and check it.

    Args:
        path: File written by `write_results`.

    Returns:
        The results, as described there.

    Raises:
        UserError: If the file cannot be read or does not follow the schema; the message names the key.
    """
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
    """Compare a value with its shape; `key` is the way to it, such as `datasets.scifact.split`."""
    if not isinstance(shape, dict):
        _check_leaf(value, shape, path, key)
        return
    if not isinstance(value, Mapping):
        _complain(path, key, "an object", value)
    for name, part in shape.items():
        if name == _EACH:
            for each in value:
                _check(value[each], part, path, _join(key, each))
        elif name != _OPEN and (name.removeprefix(_OPTIONAL) in value or not name.startswith(_OPTIONAL)):
            plain = name.removeprefix(_OPTIONAL)
            if plain not in value:
                raise UserError(f"{path}: expected the key {_join(key, plain)!r}, got none: write the file again")
            _check(value[plain], part, path, _join(key, plain))
    if _EACH not in shape and _OPEN not in shape:
        known = {name.removeprefix(_OPTIONAL) for name in shape}
        unknown = [name for name in value if name not in known]
        if unknown:
            raise UserError(f"{path}: expected only known keys, got {_join(key, unknown[0])!r}: remove or rename it")


def _check_leaf(value: Any, kinds: Any, path: Path, key: str) -> None:
    allowed = kinds if isinstance(kinds, tuple) else (kinds,)
    # In Python a bool is an int; in the file they are different things.
    wrong_bool = isinstance(value, bool) and bool not in allowed and object not in allowed
    if wrong_bool or not isinstance(value, allowed):
        _complain(path, key, " or ".join("null" if kind is NoneType else kind.__name__ for kind in allowed), value)
    if isinstance(value, float) and not math.isfinite(value):
        _complain(path, key, "a finite number", value)


def _complain(path: Path, key: str, expected: str, value: Any) -> None:
    raise UserError(f"{path}: expected {expected} at {key or 'the top'!r}, got {value!r}: write the file again")


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def mean_over_datasets(datasets: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Average each system's metrics over data sets, each data set counting alike.

    Args:
        datasets: The `datasets` part of the results, at least one data set.

    Returns:
        System -> metric -> mean, for the systems and metrics that every data set has.

    Example:
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


def format_results_table(results: Mapping[str, Any], *, metric: str = "ndcg@10") -> str:
    """Lay results out for the terminal, under 100 columns.

    Args:
        results: As from `read_results`.
        metric: The metric shown and compared; recall@100 stands beside it.

    Returns:
        A table with one row per data set (and subset) and system, the base first, then the mean over
        data sets if there are several. No line ends in spaces.
    """
    rows: list[tuple[str, ...]] = [
        ("data set (queries)", "system", metric.upper(), "vs base", "95% interval", "p", "R@100")
    ]
    for name, entry in results["datasets"].items():
        rows += _table_rows(f"{name} {entry['split']} ({entry['num_queries']})", entry, metric)
        for subset, part in entry.get("subsets", {}).items():
            rows += _table_rows(f"  {subset.replace('_', ' ')} ({part['num_queries']})", part, metric)
    if len(results["datasets"]) > 1:
        rows += _table_rows("mean of data sets", {"systems": results["mean"]}, metric)
    return format_table(rows, num_names=2)


def _table_rows(label: str, entry: Mapping[str, Any], metric: str) -> list[tuple[str, ...]]:
    systems = entry["systems"]
    base = systems.get("base", {}).get(metric)
    rows: list[tuple[str, ...]] = []
    for system in sorted(systems, key=lambda name: name != "base"):  # stable: the others keep their order
        value = systems[system].get(metric)
        compared = entry.get("comparisons", {}).get(system, {})
        tested = compared.get("metric") == metric
        is_other = system != "base" and value is not None and base is not None
        rows.append(
            (
                _shorten(label, 28),
                _shorten(system, 12),
                "-" if value is None else f"{value:.4f}",
                f"{value - base:+.4f}" if is_other else "",
                f"[{compared['low']:+.4f}, {compared['high']:+.4f}]" if tested else "",
                f"{compared['p_value']:.4f}" if tested else "",
                f"{systems[system]['recall@100']:.4f}" if "recall@100" in systems[system] else "-",
            )
        )
        label = ""
    return rows


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
