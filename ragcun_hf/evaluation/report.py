"""The report of an evaluation: figures for a Trainer's log, a table for a reader, a results file for a card."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .ranking import Run, write_trec_run
from .results import (
    BASELINES,
    PREDICTOR_SYSTEM,
    format_results_table,
    results_rows,
    write_results,
)
from .tables import markdown_table

_WITH_PREFIX = (*BASELINES, PREDICTOR_SYSTEM)  # in the names of figures


class RetrievalReport(dict[str, float]):
    """The figures of one evaluation, by name: `ndcg@10` of the model, `base_ndcg@10`, `bm25_ndcg@10` and so on.

    `print` shows a table, and so does a notebook.

    Args:
        results: The content of a results file.
        runs: The rankings, by data set and system.
        name: Put in front of the name of every figure.

    Attributes:
        results: As given; `publishing.card.render_card` and `save` take it.
        runs: As given.
    """

    def __init__(
        self, results: dict[str, Any], runs: Mapping[str, Mapping[str, Run]] | None = None, *, name: str = ""
    ) -> None:
        prefix = f"{name}_" if name else ""
        (entry,) = results["datasets"].values()
        # The model's own figures come first: a Trainer's log shows them in this order.
        for system in sorted(entry["systems"], key=lambda system: system in _WITH_PREFIX):
            own = f"{system}_" if system in _WITH_PREFIX else ""
            self.update({f"{prefix}{own}{metric}": value for metric, value in entry["systems"][system].items()})
        self.results = results
        self.runs = dict(runs or {})

    def __str__(self) -> str:
        """Return the table for a terminal."""
        return format_results_table(self.results)

    def _repr_markdown_(self) -> str:
        return markdown_table(results_rows(self.results), num_names=2)

    def _repr_html_(self) -> str:
        head, *rows = results_rows(self.results)
        titles = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        return f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"

    def save(self, path: str | os.PathLike[str], *, with_runs: bool = True) -> None:
        """Write the results as JSON, and the rankings as TREC files into a folder of the same name beside it.

        Args:
            path: The results file, such as `results/mine.json`; the run files are then in `results/mine/`.
            with_runs: Whether to write the rankings, from which `training/table.py` tests differences between models.

        Raises:
            UserError: If an id contains a space, so that a TREC file cannot hold it.
        """
        path = Path(path)
        write_results(path, self.results)
        for dataset, runs in self.runs.items() if with_runs else ():
            for system, run in runs.items():
                tag = re.sub(r"\s+", "_", f"{path.stem}.{system}")
                write_trec_run(path.with_suffix("") / f"{dataset}.{system}.trec", run, tag=tag)
