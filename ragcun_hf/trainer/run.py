"""A training run from parsed arguments to a saved model, shared by the training commands."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..command_line import default_output_folder, parse_arguments, quiet_libraries, say
from ..data.held_out import hold_out_texts, read_texts
from ..data.pairs import read_pairs
from ..data.stream import ShuffledStream
from ..data.training_rows import DrawnRows, KnownRows, TrainingRows, columns
from ..errors import UserError
from ..features.arguments import FeatureArguments
from ..files import disk_errors_explained, source_name
from ..model.arguments import ModelArguments
from .arguments import IsotropicGaussianTrainingArguments, ParsedArguments, RunArguments, ValidationArguments
from .plan import ChosenSettings, RunFacts, RunPlan, check_run, format_plan, plan_run
from .push import plan_push
from .record import (
    check_same_model,
    essential_arguments,
    find_checkpoint,
    finish_training,
    head_weights,
    measured_energy,
    recorded_arguments,
    remove_checkpoints,
    report_saved_model,
    save_run,
)
from .sharding import whole_weights

if TYPE_CHECKING:
    from ..features.feature_store import FeatureStore
    from ..model.modeling_isotropic_gaussian import IsotropicGaussianModel
    from .trainer import IsotropicGaussianTrainer

logger = logging.getLogger(__name__)

SHARED_ARGUMENTS = (ValidationArguments, ModelArguments, FeatureArguments, RunArguments)
"""Dataclasses of flags that all training commands have, beside their data flags and the training arguments."""


@dataclass(frozen=True)
class RunData:
    """What a training command read.

    Attributes:
        train: Training rows.
        validation: Held-out rows, or None.
        facts: What the record says of the data.
        choose: For an automatic run: encodes, tries settings, and returns the chosen ones and what the record says
            of the choice.
    """

    train: TrainingRows
    validation: TrainingRows | None
    facts: dict[str, Any]
    choose: Callable[[], tuple[ChosenSettings, dict[str, Any]]] | None = None


def train_from_command_line(
    data_class: type,
    read_data: Callable[[ParsedArguments], RunData],
    *,
    script: str,
    description: str,
    arguments: Sequence[str] | None = None,
    defaults: dict[str, Any] | None = None,
) -> None:
    """Run a training command: parse, read, plan, train, save, and print what comes next.

    Args:
        data_class: The command's own dataclass of data flags.
        read_data: Reads the data that the arguments name.
        script: The command's name, which also names its default output folder.
        description: First lines of `--help`.
        arguments: The command line; `sys.argv` if None.
        defaults: The command's own defaults, where they differ from those of the dataclasses.
    """
    parsed = ParsedArguments(
        *parse_arguments(
            [data_class, *SHARED_ARGUMENTS, IsotropicGaussianTrainingArguments],
            description=description,
            arguments=arguments,
            defaults={"output_dir": default_output_folder(script, arguments), **(defaults or {})},
        )
    )
    quiet_libraries()
    if parsed.validation.val_data and parsed.validation.val_fraction:
        raise UserError("expected either --val_data or --val_fraction, got both: give one of them")
    checkpoint = find_checkpoint(parsed.training, overwrite=parsed.run.overwrite)
    data = read_data(parsed)
    facts = RunFacts(
        num_rows=data.train.num_rows,
        num_queries=_num_queries(parsed, data.train),
        has_validation=data.validation is not None,
        stream_order=data.train.stream_order,
        checkpoint=checkpoint,
        num_processes=parsed.training.world_size,
    )
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
    if push is not None:
        push.send(Path(str(plan.training.output_dir)))
    trainer.accelerator.wait_for_everyone()
    report_saved_model(trainer)


def read_document_texts(data: Any, *, usable: Callable[[str], bool]) -> tuple[list[str], dict[str, Any]]:
    """Read the usable texts of `--documents`, and what the record says of them."""
    options = {name: getattr(data, name) for name in ("split", "text_column", "title_column", "limit")}
    texts, counts = read_texts(data.documents, usable=usable, **options)
    return texts, {"train": [source_name(data.documents)], **counts}


def document_data(
    parsed: ParsedArguments,
    make_rows: Callable[[list[str]], DrawnRows],
    *,
    usable: Callable[[str], bool],
    facts: dict[str, Any],
) -> RunData:
    """Read `--documents` and make training and validation rows of them, for the two commands without pairs."""
    texts, read = read_document_texts(parsed.data, usable=usable)
    options = parsed.validation_options
    fraction = 0.0 if options["val_data"] else options["val_fraction"]
    train, validation = hold_out_texts(texts, make_rows, val_fraction=fraction, seed=options["seed"])
    if options["val_data"]:
        pairs = KnownRows(read_pairs(options["val_data"], split=options["val_split"]))
        return RunData(train, pairs, {**read, **facts})
    return RunData(train, validation, {**read, **facts})


def _num_queries(parsed: ParsedArguments, rows: TrainingRows) -> int | None:
    """Count the distinct queries to balance; None if there is no need, or if they are not known before training."""
    if not parsed.training.balance_queries or rows.num_rows is None:
        return None
    # Cached features are of the first epoch, and so are the queries of all epochs.
    pairs = columns(rows) if parsed.uses_cached_features else rows.known_pairs()
    return None if pairs is None else len(set(pairs[0]))


def run_training(plan: RunPlan, data: RunData) -> IsotropicGaussianTrainer:
    """Train as planned and save the model; return the trainer, with the saved model."""
    from transformers import set_seed

    for warning in plan.warnings:
        logger.warning(warning)
    set_seed(plan.training.seed)
    # Moved before the Trainer would, so that features are computed on the device where the model trains.
    model = plan.model.build()
    model.to(plan.training.device)  # type: ignore[arg-type]  # transformers wraps Module.to without its types
    started = time.perf_counter()
    with measured_energy(plan.measures_energy) as energy:
        store = plan.features.store(model) if plan.uses_cached_features else None
        if plan.checkpoint is not None:
            check_same_model(model.config, Path(plan.checkpoint.path))
        trainer = _make_trainer(plan, data, model, store)
        feature_seconds = time.perf_counter() - started
        if store is not None:
            say(store.summary())
        validation_figures = _train(trainer, plan)
    weights = whole_weights(trainer.accelerator, trainer.model)
    if trainer.is_world_process_zero():
        training_seconds = (trainer.state.log_history or [{}])[-1].get("train_runtime", 0.0)
        resolved = {f"lambda_{term}": weight for term, weight in trainer.weights.items()}
        record = {
            "model": {**asdict(plan.model), "base_model": source_name(plan.model.base_model)},
            "seconds": {"features": round(feature_seconds, 2), "training": round(training_seconds, 2)},
            "features": None if store is None else store.settings(),
            "steps": trainer.state.global_step,
            "blend": plan.blend,
            "training_arguments": {**recorded_arguments(trainer.args), **resolved},
            "essential": essential_arguments(trainer.args),
            "data": data.facts,
            "energy": energy or None,
            "validation_ndcg@10": validation_figures,
        }
        save_run(trainer, record, data.train, weights)
    return trainer


def _train(trainer: IsotropicGaussianTrainer, plan: RunPlan) -> dict[str, float]:
    """Train and blend; return NDCG@10 on held-out pairs, as far as it was measured."""
    folder, resumed = Path(str(trainer.args.output_dir)), trainer.args.resume_from_checkpoint
    if trainer.is_world_process_zero() and not resumed:
        remove_checkpoints(folder)
    start = head_weights(trainer.accelerator.unwrap_model(trainer.model)) if plan.blend < 1 else {}
    if plan.blend > 0:
        with disk_errors_explained(folder):
            trainer.train(resume_from_checkpoint=resumed)
    return finish_training(trainer, start, plan.blend)


def _make_trainer(
    plan: RunPlan, data: RunData, model: IsotropicGaussianModel, store: FeatureStore | None
) -> IsotropicGaussianTrainer:
    """Encode what the run trains on, initialize the projection from it, and make the Trainer with its callbacks."""
    from transformers import ProgressCallback

    from .callbacks import TermsProgressCallback, TrackedPlots, early_stopping, follow_stream
    from .inputs import feature_inputs, retrieval_validation, text_inputs
    from .trainer import IsotropicGaussianTrainer

    training = plan.training
    validation = None if data.validation is None else retrieval_validation(data.validation, store)
    if store is None:
        inputs = text_inputs(model, data.train, data.validation)
    else:
        inputs = feature_inputs(model, data.train, data.validation, store)
    if model.config.output_dim < model.config.feature_dim or plan.model.whitening:
        model.start_from_features(inputs.sample(), whitening=plan.model.whitening)
    patience = training.early_stopping_patience
    trainer = IsotropicGaussianTrainer(
        model=model,
        args=training,
        data_collator=inputs.collator,
        train_dataset=inputs.train_rows,
        eval_dataset=inputs.validation_rows,
        validation=validation,
        pair_ids=inputs.pair_ids,
        eval_pair_ids=inputs.eval_pair_ids,
        callbacks=[] if patience is None else [early_stopping(patience, plan.checkpoint)],
    )
    if isinstance(data.train, ShuffledStream):
        follow_stream(trainer, data.train, plan.checkpoint)
    # The plots run the model in the main process alone, where a sharded model would wait for the others.
    if training.report_to and not trainer.accelerator.is_fsdp2:
        TrackedPlots(inputs.sample).attach(trainer)
    if not training.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(TermsProgressCallback)
    return trainer
