"""Plan a training run: check the arguments, then decide every setting once, before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..command_line import format_table
from ..errors import UserError
from ..evaluation.results import MAIN_METRIC
from .arguments import with_values
from .callbacks import check_stream_position
from .objective import resolve_weights

if TYPE_CHECKING:
    from .arguments import IsotropicGaussianTrainingArguments, ParsedArguments
    from .record import Checkpoint

_TRACKERS = {name: f"'ragcun_hf[{name}]'" for name in ("trackio", "tensorboard", "wandb")}


@dataclass(frozen=True)
class ChosenSettings:
    """Settings that an automatic run chose: fields of `ModelArguments`, epochs and blend."""

    model: Mapping[str, Any]
    num_train_epochs: float
    blend: float


@dataclass(frozen=True)
class RunFacts:
    """What decides settings besides the arguments."""

    num_rows: int | None  # training rows of an epoch; None for a stream
    num_queries: int | None = None  # distinct queries, for balanced epochs; None if not known before training
    has_validation: bool = False
    stream_order: Mapping[str, int] | None = None  # arguments that decide the order of a stream
    checkpoint: Checkpoint | None = None  # to resume from
    num_processes: int = 1
    is_automatic: bool = False
    chosen: ChosenSettings | None = None  # in an automatic run, once they are chosen


@dataclass(frozen=True)
class RunPlan:
    """A run before it begins: final arguments, the facts that decided them, and what the user should know."""

    arguments: ParsedArguments
    facts: RunFacts
    warnings: tuple[str, ...]

    @property
    def epoch_rows(self) -> int | None:
        """Rows that an epoch uses; None for a stream."""
        return self.facts.num_queries if self.arguments.training.balance_queries else self.facts.num_rows


def plan_run(parsed: ParsedArguments, facts: RunFacts) -> RunPlan:
    """Decide every setting of a run. Changes neither the arguments nor anything else."""
    training, model, run = parsed.training, parsed.model, parsed.run
    warnings = []
    # The Trainer would push every checkpoint, with its own card; instead, the saved model is pushed once.
    decided: dict[str, Any] = {"push_to_hub": False}
    if facts.checkpoint is not None:
        decided["resume_from_checkpoint"] = facts.checkpoint.path
    if facts.chosen is not None:
        model, run = replace(model, **facts.chosen.model), replace(run, blend=facts.chosen.blend)
        if run.blend > 0:
            decided["num_train_epochs"] = facts.chosen.num_train_epochs
    if facts.has_validation:
        decided |= _validation_settings(training, is_resumed=facts.checkpoint is not None)
    # A blend uses the last weights: those of the best checkpoint need not be the best to blend.
    loads_best = decided.get("load_best_model_at_end", training.load_best_model_at_end)
    decided["load_best_model_at_end"] = loads_best and run.blend == 1
    num_rows = RunPlan(parsed, facts, ()).epoch_rows
    rows_per_step = training.per_device_train_batch_size * facts.num_processes
    if num_rows is None:
        # A stream ends its passes itself, and finds its position after a resume itself.
        decided |= {"dataloader_drop_last": True}
        decided |= {"ignore_data_skip": True} if facts.checkpoint is not None else {}
    elif training.dataloader_drop_last and num_rows < rows_per_step:
        decided["dataloader_drop_last"] = False
        warnings.append(f"The {num_rows} rows of an epoch do not fill a batch of {rows_per_step}; it is kept smaller.")
    if facts.is_automatic and facts.chosen is None:
        warnings.append("Whitening, projection, epochs and blend are chosen after encoding, by pseudo-queries.")
    final = replace(parsed, model=model, run=run, training=with_values(training, **decided))
    return RunPlan(final, facts, tuple(warnings))


def _validation_settings(training: IsotropicGaussianTrainingArguments, *, is_resumed: bool) -> dict[str, Any]:
    """Evaluate once per epoch unless the flags say when, and keep the best checkpoint."""
    strategy = training.eval_strategy
    if strategy == "no":
        strategy = "steps" if training.eval_steps else "epoch"
    # Training has to beat the start. A checkpoint to resume from was evaluated before it was saved.
    settings: dict[str, Any] = {"eval_strategy": strategy, "eval_on_start": not is_resumed}
    if training.save_strategy in ("steps", "epoch"):
        # Only a checkpoint that is saved when it is evaluated can be loaded as the best.
        settings |= {"save_strategy": strategy, "save_steps": training.eval_steps or training.save_steps}
    settings["load_best_model_at_end"] = training.save_strategy != "no"
    if training.metric_for_best_model is None:
        settings |= {"metric_for_best_model": f"eval_{MAIN_METRIC}", "greater_is_better": True}
    return settings


def format_plan(plan: RunPlan) -> str:
    """Format a plan as a table for the terminal, its warnings below."""
    model, training, run = plan.arguments.model, plan.arguments.training, plan.arguments.run
    weights = resolve_weights(training, use_predictor=model.use_predictor)
    terms = [f"{weight:g} {term} ({getattr(training, f'{term}_kind')})" for term, weight in weights.items() if weight]
    rows = "a stream" if plan.epoch_rows is None else f"{plan.epoch_rows:,} an epoch"
    source = "features, computed once" if plan.arguments.uses_cached_features else "texts, encoded at every step"
    batch = f"{training.per_device_train_batch_size} rows on each of {plan.facts.num_processes} processes"
    last = "dropped" if training.dataloader_drop_last else "kept"
    length = f"{training.max_steps} steps" if training.max_steps > 0 else f"{training.num_train_epochs:g} epochs"
    when = f"every {training.eval_steps:g} steps" if training.eval_strategy == "steps" else "every epoch"
    kept = "best" if training.load_best_model_at_end else "last"
    table = {
        "encoder": f"{model.base_model}, {'frozen' if model.freeze_base else 'trained'}",
        "projection": f"{model.projection_kind}, {model.projection_init} start, whitening {model.whitening:g}",
        "predictor": "yes" if model.use_predictor else "no",
        "rows": f"{rows}, as {source}",
        "batch": f"{batch}, {training.gradient_accumulation_steps} per step; a smaller last one is {last}",
        "loss": " + ".join(terms),
        "length": length if run.blend > 0 else "none (--blend 0)",
        "validation": f"{training.metric_for_best_model} {when}" if plan.facts.has_validation else "none",
        "saved": f"the {kept} weights, blend {run.blend:g}, in {training.output_dir}",
        "resumed from": plan.facts.checkpoint.path if plan.facts.checkpoint else "nothing",
    }
    return "\n".join([format_table([("setting", "value"), *table.items()], num_names=2), *plan.warnings])


def check_run(parsed: ParsedArguments, facts: RunFacts) -> None:
    """Raise a UserError if arguments contradict each other or the data, before anything is loaded."""
    training = parsed.training
    if parsed.features.needs_store() and not parsed.uses_cached_features:
        raise UserError(
            "--encoder_dtype bfloat16, --encoder_backend and --feature_dtype are for cached features, got training "
            "from tokens: leave them out (--bf16 sets the precision)"
        )
    if training.n_gpu > 1:
        raise UserError(
            f"expected one GPU per process, got {training.n_gpu}: start with accelerate launch --config_file "
            "ragcun_hf/cli/accelerate/one_machine_gpus.yaml, or set CUDA_VISIBLE_DEVICES to one"
        )
    if facts.num_rows is not None and facts.num_rows < 2:
        raise UserError(
            f"expected at least two training rows, got {facts.num_rows}: a batch needs other documents to compare with"
        )
    if training.early_stopping_patience is not None and not facts.has_validation:
        raise UserError("--early_stopping_patience needs validation pairs, got none: add --val_data or --val_fraction")
    if facts.checkpoint is not None:
        check_stream_position(facts.checkpoint, facts.stream_order)
    resolve_weights(training, use_predictor=parsed.model.use_predictor)
    _check_trackers(training.report_to or ())
    if training.balance_queries and facts.num_queries is None:
        raise UserError(
            "--balance_queries needs pairs that are known before training, got a stream or documents whose queries "
            "are drawn anew each epoch: leave it out"
        )
    if training.balance_queries and facts.num_queries == 1:
        raise UserError(
            "--balance_queries needs at least two different queries, got one: a batch would hold a single pair"
        )
    _check_blend(parsed)
    _check_sharding(parsed)


def _check_trackers(names: Iterable[str]) -> None:
    from transformers.integrations import get_available_reporting_integrations

    installed = get_available_reporting_integrations()
    for name in names:
        if name not in installed:
            raise UserError(
                f"--report_to {name} needs {name}, which is not installed: run pip install "
                f"{_TRACKERS.get(name, name)}, or leave the flag out"
            )


def _check_blend(parsed: ParsedArguments) -> None:
    blend, model, training = parsed.run.blend, parsed.model, parsed.training
    if not 0 <= blend <= 1:
        raise UserError(f"--blend must be in [0, 1], got {blend}: set it to e.g. 0.5")
    if blend == 1:
        return
    if model.projection_init != "identity" or not model.freeze_base:
        raise UserError(
            f"--blend {blend} needs a frozen encoder and --projection_init identity: the start of other runs is no "
            "retrieval model to blend with"
        )
    if training.resume_from_checkpoint:
        raise UserError("--blend needs the start of the run, which a resumed run does not have: leave one of them out")
    if training.early_stopping_patience is not None:
        raise UserError(
            "--early_stopping_patience measures the trained weights, but --blend saves other ones, which gain from "
            "longer training: leave one of the two out"
        )


def _check_sharding(parsed: ParsedArguments) -> None:
    plugin_args = parsed.training.fsdp_plugin_args  # of --fsdp; a file of accelerate sets the environment instead
    if plugin_args is None and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(**(plugin_args or {}))
    if parsed.model.freeze_base:
        raise UserError(
            "FSDP shards an encoder that trains, got a frozen one: add --no_freeze_base, or launch with "
            "ragcun_hf/cli/accelerate/one_machine_gpus.yaml"
        )
    # Only the full state dict writes the config, which a resume compares, beside the weights of a checkpoint.
    wanted = {
        "fsdp_version": (plugin.fsdp_version, 2),
        "fsdp_state_dict_type": (plugin.state_dict_type.name, "FULL_STATE_DICT"),
    }
    for name, (value, expected) in wanted.items():
        if value != expected:
            raise UserError(
                f"expected {name} {expected}, got {value}: launch with "
                "ragcun_hf/cli/accelerate/fsdp2_trainable_encoder.yaml"
            )
