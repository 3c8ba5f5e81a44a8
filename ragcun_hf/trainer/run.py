"""One training run from checked pairs to a saved model; what the three training scripts have in common."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..command_line import default_output_folder, parse_arguments, quiet_libraries, say
from ..errors import UserError
from ..features.arguments import FeatureArguments
from ..files import disk_errors_explained, source_name
from ..model.arguments import ModelArguments
from .arguments import ParsedArguments, RunArguments, ValidationArguments
from .checks import check_run
from .outcome import finish_training, head_weights
from .push import plan_push
from .record import (
    check_output_folder,
    check_same_model,
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
    from .arguments import IsotropicGaussianTrainingArguments
    from .inputs import TrainerInputs
    from .known_pairs import PairIds
    from .trainer import IsotropicGaussianTrainer

logger = logging.getLogger(__name__)

__all__ = [
    "FeatureArguments",
    "ModelArguments",
    "ParsedArguments",
    "RunArguments",
    "ValidationArguments",
    "check_output_folder",
    "document_views",
    "run_training",
    "source_name",
    "train_from_command_line",
]


def train_from_command_line(
    data_class: type,
    read_views: Callable[[ParsedArguments], tuple[Any, Any, dict[str, Any]]],
    *,
    script: str,
    description: str,
    arguments: Sequence[str] | None = None,
    defaults: dict[str, Any] | None = None,
) -> None:
    """Do what every training script does: parse, read, train, save, and say what comes next.

    Args:
        data_class: The script's own dataclass of data flags.
        read_views: Called with all arguments; returns training views, validation views or None, and what the
            record says of the data.
        script: The script's name, which also names its default output folder.
        description: First lines of `--help`.
        arguments: The command line; `sys.argv` if None.
        defaults: The script's own defaults, where they differ from the dataclasses'.
    """
    from .arguments import IsotropicGaussianTrainingArguments

    classes = [data_class, ValidationArguments, ModelArguments, FeatureArguments, RunArguments]
    parsed = ParsedArguments(
        *parse_arguments(
            [*classes, IsotropicGaussianTrainingArguments],
            description=description,
            arguments=arguments,
            defaults={"output_dir": default_output_folder(script, arguments), **(defaults or {})},
        )
    )
    quiet_libraries()
    if parsed.validation.val_data and parsed.validation.val_fraction:
        raise UserError("expected either --val_data or --val_fraction, got both: give one of them")
    check_output_folder(parsed.training, overwrite=parsed.run.overwrite)
    train_views, validation_views, facts = read_views(parsed)
    report_saved_model(run_training(parsed, train_views, validation_views, data_facts={"script": script, **facts}))


def document_views(
    parsed: ParsedArguments,
    make_views: Callable[[list[str]], Any],
    *,
    usable: Callable[[str], bool],
    facts: dict[str, Any],
) -> tuple[Any, Any, dict[str, Any]]:
    """Read `--documents` and make training and validation views of them, for the two self-supervised scripts."""
    from ..data.held_out import hold_out_texts, read_texts
    from ..data.pairs import read_pairs

    data, validation_args = parsed.data, parsed.validation
    names = ("split", "text_column", "title_column", "limit")
    texts, counts = read_texts(data.documents, usable=usable, **{name: getattr(data, name) for name in names})
    fraction = 0.0 if validation_args.val_data else validation_args.val_fraction
    train, validation = hold_out_texts(texts, make_views, val_fraction=fraction, seed=parsed.training.seed)
    if validation_args.val_data:
        validation = read_pairs(validation_args.val_data, split=validation_args.val_split or data.split)
    return train, validation, {"train": [source_name(data.documents)], **counts, **facts}


def run_training(
    parsed: ParsedArguments, train_views: Any, validation_views: Any, *, data_facts: dict[str, Any]
) -> IsotropicGaussianTrainer:
    """Train on views of texts and save the model.

    Args:
        parsed: The encoder and head, the feature cache, weights, optimizer, schedule and output folder.
        train_views: Rows `{"query", "positive", "negative"}` of text.
        validation_views: The same, held out, or None; gives eval_loss and NDCG@10 at every evaluation.
        data_facts: What the record says of the data: sources and counts.

    Returns:
        The trainer, after training, its model the one that was saved.

    Raises:
        UserError: If arguments do not go together, or there is too little data.
    """
    from transformers import set_seed

    training_args = parsed.training
    set_seed(training_args.seed)
    check_run(parsed, train_views, validation_views)
    push = plan_push(training_args)
    # Moved before the Trainer would, so that features are computed where the model trains.
    model = parsed.model.build()
    model.to(training_args.device)  # type: ignore[arg-type]  # transformers wraps Module.to without its types
    started = time.perf_counter()
    with measured_energy(parsed.run.measure_energy and training_args.process_index == 0) as energy:
        store = parsed.features.store(model) if parsed.uses_cached_features else None
        if training_args.resume_from_checkpoint:
            check_same_model(model.config, Path(training_args.resume_from_checkpoint))
        trainer = _build_trainer(model, train_views, validation_views, store, parsed)
        feature_seconds = time.perf_counter() - started
        if store is not None:
            say(store.summary())
        validation_figures = _train(trainer, parsed)
    weights = whole_weights(trainer.accelerator, trainer.model)
    if trainer.is_world_process_zero():
        measured = {"data": data_facts, "energy": energy or None, "validation_ndcg@10": validation_figures}
        facts = _facts(trainer, parsed, store, feature_seconds)
        save_run(trainer, {**facts, **measured}, train_views, weights)
    if push is not None:
        push.send(Path(str(training_args.output_dir)))
    trainer.accelerator.wait_for_everyone()
    return trainer


def _train(trainer: IsotropicGaussianTrainer, parsed: ParsedArguments) -> dict[str, float]:
    """Run the loop, blend, and return NDCG@10 of held-out pairs, as far as it was measured."""
    folder, resumed = Path(str(trainer.args.output_dir)), trainer.args.resume_from_checkpoint
    if trainer.is_world_process_zero() and not resumed:
        remove_checkpoints(folder)
    model = trainer.accelerator.unwrap_model(trainer.model)
    start = head_weights(model) if parsed.run.blend < 1 else {}
    if parsed.run.blend > 0:
        with disk_errors_explained(folder):
            trainer.train(resume_from_checkpoint=resumed)
    return finish_training(trainer, start, parsed.run.blend)


def _facts(
    trainer: IsotropicGaussianTrainer, parsed: ParsedArguments, store: FeatureStore | None, feature_seconds: float
) -> dict[str, Any]:
    training_seconds = (trainer.state.log_history or [{}])[-1].get("train_runtime", 0.0)
    return {
        "model": {**asdict(parsed.model), "base_model": source_name(parsed.model.base_model)},
        "seconds": {"features": round(feature_seconds, 2), "training": round(training_seconds, 2)},
        "features": None if store is None else store.settings(),
        "steps": trainer.state.global_step,
        "blend": parsed.run.blend,
        "training_arguments": {
            **recorded_arguments(trainer.args),
            **{f"lambda_{name}": weight for name, weight in trainer.weights.items()},
        },
    }


def _build_trainer(
    model: IsotropicGaussianModel,
    train_views: Any,
    validation_views: Any,
    store: FeatureStore | None,
    parsed: ParsedArguments,
) -> IsotropicGaussianTrainer:
    from transformers import ProgressCallback

    from ..data.stream import ShuffledStream
    from .callbacks import TermsProgressCallback, ending_callbacks
    from .inputs import feature_inputs, retrieval_validation, text_inputs
    from .streaming import follow_stream, refuse_streamed_checkpoint
    from .tracking import TrackedPlots
    from .trainer import IsotropicGaussianTrainer

    training_args = parsed.training
    validation = None if validation_views is None else retrieval_validation(validation_views, store)
    if store is None:
        inputs = text_inputs(model, train_views, validation_views)
    else:
        inputs = feature_inputs(model, train_views, validation_views, store)
    if model.config.output_dim < model.config.feature_dim or parsed.model.whitening:
        model.start_from_features(inputs.sample(), whitening=parsed.model.whitening)
    _check_balance(inputs.pair_ids, training_args)
    _keep_small_sets(inputs, training_args)
    trainer = IsotropicGaussianTrainer(
        model=model,
        args=training_args,
        data_collator=inputs.collator,
        train_dataset=inputs.train_rows,
        eval_dataset=inputs.validation_rows,
        validation=validation,
        pair_ids=inputs.pair_ids,
        eval_pair_ids=inputs.eval_pair_ids,
        callbacks=ending_callbacks(training_args),
    )
    if isinstance(train_views, ShuffledStream):
        follow_stream(trainer, train_views)
    else:
        refuse_streamed_checkpoint(training_args.resume_from_checkpoint)
    # The plots run the model in the main process alone, where a sharded one would wait for the others.
    if training_args.report_to and not trainer.accelerator.is_fsdp2:
        TrackedPlots(inputs.sample).attach(trainer)
    if not training_args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(TermsProgressCallback)
    return trainer


def _check_balance(pair_ids: PairIds | None, training_args: IsotropicGaussianTrainingArguments) -> None:
    if not training_args.balance_queries:
        return
    if pair_ids is None:
        raise UserError(
            "--balance_queries needs pairs that are known before training, got a stream or views of documents that "
            "are drawn anew: leave it out"
        )
    if pair_ids.num_queries() < 2:
        raise UserError(
            "--balance_queries needs at least two different queries, got one: a batch would hold a single pair"
        )


def _keep_small_sets(inputs: TrainerInputs, training_args: IsotropicGaussianTrainingArguments) -> None:
    """Where everything fits in one batch, dropping the last one would leave nothing to train on."""
    if not hasattr(inputs.train_rows, "__len__") or not training_args.dataloader_drop_last:
        return
    num_rows = len(inputs.train_rows)
    if training_args.balance_queries and inputs.pair_ids is not None:
        num_rows = inputs.pair_ids.num_queries()
    if num_rows < training_args.per_device_train_batch_size * training_args.world_size:
        logger.warning(
            "The %d training rows of an epoch fit in less than one batch of %d; it is kept.",
            *(num_rows, training_args.per_device_train_batch_size * training_args.world_size),
        )
        training_args.dataloader_drop_last = False
