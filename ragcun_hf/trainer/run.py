"""A training run, from a plan and its data to a saved model."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ..command_line import say
from ..data.stream import ShuffledStream
from ..data.training_rows import TableRows, TrainingRows, read_columns
from ..files import disk_errors_explained, source_name
from .plan import ChosenSettings, RunFacts, RunPlan
from .record import (
    Checkpoint,
    check_and_blend,
    check_model_flags,
    essential_arguments,
    measured_energy,
    recorded_arguments,
    remove_checkpoints,
    save_run,
    trainable_weights,
)
from .sharding import whole_weights

if TYPE_CHECKING:
    from ..features.feature_store import FeatureStore
    from ..model.modeling_isotropic_gaussian import IsotropicGaussianModel
    from .arguments import ParsedArguments
    from .trainer import IsotropicGaussianTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunData:
    """Training rows, held-out rows, and what the record says of them."""

    train: TrainingRows
    validation: TrainingRows | None
    facts: dict[str, Any]
    # Of an automatic run: tries settings, returns the chosen ones and what the record says of the choice.
    choose: Callable[[], tuple[ChosenSettings, dict[str, Any]]] | None = None

    @classmethod
    def of_pairs(cls, train: Any, validation: Any, facts: dict[str, Any]) -> Self:
        """Take tables of pairs; that of validation may be None."""
        return cls(TableRows(train), None if validation is None else TableRows(validation), facts)


def find_facts(parsed: ParsedArguments, data: RunData, checkpoint: Checkpoint | None) -> RunFacts:
    """Find the facts that a plan depends on; reads the queries only if they are to be balanced."""
    pairs = None
    if parsed.training.balance_queries and data.train.num_rows is not None:
        # Cached features are of the first epoch, so its queries are those of all epochs.
        pairs = read_columns(data.train) if parsed.uses_cached_features else data.train.known_pairs()
    return RunFacts(
        num_rows=data.train.num_rows,
        num_queries=None if pairs is None else len(set(pairs[0])),
        has_validation=data.validation is not None,
        stream_order=data.train.stream_order,
        checkpoint=checkpoint,
        num_processes=parsed.training.world_size,
        is_automatic=data.choose is not None,
    )


def run_training(plan: RunPlan, data: RunData) -> IsotropicGaussianTrainer:
    """Train as planned and save the model; return the trainer, which holds the saved model."""
    from transformers import set_seed

    arguments, training, checkpoint = plan.arguments, plan.arguments.training, plan.facts.checkpoint
    set_seed(training.seed)
    # Moved before the Trainer would, so that features are computed on the device where the model trains.
    model = arguments.model.build()
    model.to(training.device)  # type: ignore[arg-type]  # transformers wraps Module.to without its types
    for warning in plan.warnings:
        logger.warning(warning)
    started = time.perf_counter()
    with measured_energy(arguments.run.measure_energy and training.process_index == 0) as energy:
        store = arguments.features.store(model) if arguments.uses_cached_features else None
        if checkpoint is not None:
            check_model_flags(model.config, Path(checkpoint.path))
        trainer = _make_trainer(plan, data, model, store)
        feature_seconds = time.perf_counter() - started
        if store is not None:
            say(store.summary())
        validation_figures = _train(trainer, arguments.run.blend)
    weights = whole_weights(trainer.accelerator, trainer.model)
    if trainer.is_world_process_zero():
        training_seconds = (trainer.state.log_history or [{}])[-1].get("train_runtime", 0.0)
        resolved = {f"lambda_{term}": weight for term, weight in trainer.weights.items()}
        record = {
            "model": {**asdict(arguments.model), "base_model": source_name(arguments.model.base_model)},
            "seconds": {"features": round(feature_seconds, 2), "training": round(training_seconds, 2)},
            "features": None if store is None else store.settings(),
            "steps": trainer.state.global_step,
            "blend": arguments.run.blend,
            "training_arguments": {**recorded_arguments(training), **resolved},
            "essential": essential_arguments(training),
            "data": data.facts,
            "energy": energy or None,
            "validation_ndcg@10": validation_figures,
        }
        save_run(trainer, record, data.train, weights)
    return trainer


def _train(trainer: IsotropicGaussianTrainer, blend: float) -> dict[str, float]:
    """Train and blend; return NDCG@10 on held-out pairs, as far as it was measured."""
    folder, resumed = Path(str(trainer.args.output_dir)), trainer.args.resume_from_checkpoint
    if trainer.is_world_process_zero() and not resumed:
        remove_checkpoints(folder)
    start = trainable_weights(trainer.accelerator.unwrap_model(trainer.model)) if blend < 1 else {}
    if blend > 0:
        with disk_errors_explained(folder):
            trainer.train(resume_from_checkpoint=resumed)
    return check_and_blend(trainer, start, blend)


def _make_trainer(
    plan: RunPlan, data: RunData, model: IsotropicGaussianModel, store: FeatureStore | None
) -> IsotropicGaussianTrainer:
    """Encode what the run trains on, initialize the projection from it, and make the Trainer with its callbacks."""
    from transformers import ProgressCallback

    from .callbacks import StreamPosition, TermsProgressCallback, TrackedPlots, early_stopping
    from .inputs import feature_inputs, retrieval_validation, text_inputs
    from .trainer import IsotropicGaussianTrainer

    training, checkpoint = plan.arguments.training, plan.facts.checkpoint
    validation = None if data.validation is None else retrieval_validation(data.validation, store)
    if store is None:
        inputs = text_inputs(model, data.train, data.validation)
    else:
        inputs = feature_inputs(model, data.train, data.validation, store)
    whitening = plan.arguments.model.whitening
    if model.config.output_dim < model.config.feature_dim or whitening:
        model.start_from_features(inputs.sample(), whitening=whitening)
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
        checkpoint=checkpoint,
        callbacks=[] if patience is None else [early_stopping(patience, checkpoint)],
    )
    if isinstance(data.train, ShuffledStream):
        trainer.add_callback(StreamPosition(trainer, data.train, checkpoint))
    # The plots run the model in the main process alone, where a sharded model would wait for the others.
    if training.report_to and not trainer.accelerator.is_fsdp2:
        TrackedPlots(inputs.sample).attach(trainer)
    if not training.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(TermsProgressCallback)
    return trainer
