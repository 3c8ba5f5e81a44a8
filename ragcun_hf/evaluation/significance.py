"""Paired tests and intervals for the difference between two systems on the same queries.

Shape letters used in this file: Q = queries, R = random sign patterns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

VALUES_AT_ONCE = 2_000_000  # random numbers held at once (16 MB)
PerQuery = Mapping[str, Mapping[str, float]]  # query id -> metric -> value
_EXACT_UP_TO = 12  # differences; 4,096 sign patterns are fewer than the random ones, and exact


@dataclass(frozen=True)
class PairedComparison:
    """The difference between system a and system b, query by query; positive means a is better."""

    difference: float  # mean of a minus mean of b
    p_value: float  # two-sided, from the paired randomization test
    low: float  # lower end of the bootstrap interval of the difference
    high: float
    wins: int  # queries on which a is better
    ties: int
    losses: int


def paired_randomization_test(a: ArrayLike, b: ArrayLike, *, num_permutations: int = 10_000, seed: int = 0) -> float:
    """Compute the two-sided p-value of the mean difference between two systems, from (Q,) values on the same queries.

    If both systems were equally good, the sign of each query's difference would be random. The p-value is the
    probability of a mean difference at least this large. With at most 12 queries of unequal values, all sign patterns
    are counted. Otherwise the observed pattern is counted among the random ones (Phipson and Smyth, 2010,
    arXiv:1603.05766). `scipy.stats.permutation_test` takes ten times as long for 10,000 queries.

    Source:
        Smucker, Allan and Carterette, "A comparison of statistical significance tests for information
        retrieval evaluation", CIKM 2007.

    >>> paired_randomization_test([1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    0.25
    """
    difference_Q = _differences(a, b)
    difference_Q = difference_Q[difference_Q != 0]
    num_queries = len(difference_Q)
    # Equal sums may differ by rounding if they are added in another order.
    observed = abs(difference_Q.sum()) - 1e-12 * np.abs(difference_Q).sum()

    def count_as_large(flipped_RQ: np.ndarray[Any, Any]) -> int:
        # The sum with some signs flipped is the whole sum minus twice the flipped part.
        sums_R = difference_Q.sum() - 2.0 * (flipped_RQ.astype(np.float64) @ difference_Q)
        return int(np.count_nonzero(np.abs(sums_R) >= observed))

    if num_queries <= _EXACT_UP_TO:
        patterns_R = np.arange(2**num_queries)
        return count_as_large((patterns_R[:, None] >> np.arange(num_queries)) & 1) / len(patterns_R)
    generator = np.random.default_rng(seed)
    step = max(1, VALUES_AT_ONCE // num_queries)
    num_as_large = 1
    for start in range(0, num_permutations, step):
        size = (min(step, num_permutations - start), num_queries)
        num_as_large += count_as_large(generator.integers(0, 2, size=size, dtype=np.int8))
    return num_as_large / (num_permutations + 1)


def bootstrap_interval(
    differences: Sequence[np.ndarray[Any, Any]], *, level: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Compute a confidence interval of the mean over data sets of their mean difference, from (Q,) of each.

    Queries are resampled with replacement within their data set; a share `level` of the resampled means lies in the
    interval (percentiles).

    Source:
        Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7(1), 1979.

    >>> bootstrap_interval([np.array([0.25, 0.25])])
    (0.25, 0.25)
    """
    from scipy import stats  # not at the top: it takes a second, and most programs that import this compare nothing

    if not 0 < level < 1:
        raise ValueError(f"expected a level in (0, 1), got {level}: use e.g. 0.95")

    def mean_of_means(*parts: np.ndarray[Any, Any], axis: int) -> np.ndarray[Any, Any]:
        return np.sum([part.mean(axis=axis) for part in parts], axis=0) / len(parts)

    # SciPy asks for two observations; one query twice has the same resampled means.
    interval = stats.bootstrap(
        [each if len(each) > 1 else np.repeat(each, 2) for each in differences],
        mean_of_means,
        n_resamples=num_resamples,
        batch=max(1, VALUES_AT_ONCE // sum(map(len, differences))),
        vectorized=True,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def compare_systems(per_query_a: PerQuery, per_query_b: PerQuery, metric: str) -> PairedComparison:
    """Compare system a with system b on one metric; the order of the queries does not matter.

    Both map query id -> metric -> value for the same queries, as from `score_queries`; b is usually the frozen base.

    >>> better = {"q1": {"ndcg@10": 1.0}, "q2": {"ndcg@10": 0.5}}
    >>> worse = {"q1": {"ndcg@10": 0.5}, "q2": {"ndcg@10": 0.5}}
    >>> compared = compare_systems(better, worse, "ndcg@10")
    >>> compared.difference, compared.p_value, compared.wins, compared.ties, compared.losses
    (0.25, 1.0, 1, 1, 0)
    """
    difference_Q = _paired_differences(per_query_a, per_query_b, metric)
    return _comparison([difference_Q], difference_Q, float(difference_Q.mean()))


def compare_over_datasets(per_query: Sequence[tuple[PerQuery, PerQuery]], metric: str) -> PairedComparison:
    """Compare system a with system b by the mean of their mean differences over data sets.

    `per_query` has the figures of a and of b for each data set. Every data set has the same weight, however many
    queries it has; signs are drawn query by query, and queries are resampled within their own data set. Wins, ties and
    losses are counted over all queries.

    >>> better, worse = {"q1": {"ndcg@10": 1.0}}, {"q1": {"ndcg@10": 0.5}}
    >>> compare_over_datasets([(better, worse), (worse, worse)], "ndcg@10").difference
    0.25
    """
    if not per_query:
        raise ValueError("expected at least one data set, got none: evaluate both systems on one")
    differences = [_paired_differences(a, b, metric) for a, b in per_query]
    weighted_Q = np.concatenate([each / (len(each) * len(differences)) for each in differences])
    return _comparison(differences, weighted_Q, float(weighted_Q.sum()))


def _comparison(
    differences: Sequence[np.ndarray[Any, Any]], weighted_Q: np.ndarray[Any, Any], difference: float
) -> PairedComparison:
    low, high = bootstrap_interval(differences)
    return PairedComparison(
        difference=difference,
        p_value=paired_randomization_test(weighted_Q, np.zeros_like(weighted_Q)),
        low=low,
        high=high,
        wins=int(np.count_nonzero(weighted_Q > 0)),
        ties=int(np.count_nonzero(weighted_Q == 0)),
        losses=int(np.count_nonzero(weighted_Q < 0)),
    )


def _paired_differences(per_query_a: PerQuery, per_query_b: PerQuery, metric: str) -> np.ndarray[Any, Any]:
    """Subtract one metric of two systems query by query, in the order of query ids: (Q,)."""
    if per_query_a.keys() != per_query_b.keys():
        raise ValueError(
            f"expected both systems on the same queries, got {len(per_query_a)} and {len(per_query_b)} queries that "
            "differ: evaluate both on one data set"
        )
    queries = sorted(per_query_a)
    return _differences(*([values[query][metric] for query in queries] for values in (per_query_a, per_query_b)))


def _differences(a: ArrayLike, b: ArrayLike) -> np.ndarray[Any, Any]:
    a_Q, b_Q = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a_Q.ndim != 1 or a_Q.shape != b_Q.shape or len(a_Q) == 0:
        raise ValueError(f"expected two equally long lists of values, got shapes {a_Q.shape} and {b_Q.shape}")
    if not (np.isfinite(a_Q).all() and np.isfinite(b_Q).all()):
        raise ValueError("expected finite values, got NaN or infinity: check the metrics")
    return a_Q - b_Q
