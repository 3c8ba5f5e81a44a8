"""Settings that a sweep tries: every combination of a grid, or random draws from a space."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..command_line import FlagValues, argument_facts
from ..errors import UserError
from ..model.arguments import ModelArguments
from ..model.configuration_isotropic_gaussian import IsotropicGaussianConfig
from ..objective.arguments import IsotropicGaussianTrainingArguments, with_values
from ..objective.terms import resolve_weights

Setting: TypeAlias = dict[str, Any]

_DATACLASSES = (ModelArguments, IsotropicGaussianTrainingArguments)
_SWEPT = {name: kind for each in _DATACLASSES for name, kind in argument_facts(each, "swept").items()}
SHAPES = tuple(name for name, kind in _SWEPT.items() if kind == "shape")
"""Arguments that change the shape of a head, its loss or its schedule; heads that differ in others train together."""
MOST_SETTINGS = 10_000
_DRAWS_PER_SETTING = 20  # after this many draws, a space is taken to hold no more different settings


@dataclass(frozen=True)
class Trial:
    """One head to train: a setting, a seed, and all arguments that follow from them."""

    setting: Setting
    seed: int
    model: ModelArguments
    training: IsotropicGaussianTrainingArguments

    def value(self, name: str) -> Any:
        """Return an argument of the model or of its training."""
        return getattr(self.model if name in argument_facts(ModelArguments, "swept") else self.training, name)


def setting_name(setting: Mapping[str, Any]) -> str:
    """Return one line that identifies a setting."""
    return json.dumps(setting, sort_keys=True)


def grid_settings(grid: Mapping[str, Any]) -> list[Setting]:
    """Combine the values of all flags (flag -> list) into distinct settings; the last flag changes fastest."""
    for flag, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{flag}: expected a list of values in a grid, got {values!r}: write [a, b]")
    columns = [[_convert(flag, value) for value in values] for flag, values in grid.items()]
    _check_names([column[0][0] for column in columns])
    count = math.prod(len(column) for column in columns)
    if count > MOST_SETTINGS:
        raise UserError(f"expected a grid of at most {MOST_SETTINGS:,} settings, got {count:,}: use --search random")
    settings = [dict(combination) for combination in itertools.product(*columns)]
    return list({setting_name(setting): setting for setting in settings}.values())


def random_settings(space: Mapping[str, Any], count: int, *, seed: int) -> list[Setting]:
    """Draw `count` distinct settings, or as many as the space has.

    The space maps a flag to a list of values or a range `{"low", "high"}`; `"log": true` makes the logarithm uniform.
    """
    if count < 1:
        raise UserError(f"--num_settings must be at least 1, got {count}: set it to e.g. 24")
    generator = random.Random(seed)
    settings: dict[str, Setting] = {}
    for _ in range(_DRAWS_PER_SETTING * count):
        drawn = [_convert(flag, _draw(flag, values, generator)) for flag, values in space.items()]
        _check_names([name for name, _ in drawn])
        setting = dict(drawn)
        settings[setting_name(setting)] = setting
        if len(settings) == count:
            break
    return list(settings.values())


def _check_names(names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"expected each flag once in a grid, got two names of {twice[0]}: leave one out")


def _convert(flag: str, value: Any) -> tuple[str, Any]:
    name, converted = _flag_values().convert(flag, value)
    if name not in _SWEPT:
        raise UserError(
            f"a sweep changes {', '.join(_SWEPT)}; got {flag!r}, which must be the same for all heads: take it out "
            "of the grid and give it as a flag"
        )
    return name, converted


@functools.cache
def _flag_values() -> FlagValues:
    return FlagValues(_DATACLASSES)


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
    return round(drawn) if _flag_values().takes_integers(flag) else drawn


def make_trial(
    setting: Setting, seed: int, model: ModelArguments, training: IsotropicGaussianTrainingArguments
) -> Trial:
    """Apply a setting, by field name, to the arguments that all trials share; a contradiction is a UserError.

    The seed is that of the head's initialization, its order of rows and its directions.
    """
    of_model = {name: value for name, value in setting.items() if name in argument_facts(ModelArguments, "swept")}
    own_model = dataclasses.replace(model, **of_model)
    of_training = {name: value for name, value in setting.items() if name not in of_model} | {"seed": seed}
    if training.per_device_eval_batch_size == training.per_device_train_batch_size:
        own_batch_size = of_training.get("per_device_train_batch_size", training.per_device_train_batch_size)
        of_training["per_device_eval_batch_size"] = own_batch_size
    if not own_model.use_predictor:
        # A shared weight is meant for the heads that have a predictor.
        of_training.setdefault("lambda_predictive", None)
    own_training = with_values(training, **of_training)
    try:
        own_training.check_values()
        if own_training.whitening and own_model.projection_init != "identity":
            raise ValueError("whitening needs projection_init identity")
        fields = own_model.config_fields()
        IsotropicGaussianConfig(**{name: fields[name] for name in SHAPES if name in fields})
        resolve_weights(own_training, use_predictor=own_model.use_predictor)
    except ValueError as error:
        raise UserError(f"setting {setting_name(setting)}: {error}") from error
    return Trial(setting, seed, own_model, own_training)


def trainer_only_flags(training: IsotropicGaussianTrainingArguments) -> list[str]:
    """Name the given flags that only the Trainer supports, and heads trained outside it do not."""
    given = {
        "gradient_accumulation_steps": training.gradient_accumulation_steps != 1,
        "optim": training.optim not in ("adamw_torch", "adamw_torch_fused"),
        "optim_args": bool(training.optim_args),
        "lr_scheduler_type": training.lr_scheduler_type == "reduce_lr_on_plateau",
        "fp16": training.fp16,
        "balance_queries": training.balance_queries,
        "matryoshka_dims": bool(training.matryoshka_dims),
        "data_seed": training.data_seed is not None,
        "early_stopping_patience": training.early_stopping_patience is not None,
    }
    return [name for name, is_given in given.items() if is_given]
