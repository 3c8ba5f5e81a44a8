"""Arguments of a training run: weights and kinds of the three loss terms, start, features, and the Trainer's own."""

from __future__ import annotations

import copy
import logging
import math
import os
import re
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, Self, TypeVar, get_args

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from ..command_line import argument, recipe_values, shipped_file
from ..errors import UserError
from ..features.arguments import FeatureArguments
from ..model.arguments import ModelArguments
from .flags import ContrastiveKind, IsotropyKind, ObjectiveArguments, PredictiveKind, ScheduleArguments

logger = logging.getLogger(__name__)

Arguments = TypeVar("Arguments")
_LARGEST = 2**31 - 1  # of counts


@dataclass
class IsotropicGaussianTrainingArguments(ObjectiveArguments, ScheduleArguments, FeatureArguments, TrainingArguments):
    """`transformers.TrainingArguments` with the loss terms, the start of the head, its features and its blend.

    Fields of the parents are declared again if their default differs or if a fact is added.

    Example:
        >>> from ragcun_hf import IsotropicGaussianTrainingArguments
        >>> arguments = IsotropicGaussianTrainingArguments(output_dir="out", lambda_isotropy=1.5, use_cpu=True)
        >>> arguments.lambda_isotropy, arguments.isotropy_kind
        (1.5, 'sigreg')
    """

    per_device_eval_batch_size: int | None = argument(  # type: ignore[assignment]
        None, "Rows per process in an evaluation. Default: as in training, so that the two losses are comparable."
    )
    dataloader_drop_last: bool = argument(
        True, "Drop the last batch of an epoch if it is smaller: it has fewer negatives and a noisier isotropy term."
    )
    logging_nan_inf_filter: bool = argument(
        False, "Leave losses that are not finite out of the log. False shows a divergence."
    )
    remove_unused_columns: bool = argument(
        False, "Must stay False: the collator reads columns that the model does not."
    )
    label_names: list[str] | None = argument([], "Must stay empty: there are no labels.")
    disable_tqdm: bool | None = argument(None, "Hide progress bars.", recorded="never")
    hub_training_digests: bool = argument(
        True,
        "With --push_to_hub, also send training_documents.txt, the digests of the training documents; see "
        "--training_digests of ragcun push.",
        recorded="never",
    )
    hub_token: str | None = argument(
        None, "Token for --push_to_hub. Default: the one saved by hf auth login.", recorded="never"
    )
    accelerator_config: dict | str | None = argument(
        None, "Settings of accelerate: a JSON file or an object.", recorded="never"
    )
    dataloader_pin_memory: bool = argument(True, "Pin memory for copies to an accelerator.", recorded="never")

    model_fields: dict[str, Any] = field(default_factory=dict, init=False)
    """Fields of the model's configuration that a recipe sets."""

    @classmethod
    def from_recipe(cls, name_or_file: str, **overrides: Any) -> Self:
        """Read a recipe: what `--recipe` gives the training commands.

        A recipe may also set fields of the model's configuration, such as `projection_hidden_dim`. The Trainer gives
        them to a model of `from_encoder` whose head is untrained, except for fields that were named there.

        Args:
            name_or_file: The name of a shipped recipe, such as `adapt`, or a YAML file.
            **overrides: Any of the arguments, or of the model's configuration, with other values.

        Returns:
            The arguments; the recipe's encoder is left out, because the Trainer is given a model.

        Raises:
            UserError: If there is no such recipe or argument.

        Example:
            >>> from ragcun_hf import IsotropicGaussianTrainingArguments
            >>> arguments = IsotropicGaussianTrainingArguments.from_recipe("adapt", output_dir="mine", max_steps=50)
            >>> arguments.blend, arguments.max_steps, arguments.model_fields
            (0.4, 50, {'projection_hidden_dim': 2048})
        """
        values = recipe_values(name_or_file, [ModelArguments, cls], overrides)
        of_config = ModelArguments(**{name: values[name] for name in _names(ModelArguments) & values.keys()})
        model_fields = {name: value for name, value in of_config.config_fields().items() if name in values}
        arguments = cls(**{name: values[name] for name in _names(cls) & values.keys()})
        return with_values(arguments, model_fields=model_fields)

    def __post_init__(self) -> None:
        """Check our own values, then let the parent check its own."""
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = self.per_device_train_batch_size
        self.check_values()
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            # The parent looks only at the end of the name and would maximize eval_loss/contrastive.
            self.greater_is_better = not self.metric_for_best_model.removeprefix("eval_").startswith("loss")
        # Without this, accelerate does not let several processes train together on a machine without accelerators.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        _refuse_backend_of_one_process(self)  # the parent would wait for the others, or fail
        try:
            super().__post_init__()
        except OverflowError as error:
            raise ValueError(
                f"expected finite numbers as flags of the Trainer, got an infinite one: {error}."
            ) from error
        except (ImportError, OSError) as error:  # of --deepspeed, and of files that flags name
            raise ValueError(
                f"{error}: install what is missing, correct the file's name, or leave the flag out."
            ) from error
        check_trainer_values(self)
        if self.n_gpu > 1:
            launch = f"accelerate launch --config_file {shipped_file('accelerate', 'one_machine_gpus')}"
            logger.warning("One of %d GPUs trains: start with %s to use all.", self.n_gpu, launch)
            # The Trainer would split each batch over all of them, and each part would be treated as a whole batch.
            self._n_gpu = 1
        # The tensors of a batch differ in length (queries, documents, both), so accelerate must not slice a batch.
        # Each process reads its own batches of a stream instead.
        accelerator_config: Any = self.accelerator_config
        accelerator_config.dispatch_batches = accelerator_config.split_batches = False
        # If one process had no last batch, the others would wait for its rows forever.
        accelerator_config.even_batches = True
        # No buffer changes in training, and a lexical half is too large to send at every step.
        self.ddp_broadcast_buffers = bool(self.ddp_broadcast_buffers)
        # Without an accelerator, pinned memory only causes a warning in every epoch.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        # Otherwise every step would wait for its batch to arrive, after all that the card had to do before.
        accelerator_config.non_blocking = accelerator_config.non_blocking or self.dataloader_pin_memory

    def check_values(self) -> None:
        """Raise a ValueError that names the field if a weight, rate, count or kind is out of range."""
        above_0 = ("temperature", "learning_rate", "encoder_learning_rate")
        at_least_0: tuple[str, ...] = ("lambda_contrastive", "lambda_isotropy", "lambda_predictive", "margin")
        at_least_0 += ("weight_decay", "warmup_steps")
        self._check_types()
        for name in (*at_least_0, *above_0):
            value, bound = getattr(self, name), "above 0" if name in above_0 else "of at least 0"
            if value is not None and not (math.isfinite(value) and (value > 0 or (value == 0 and name in at_least_0))):
                raise ValueError(f"`{name}` must be a finite number {bound}, got {value}.")
        if self.lambda_contrastive == self.lambda_isotropy == 0 and self.lambda_predictive == 0:
            raise ValueError("All three lambda weights are 0: there is nothing to train, set one above 0.")
        counts = {
            "batch_size": self.per_device_train_batch_size,
            "per_device_eval_batch_size": self.per_device_eval_batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "num_directions": self.num_directions,
            "early_stopping_patience": self.early_stopping_patience,
            "shuffle_buffer_size": self.shuffle_buffer_size,
        }
        for name, count in counts.items():
            if count is not None and count < 1:
                raise ValueError(f"`{name}` must be at least 1, got {count}.")
        too_many = [name for name, count in {**counts, "max_steps": self.max_steps}.items() if (count or 0) > _LARGEST]
        if too_many:
            raise ValueError(f"`{too_many[0]}` must be at most {_LARGEST}, got more.")
        if any(width < 1 for width in self.matryoshka_dims):
            raise ValueError(f"`matryoshka_dims` must be widths of at least 1, got {self.matryoshka_dims}.")
        if self.max_steps <= 0 and not (math.isfinite(self.num_train_epochs) and self.num_train_epochs > 0):
            raise ValueError(f"`epochs` must be a finite number above 0, got {self.num_train_epochs}.")
        self._check_shares_and_kinds()

    def _check_types(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(each.default, Real) and not (value is None or isinstance(value, Real | np.bool_)):
                raise ValueError(f"`{each.name}` must be a number or a truth value, got {value!r}.")

    def _check_shares_and_kinds(self) -> None:
        ranges = {"whitening": "[0, 0.5]", "blend": "[0, 1]", "val_fraction": "[0, 1)"}
        in_range = (0 <= self.whitening <= 0.5, 0 <= self.blend <= 1, 0 <= self.val_fraction < 1)
        for (name, interval), is_in_range in zip(ranges.items(), in_range, strict=True):
            if not is_in_range:
                raise ValueError(f"`{name}` must be in {interval}, got {getattr(self, name)}.")
        kinds = {"contrastive": ContrastiveKind, "isotropy": IsotropyKind, "predictive": PredictiveKind}
        for term, choices in kinds.items():
            if (kind := getattr(self, f"{term}_kind")) not in get_args(choices):
                raise ValueError(f"`{term}_kind` must be one of {', '.join(get_args(choices))}, got {kind!r}.")


def choice_name(choice: Any) -> str:
    """Return the value of a flag as a user writes it, where transformers has made it a member of an enumeration."""
    return str(getattr(choice, "value", choice))


def check_trainer_values(args: TrainingArguments) -> None:
    """Raise a ValueError that names the field if the Trainer would fail on one of its own flags after encoding."""
    _refuse_untried(args)
    _try_loader(args)
    _try_compilation(args)
    _try_optimizer(args)


def _refuse_untried(args: TrainingArguments) -> None:
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise ValueError(
            f"`train_sampling_strategy` must be random or sequential, got {args.train_sampling_strategy}: rows are "
            "texts, whose numbers of tokens are not known beforehand."
        )
    if args.use_liger_kernel:
        raise ValueError("`use_liger_kernel` replaces layers of language models, not of encoders: leave it out.")
    if re.match("galore|apollo|lomo|adalomo", args.optim):
        raise ValueError(
            f"`optim` {choice_name(args.optim)} changes how a large model's own layers are trained, and is not "
            "supported: leave it out, or name another optimizer, such as adamw_torch."
        )
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"`seed` must be in [0, 2**32), got {args.seed}.")


def _refuse_backend_of_one_process(args: TrainingArguments) -> None:
    from accelerate.utils import get_int_from_env

    # Of torch's launcher, and of mpirun's kinds.
    sizes = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]
    is_launched = "LOCAL_RANK" in os.environ or get_int_from_env(sizes, 1) > 1
    if args.ddp_backend is not None and not is_launched:
        raise ValueError(
            f"`ddp_backend` {args.ddp_backend} connects several processes, got one: start with accelerate launch, or "
            "leave it out."
        )


def _try_loader(args: TrainingArguments) -> None:
    settings = ("num_workers", "persistent_workers", "prefetch_factor", "multiprocessing_context")
    rows: Any = [0]
    try:
        DataLoader(rows, **{name: getattr(args, f"dataloader_{name}") for name in settings})
    except ValueError as error:
        given = ", ".join(f"`dataloader_{name}` {getattr(args, f'dataloader_{name}')}" for name in settings)
        raise ValueError(f"The settings {given} contradict each other ({error}): change one of them.") from error


def _try_compilation(args: TrainingArguments) -> None:
    if not args.torch_compile:
        return
    from accelerate.utils import DynamoBackend
    from torch._inductor import list_mode_options

    choices = {"backend": [each.lower() for each in DynamoBackend.list()], "mode": ["default", *list_mode_options()]}
    for setting, names in choices.items():
        name = getattr(args, f"torch_compile_{setting}")
        if name is not None and name.lower() not in names:
            raise ValueError(f"`torch_compile_{setting}` must be one of {', '.join(names)}, got {name!r}.")


_UNMADE = (ValueError, TypeError, ImportError, RuntimeError, ArithmeticError)


def _try_optimizer(args: TrainingArguments) -> None:
    """Build the optimizer and its schedule, both for one number, if another than the default is named."""
    of_optimizer = ("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon")
    given = (*of_optimizer, "lr_scheduler_type", "lr_scheduler_kwargs")
    if not any(getattr(args, name) != getattr(type(args), name) for name in given):
        return
    from transformers import Trainer

    try:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = optimizer_class([torch.zeros(1, requires_grad=True)], **options)
    except _UNMADE as error:
        settings = f" with `optim_args` {args.optim_args}" if args.optim_args else ""
        raise ValueError(
            f"`optim` {choice_name(args.optim)}{settings} cannot be made ({error}): change it, or install what "
            "it needs."
        ) from error
    _try_schedule(args, optimizer)


def _try_schedule(args: TrainingArguments, optimizer: torch.optim.Optimizer) -> None:
    from transformers import get_scheduler

    settings: Any = args.lr_scheduler_kwargs
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 0, 1, scheduler_specific_kwargs=settings)
    except _UNMADE as error:
        raise ValueError(
            f"`lr_scheduler_type` {choice_name(args.lr_scheduler_type)} cannot be made with `lr_scheduler_kwargs` "
            f"{settings} ({error}): give the settings that it needs, as JSON, or name another schedule."
        ) from error


def learning_rates(args: TrainingArguments, num_steps: int, num_warmup_steps: int) -> list[float]:
    """Return the shares of the learning rate where a schedule turns: at its ends and around the end of the warm-up.

    A UserError says that the schedule has none there, or one that is no finite number of at least 0.
    """
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    settings: Any = args.lr_scheduler_kwargs
    steps = {0, 1, num_warmup_steps - 1, num_warmup_steps, num_warmup_steps + 1, num_steps - 1}
    try:
        schedule = get_scheduler(
            args.lr_scheduler_type, optimizer, num_warmup_steps, num_steps, scheduler_specific_kwargs=settings
        )
        rate_at = getattr(schedule, "lr_lambdas", [lambda _: 1.0])[0]  # others follow from evaluations
        rate_at(num_steps)  # asked for after the last step, but not used
        rates = [rate_at(step) for step in sorted(steps) if 0 <= step < num_steps]
        fault = "" if all(math.isfinite(rate) and rate >= 0 for rate in rates) else f"rates {rates}"
    except _UNMADE as error:
        fault = str(error)
    if fault:
        raise UserError(
            f"--lr_scheduler_type {choice_name(args.lr_scheduler_type)} with --lr_scheduler_kwargs {settings} expects "
            f"other settings, got {num_warmup_steps} steps of warm-up in {num_steps} steps of training ({fault}): "
            "change --warmup_steps or --lr_scheduler_kwargs, or name another schedule"
        )
    return rates


def _names(dataclass_type: type) -> set[str]:
    return {each.name for each in fields(dataclass_type) if each.init}


def with_values(arguments: Arguments, **values: Any) -> Arguments:
    """Return a copy of an arguments object with other values; the only place that sets one after its creation."""
    # `dataclasses.replace` would run `__post_init__` again, which resets what accelerate knows of the processes.
    changed = copy.copy(arguments)
    for name, value in values.items():
        setattr(changed, name, value)
    return changed
