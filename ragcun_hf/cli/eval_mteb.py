"""Evaluate a model with MTEB, on your own BEIR folders or on MTEB's tasks.

    python training/eval_mteb.py --model_path checkpoints/mine --beir_folders data/beir/scifact data/beir/nfcorpus
    python training/eval_mteb.py --model_path your-name/mine --tasks NFCorpus ArguAna

The model is loaded by sentence-transformers, as by everybody who runs MTEB on it. The script prints a table and
writes MTEB's scores as JSON. For significance tests and the frozen base beside the model, use training/eval_beir.py.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..command_line import argument, parse_arguments, quiet_libraries, say
from ..errors import UserError
from ..evaluation.environment import measurement_facts
from ..evaluation.results import write_json
from ..files import check_file_name, check_writable, disk_errors_explained
from ..model.base_models import check_model_path


@dataclass
class MtebArguments:
    """The model, the tasks, and the output folder."""

    model_path: str | None = argument(None, "A trained model: its folder or its Hub id.")
    revision: str | None = argument(None, "Branch, tag or commit of a model on the Hub.")
    beir_folders: list[str] = argument([], "Folders in BEIR's layout, one retrieval task each.")
    split: str = argument("test", "Name of the judgements of --beir_folders to use.")
    language: str = argument("eng-Latn", "Language and script of --beir_folders, as MTEB writes them.")
    keep_identical_ids: bool = argument(False, "Keep a document with the query's own id; BEIR drops it.")
    tasks: list[str] = argument([], "Names of MTEB's own tasks; their data is downloaded from the Hub.")
    trust_remote_code: bool = argument(False, "Run the code of a model of a type other than this package's.")
    output_dir: str = argument("results/mteb", "Folder for the scores.")
    run_name: str | None = argument(None, "Name of the file with the scores. Default: the model folder's name.")
    batch_size: int = argument(32, "Texts per batch.")


def main(arguments: list[str] | None = None) -> None:
    """Evaluate task by task, and write the scores after each."""
    (args,) = parse_arguments([MtebArguments], description=__doc__ or "", arguments=arguments)
    quiet_libraries()
    _check(args)
    from accelerate import PartialState

    from ..evaluation.mteb_tasks import format_mteb_table, load_sentence_transformer, run_task

    tasks = _tasks(args)
    model = load_sentence_transformer(
        args.model_path,
        revision=args.revision,
        device=str(PartialState().device),
        trust_remote_code=args.trust_remote_code,
    )
    folder = Path(args.model_path)
    name = folder.resolve().name if folder.is_dir() else args.model_path.replace("/", "__")
    path = Path(args.output_dir) / f"{args.run_name or name}.json"
    facts = _facts(args, model, name, arguments)
    entries: list[dict[str, Any]] = []
    for task in tasks:
        entry = run_task(model, task, batch_size=args.batch_size, show_progress=sys.stderr.isatty())
        entries.append(entry)
        say(f"Evaluated {entry['task']}, {len(entries)} of {len(tasks)}")
        with disk_errors_explained(path.parent):  # after each task, because many tasks take hours
            write_json(path, {**facts, "tasks": entries})
    say(f"\n{format_mteb_table(entries)}\n\nWrote {path}.")


def _check(args: MtebArguments) -> None:
    from ..evaluation.mteb_tasks import require_mteb

    if not args.model_path:
        raise UserError("--model_path expects a folder or a Hub id, got none: name the model")
    check_model_path(args.model_path)
    if not (args.beir_folders or args.tasks):
        raise UserError("expected something to evaluate on, got neither --beir_folders nor --tasks: give one of them")
    if args.batch_size < 1:
        raise UserError(f"--batch_size must be at least 1, got {args.batch_size}: raise it")
    require_mteb()
    check_writable(args.output_dir)
    if args.run_name is not None:
        check_file_name(args.run_name, "--run_name")


def _tasks(args: MtebArguments) -> list[Any]:
    from ..evaluation.mteb_tasks import task_from_beir_folder, tasks_by_name

    options: dict[str, Any] = {"language": args.language, "drop_identical_ids": not args.keep_identical_ids}
    tasks = [task_from_beir_folder(folder, args.split, **options) for folder in dict.fromkeys(args.beir_folders)]
    tasks += tasks_by_name(list(dict.fromkeys(args.tasks)))
    names = [task.metadata.name for task in tasks]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated:
        raise UserError(
            f"expected tasks of different names, got {repeated!r} twice: rename a folder, or leave one out"
        )
    return tasks


def _facts(args: MtebArguments, model: Any, name: str, arguments: list[str] | None) -> dict[str, Any]:
    facts = measurement_facts("eval_mteb", arguments)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    packages = {package: version(package) for package in ("mteb", "sentence-transformers")}
    return {
        **facts,
        "versions": {**facts["versions"], **packages},
        "model": {
            "name": name,
            "revision": args.revision,
            "similarity": model.similarity_fn_name,
            "output_dim": model.get_embedding_dimension(),
            "max_length": model.max_seq_length,
            "prompts": model.prompts,
        },
        "settings": {"batch_size": args.batch_size, "dtype": dtype},
    }
