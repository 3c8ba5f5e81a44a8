"""Run a training command from flags to a saved model; the part that the three training commands share."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..command_line import argument, asks_for_help, default_output_folder, parse_arguments, quiet_libraries, say
from ..commands import command
from ..data.documents import is_beir_folder
from ..errors import UserError
from ..features.arguments import FeatureArguments
from ..files import HELD_OUT_FILE, owned_folder, source_name
from ..model.arguments import ModelArguments
from ..model.base_models import check_base_name
from ..objective.flags import ObjectiveArguments, ScheduleArguments

if TYPE_CHECKING:
    from ..objective.arguments import IsotropicGaussianTrainingArguments
    from ..trainer.data import TrainingData

_MOST_SEARCHED = 20_000  # documents of a BEIR folder that validation searches by itself: encoding more takes long


@dataclass
class ValidationArguments:
    """Held-out data, by which the best checkpoint is chosen."""

    val_data: str | None = argument(
        None,
        "Held-out query-document pairs. Loss and NDCG@10 are measured on them after every epoch (or every "
        "--eval_steps), and the best checkpoint is kept, unless --blend is below 1.",
    )
    val_split: str | None = argument(None, "Split of --val_data. Default: as --split.")
    val_corpus: str | None = argument(
        None,
        "Documents that held-out queries search besides their own: a file, a folder, a BEIR folder or a Hub dataset "
        "id. With all documents of a collection, validation is as hard as the search will be. Default: the corpus of "
        f"the BEIR folders that held-out pairs come from, {_MOST_SEARCHED:,} documents of each at most, if the "
        "encoder is frozen and its features are kept; else none.",
    )


@dataclass
class RunArguments:
    """Settings of a run besides the training itself."""

    overwrite: bool = argument(False, "Replace the model of an earlier run in the output folder.")
    show_plan: bool = argument(False, "Print what the run would do and exit, before anything is encoded.")


@dataclass(frozen=True)
class ParsedArguments:
    """All arguments of a training command, by topic."""

    data: Any
    validation: ValidationArguments
    model: ModelArguments
    training: IsotropicGaussianTrainingArguments
    run: RunArguments

    def held_out_pairs(self) -> Any:
        """Read `--val_data`; None without it."""
        from ..data.pairs import read_pairs

        validation = self.validation
        if not validation.val_data:
            return None
        if self.training.val_fraction:
            raise UserError("expected either --val_data or --val_fraction, got both: give one of them")
        return read_pairs(validation.val_data, split=validation.val_split or self.data.split)


def parse_training_arguments(
    *classes: type, description: str, arguments: Sequence[str] | None, defaults: dict[str, Any]
) -> tuple[Any, ...]:
    """Parse the flags of some dataclasses, the last of them for data, and those that all training commands have.

    Returns an instance of each dataclass but the last, then `ParsedArguments`, which holds that one as `data`.
    """
    first = [*reversed(classes), ValidationArguments, ModelArguments]  # in `--help`, the data come first
    options: dict[str, Any] = {"description": description, "arguments": arguments, "defaults": defaults}
    options["help_all"] = "the flags of transformers.TrainingArguments, such as --max_steps, --bf16 and --report_to,"
    if asks_for_help(arguments):  # without the classes that take seconds to import
        parse_arguments([*first, ObjectiveArguments, ScheduleArguments, FeatureArguments, RunArguments], **options)
    from ..objective.arguments import IsotropicGaussianTrainingArguments

    parsed = parse_arguments([*first, IsotropicGaussianTrainingArguments, RunArguments], **options)
    data, *own = parsed[: len(classes)]
    arguments_of_all = ParsedArguments(data, *parsed[len(classes) :])
    check_base_name(arguments_of_all.model.base_model)
    return *reversed(own), arguments_of_all


def train_from_command_line(
    script: str,
    description: str | None,
    data_class: type,
    read_data: Callable[[ParsedArguments], TrainingData],
    arguments: Sequence[str] | None,
    **defaults: Any,
) -> None:
    """Run a training command: parse, read, train, save, and print what comes next.

    `script` names the command and its default output folder, `data_class` declares its own data flags, and `defaults`
    are its defaults where they differ from those of the dataclasses.
    """
    defaults["output_dir"] = default_output_folder(script, arguments)
    (parsed,) = parse_training_arguments(
        data_class, description=description or "", arguments=arguments, defaults=defaults
    )
    from ..objective.arguments import with_values
    from ..trainer.plan import check_run, find_facts, format_plan, plan_run
    from ..trainer.record import check_output_folder, open_checkpoint

    quiet_libraries()
    # In Python, what is named when a model is made counts more than a recipe; here, flags and recipe are one.
    training = with_values(parsed.training, model_fields=parsed.model.changed_fields())
    folder = str(training.output_dir)
    check_output_folder(training, overwrite=parsed.run.overwrite)
    data = with_corpus(read_data(parsed), parsed)
    data = replace(data, facts={"script": script, **data.facts})
    checkpoint = open_checkpoint(Path(folder), training.resume_from_checkpoint)
    facts = find_facts(training, parsed.model, data, checkpoint=checkpoint)
    check_run(training, facts)
    if parsed.run.show_plan:
        say(format_plan(plan_run(training, facts)))
        return
    # Of several processes, the first one writes.
    with owned_folder(Path(folder)) if training.process_index == 0 else nullcontext():
        check_output_folder(training, overwrite=parsed.run.overwrite)  # again: another run may have ended meanwhile
        _train_and_save(parsed, training, data)
    say(f"\nSaved the model, its tokenizer and its training record in {folder}.")
    say(f"Next: {next_command(parsed, folder)}")


def _train_and_save(parsed: ParsedArguments, training: IsotropicGaussianTrainingArguments, data: TrainingData) -> None:
    from transformers import set_seed

    from ..trainer.record import remove_checkpoints
    from ..trainer.trainer import IsotropicGaussianTrainer

    set_seed(training.seed)
    model = parsed.model.build()
    model.given_fields = {}
    trainer = IsotropicGaussianTrainer(model, training, data)
    if trainer.is_world_process_zero() and not training.resume_from_checkpoint:
        remove_checkpoints(Path(str(training.output_dir)))
    trainer.train()
    trainer.save_model()
    if training.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.wait_for_everyone()


def next_command(parsed: ParsedArguments, folder: str) -> str:
    """Return a command that uses the saved model on this user's own data: an evaluation if they hold judgements."""
    model = ["--model_path", folder, *(["--use_predictor"] if parsed.model.use_predictor else [])]
    data, corpus, column = parsed.data, parsed.validation.val_corpus or getattr(parsed.data, "documents", None), "text"
    pairs: list[str] = getattr(data, "train_data", [])
    for source in filter(None, [parsed.validation.val_data, corpus, *pairs]):
        if split := _split_to_evaluate(source, parsed):
            place = Path(os.path.relpath(Path(source).expanduser()))
            words = [*model, "--datasets", place.resolve().name, "--data_dir", str(place.parent)]
            return command("eval_beir", *words, *([] if split == "test" else ["--split", split]))
    held_out = Path(folder, HELD_OUT_FILE)
    if held_out.is_file():
        return command("eval_beir", *model, "--pairs", str(held_out), *(["--corpus", corpus] if corpus else []))
    if not corpus:
        corpus, column = (pairs[0], data.positive_column) if pairs else (data.input_xy_pairs, data.x_column)
    words = [*model, "--corpus", corpus, *([] if column == "text" else ["--text_column", column])]
    return command("search_demo", *words, *([] if data.split == "train" else ["--split", data.split]))


def _split_to_evaluate(source: str, parsed: ParsedArguments) -> str | None:
    """Return the judgements of a BEIR folder to evaluate with, or None; those of training, seen before, are last."""
    splits = {path.stem for path in Path(source).expanduser().glob("qrels/*.tsv")} if is_beir_folder(source) else set()
    wanted = ("test", parsed.validation.val_split, "dev", parsed.data.split)
    return next((name for name in wanted if name in splits), None)


def with_corpus(data: TrainingData, parsed: ParsedArguments) -> TrainingData:
    """Let validation search the documents of `--val_corpus`, or else those of the BEIR folders of held-out pairs."""
    from ..data.documents import document_texts, read_documents

    if parsed.validation.val_corpus:
        return data.with_corpus(
            document_texts(read_documents(parsed.validation.val_corpus, unique_ids=False)), parsed.training
        )
    for folder in _folders_to_search(data, parsed):
        data = data.searching(_corpus_of(folder))
    return data


def _folders_to_search(data: TrainingData, parsed: ParsedArguments) -> list[str]:
    """Return the BEIR folders whose corpus validation searches without being told so."""
    # Without kept features, every evaluation would encode the whole corpus.
    is_cached = parsed.model.freeze_base and parsed.training.feature_cache and data.train.num_rows is not None
    if data.validation is None or data.corpus or not is_cached:
        return []
    val_data = parsed.validation.val_data
    return [*filter(is_beir_folder, [val_data] if val_data else getattr(parsed.data, "train_data", []))]


def _corpus_of(folder: str) -> list[str]:
    """Return the documents of a BEIR folder, or a sample if they are many, and say so."""
    from ..data.beir_folder import read_corpus
    from ..data.mapped_column import take

    _, texts = read_corpus(Path(folder).expanduser() / "corpus.jsonl")
    num_chosen = min(len(texts), _MOST_SEARCHED)
    rows = sorted(random.Random(0).sample(range(len(texts)), num_chosen))
    of_all = "" if num_chosen == len(texts) else f" of {len(texts):,}"
    say(
        f"Validation searches {num_chosen:,}{of_all} documents of {Path(folder, 'corpus.jsonl')}; "
        "--val_corpus names others."
    )
    return [text for text in take(texts, rows) if text]


def read_document_texts(data: Any) -> tuple[Any, dict[str, Any]]:
    """Read `--documents`, and what the record says of them."""
    from ..data.documents import read_documents

    options = {name: getattr(data, name) for name in ("split", "text_column", "title_column", "limit")}
    return read_documents(data.documents, unique_ids=False, **options), {"train": [source_name(data.documents)]}
