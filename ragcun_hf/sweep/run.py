"""Run a sweep: train and measure heads in rounds, with successive halving."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from ..objective.terms import TERMS, resolve_weights
from .heads import HeadBatch, HeadData, heads_at_once, measure_head, with_head
from .records import SweepRecords, TrialRecord
from .settings import SHAPES, Setting, Trial, setting_name

logger = logging.getLogger(__name__)

_LEAST_STEPS = 10  # of a head in a round; fewer show little more than the warm-up


@dataclass(frozen=True)
class Round:
    """The number of settings that take part in a round, and their share of a whole training."""

    num_settings: int
    share: float


def plan_rounds(num_settings: int, *, factor: int, least_share: float = 0.0) -> list[Round]:
    """Plan rounds that each keep one of `factor` settings and train it `factor` times as long.

    No round is shorter than `least_share` of a whole training. The last round is a whole training, of at least two
    settings if there are several; with a factor of 1 it is the only one. With a factor of 4, for example, 24 settings
    train for 1/16, 6 for 1/4, and 2 for the whole training.
    """
    least = min(2, num_settings)
    counts = [num_settings]
    while factor > 1 and counts[-1] > least and factor ** -len(counts) >= least_share:
        counts.append(max(least, math.floor(num_settings / factor ** len(counts))))
    return [Round(count, factor ** (number + 1.0 - len(counts))) for number, count in enumerate(counts)]


def run_rounds(
    data: HeadData,
    settings: Sequence[Setting],
    trials: Sequence[Trial],
    records: SweepRecords,
    *,
    factor: int,
    select: str,
) -> None:
    """Train and measure heads round by round, except those that the records hold from an interrupted run.

    `trials` are every setting with every seed. The validation figure `select` decides which settings stay.
    """
    fewest = min(data.num_steps(trial.training) for trial in trials)
    names = [setting_name(setting) for setting in settings]
    for number, each in enumerate(plan_rounds(len(settings), factor=factor, least_share=_LEAST_STEPS / fewest)):
        if number:
            best = records.summaries(select, round_number=number - 1)[: each.num_settings]
            names = [setting_name(summary.setting) for summary in best]
        chosen = [trial for trial in trials if setting_name(trial.setting) in names]
        logger.info("round %d: %d heads", number, len(chosen))
        # Batches are formed before those that are done are left out: dropout depends on which heads train together.
        parts = [
            part
            for part in _batches(chosen, data)
            if any((setting_name(trial.setting), trial.seed, number) not in records for trial in part)
        ]
        _train_parts(data, parts, records, number, each.share)


def _train_parts(
    data: HeadData, parts: Sequence[Sequence[Trial]], records: SweepRecords, number: int, share: float
) -> None:
    if data.validation is None:
        raise ValueError("A sweep needs a validation to measure heads by, got None.")
    budgets = [data.num_steps(part[0].training, share) for part in parts]
    total = sum(len(part) * steps for part, steps in zip(parts, budgets, strict=True))
    with tqdm(total=total, desc=f"Round {number + 1}", unit="step", disable=not parts) as bar:
        for part, steps in zip(parts, budgets, strict=True):
            started = time.perf_counter()
            template = with_head(data.base, part[0].model)
            heads = HeadBatch(template, [data.initial_weights(template, trial) for trial in part], part)
            for _ in heads.train(data, total_steps=steps, share=share):
                bar.update(len(part))
            figures = [measure_head(template, head, data.validation) for head in heads.heads()]
            seconds = (time.perf_counter() - started) / len(part)
            records.add(
                [
                    TrialRecord(trial.setting, trial.seed, number, steps, found, seconds)
                    for trial, found in zip(part, figures, strict=True)
                ]
            )


def _batches(trials: Sequence[Trial], data: HeadData) -> list[list[Trial]]:
    """Group trials into batches of heads that can train together."""
    groups: dict[Any, list[Trial]] = {}
    for trial in trials:
        weights = resolve_weights(trial.training, use_predictor=trial.model.use_predictor)
        key = [trial.value(name) for name in SHAPES] + [weights[term] > 0 for term in TERMS]
        # With hard negatives, batches differ in size unless all heads see the same rows.
        groups.setdefault((*key, trial.seed if data.has_negatives else None), []).append(trial)
    parts = []
    for group in groups.values():
        size = heads_at_once(group[0].training.per_device_train_batch_size, data.device)
        parts += [group[start : start + size] for start in range(0, len(group), size)]
    return parts
