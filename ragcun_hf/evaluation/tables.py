"""Tables of many models from their results files, as text, Markdown, LaTeX or CSV, with significance marks."""

from __future__ import annotations

import csv
import io
import itertools
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError
from .results import BASELINES, MODEL_SYSTEM, PROJECTION_SYSTEM
from .significance import PairedComparison, PerQuery, compare_over_datasets, compare_systems

Key = tuple[str, str, str]  # model, data set and system of a run
Column = tuple[str, str]  # data set (or MEAN) and metric

MEAN = "mean"
MARKS = "abcdefghijklmnopqrstuvwxyz"
_SEED = re.compile(r"[._-]?seed[._-]?\d+$", flags=re.IGNORECASE)
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {sign: f"\\{sign}" for sign in "&%$#_{}"}


@dataclass(frozen=True)
class TableRow:
    """One system of one model, perhaps trained with several seeds."""

    label: str
    systems: Sequence[Mapping[str, Mapping[str, float]]]  # one for each seed: data set -> metric -> value
    per_query: Sequence[Mapping[str, PerQuery]] = field(default_factory=list)  # one for each seed: data set -> figures

    def values(self, column: Column, datasets: Sequence[str]) -> list[float]:
        """Return a figure for each seed; none if a data set or the metric was not measured for every seed."""
        dataset, metric = column
        names = datasets if dataset == MEAN else [dataset]
        found = [[seed.get(name, {}).get(metric) for name in names] for seed in self.systems]
        if any(value is None for values in found for value in values):
            return []
        return [math.fsum(values) / len(values) for values in found]  # type: ignore[arg-type]

    def mean_per_query(self, dataset: str) -> PerQuery | None:
        """Average the figures of each query over the seeds; None if a run is missing."""
        seeds = [seed[dataset] for seed in self.per_query if dataset in seed]
        if not seeds or len(seeds) < len(self.systems):
            return None
        return {
            query: {metric: math.fsum(seed[query][metric] for seed in seeds) / len(seeds) for metric in metrics}
            for query, metrics in seeds[0].items()
        }


@dataclass(frozen=True)
class Cell:
    """One figure of a row."""

    mean: float | None  # over seeds; None if not measured
    deviation: float | None = None  # sample standard deviation over two or more seeds
    marks: str = ""  # letters of the rows that are significantly worse
    is_best: bool = False  # of its column


@dataclass(frozen=True)
class ComparisonTable:
    """Rows of models, with a column for each data set and metric, and for the mean over several data sets.

    With at most 26 rows, each has a letter: the first is a. `is_marked` says whether any difference was tested.
    """

    columns: list[Column]
    rows: list[TableRow]
    cells: list[list[Cell]]  # by row, then by column
    is_marked: bool

    def text_rows(self) -> list[tuple[str, ...]]:
        """Return the cells as plain text, the header first."""
        return self._rows(_plain_cell, [f"{data} {metric.upper()}" for data, metric in self.columns])

    def to_markdown(self) -> str:
        """Return a Markdown table; the best figure of each column is bold."""
        return markdown_table(self._rows(_markdown_cell, self._titles()), num_names=1)

    def to_latex(self) -> str:
        """Return a LaTeX `tabular` in the style of the package booktabs; the best figure of each column is bold."""
        head, *rows = self._rows(_latex_cell, [_latex(title) for title in self._titles()], name=_latex)
        lines = [" & ".join(row) + r" \\" for row in rows]
        start = rf"\begin{{tabular}}{{l{'r' * len(self.columns)}}}"
        return "\n".join([start, r"\toprule", " & ".join(head) + r" \\", r"\midrule", *lines, _LATEX_END, ""])

    def to_csv(self) -> str:
        """Return CSV with unrounded figures; standard deviations and marks have columns of their own."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        parts = [
            (f"{data} {metric}", f"{data} {metric} sd", f"{data} {metric} better than")
            for data, metric in self.columns
        ]
        writer.writerow(["mark", "model", "seeds", *itertools.chain(*parts)])
        for number, (row, cells) in enumerate(zip(self.rows, self.cells, strict=True)):
            figures = [(cell.mean, cell.deviation, cell.marks) for cell in cells]
            blank = ["" if value is None else value for each in figures for value in each]
            writer.writerow([_mark(number), row.label, len(row.systems), *blank])
        return buffer.getvalue()

    def _titles(self) -> list[str]:
        return [f"{data} {metric.upper()}" for data, metric in self.columns]

    def _rows(self, cell: Any, titles: list[str], name: Any = str) -> list[tuple[str, ...]]:
        rows = [("model", *titles)]
        for number, (row, cells) in enumerate(zip(self.rows, self.cells, strict=True)):
            seeds = f" ({len(row.systems)} seeds)" if len(row.systems) > 1 else ""
            mark = f"{_mark(number)} " if self.is_marked else ""
            rows.append((name(f"{mark}{row.label}{seeds}"), *(cell(each) for each in cells)))
        return rows


_LATEX_END = "\\bottomrule\n\\end{tabular}"


def _mark(number: int) -> str:
    return MARKS[number] if number < len(MARKS) else ""


def collect_rows(
    results: Sequence[Mapping[str, Any]],
    *,
    groups: Sequence[str] = (),
    per_query: Mapping[Key, PerQuery] | None = None,
) -> list[TableRow]:
    """Make a row for every system of every model: the frozen bases first, then the other baselines, then the models.

    Models whose names differ only in a seed at the end (`mine_seed1`, `mine-seed-2`) are seeds of one model, and so
    are those whose names start with one of `groups`. A baseline with the same figures in all files has one row.

    Args:
        results: Contents of results files, of models with different names.
        groups: Beginnings of names.
        per_query: (model, data set, system) -> figures of each query, for significance.

    Returns:
        The rows.

    Raises:
        UserError: If two models have the same name.
    """
    names = [each["model"]["name"] for each in results]
    repeated = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if repeated is not None:
        raise UserError(
            f"expected results of different models, got {repeated!r} twice: evaluate one under another --run_name"
        )
    found: dict[tuple[str, str], list[tuple[str, Any]]] = {}  # (group, system) -> name and figures of each seed
    for name, each in zip(names, results, strict=True):
        for system in dict.fromkeys(system for entry in each["datasets"].values() for system in entry["systems"]):
            entries = each["datasets"].items()
            figures = {data: entry["systems"][system] for data, entry in entries if system in entry["systems"]}
            found.setdefault((_group(name, groups), system), []).append((name, figures))
    rows = []
    for system in BASELINES:
        rows += _shared_rows(system, {group: seeds for (group, of), seeds in found.items() if of == system}, per_query)
    for (group, system), seeds in found.items():
        if system not in BASELINES:
            label = group if system in (PROJECTION_SYSTEM, MODEL_SYSTEM) else f"{group}, {system}"
            rows.append(_row(label, system, seeds, per_query))
    return rows


def _group(name: str, groups: Sequence[str]) -> str:
    longest = max((group for group in groups if name.startswith(group)), key=len, default=None)
    return longest or _SEED.sub("", name) or name


def _shared_rows(system: str, seeds_of: Mapping[str, Any], per_query: Any) -> list[TableRow]:
    """Make a row for each different set of figures of a baseline, which does not depend on a seed."""
    distinct: list[tuple[str, tuple[str, Any]]] = []
    for group, seeds in seeds_of.items():
        for name, figures in seeds:
            same = [place for place, (_, (_, other)) in enumerate(distinct) if _agree(figures, other)]
            if not same:
                distinct.append((group, (name, figures)))
            elif len(figures) > len(distinct[same[0]][1][1]):
                distinct[same[0]] = (group, (name, figures))
    is_one = len(distinct) == 1
    return [_row(system if is_one else f"{system} of {group}", system, [seed], per_query) for group, seed in distinct]


def _agree(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two files have the same figures wherever both have some, and have some in common."""
    common = one.keys() & other.keys()
    return bool(common) and all(one[data] == other[data] for data in common)


def _row(label: str, system: str, seeds: Sequence[tuple[str, Any]], per_query: Any) -> TableRow:
    known = per_query or {}
    of_seeds = [
        {data: known[name, data, system] for data in figures if (name, data, system) in known}
        for name, figures in seeds
    ]
    return TableRow(label, [figures for _, figures in seeds], of_seeds)


def compare_rows(rows: Sequence[TableRow], metrics: Sequence[str], *, level: float = 0.05) -> ComparisonTable:
    """Lay out rows in columns, and mark each figure with the letters of the rows that are significantly worse.

    Two rows are compared by the paired randomization test, where the figures of each query are known; of several
    seeds, the means. The p-values of a column are corrected for the number of its pairs (Holm, "A simple sequentially
    rejective multiple test procedure", 1979).

    Args:
        rows: As from `collect_rows`.
        metrics: Such as `ndcg@10`.
        level: Differences with a smaller corrected p-value are significant.

    Returns:
        The table.

    Raises:
        UserError: If no row has one of the metrics.
    """
    datasets = list(dict.fromkeys(name for row in rows for seed in row.systems for name in seed))
    places = [*datasets, *([MEAN] if len(datasets) > 1 else [])]
    columns = [(place, metric) for place in places for metric in metrics]
    known = {metric for row in rows for seed in row.systems for figures in seed.values() for metric in figures}
    for metric in metrics:
        if metric not in known:
            raise UserError(f"expected metrics of these results ({', '.join(sorted(known))}), got {metric!r}: use one")
    by_column = [_column_cells(rows, column, datasets, level) for column in columns]
    is_marked = any(tested for _, tested in by_column)
    cells = [list(row) for row in zip(*(column for column, _ in by_column), strict=True)]
    return ComparisonTable(columns, list(rows), cells, is_marked)


def _column_cells(
    rows: Sequence[TableRow], column: Column, datasets: Sequence[str], level: float
) -> tuple[list[Cell], bool]:
    """Return the cells of a column, and whether any pair of its rows could be compared."""
    values = [row.values(column, datasets) for row in rows]
    means = [math.fsum(each) / len(each) if each else None for each in values]
    best = max((round(mean, 4) for mean in means if mean is not None), default=None)
    comparisons = _comparisons(rows, column, datasets) if len(rows) <= len(MARKS) else {}
    corrected = holm({pair: compared.p_value for pair, compared in comparisons.items()})
    cells = []
    for number, (mean, seeds) in enumerate(zip(means, values, strict=True)):
        worse = set()
        for (a, b), compared in comparisons.items():
            if corrected[a, b] < level and number in (a, b):
                is_better = (compared.difference > 0) == (number == a)
                worse |= {b if number == a else a} if is_better else set()
        deviation = statistics.stdev(seeds) if len(seeds) > 1 else None
        is_best = mean is not None and round(mean, 4) == best and len(rows) > 1
        cells.append(Cell(mean, deviation, "".join(_mark(row) for row in sorted(worse)), is_best))
    return cells, bool(comparisons)


def _comparisons(
    rows: Sequence[TableRow], column: Column, datasets: Sequence[str]
) -> dict[tuple[int, int], PairedComparison]:
    """Compare all pairs of rows whose figures of each query are known, on the same queries."""
    dataset, metric = column
    names = list(datasets) if dataset == MEAN else [dataset]
    known = {}
    for number, row in enumerate(rows):
        found = [row.mean_per_query(name) for name in names]
        if None not in found:
            known[number] = found
    compared = {}
    for a, b in itertools.combinations(known, 2):
        pairs: list[Any] = list(zip(known[a], known[b], strict=True))
        if all(one.keys() == other.keys() for one, other in pairs):
            is_mean = dataset == MEAN
            compared[a, b] = (
                compare_over_datasets(pairs, metric) if is_mean else compare_systems(pairs[0][0], pairs[0][1], metric)
            )
    return compared


def holm(p_values: Mapping[Any, float]) -> dict[Any, float]:
    """Correct p-values for their number: a family of true hypotheses has one below the level with that probability.

    Source:
        Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6, 1979.

    >>> {name: round(p, 3) for name, p in holm({"a": 0.02, "b": 0.01, "c": 0.5}).items()}
    {'b': 0.03, 'a': 0.04, 'c': 0.5}
    """
    corrected: dict[Any, float] = {}
    largest = 0.0
    for place, (name, p_value) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, p_value * (len(p_values) - place)))
        corrected[name] = largest
    return corrected


def _plain_cell(cell: Cell) -> str:
    if cell.mean is None:
        return "-"
    spread = "" if cell.deviation is None else f" ±{cell.deviation:.4f}"
    return f"{cell.mean:.4f}{spread}{' ' if cell.marks else ''}{cell.marks}"


def _markdown_cell(cell: Cell) -> str:
    if cell.mean is None:
        return "-"
    spread = "" if cell.deviation is None else f" ± {cell.deviation:.4f}"
    figure = f"**{cell.mean:.4f}**" if cell.is_best else f"{cell.mean:.4f}"
    return f"{figure}{spread}{f'<sup>{cell.marks}</sup>' if cell.marks else ''}"


def _latex_cell(cell: Cell) -> str:
    if cell.mean is None:
        return "--"
    spread = "" if cell.deviation is None else rf" $\pm$ {cell.deviation:.4f}"
    figure = rf"\textbf{{{cell.mean:.4f}}}" if cell.is_best else f"{cell.mean:.4f}"
    marks = rf"\textsuperscript{{{cell.marks}}}" if cell.marks else ""
    return f"{figure}{spread}{marks}"


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def markdown_table(rows: Sequence[Sequence[str]], *, num_names: int) -> str:
    r"""Write a Markdown table, header first: the first `num_names` columns left, the others (numbers) right.

    >>> print(markdown_table([("set", "NDCG@10"), ("a|b", "0.6457")], num_names=1))
    | set | NDCG@10 |
    |---|--:|
    | a\|b | 0.6457 |
    """
    head, *others = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    rule = "|".join(["---"] * num_names + ["--:"] * (len(head) - num_names))
    return "\n".join([f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in others)])
