"""Checks of a training run's arguments, before anything is loaded."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from ..model.arguments import ModelArguments
    from .arguments import IsotropicGaussianTrainingArguments, ParsedArguments

_TRACKERS = {name: f"'ragcun_hf[{name}]'" for name in ("trackio", "tensorboard", "wandb")}


def check_run(parsed: ParsedArguments, train_views: Any, validation_views: Any) -> None:
    """Check what is trained on what before anything is loaded, and turn validation on where it was asked for.

    Args:
        parsed: All arguments; evaluation and saving strategies may be set.
        train_views: Training rows.
        validation_views: Held-out rows, or None.

    Raises:
        UserError: If arguments do not go together, or there is too little data.
    """
    if parsed.features.needs_store() and not parsed.uses_cached_features:
        raise UserError(
            "--encoder_dtype bfloat16, --encoder_backend and --feature_dtype are for cached features, got training "
            "from tokens: leave them out (--bf16 sets the arithmetic)"
        )
    if parsed.training.n_gpu > 1:
        raise UserError(
            f"expected one GPU a process, got {parsed.training.n_gpu}: start with accelerate launch --config_file "
            "training/accelerate/one_machine_gpus.yaml, or set CUDA_VISIBLE_DEVICES to one"
        )
    _check_arguments(train_views, validation_views, parsed.model, parsed.training)
    _check_blend(parsed)
    _check_sharding(parsed)


def _check_arguments(
    train_views: Any,
    validation_views: Any,
    model_args: ModelArguments,
    training_args: IsotropicGaussianTrainingArguments,
) -> None:
    num_rows = len(train_views) if hasattr(train_views, "__len__") else None
    if num_rows is not None and num_rows < 2:
        raise UserError(
            f"expected at least two training rows, got {num_rows}: a batch needs other documents to compare"
        )
    if (training_args.lambda_predictive or 0) > 0 and not model_args.use_predictor:
        raise UserError(
            f"--lambda_predictive {training_args.lambda_predictive} needs a predictor, got none: add --use_predictor, "
            "or set the weight to 0"
        )
    if training_args.lambda_contrastive == training_args.lambda_isotropy == 0 and not model_args.use_predictor:
        raise UserError(
            "expected a term to train, got --lambda_contrastive 0 and --lambda_isotropy 0 without a predictor: "
            "set one above 0, or add --use_predictor"
        )
    _check_loggers(training_args.report_to)
    if validation_views is None:
        if training_args.early_stopping_patience is not None:
            raise UserError(
                "--early_stopping_patience needs validation pairs, got none: add --val_data or --val_fraction"
            )
        return
    # Validation was asked for: evaluate once per epoch unless the flags say when, and keep the best.
    if training_args.eval_strategy == "no":
        training_args.eval_strategy = "steps" if training_args.eval_steps else "epoch"
    # Only what is saved when it is evaluated can be the best that is loaded at the end.
    if training_args.save_strategy in ("steps", "epoch"):
        training_args.save_strategy = training_args.eval_strategy
        training_args.save_steps = training_args.eval_steps or training_args.save_steps
    training_args.load_best_model_at_end = training_args.save_strategy != "no"
    if training_args.metric_for_best_model is None:
        training_args.metric_for_best_model, training_args.greater_is_better = "eval_ndcg@10", True
    # The start is no checkpoint, but what training has to beat. A checkpoint was evaluated before it was saved.
    training_args.eval_on_start = not training_args.resume_from_checkpoint


def _check_blend(parsed: ParsedArguments) -> None:
    blend = parsed.run.blend
    if not 0 <= blend <= 1:
        raise UserError(f"--blend must be in [0, 1], got {blend}: set it to e.g. 0.5")
    if blend < 1 and (parsed.model.projection_init != "identity" or not parsed.model.freeze_base):
        raise UserError(
            f"--blend {blend} needs a frozen encoder and --projection_init identity: what a random start or a moving "
            "encoder is blended with is no retrieval model"
        )
    if blend < 1 and parsed.training.resume_from_checkpoint:
        raise UserError("--blend needs the start of the run, which --resume_from_checkpoint has left: leave one out")
    if blend < 1 and parsed.training.early_stopping_patience is not None:
        raise UserError(
            "--early_stopping_patience measures the trained weights, got --blend, which goes back from them and gains "
            "by going far: leave one out"
        )
    # For the same reason the last weights are blended, not those that alone were best.
    parsed.training.load_best_model_at_end = parsed.training.load_best_model_at_end and blend == 1


def _check_sharding(parsed: ParsedArguments) -> None:
    plugin_args = parsed.training.fsdp_plugin_args  # of --fsdp; a file of accelerate speaks through the environment
    if plugin_args is None and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(**(plugin_args or {}))
    if parsed.model.freeze_base:
        raise UserError(
            "FSDP shards an encoder that trains, got a frozen one: add --no_freeze_base, or launch with "
            "training/accelerate/one_machine_gpus.yaml"
        )
    # Only the full state dict puts the config beside a checkpoint's weights, which a resume compares.
    wanted = {
        "fsdp_version": (plugin.fsdp_version, 2),
        "fsdp_state_dict_type": (plugin.state_dict_type.name, "FULL_STATE_DICT"),
    }
    for name, (value, expected) in wanted.items():
        if value != expected:
            raise UserError(
                f"expected {name} {expected}, got {value}: launch with "
                "training/accelerate/fsdp2_trainable_encoder.yaml"
            )


def _check_loggers(report_to: Any) -> None:
    from transformers.integrations import get_available_reporting_integrations

    installed = get_available_reporting_integrations()
    for name in report_to:
        if name not in installed:
            raise UserError(
                f"--report_to {name} is not among what is installed ({', '.join(installed) or 'nothing is'}): run "
                f"pip install {_TRACKERS.get(name, name)}, or leave the flag out"
            )
