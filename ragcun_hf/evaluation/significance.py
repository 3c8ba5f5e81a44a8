"""Paired tests and intervals for the difference between two systems on the same queries.

Shape letters used in this file: Q = queries, R = random rearrangements in a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

_EXACT_UP_TO = 12  # 4,096 sign patterns: fewer than the random ones, and without their noise
_CHUNK_VALUES = 2_000_000  # random numbers held at once (16 MB)


@dataclass(frozen=True)
class Comparison:
    """How system a differs from system b, query by query; positive means a is better."""

    difference: float  # mean of a minus mean of b
    p_value: float  # two-sided, of the paired randomization test
    low: float  # lower end of the bootstrap interval of the difference
    high: float
    wins: int  # queries on which a is better
    ties: int
    losses: int


def paired_randomization_test(a: ArrayLike, b: ArrayLike, *, num_permutations: int = 10_000, seed: int = 0) -> float:
    """Compute the probability of so large a mean difference if the systems' labels meant nothing.

    Under the null hypothesis each query's two values could as well be swapped, so the sign of each
    difference is drawn at random. Queries with equal values change nothing; with at most 12 others
    all sign patterns are counted, and the result is exact.

    Args:
        a: Values of one system, shape (Q,), one per query, Q >= 1.
        b: Values of the other system on the same queries in the same order.
        num_permutations: Random sign patterns; the smallest possible p is 1 / (num_permutations + 1).
        seed: Of the random sign patterns.

    Returns:
        Two-sided p-value in (0, 1].

    Raises:
        ValueError: If shapes differ, there is no query, or a value is not finite.

    Source:
        Smucker, Allan and Carterette, "A comparison of statistical significance tests for information
        retrieval evaluation", CIKM 2007. The observed pattern is counted among the random ones
        (Phipson and Smyth, 2010, arXiv:1603.05766), so that p is never 0.

    Example:
        >>> paired_randomization_test([1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
        0.25
    """
    difference_Q = _differences(a, b)
    difference_Q = difference_Q[difference_Q != 0]
    # Equal sums may differ by rounding when added in another pattern.
    reached = abs(difference_Q.sum()) - 1e-12 * np.abs(difference_Q).sum()
    if len(difference_Q) <= _EXACT_UP_TO:
        patterns = np.arange(2 ** len(difference_Q))[:, None]
        signs_RQ = 1.0 - 2.0 * ((patterns >> np.arange(len(difference_Q))) & 1)
        return float(np.mean(np.abs(signs_RQ @ difference_Q) >= reached))
    generator = np.random.default_rng(seed)
    num_reached = 0
    for size in _chunk_sizes(num_permutations, len(difference_Q)):
        flipped_RQ = generator.integers(0, 2, size=(size, len(difference_Q)), dtype=np.int8)
        # Sum of signed differences = all of them minus twice the flipped ones.
        sums_R = difference_Q.sum() - 2.0 * (flipped_RQ.astype(np.float64) @ difference_Q)
        num_reached += int(np.count_nonzero(np.abs(sums_R) >= reached))
    return (num_reached + 1) / (num_permutations + 1)


def paired_bootstrap_interval(
    a: ArrayLike, b: ArrayLike, *, level: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Compute an interval for the mean difference by drawing queries again with replacement.

    Args:
        a: Values of one system, shape (Q,), one per query, Q >= 1.
        b: Values of the other system on the same queries in the same order.
        level: Coverage aimed at, in (0, 1); larger gives a wider interval.
        num_resamples: Sets of queries drawn.
        seed: Of the draws.

    Returns:
        Lower and upper end, in the unit of the values (percentile method).

    Raises:
        ValueError: If shapes differ, there is no query, a value is not finite, or `level` is not in (0, 1).

    Source:
        Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7(1), 1979.

    Example:
        >>> paired_bootstrap_interval([0.5, 0.75], [0.25, 0.5])
        (0.25, 0.25)
    """
    means_R = _resampled_means(_differences(a, b), np.random.default_rng(seed), num_resamples)
    return _interval(means_R, level)


def _resampled_means(
    difference_Q: np.ndarray[Any, Any], generator: np.random.Generator, num_resamples: int
) -> np.ndarray[Any, Any]:
    means = [
        difference_Q[generator.integers(0, len(difference_Q), size=(size, len(difference_Q)))].mean(axis=1)
        for size in _chunk_sizes(num_resamples, len(difference_Q))
    ]
    return np.concatenate(means)


def _interval(means_R: np.ndarray[Any, Any], level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"expected a level in (0, 1), got {level}: use e.g. 0.95")
    low, high = np.quantile(means_R, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def compare_systems(
    per_query_a: Mapping[str, Mapping[str, float]],
    per_query_b: Mapping[str, Mapping[str, float]],
    metric: str,
    *,
    level: float = 0.95,
    num_permutations: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compare system a with system b on one metric.

    Args:
        per_query_a: Query id -> metric -> value, as from `per_query_metrics`.
        per_query_b: The same for the other system (usually the frozen base), on the same queries.
        metric: Name of the metric.
        level: Coverage of the interval.
        num_permutations: Of the test, and resamples of the interval.
        seed: Of both.

    Returns:
        The comparison; it does not depend on the order of the queries.

    Raises:
        ValueError: If the systems were not measured on the same queries.

    Example:
        >>> better = {"q1": {"ndcg@10": 1.0}, "q2": {"ndcg@10": 0.5}}
        >>> worse = {"q1": {"ndcg@10": 0.5}, "q2": {"ndcg@10": 0.5}}
        >>> compared = compare_systems(better, worse, "ndcg@10")
        >>> compared.difference, compared.p_value, compared.wins, compared.ties, compared.losses
        (0.25, 1.0, 1, 1, 0)
    """
    a_Q, b_Q = _values(per_query_a, per_query_b, metric)
    p_value = paired_randomization_test(a_Q, b_Q, num_permutations=num_permutations, seed=seed)
    low, high = paired_bootstrap_interval(a_Q, b_Q, level=level, num_resamples=num_permutations, seed=seed)
    return Comparison(
        difference=float((a_Q - b_Q).mean()),
        p_value=p_value,
        low=low,
        high=high,
        wins=int(np.count_nonzero(a_Q > b_Q)),
        ties=int(np.count_nonzero(a_Q == b_Q)),
        losses=int(np.count_nonzero(a_Q < b_Q)),
    )


def compare_over_datasets(
    per_query: Sequence[tuple[Mapping[str, Mapping[str, float]], Mapping[str, Mapping[str, float]]]],
    metric: str,
    *,
    level: float = 0.95,
    num_permutations: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compare system a with system b by the mean over data sets of their mean difference.

    Every data set counts alike, however many queries it has. Signs are drawn query by query, and queries are drawn
    again within their own data set.

    Args:
        per_query: Of each data set, the figures of a and of b, as for `compare_systems`.
        metric: Name of the metric.
        level: Coverage of the interval.
        num_permutations: Of the test, and resamples of the interval.
        seed: Of both.

    Returns:
        The comparison; wins, ties and losses are counted over all queries.

    Raises:
        ValueError: If there is no data set, or the systems were not measured on the same queries.

    Example:
        >>> better, worse = {"q1": {"ndcg@10": 1.0}}, {"q1": {"ndcg@10": 0.5}}
        >>> compare_over_datasets([(better, worse), (worse, worse)], "ndcg@10").difference
        0.25
    """
    if not per_query:
        raise ValueError("expected at least one data set, got none: evaluate both systems on one")
    differences = [_differences(*_values(a, b, metric)) for a, b in per_query]
    weighted_Q = np.concatenate([each / (len(each) * len(differences)) for each in differences])
    generator = np.random.default_rng(seed)
    means_R = sum(_resampled_means(each, generator, num_permutations) for each in differences) / len(differences)
    low, high = _interval(np.asarray(means_R), level)
    p_value = paired_randomization_test(
        weighted_Q, np.zeros_like(weighted_Q), num_permutations=num_permutations, seed=seed
    )
    return Comparison(
        difference=float(weighted_Q.sum()),
        p_value=p_value,
        low=low,
        high=high,
        wins=int(np.count_nonzero(weighted_Q > 0)),
        ties=int(np.count_nonzero(weighted_Q == 0)),
        losses=int(np.count_nonzero(weighted_Q < 0)),
    )


def _values(
    per_query_a: Mapping[str, Mapping[str, float]], per_query_b: Mapping[str, Mapping[str, float]], metric: str
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Lay one metric of two systems out in one order of the queries."""
    if per_query_a.keys() != per_query_b.keys():
        raise ValueError(
            f"expected both systems on the same queries, got {len(per_query_a)} and {len(per_query_b)} queries that "
            "differ: evaluate both on one data set"
        )
    queries = sorted(per_query_a)
    a_Q, b_Q = (
        np.array([values[query][metric] for query in queries], dtype=np.float64)
        for values in (per_query_a, per_query_b)
    )
    return a_Q, b_Q


def _differences(a: ArrayLike, b: ArrayLike) -> np.ndarray[Any, Any]:
    a_Q, b_Q = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a_Q.ndim != 1 or a_Q.shape != b_Q.shape or len(a_Q) == 0:
        raise ValueError(f"expected two equally long lists of values, got shapes {a_Q.shape} and {b_Q.shape}")
    if not (np.isfinite(a_Q).all() and np.isfinite(b_Q).all()):
        raise ValueError("expected finite values, got NaN or infinity: check the metrics")
    return a_Q - b_Q


def _chunk_sizes(total: int, num_queries: int) -> Iterator[int]:
    size = max(1, _CHUNK_VALUES // num_queries)
    for start in range(0, total, size):
        yield min(size, total - start)
