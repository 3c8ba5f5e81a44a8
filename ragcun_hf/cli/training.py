"""Run a training command from flags to a saved model; the part that the three training commands share."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..command_line import default_output_folder, parse_arguments, quiet_libraries, say
from ..errors import UserError
from ..files import source_name

if TYPE_CHECKING:
    from ..data.pseudo_queries import PseudoQueryKind
    from ..data.training_rows import DocumentRows
    from ..trainer.arguments import ParsedArguments
    from ..trainer.run import RunData


def parse_training_arguments(
    *classes: type, description: str, arguments: Sequence[str] | None, defaults: dict[str, Any]
) -> tuple[Any, ...]:
    """Parse the flags of some dataclasses, the last of them for data, and those that all training commands have.

    Returns an instance of each dataclass but the last, then `ParsedArguments`, which holds that one as `data`.
    """
    from ..features.arguments import FeatureArguments
    from ..model.arguments import ModelArguments
    from ..trainer.arguments import (
        IsotropicGaussianTrainingArguments,
        ParsedArguments,
        RunArguments,
        ValidationArguments,
    )

    shared = (ValidationArguments, ModelArguments, FeatureArguments, RunArguments, IsotropicGaussianTrainingArguments)
    parsed = parse_arguments([*classes, *shared], description=description, arguments=arguments, defaults=defaults)
    *own, data = parsed[: len(classes)]
    return *own, ParsedArguments(data, *parsed[len(classes) :])


def train_from_command_line(
    script: str,
    description: str | None,
    data_class: type,
    read_data: Callable[[ParsedArguments], RunData],
    arguments: Sequence[str] | None,
    **defaults: Any,
) -> None:
    """Run a training command: parse, read, plan, train, save, and print what comes next.

    `script` names the command and its default output folder, `data_class` declares its own data flags, and `defaults`
    are its defaults where they differ from those of the dataclasses.
    """
    from ..trainer.plan import check_run, format_plan, plan_run
    from ..trainer.push import plan_push
    from ..trainer.record import find_checkpoint
    from ..trainer.run import find_facts, run_training

    defaults["output_dir"] = default_output_folder(script, arguments)
    (parsed,) = parse_training_arguments(
        data_class, description=description or "", arguments=arguments, defaults=defaults
    )
    quiet_libraries()
    if parsed.validation.val_data and parsed.validation.val_fraction:
        raise UserError("expected either --val_data or --val_fraction, got both: give one of them")
    checkpoint = find_checkpoint(parsed.training, overwrite=parsed.run.overwrite)
    data = read_data(parsed)
    facts = find_facts(parsed, data, checkpoint)
    check_run(parsed, facts)
    plan = plan_run(parsed, facts)
    if parsed.run.show_plan:
        say(format_plan(plan))
        return
    push = plan_push(parsed.training)
    if data.choose is not None:
        chosen, facts_of_choice = data.choose()
        plan = plan_run(parsed, replace(facts, chosen=chosen))
        data = replace(data, facts={**data.facts, **facts_of_choice})
    trainer = run_training(plan, replace(data, facts={"script": script, **data.facts}))
    folder = str(plan.arguments.training.output_dir)
    if push is not None:
        push.send(Path(folder))
    trainer.accelerator.wait_for_everyone()
    predictor = " --use_predictor" if plan.arguments.model.use_predictor else ""
    say(f"\nSaved the model, its tokenizer and its training record in {folder}.")
    command = f"python training/eval_beir.py --model_path {shlex.quote(folder)}{predictor}"
    say(f"Next: {command} --datasets scifact nfcorpus arguana")


def read_document_texts(data: Any) -> tuple[list[str], dict[str, Any]]:
    """Read the texts of `--documents`, and what the record says of them."""
    from ..data.held_out import read_texts

    options = {name: getattr(data, name) for name in ("split", "text_column", "title_column", "limit")}
    texts, counts = read_texts(data.documents, **options)
    return texts, {"train": [source_name(data.documents)], **counts}


def automatic_document_data(parsed: ParsedArguments, counts: Mapping[PseudoQueryKind, int]) -> RunData:
    """Read `--documents` for a run that chooses its settings; `counts` pseudo-queries per document train it."""
    from ..sweep.automatic import automatic_data, check_automatic

    check_automatic(parsed)
    return automatic_data(parsed, *read_document_texts(parsed.data), counts)


def document_data(
    parsed: ParsedArguments,
    make_rows: Callable[[list[str]], DocumentRows],
    *,
    facts: dict[str, Any],
) -> RunData:
    """Read `--documents` and make training and validation rows of them."""
    from ..data.held_out import hold_out_texts
    from ..data.pairs import read_pairs
    from ..data.training_rows import TableRows
    from ..trainer.run import RunData

    texts, read = read_document_texts(parsed.data)
    options = parsed.validation_options
    fraction = 0.0 if options["val_data"] else options["val_fraction"]
    train, validation = hold_out_texts(texts, make_rows, val_fraction=fraction, seed=options["seed"])
    if options["val_data"]:
        pairs = TableRows(read_pairs(options["val_data"], split=options["val_split"]))
        return RunData(train, pairs, {**read, **facts})
    return RunData(train, validation, {**read, **facts})
