"""Make one table of many models from their results files: text, Markdown, LaTeX or CSV.

    python training/table.py --results results/a.json results/b_seed1.json results/b_seed2.json --output table.tex

Rows are models, columns are data sets. Models whose names differ only in a seed at the end (b_seed1, b_seed2) are one
row: the mean and the standard deviation over the seeds. If the run files of eval_beir.py are beside the results, and
the judgements are found, a figure is marked with the letters of the rows that are significantly worse.
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..command_line import argument, format_table, parse_arguments, say
from ..commands import command
from ..errors import UserError
from ..files import check_writable, write_whole

_FORMATS = {".md": "to_markdown", ".tex": "to_latex", ".csv": "to_csv"}
_LARGEST_DEVIATION = 1e-9  # of a figure from runs: it is the mean of the same numbers


@dataclass
class TableArguments:
    """The results to show, and how."""

    results: list[str] = argument([], "Results files of eval_beir.py or of RetrievalEvaluator, one for each model.")
    output: list[str] = argument([], "Files to write; .md, .tex and .csv are Markdown, LaTeX and CSV.")
    metrics: list[str] = argument(["ndcg@10"], "Figures to show, such as ndcg@10 and recall@100.")
    group: list[str] = argument(
        [], "Beginnings of names: models whose names start with one of them are seeds of one model."
    )
    systems: list[str] = argument([], "Systems to show, such as base, bm25, fusion and projection. Default: all.")
    data_dir: str | None = argument(
        None,
        "Folder with the BEIR folders of the data sets, for their judgements. Default: the one that the evaluation "
        "was given, if it is there, or data/beir.",
    )
    level: float = argument(0.05, "Differences with a smaller p-value, corrected for the pairs, are significant.")


def main(arguments: list[str] | None = None) -> None:
    """Read the results, print the table, and write it in the formats asked for."""
    (args,) = parse_arguments([TableArguments], description=__doc__ or "", arguments=arguments)
    _check(args)
    from ..evaluation.results import read_results
    from ..evaluation.tables import collect_rows, compare_rows

    paths = {path: read_results(path) for path in dict.fromkeys(args.results)}
    chosen = [_chosen(results, args.systems) for results in paths.values()]
    per_query: dict[Any, Any] = {}
    missing: list[str] = []
    for path, results in zip(paths, chosen, strict=True):
        _add_per_query(per_query, missing, Path(path), results, args.data_dir)
    table = compare_rows(collect_rows(chosen, groups=args.group, per_query=per_query), args.metrics, level=args.level)
    say(format_table(table.text_rows(), num_names=1))
    if table.is_marked:
        say(f"\nLetters: significantly better than these rows (p < {args.level:g}, Holm's correction in each column).")
    if missing:
        say(f"\nNot tested for significance: {missing[0]}{f' ({len(missing) - 1} more)' if missing[1:] else ''}.")
    for output in args.output:
        path = Path(output)
        write_whole(path, getattr(table, _FORMATS[path.suffix])().rstrip("\n") + "\n")
        say(f"Wrote {output}.")


def _check(args: TableArguments) -> None:
    if not args.results:
        raise UserError(
            f"--results expects at least one results file, got none: write one with {command('eval_beir')}"
        )
    if not 0 < args.level < 1:
        raise UserError(f"--level must be between 0 and 1, got {args.level}: use e.g. 0.05")
    for output in map(Path, args.output):
        if output.suffix not in _FORMATS:
            raise UserError(f"--output expects files ending in {', '.join(_FORMATS)}, got {str(output)!r}: rename it")
        check_writable(output.parent)


def _chosen(results: dict[str, Any], systems: list[str]) -> dict[str, Any]:
    """Leave out the systems that were not asked for."""
    if not systems:
        return results
    present = {system for entry in results["datasets"].values() for system in entry["systems"]}
    if not present & {*systems}:
        raise UserError(
            f"--systems expects some of {', '.join(sorted(present))} for {results['model']['name']}, got "
            f"{', '.join(systems)}: name one"
        )
    datasets = {
        name: {
            **entry,
            "systems": {system: entry["systems"][system] for system in systems if system in entry["systems"]},
        }
        for name, entry in results["datasets"].items()
    }
    return {**results, "datasets": datasets}


def _add_per_query(
    per_query: dict[Any, Any], missing: list[str], path: Path, results: Mapping[str, Any], data_dir: str | None
) -> None:
    """Score the runs beside a results file, for each data set whose judgements are there; note what is missing."""
    from ..data.beir_folder import read_qrels

    for name, entry in results["datasets"].items():
        folder, lacking = _folder_with_judgements(name, entry["split"], results["command"], data_dir)
        if lacking:
            missing.append(lacking)
            continue
        qrels = read_qrels(folder, entry["split"])
        for system, figures in entry["systems"].items():
            run_path = path.with_suffix("") / f"{name}.{system}.trec"
            if run_path.is_file():
                per_query[results["model"]["name"], name, system] = _scores(run_path, path, figures, folder, qrels)
            else:
                missing.append(f"there is no {run_path}, which the evaluation writes beside its results")


def _folder_with_judgements(name: str, split: str, evaluated_by: str, data_dir: str | None) -> tuple[Path, str]:
    """Return the BEIR folder of a data set, and what is lacking, or ""; results keep the command that wrote them."""
    recorded = _flag(evaluated_by, "--data_dir")
    parents = [data_dir] if data_dir else [*filter(None, [recorded]), "data/beir"]
    folders = [Path(parent).expanduser() / name for parent in parents]
    for folder in folders:
        if (folder / "qrels" / f"{split}.tsv").is_file():
            return folder, ""
    if _flag(evaluated_by, "--pairs"):
        return folders[0], f"the queries of {name} are pairs without a BEIR folder"
    return folders[0], (
        f"there is no {folders[0] / 'qrels' / f'{split}.tsv'}: name the folder that holds the folder {name} with "
        "--data_dir"
    )


def _flag(command_line: str, flag: str) -> str | None:
    """Return the value of a flag in a recorded command, or None."""
    try:
        words = shlex.split(command_line)
    except ValueError:  # of a report in Python
        return None
    joined = next((word.partition("=")[2] for word in words if word.startswith(f"{flag}=")), None)
    return joined or next((value for word, value in itertools.pairwise(words) if word == flag), None)


def _scores(
    run_path: Path, path: Path, figures: Mapping[str, float], folder: Path, qrels: dict[str, dict[str, int]]
) -> Any:
    """Score a run, and refuse it if it is not that of the results."""
    from ..evaluation.metrics.retrieval.trec_scores import average_scores, score_queries
    from ..evaluation.ranking import read_trec_run

    scores = score_queries(read_trec_run(run_path), qrels)
    found = average_scores(scores)
    wrong = [key for key, value in figures.items() if abs(found.get(key, value) - value) > _LARGEST_DEVIATION]
    if wrong:
        raise UserError(
            f"{run_path}: expected the run of {path}, with {wrong[0]} {figures[wrong[0]]:.6f}, got one with "
            f"{found[wrong[0]]:.6f} on the judgements in {folder}: evaluate the model again, remove the run, or name "
            "the folder of the judgements with --data_dir"
        )
    return scores
