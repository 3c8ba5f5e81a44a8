"""Plan a training run: check the arguments, then decide every setting once, before anything is encoded."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..command_line import format_table, shipped_file
from ..data.training_rows import read_columns
from ..errors import UserError
from ..evaluation.results import MAIN_METRIC
from ..objective.arguments import IsotropicGaussianTrainingArguments, choice_name, learning_rates, with_values
from ..objective.terms import resolve_weights
from ..sweep.automatic import CHOSEN_FIELDS
from ..sweep.settings import trainer_only_flags
from .callbacks import check_stream_position

if TYPE_CHECKING:
    from ..sweep.automatic import ChosenSettings
    from .data import TrainingData
    from .record import Checkpoint


@dataclass(frozen=True)
class RunFacts:
    """What decides settings besides the arguments."""

    model: Any  # the model's configuration, or the flags that will make it
    num_rows: int | None  # training rows of an epoch; None for a stream
    num_queries: int | None = None  # distinct queries, for balanced epochs; None if not known before training
    has_validation: bool = False
    stream_order: Mapping[str, int] | None = None  # arguments that decide the order of a stream
    checkpoint: Checkpoint | None = None  # to resume from
    num_processes: int = 1
    uses_features: bool = True  # the head trains on features that are computed once; else every step runs the encoder
    is_automatic: bool = False
    has_documents: bool = False  # without labels, which give the head its start
    is_untrained: bool = True  # the model's head
    given_fields: Collection[str] = ()  # of the model's configuration, named when it was made in Python
    has_foreign_code: bool = False  # the encoder
    without_checkpointing: str | None = None  # the encoder's class, if it cannot recompute its activations
    chosen: ChosenSettings | None = None  # in an automatic run, once they are chosen


def find_facts(
    args: IsotropicGaussianTrainingArguments,
    model: Any,
    data: TrainingData,
    *,
    checkpoint: Checkpoint | None = None,
    chosen: ChosenSettings | None = None,
    **of_model: Any,
) -> RunFacts:
    """Find the facts that a plan depends on; reads the queries only if they are to be balanced.

    `of_model` are further fields of `RunFacts`, known once there is a model.
    """
    train, pairs = data.train, None
    uses_features = model.freeze_base and args.feature_cache and train.num_rows is not None
    if args.balance_queries and train.num_rows is not None:
        # Cached features are of the first epoch, so its queries are those of all epochs.
        pairs = read_columns(train) if uses_features else train.known_pairs()
    return RunFacts(
        model=model,
        num_rows=train.num_rows,
        num_queries=None if pairs is None else len(set(pairs[0])),
        has_validation=data.validation is not None,
        stream_order=train.stream_order,
        checkpoint=checkpoint,
        chosen=chosen,
        num_processes=args.world_size,
        uses_features=uses_features,
        is_automatic=data.automatic is not None,
        has_documents=bool(data.documents),
        **of_model,
    )


@dataclass(frozen=True)
class RunPlan:
    """A run before it begins: final arguments, the facts that decided them, and what the user should know."""

    arguments: IsotropicGaussianTrainingArguments
    facts: RunFacts
    warnings: tuple[str, ...]


def _epoch_rows(args: IsotropicGaussianTrainingArguments, facts: RunFacts) -> int | None:
    """Return the number of rows that an epoch uses; None for a stream."""
    return facts.num_queries if args.balance_queries else facts.num_rows


def _rates(args: IsotropicGaussianTrainingArguments, facts: RunFacts) -> list[float]:
    """Return `learning_rates` of the steps, counted as the Trainer does; none if they cannot be counted yet."""
    num_steps, num_rows = args.max_steps, _epoch_rows(args, facts)
    if num_steps <= 0:
        if num_rows is None or (facts.is_automatic and facts.chosen is None):
            return []
        rows_per_batch = args.per_device_train_batch_size * facts.num_processes
        num_batches = num_rows // rows_per_batch if args.dataloader_drop_last else -(-num_rows // rows_per_batch)
        num_steps = math.ceil(args.num_train_epochs * max(1, -(-num_batches // args.gradient_accumulation_steps)))
    return learning_rates(args, num_steps, args.get_warmup_steps(num_steps))


def plan_run(args: IsotropicGaussianTrainingArguments, facts: RunFacts) -> RunPlan:
    """Decide every setting of a run. Changes neither the arguments nor anything else."""
    warnings = []
    # The Trainer would push every checkpoint, with its own card; instead, the saved model is pushed once.
    decided: dict[str, Any] = {"push_to_hub": False}
    if facts.chosen is not None:
        decided |= {"whitening": facts.chosen.whitening, "blend": facts.chosen.blend}
        if facts.chosen.blend > 0:
            decided["num_train_epochs"] = facts.chosen.num_train_epochs
    if facts.checkpoint is not None:
        decided["resume_from_checkpoint"] = facts.checkpoint.path
    if facts.has_validation:
        decided |= _validation_settings(args, is_resumed=facts.checkpoint is not None)
    # A blend uses the last weights: those of the best checkpoint need not be the best to blend.
    loads_best = decided.get("load_best_model_at_end", args.load_best_model_at_end)
    decided["load_best_model_at_end"] = loads_best and decided.get("blend", args.blend) == 1
    num_rows = _epoch_rows(args, facts)
    rows_per_step = args.per_device_train_batch_size * facts.num_processes
    if num_rows is None:
        # A stream ends its passes itself, and finds its position after a resume itself.
        decided |= {"dataloader_drop_last": True}
        decided |= {"ignore_data_skip": True} if facts.checkpoint is not None else {}
    elif args.dataloader_drop_last and num_rows < rows_per_step:
        decided["dataloader_drop_last"] = False
        warnings.append(f"The {num_rows} rows of an epoch do not fill a batch of {rows_per_step}; it is kept smaller.")
    planned = with_values(args, **decided)
    if planned.blend > 0 and (rates := _rates(planned, facts)) and not any(rates):
        warnings.append("The learning rate is 0 in all steps, so nothing is trained: set --warmup_steps 0.")
    if facts.is_automatic and facts.chosen is None:
        warnings.append("Whitening, projection, epochs and blend are chosen after encoding, by pseudo-queries.")
    if facts.has_documents and facts.is_untrained and (replaced := _replaced_by_documents(args)):
        warnings.append(
            f"If the documents without labels help, their head is the start, and {', '.join(replaced)} of this run do "
            "not count."
        )
    return RunPlan(planned, facts, tuple(warnings))


def _replaced_by_documents(args: IsotropicGaussianTrainingArguments) -> list[str]:
    """Name the settings of a recipe, or of a command, that a head of documents without labels replaces."""
    given = {name: args.model_fields.get(name) for name in CHOSEN_FIELDS} | {"whitening": args.whitening}
    return [f"{name} {value}" for name, value in given.items() if value]


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
    args, facts, model = plan.arguments, plan.facts, plan.facts.model
    weights = resolve_weights(args, use_predictor=model.use_predictor)
    terms = [f"{weight:g} {term} ({getattr(args, f'{term}_kind')})" for term, weight in weights.items() if weight]
    num_rows = _epoch_rows(args, facts)
    rows = "a stream" if num_rows is None else f"{num_rows:,} an epoch"
    source = "features, computed once" if facts.uses_features else "texts, encoded at every step"
    batch = f"{args.per_device_train_batch_size} rows on each of {facts.num_processes} processes"
    last = "dropped" if args.dataloader_drop_last else "kept"
    length = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    when = f"every {args.eval_steps:g} steps" if args.eval_strategy == "steps" else "every epoch"
    kept = "best" if args.load_best_model_at_end else "last"
    encoder = getattr(model, "base_model", None) or getattr(model, "base_model_name", None)
    table = {
        "encoder": f"{encoder}, {'frozen' if model.freeze_base else 'trained'}",
        "documents": "the encoder's own vectors" if model.freeze_documents else "through the projection",
        "projection": f"{model.projection_kind}, {model.projection_init} start, whitening {args.whitening:g}",
        "predictor": "yes" if model.use_predictor else "no",
        "rows": f"{rows}, as {source}",
        "batch": f"{batch}, {args.gradient_accumulation_steps} per step; a smaller last one is {last}",
        "loss": " + ".join(terms),
        "length": length if args.blend > 0 else "none (--blend 0)",
        "validation": f"{args.metric_for_best_model} {when}" if facts.has_validation else "none",
        "saved": f"the {kept} weights, blend {args.blend:g}, in {args.output_dir}",
        "start": "a head trained on documents without labels" if facts.has_documents else "the projection's own",
        "resumed from": facts.checkpoint.path if facts.checkpoint else "nothing",
    }
    return "\n".join([format_table([("setting", "value"), *table.items()], num_names=2), *plan.warnings])


def check_run(training: IsotropicGaussianTrainingArguments, facts: RunFacts) -> None:
    """Raise a UserError if arguments contradict each other, the model or the data."""
    _check_encoder(training, facts)
    if facts.num_rows is not None and facts.num_rows < 2:
        raise UserError(
            f"expected at least two training rows, got {facts.num_rows}: a batch needs other documents to compare with"
        )
    _check_validation(training, facts)
    if facts.checkpoint is not None:
        check_stream_position(facts.checkpoint, facts.stream_order)
    resolve_weights(training, use_predictor=facts.model.use_predictor)
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
    if facts.is_automatic and facts.chosen is None:
        _check_automatic(training, facts)
    if facts.has_documents:
        _check_documents(facts)
    if training.blend > 0:
        _rates(training, facts)
    _check_start(training, facts)
    _check_sharding(training, facts)


def _check_validation(training: IsotropicGaussianTrainingArguments, facts: RunFacts) -> None:
    given = {
        "early_stopping_patience": training.early_stopping_patience is not None,
        f"eval_strategy {choice_name(training.eval_strategy)}": training.eval_strategy != "no",
        "eval_on_start": training.eval_on_start,
        "save_strategy best": training.save_strategy == "best",
        "load_best_model_at_end": training.load_best_model_at_end,
    }
    if not facts.has_validation and any(given.values()):
        flag = next(name for name, is_given in given.items() if is_given)
        raise UserError(
            f"--{flag} needs validation pairs, got none: add --val_data or --val_fraction, or leave the flag out"
        )


def _check_encoder(training: IsotropicGaussianTrainingArguments, facts: RunFacts) -> None:
    if training.needs_store() and not facts.uses_features:
        raise UserError(
            "--encoder_dtype bfloat16 or float16, --encoder_backend and --feature_dtype are for cached features, got "
            "training from tokens: leave them out (--bf16 sets the precision)"
        )
    if facts.has_foreign_code:
        raise UserError(
            "expected an encoder that transformers knows, got one with code of its own, which a saved model could not "
            "load: take another encoder"
        )
    if training.activation_checkpointing and facts.without_checkpointing is not None:
        raise UserError(
            "--activation_checkpointing (or --gradient_checkpointing) needs an encoder that supports it, got "
            f"{facts.without_checkpointing}, which does not: leave it out, or reduce --batch_size instead"
        )


def _starts_as_base(model: Any) -> bool:
    """Return whether an untrained head of this model ranks as its frozen encoder does."""
    is_as_wide = model.output_dim in (None, getattr(model, "encoder_dim", model.output_dim))
    is_plain = model.projection_init == "identity" and not model.use_predictor
    return is_plain and is_as_wide and model.similarity_fn_name == getattr(model, "encoder_similarity", "cosine")


def _check_automatic(training: IsotropicGaussianTrainingArguments, facts: RunFacts) -> None:
    """Refuse what contradicts an automatic choice, before it is made."""
    model = facts.model
    if not facts.is_untrained:
        raise UserError("--automatic chooses the head, got a trained one: make a model with from_encoder")
    if not facts.uses_features or facts.num_processes != 1:
        raise UserError(
            "--automatic trains heads on cached features of a frozen encoder in one process: leave --no_freeze_base, "
            "--no_feature_cache and accelerate launch out"
        )
    if model.projection_init != "identity" or model.use_predictor or training.whitening or training.blend != 1.0:
        raise UserError(
            "--automatic chooses initialization and blend of a projection itself: leave --projection_init, "
            "--use_predictor, --whitening and --blend out"
        )
    if named := [name for name in CHOSEN_FIELDS if name in {*facts.given_fields, *training.model_fields}]:
        raise UserError(
            f"--automatic chooses kind and width of the projection itself, got --{named[0]}: leave --projection_kind "
            "and --projection_hidden_dim out"
        )
    if training.num_train_epochs != type(training).num_train_epochs or training.max_steps > 0:
        raise UserError("--automatic chooses the length of training: leave --epochs and --max_steps out")
    if refused := trainer_only_flags(training):
        raise UserError(f"--automatic does not support --{refused[0]}: leave the flag out")


def _check_trackers(names: Iterable[str]) -> None:
    from transformers.integrations import get_available_reporting_integrations

    installed = get_available_reporting_integrations()
    for name in names:
        if name not in installed:
            raise UserError(
                f"--report_to {name} needs {name}, which is not installed: run pip install "
                f"{name}, or leave the flag out"
            )


def _check_documents(facts: RunFacts) -> None:
    """Refuse what a head that begins with documents without labels cannot do, before anything is encoded."""
    model = facts.model
    if not facts.uses_features or facts.num_processes != 1:
        raise UserError(
            "--documents beside pairs train on cached features of a frozen encoder in one process: leave "
            "--no_freeze_base, --no_feature_cache and accelerate launch out"
        )
    if model.projection_init != "identity" or model.use_predictor:
        raise UserError(
            "--documents beside pairs give a projection its start: leave --projection_init and --use_predictor out"
        )
    if named := [name for name in CHOSEN_FIELDS if facts.is_untrained and name in facts.given_fields]:
        raise UserError(
            f"--documents beside pairs choose kind and width of the projection, got a model made with --{named[0]}: "
            "leave it out, or train on the pairs alone"
        )
    if facts.checkpoint is not None:
        raise UserError("a run that begins with --documents cannot be resumed, got a checkpoint: start it again")


def _check_start(training: IsotropicGaussianTrainingArguments, facts: RunFacts) -> None:
    model, blend = facts.model, training.blend
    if training.fall_back and not (facts.has_validation and facts.uses_features and _starts_as_base(facts.model)):
        raise UserError(
            "--fall_back needs held-out pairs, cached features and a head that starts at the identity, as wide as "
            "the encoder: add --val_data or --val_fraction, or leave the flag out"
        )
    if any(width >= model.output_dim for width in training.matryoshka_dims if model.output_dim):
        raise UserError(
            f"--matryoshka_dims must be narrower than the embedding ({model.output_dim}), got "
            f"{training.matryoshka_dims}: leave the others out"
        )
    if training.matryoshka_dims and model.freeze_documents:
        raise UserError(
            "--matryoshka_dims orders the coordinates of embeddings, which --freeze_documents leaves alone: leave "
            "one of them out"
        )
    if training.whitening and model.projection_init != "identity":
        raise UserError(
            f"--whitening {training.whitening} needs --projection_init identity, got {model.projection_init}: a "
            "random initialization cannot be whitened"
        )
    if blend == 1:
        return
    if model.projection_init != "identity" or not model.freeze_base:
        raise UserError(
            f"--blend {blend} needs a frozen encoder and --projection_init identity: the start of other runs is no "
            "retrieval model to blend with"
        )
    if training.resume_from_checkpoint or facts.checkpoint is not None:
        raise UserError("--blend needs the start of the run, which a resumed run does not have: leave one of them out")
    if training.early_stopping_patience is not None:
        raise UserError(
            "--early_stopping_patience measures the trained weights, but --blend saves other ones, which gain from "
            "longer training: leave one of the two out"
        )


def _check_sharding(training: IsotropicGaussianTrainingArguments, facts: RunFacts) -> None:
    plugin_args = training.fsdp_plugin_args  # of --fsdp; a file of accelerate sets the environment instead
    if plugin_args is None and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(**(plugin_args or {}))
    if facts.model.freeze_base:
        raise UserError(
            "FSDP shards an encoder that trains, got a frozen one: add --no_freeze_base, or launch with "
            f"{shipped_file('accelerate', 'one_machine_gpus')}"
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
