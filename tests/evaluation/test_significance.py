"""The paired test and the interval agree with slow, independent versions."""

import itertools

import numpy as np
import pytest
from scipy import stats

from ragcun_hf.evaluation.significance import bootstrap_interval, compare_systems, paired_randomization_test


def _slow_exact_p(a, b):
    observed = abs(sum(x - y for x, y in zip(a, b, strict=True)))
    sums = [
        abs(sum(sign * (x - y) for sign, x, y in zip(signs, a, b, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(a))
    ]
    return sum(value >= observed - 1e-12 for value in sums) / len(sums)


@pytest.mark.parametrize("num_queries", [1, 2, 5, 9])
def test_small_samples_are_counted_exactly(num_queries):
    a, b = np.random.default_rng(num_queries).integers(0, 4, size=(2, num_queries)) / 4
    assert paired_randomization_test(a, b) == _slow_exact_p(a, b)


def test_exact_p_equals_scipy():
    a, b = np.random.default_rng(3).random((2, 10))
    expected = stats.permutation_test(
        (a, b), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf
    ).pvalue
    assert paired_randomization_test(a, b) == pytest.approx(expected, abs=1e-12)


def test_random_patterns_come_close_to_the_exact_p():
    # 13 differences: one too many for the exact way, few enough to count slowly.
    a, b = np.random.default_rng(0).random((2, 13))
    assert paired_randomization_test(a, b, num_permutations=20_000) == pytest.approx(_slow_exact_p(a, b), abs=0.015)


def test_queries_without_a_difference_do_not_matter():
    a, b = np.random.default_rng(0).random((2, 8))
    padded = np.concatenate([a, np.ones(200)]), np.concatenate([b, np.ones(200)])
    assert paired_randomization_test(*padded) == paired_randomization_test(a, b)


def test_equal_systems_have_p_one():
    assert paired_randomization_test(np.ones(50), np.ones(50)) == 1.0


def test_p_is_two_sided_symmetric_and_never_zero():
    a, b = np.random.default_rng(0).random(300) + 5, np.random.default_rng(1).random(300)
    assert paired_randomization_test(a, b, num_permutations=999) == 1 / 1000
    assert paired_randomization_test(b, a, num_permutations=999) == 1 / 1000


def test_p_is_uniform_when_labels_mean_nothing():
    generator = np.random.default_rng(0)
    pairs = generator.random((400, 2, 30))
    p_values = np.sort(
        [paired_randomization_test(a, b, num_permutations=200, seed=i) for i, (a, b) in enumerate(pairs)]
    )
    distance = np.abs(p_values - (np.arange(400) + 0.5) / 400).max()
    assert distance < 1.63 / np.sqrt(400), "Kolmogorov's bound at 1 %"


def test_the_same_seed_gives_the_same_p_and_interval():
    a, b = np.random.default_rng(0).random((2, 40))
    assert paired_randomization_test(a, b, seed=7) == paired_randomization_test(a, b, seed=7)
    assert bootstrap_interval([a - b], seed=7) == bootstrap_interval([a - b], seed=7)
    assert bootstrap_interval([a - b], seed=7) != bootstrap_interval([a - b], seed=8)


def test_chunks_change_results_by_the_noise_of_the_draws_only(monkeypatch):
    a, b = np.random.default_rng(0).random((2, 40))
    whole = paired_randomization_test(a, b), bootstrap_interval([a - b])
    monkeypatch.setattr("ragcun_hf.evaluation.significance.VALUES_AT_ONCE", 40 * 999)
    assert paired_randomization_test(a, b) == pytest.approx(whole[0], abs=0.02)
    assert bootstrap_interval([a - b]) == pytest.approx(whole[1], abs=0.01)


def test_the_interval_equals_a_loop_and_comes_close_to_the_normal_one():
    a, b = np.random.default_rng(0).random((2, 200))
    difference = a - b
    generator = np.random.default_rng(5)
    means = [difference[generator.integers(0, 200, size=200)].mean() for _ in range(1000)]
    expected = np.quantile(means, [0.05, 0.95])
    assert bootstrap_interval([a - b], level=0.9, num_resamples=1000, seed=5) == pytest.approx(expected, abs=1e-12)
    spread = 1.645 * difference.std() / np.sqrt(200)
    assert bootstrap_interval([a - b], level=0.9) == pytest.approx(
        (difference.mean() - spread, difference.mean() + spread), abs=0.1 * spread
    )


def test_a_higher_level_gives_a_wider_interval():
    a, b = np.random.default_rng(0).random((2, 60))
    low, high = bootstrap_interval([a - b], level=0.5)
    wide_low, wide_high = bootstrap_interval([a - b], level=0.99)
    assert wide_low < low < high < wide_high


def _per_query(values):
    return {f"q{i}": {"ndcg@10": value} for i, value in enumerate(values)}


def test_a_comparison_counts_wins_ties_and_losses_from_the_first_systems_side():
    compared = compare_systems(_per_query([1.0, 0.5, 0.2, 0.9]), _per_query([0.5, 0.5, 0.3, 0.1]), "ndcg@10")
    assert (compared.wins, compared.ties, compared.losses) == (2, 1, 1)
    assert compared.difference == pytest.approx((0.5 + 0 - 0.1 + 0.8) / 4)
    assert compared.low < compared.difference < compared.high
    assert compared.p_value == 0.5  # 8 patterns of +-.5 +-.1 +-.8: four sums reach 1.2 in size


def test_a_comparison_ignores_the_order_of_queries():
    a, b = (_per_query(values) for values in np.random.default_rng(0).random((2, 30)).tolist())
    assert compare_systems(a, b, "ndcg@10") == compare_systems(dict(reversed(a.items())), b, "ndcg@10")


def test_different_queries_are_refused():
    with pytest.raises(ValueError, match="same queries"):
        compare_systems(_per_query([1.0]), _per_query([1.0, 0.5]), "ndcg@10")


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0]), ([np.nan], [1.0]), ([[1.0]], [[1.0]])])
def test_values_that_cannot_be_paired_are_refused(a, b):
    with pytest.raises(ValueError, match="expected"):
        paired_randomization_test(a, b)
