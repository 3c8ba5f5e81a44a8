"""Which settings a sweep tries: every combination of a grid, or random draws from a space."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..command_line import FlagValues
from ..errors import UserError
from ..model.arguments import ModelArguments
from ..model.configuration_isotropic_gaussian import IsotropicGaussianConfig
from ..trainer.arguments import IsotropicGaussianTrainingArguments
from ..trainer.objective import resolve_weights

Setting: TypeAlias = dict[str, Any]

# One number per head: heads that differ in these alone are trained at once.
NUMBERS = (
    "lambda_contrastive",
    "lambda_isotropy",
    "lambda_predictive",
    "temperature",
    "margin",
    "learning_rate",
    "weight_decay",
    "whitening",
)
# What changes the shape of a head, of its loss or of its schedule.
SHAPES = (
    "use_predictor",
    "output_dim",
    "projection_kind",
    "projection_init",
    "projection_hidden_dim",
    "predictor_hidden_dim",
    "dropout",
    "similarity_fn_name",
    "contrastive_kind",
    "isotropy_kind",
    "predictive_kind",
    "bidirectional",
    "num_directions",
    "per_device_train_batch_size",
    "num_train_epochs",
    "warmup_steps",
)
_MOST_SETTINGS = 10_000
_ATTEMPTS_PER_DRAW = 20  # before a space is taken to hold no more different settings


@dataclass(frozen=True)
class Trial:
    """One head to train: a setting, a seed, and all arguments that follow from them."""

    setting: Setting
    seed: int
    model: ModelArguments
    training: IsotropicGaussianTrainingArguments

    def value(self, name: str) -> Any:
        """Look an argument up, whichever dataclass has it."""
        return getattr(self.model if hasattr(self.model, name) else self.training, name)


def setting_name(setting: Mapping[str, Any]) -> str:
    """Write a setting as one line that tells it from all others."""
    return json.dumps(setting, sort_keys=True)


def grid_settings(grid: Mapping[str, Any]) -> list[Setting]:
    """Combine every value with every other.

    Args:
        grid: Flag -> list of values.

    Returns:
        The settings by field name, the last flag changing fastest, each once.

    Raises:
        UserError: If a flag is not one that a sweep can change, a value is impossible, or there are too many.

    Example:
        >>> grid_settings({"temperature": [0.02, 0.05], "similarity": ["cosine"]})
        [{'temperature': 0.02, 'similarity_fn_name': 'cosine'}, {'temperature': 0.05, 'similarity_fn_name': 'cosine'}]
    """
    columns = [[_convert(flag, value) for value in _listed(flag, values)] for flag, values in grid.items()]
    _check_names([column[0][0] for column in columns])
    count = math.prod(len(column) for column in columns)
    if count > _MOST_SETTINGS:
        raise UserError(f"expected a grid of at most {_MOST_SETTINGS:,} settings, got {count:,}: use --search random")
    settings = [dict(combination) for combination in itertools.product(*columns)]
    return list({setting_name(setting): setting for setting in settings}.values())


def random_settings(space: Mapping[str, Any], count: int, *, seed: int) -> list[Setting]:
    """Draw different settings.

    Args:
        space: Flag -> list of values, or `{"low", "high"}` with an optional `"log": true`, which draws evenly in
            the logarithm.
        count: How many; fewer where the space holds no more.
        seed: Another seed draws others.

    Returns:
        The settings by field name.

    Raises:
        UserError: As `grid_settings`, or on a range without two ends in order.
    """
    if count < 1:
        raise UserError(f"--num_settings must be at least 1, got {count}: set it to e.g. 24")
    generator = random.Random(seed)
    settings: dict[str, Setting] = {}
    for _ in range(_ATTEMPTS_PER_DRAW * count):
        drawn = [_convert(flag, _draw(flag, values, generator)) for flag, values in space.items()]
        _check_names([name for name, _ in drawn])
        setting = dict(drawn)
        settings[setting_name(setting)] = setting
        if len(settings) == count:
            break
    return list(settings.values())


def make_trial(
    setting: Setting, seed: int, model: ModelArguments, training: IsotropicGaussianTrainingArguments
) -> Trial:
    """Put a setting over the arguments that all trials share.

    Args:
        setting: By field name.
        seed: Of the head's start, its data order and its directions.
        model: The shared arguments.
        training: Likewise.

    Returns:
        The trial, its values checked.

    Raises:
        UserError: If the values do not go together.
    """
    own_training = copy.copy(training)
    own_training.seed = seed
    of_model = {name: value for name, value in setting.items() if hasattr(model, name)}
    for name in setting.keys() - of_model.keys():
        setattr(own_training, name, setting[name])
    if training.per_device_eval_batch_size == training.per_device_train_batch_size:
        own_training.per_device_eval_batch_size = own_training.per_device_train_batch_size
    trial = Trial(setting, seed, dataclasses.replace(model, **of_model), own_training)
    if "lambda_predictive" not in setting and not trial.model.use_predictor:
        own_training.lambda_predictive = None  # a shared weight is meant for the heads that have a predictor
    try:
        _check_trial(trial)
    except ValueError as error:
        raise UserError(f"setting {setting_name(setting)}: {error}") from error
    return trial


def trainer_only_flags(training: IsotropicGaussianTrainingArguments) -> list[str]:
    """Name the flags that were given and that only the Trainer follows, not heads trained outside it."""
    given = {
        "gradient_accumulation_steps": training.gradient_accumulation_steps != 1,
        "optim": training.optim not in ("adamw_torch", "adamw_torch_fused"),
        "optim_args": bool(training.optim_args),
        "lr_scheduler_type": training.lr_scheduler_type == "reduce_lr_on_plateau",
        "fp16": training.fp16,
        "balance_queries": training.balance_queries,
        "data_seed": training.data_seed is not None,
        "early_stopping_patience": training.early_stopping_patience is not None,
    }
    return [name for name, is_given in given.items() if is_given]


def _check_trial(trial: Trial) -> None:
    model, training = trial.model, trial.training
    training.check_values()
    model.check_values()
    fields = model.config_fields()
    IsotropicGaussianConfig(**{name: fields[name] for name in SHAPES if name in fields})
    if (training.lambda_predictive or 0) > 0 and not model.use_predictor:
        raise UserError(
            f"lambda_predictive {training.lambda_predictive} needs a predictor, got none: set use_predictor, or leave "
            "the weight out (1 with a predictor, 0 without)"
        )
    if not any(resolve_weights(training, use_predictor=model.use_predictor).values()):
        raise UserError("expected a term to train, got weights that are all 0: set one above 0, or use_predictor")


def _check_names(names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"expected each flag once in a grid, got two names of {twice[0]}: leave one out")


def _convert(flag: str, value: Any) -> tuple[str, Any]:
    name, converted = _flag_values().convert(flag, value)
    if name not in (*NUMBERS, *SHAPES):
        raise UserError(
            f"a sweep changes {', '.join((*NUMBERS, *SHAPES))}; got {flag!r}, which has to be the same for all: take "
            "it out of the grid and give it as a flag"
        )
    return name, converted


@functools.cache
def _flag_values() -> FlagValues:
    return FlagValues([ModelArguments, IsotropicGaussianTrainingArguments])


def _listed(flag: str, values: Any) -> list[Any]:
    if not isinstance(values, list) or not values:
        raise UserError(f"{flag}: expected a list of values in a grid, got {values!r}: write [a, b]")
    return values


def _draw(flag: str, values: Any, generator: random.Random) -> Any:
    if isinstance(values, list) and values:
        return generator.choice(values)
    try:
        low, high, is_log = float(values["low"]), float(values["high"]), bool(values.get("log", False))
        is_range = low < high and not (is_log and low <= 0) and not set(values) - {"low", "high", "log"}
    except (TypeError, KeyError, ValueError):
        is_range = False
    if not is_range:
        raise UserError(
            f"{flag}: expected a list of values or a range {{low: a, high: b, log: true}} with a < b (and a > 0 with "
            f"log), got {values!r}: correct it"
        )
    drawn = math.exp(generator.uniform(math.log(low), math.log(high))) if is_log else generator.uniform(low, high)
    return round(drawn) if _flag_values().is_whole(flag) else drawn
