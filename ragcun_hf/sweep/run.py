"""A sweep from checked pairs to scores: features once, then rounds of heads."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor
from tqdm.auto import tqdm

from ..errors import NotFiniteError, UserError
from ..model.arguments import ModelArguments
from ..model.modeling_isotropic_gaussian import IsotropicGaussianModel
from ..trainer.inputs import as_feature_pairs, prompts_of, retrieval_validation
from ..trainer.objective import TERMS, resolve_weights
from .head_batch import HeadBatch, PairBatches, heads_at_once
from .heads import TrainingPairs, start_weights, with_head
from .records import SweepRecords, TrialRecord
from .settings import SHAPES, Setting, Trial, setting_name

if TYPE_CHECKING:
    from ..features.feature_store import FeatureStore

logger = logging.getLogger(__name__)

_LEAST_STEPS = 10  # of a head in a round: in fewer, little more than the warm-up is seen
_FEW_DOCUMENTS = 10  # among so few, NDCG@10 finds everything


@dataclass
class SweepData(TrainingPairs):
    """What all heads of a sweep share.

    Args:
        base: As for `TrainingPairs`.
        pairs: Training pairs, then validation pairs.
        num_training_rows: How many are for training.
        validation: Measures a model on the held-out pairs.
    """

    validation: Callable[[IsotropicGaussianModel], dict[str, float]]

    @classmethod
    def of_views(
        cls, base: IsotropicGaussianModel, train_views: Any, validation_views: Any, store: FeatureStore
    ) -> Self:
        """Compute the features of all texts, or read them."""
        num_held_out = len({validation_views[row]["positive"] for row in range(len(validation_views))})
        if num_held_out <= _FEW_DOCUMENTS:
            logger.warning("Only %d documents are held out: NDCG@10 says little about them.", num_held_out)
        _check_training_rows(train_views)
        pairs = as_feature_pairs([train_views, validation_views], store, prompts_of(base))
        return cls(base, pairs, len(train_views), retrieval_validation(validation_views, store))

    @classmethod
    def of_pairs(
        cls,
        base: IsotropicGaussianModel,
        train_views: Any,
        store: FeatureStore,
        validation: Callable[[IsotropicGaussianModel], dict[str, float]],
    ) -> Self:
        """Compute the features of the training texts, or read them; the validation has its own."""
        _check_training_rows(train_views)
        pairs = as_feature_pairs([train_views], store, prompts_of(base))
        return cls(base, pairs, len(train_views), validation)

    def base_figures(self) -> dict[str, float]:
        """Measure the frozen base itself, by cosine."""
        model = with_head(self.base, ModelArguments(projection_kind="linear"))
        return self.validation(model)


def _check_training_rows(views: Any) -> None:
    if len(views) < 2:
        raise UserError(f"expected at least two training rows, got {len(views)}: a batch needs others to compare")


def run_rounds(
    data: SweepData,
    settings: Sequence[Setting],
    trials: Sequence[Trial],
    records: SweepRecords,
    *,
    factor: int,
    select: str,
) -> None:
    """Train and measure heads round by round; what the records hold already is not done again.

    Args:
        data: Features and validation.
        settings: All settings.
        trials: Every setting with every seed.
        records: Where scores go and what earlier runs left.
        factor: Of successive halving; 1 for none.
        select: The validation figure that decides which settings go on.
    """
    batches = PairBatches(data.pairs, data.num_training_rows, data.base.device)
    fewest = min(steps_of(batches, trial) for trial in trials)
    names = [setting_name(setting) for setting in settings]
    for number, each in enumerate(plan_rounds(len(settings), factor=factor, least_share=_LEAST_STEPS / fewest)):
        if number:
            best = records.summaries(select, round_number=number - 1)[: each.num_settings]
            names = [setting_name(summary.setting) for summary in best]
        chosen = [trial for trial in trials if setting_name(trial.setting) in names]
        logger.info("round %d: %d heads", number, len(chosen))
        _run_round(data, batches, chosen, records, number, each)


def _run_round(
    data: SweepData, batches: PairBatches, trials: Sequence[Trial], records: SweepRecords, number: int, plan: Round
) -> None:
    # Parted before looking at what is done already: a head's dropout depends on those beside it.
    parts = [
        part
        for part in _batched_trials(trials, by_seed=batches.has_negatives)
        if any((setting_name(trial.setting), trial.seed, number) not in records for trial in part)
    ]
    budgets = [steps_of(batches, part[0], plan.share) for part in parts]
    total = sum(len(part) * steps for part, steps in zip(parts, budgets, strict=True))
    with tqdm(total=total, desc=f"Round {number + 1}", unit="step", disable=not parts) as bar:
        for part, steps in zip(parts, budgets, strict=True):
            started = time.perf_counter()
            template = with_head(data.base, part[0].model)
            heads = HeadBatch(template, [start_weights(template, trial, data) for trial in part], part)
            for _ in heads.train(batches, total_steps=steps, share=plan.share):
                bar.update(len(part))
            figures = [_measured(template, head, data.validation) for head in heads.heads()]
            seconds = (time.perf_counter() - started) / len(part)
            records.add(
                [
                    TrialRecord(trial.setting, trial.seed, number, steps, found, seconds)
                    for trial, found in zip(part, figures, strict=True)
                ]
            )


def steps_of(batches: PairBatches, trial: Trial, share: float = 1.0) -> int:
    """Count the optimizer steps of a share of a trial's whole budget."""
    args = trial.training
    per_epoch = batches.steps_per_epoch(args.per_device_train_batch_size, drop_last=args.dataloader_drop_last)
    whole = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    return max(1, math.ceil(share * whole))


def _batched_trials(trials: Sequence[Trial], *, by_seed: bool) -> list[list[Trial]]:
    """Part trials into batches of heads that one stacked tensor per weight can hold."""
    groups: dict[Any, list[Trial]] = {}
    for trial in trials:
        weights = resolve_weights(trial.training, use_predictor=trial.model.use_predictor)
        key = [trial.value(name) for name in SHAPES] + [weights[term] > 0 for term in TERMS]
        # Hard negatives make batches of unlike sizes, but for heads that see the same rows.
        groups.setdefault((*key, trial.seed if by_seed else None), []).append(trial)
    parts = []
    for group in groups.values():
        size = heads_at_once(group[0].training.per_device_train_batch_size)
        parts += [group[start : start + size] for start in range(0, len(group), size)]
    return parts


def _measured(
    template: IsotropicGaussianModel,
    head: dict[str, Tensor],
    validation: Callable[[IsotropicGaussianModel], dict[str, float]],
) -> dict[str, float]:
    """Measure one head; a diverged one has no figures."""
    template.load_state_dict(head, strict=False)
    try:
        return validation(template.eval())
    except NotFiniteError:
        return {}


@dataclass(frozen=True)
class Round:
    """One round: how many settings take part, and with what share of the whole budget."""

    num_settings: int
    share: float


def plan_rounds(num_settings: int, *, factor: int, least_share: float = 0.0) -> list[Round]:
    """Plan rounds that each keep one setting in `factor` and give it `factor` times the budget.

    Args:
        num_settings: Settings of the first round, >= 1.
        factor: At least 2; 1 trains every setting in full at once.
        least_share: No round has a smaller share of the whole budget: there are fewer rounds then.

    Returns:
        The rounds in order; the last has the whole budget and, where there are several settings, at least two.

    Example:
        >>> [(each.num_settings, each.share) for each in plan_rounds(24, factor=4)]
        [(24, 0.0625), (6, 0.25), (2, 1.0)]
    """
    least = min(2, num_settings)
    counts = [num_settings]
    while factor > 1 and counts[-1] > least and factor ** -len(counts) >= least_share:
        counts.append(max(least, math.floor(num_settings / factor ** len(counts))))
    return [Round(count, factor ** (number + 1.0 - len(counts))) for number, count in enumerate(counts)]
