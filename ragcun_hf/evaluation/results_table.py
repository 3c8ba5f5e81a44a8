"""The results as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


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
    return lay_out(rows, num_names=2)


def lay_out(rows: Sequence[Sequence[str]], *, num_names: int) -> str:
    """Align the cells of a table for the terminal: names to the left, numbers to the right, a line below the head.

    Args:
        rows: The head first, all of one length.
        num_names: How many columns, from the left, are names.

    Returns:
        Lines, none of which ends in spaces.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        names = [cell.ljust(width) for cell, width in zip(row[:num_names], widths[:num_names], strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(row[num_names:], widths[num_names:], strict=True)]
        lines.append("  ".join(names + numbers).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


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
