"""Measure the effect of each term, kind, start and width of a head: one change at a time, on held-out documents.

    python training/benchmarks/ablations.py --base_model embedded
    python training/benchmarks/ablations.py --base_model embedded --train_data python_docs data/beir/scifact

Heads train on the pairs of four fifths of the documents. The queries of the other documents search the whole corpus.
python_docs are the documentation strings of installed packages, which need no download.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ragcun_hf.command_line import argument, parse_arguments, quiet_libraries, run_script, say
from ragcun_hf.commands import portable_command
from ragcun_hf.errors import UserError
from ragcun_hf.features.arguments import FeatureArguments
from ragcun_hf.model.arguments import ModelArguments

SCRIPT = "training/benchmarks/ablations.py"
PYTHON_DOCS = "python_docs"


@dataclass
class Arguments:
    """Training data, and the part of the table to make."""

    train_data: list[str] = argument(
        [PYTHON_DOCS], "Pairs, as for train_contrastive.py, or python_docs; each source gets a block of columns."
    )
    base_model: str = argument("embedded", "The encoder.")
    groups: list[str] = argument(["terms", "kinds", "starts", "widths", "words"], "Which groups of changes.")
    seeds: list[int] = argument(
        [1, 2, 3], "Each change is trained with each seed; seeds do not change the held-out part."
    )
    epochs: float = argument(10.0, "Passes over the training pairs.")
    batch_size: int = argument(256, "Pairs per step.")
    learning_rate: float = argument(1e-3, "Peak learning rate.")
    val_fraction: float = argument(0.2, "Fraction of the documents to hold out, with their queries.")
    output_dir: str = argument("results/ablations", "Folder of table.md, ablations.png and ablations.json.")


def main(arguments: list[str] | None = None) -> None:
    """Measure every change on every data set, then write table and plot."""
    args, features = parse_arguments([Arguments, FeatureArguments], description=__doc__ or "", arguments=arguments)
    quiet_libraries()
    from ablation_changes import CHANGES, WORDS

    from ragcun_hf.evaluation.results import MAIN_METRIC
    from ragcun_hf.model.base_models import load_base_model

    started = time.perf_counter()
    known = [*CHANGES, "words"]
    if not args.groups or not set(args.groups) <= set(known):
        raise UserError(f"--groups expects names among {', '.join(known)}, got {args.groups}: correct it")
    if not args.seeds or not args.train_data:
        raise UserError("--seeds and --train_data expect at least one value each, got none: leave the flag out")
    names = [Path(source).stem for source in args.train_data]
    if len(set(names)) < len(names):
        raise UserError(f"--train_data expects sources of different names, got {', '.join(names)}: rename one")
    folder = Path(args.output_dir)
    base = load_base_model(args.base_model)
    store = features.store(base)
    changes = {name: CHANGES[name] for name in args.groups if name in CHANGES}
    words = WORDS if "words" in args.groups else {}
    effects, bases = {}, {}
    for source, name in zip(args.train_data, names, strict=True):
        data, documents = _data(source, folder, base, store, args.val_fraction)
        bases[name] = data.base_figures()[MAIN_METRIC]
        effects[name] = _measured(args, data, changes, name)
        for change, setting in words.items():
            lexical = load_base_model(args.base_model)
            _fit(lexical, documents, **setting)
            data, _ = _data(source, folder, lexical, features.store(lexical), args.val_fraction)
            effects[name] += _measured(args, data, {"words": {change: {}}}, change)
        # Written after each data set, so that a stopped run leaves the finished ones.
        table = _write(folder, effects, bases, portable_command(SCRIPT, arguments), asdict(args))
    minutes = (time.perf_counter() - started) / 60
    say(f"\n{table}\n\nIn {folder}: table.md, ablations.png, ablations.json. {minutes:.1f} minutes.")


def _fit(model: Any, documents: list[str], *, dim: int | None = None, times: float = 1.0) -> None:
    """Give a model a lexical half with a multiple of the weight that is chosen."""
    model.fit_lexical(documents, dim=dim, num_start_texts=0)
    model.config.lexical_weight = min(0.9, times * model.config.lexical_weight)


def _data(source: str, folder: Path, base: Any, store: Any, val_fraction: float) -> tuple[Any, list[str]]:
    """Hold documents out; their queries search all documents, also those of training, which are returned too."""
    from ragcun_hf.data.documents import document_texts, is_beir_folder, read_documents
    from ragcun_hf.data.held_out import drop_validation_negatives, split_by_document
    from ragcun_hf.data.pairs import drop_duplicate_rows, read_pairs
    from ragcun_hf.data.python_docs import build_python_docs, write_entries
    from ragcun_hf.data.training_rows import TableRows
    from ragcun_hf.evaluation.validation import RetrievalValidation
    from ragcun_hf.sweep.heads import HeadData

    if source == PYTHON_DOCS:
        source = str(write_entries(build_python_docs(), folder / PYTHON_DOCS))
    pairs, _ = drop_duplicate_rows(read_pairs(source))
    train, held_out = split_by_document(pairs, val_fraction)
    others = list(pairs["positive"])
    if is_beir_folder(Path(source)):
        others = document_texts(read_documents(source))
    validation = RetrievalValidation(held_out["query"], held_out["positive"], distractors=others, store=store)
    rows = TableRows(drop_validation_negatives(train, held_out))
    return HeadData.of_rows(base, rows, store, validation=validation), others


def _measured(args: Arguments, data: Any, changes: dict[str, Any], name: str) -> list[Any]:
    from ablation_changes import measure_changes

    from ragcun_hf.objective.arguments import IsotropicGaussianTrainingArguments

    training = IsotropicGaussianTrainingArguments(
        output_dir=args.output_dir,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        report_to="none",
    )
    model = ModelArguments(base_model=args.base_model)
    total = sum(len(each) for each in changes.values())
    found = measure_changes(data, changes, args.seeds, model, training)
    return list(tqdm(found, total=total, desc=name, unit="change"))


def _write(
    folder: Path, effects: dict[str, list[Any]], bases: dict[str, float], command: str, settings: dict[str, Any]
) -> str:
    from ablation_report import format_ablations, plot_ablations

    from ragcun_hf.evaluation.environment import environment_facts
    from ragcun_hf.evaluation.results import write_json
    from ragcun_hf.files import write_whole

    table = format_ablations(effects, bases)
    write_whole(folder / "table.md", table + "\n")
    plot_ablations(effects, bases, folder / "ablations.png")
    of_sets = {name: [asdict(effect) for effect in of_set] for name, of_set in effects.items()}
    content = {"command": command, "settings": settings, "base": bases, "effects": of_sets, **environment_facts()}
    write_json(folder / "ablations.json", content)
    return table


if __name__ == "__main__":
    run_script(main)
