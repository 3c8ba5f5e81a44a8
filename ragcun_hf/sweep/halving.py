"""Successive halving: all settings on a small budget, the better ones on larger ones.

Source: Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization", AISTATS 2016,
arXiv:1502.07943. Each round starts its heads anew, with a learning rate that falls to its end within the round: a
budget that is cut off halfway says little about a setting, and a round can be resumed from its scores alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


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
