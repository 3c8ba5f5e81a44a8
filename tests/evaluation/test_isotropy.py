"""Isotropy measures equal values worked by hand."""

import math

import numpy as np
import pytest
import torch

from ragcun_hf.evaluation.metrics.isotropy.measures import (
    covariance_eigenvalues,
    effective_rank,
    embedding_std,
    iso_score,
    isotropy_report,
    mean_cosine,
    sigreg,
)
from ragcun_hf.evaluation.model_evaluation import measure_isotropy


def _cross(*lengths):
    """Two opposite points per axis: mean 0, variance length^2 / (number of axes) along each."""
    return np.concatenate([np.diag(lengths), -np.diag(lengths)]).astype(np.float64)


def test_eigenvalues_of_a_cross_are_the_hand_worked_variances():
    assert covariance_eigenvalues(_cross(3.0, 1.0, 2.0)).tolist() == pytest.approx([3.0, 4 / 3, 1 / 3])


@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (7, 7)])
def test_eigenvalues_are_the_squared_singular_values_of_centered_vectors_tall_or_wide(shape):
    vectors = np.random.default_rng(0).standard_normal(shape) + 2.0
    singular = np.linalg.svd(vectors - vectors.mean(axis=0), compute_uv=False)
    found = covariance_eigenvalues(vectors)
    assert found.shape == (shape[1],)
    np.testing.assert_allclose(found, np.pad(singular**2 / shape[0], (0, shape[1] - len(singular))), atol=1e-12)


def test_effective_rank_equals_the_hand_worked_entropy():
    # Variances 9 : 1, so shares .9 and .1.
    expected = math.exp(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))
    assert effective_rank(_cross(3.0, 1.0)) == pytest.approx(expected)


def test_effective_rank_counts_used_directions_whatever_offset_scale_and_width():
    points = np.pad(_cross(2.0, 2.0, 2.0), ((0, 0), (0, 7)))
    assert effective_rank(points) == pytest.approx(3.0)
    assert effective_rank(points * 1e-3 + 5.0) == pytest.approx(3.0, rel=1e-6)
    assert effective_rank(np.outer(np.arange(5.0), np.ones(4))) == pytest.approx(1.0)


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_a_collapse_to_one_point_has_rank_zero_and_no_nan(value):
    report = isotropy_report(np.full((77, 8), value))
    assert report["effective_rank"] == report["iso_score"] == 0.0
    assert report["embedding_std"] == pytest.approx(0.0, abs=1e-12)
    assert report["mean_cosine"] == pytest.approx(1.0 if value else 0.0)


def test_mean_cosine_equals_the_average_over_all_pairs():
    vectors = np.random.default_rng(0).standard_normal((30, 6)) + 0.5
    cosines = [
        vectors[i] @ vectors[j] / np.linalg.norm(vectors[i]) / np.linalg.norm(vectors[j])
        for i in range(30)
        for j in range(30)
        if i != j
    ]
    assert mean_cosine(vectors) == pytest.approx(np.mean(cosines), abs=1e-12)


def test_a_zero_vector_has_cosine_zero_in_the_mean():
    assert mean_cosine(np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 0.0]])) == pytest.approx(1 / 3)


def test_embedding_std_averages_over_dimensions():
    assert embedding_std(np.array([[1.0, 3.0], [-1.0, -3.0], [1.0, 3.0], [-1.0, -3.0]])) == 2.0


def test_iso_score_equals_the_hand_worked_value():
    # Spectrum (1.5, .5): normalised to length sqrt(2) it is (3, 1) / sqrt(5); the paper's steps follow.
    defect = math.sqrt((3 / math.sqrt(5) - 1) ** 2 + (1 / math.sqrt(5) - 1) ** 2) / math.sqrt(2 * (2 - math.sqrt(2)))
    fraction = (2 - defect**2 * (2 - math.sqrt(2))) ** 2 / 4
    assert iso_score(_cross(math.sqrt(3.0), 1.0)) == pytest.approx(2 * fraction - 1)
    assert iso_score(_cross(1.0, 1.0, 1.0)) == pytest.approx(1.0)
    assert iso_score(_cross(1.0, 0.0, 0.0)) == pytest.approx(0.0, abs=1e-12)


def test_a_standard_gaussian_has_its_documented_values():
    report = isotropy_report(np.random.default_rng(0).standard_normal((20_000, 16)))
    assert report["effective_rank"] == pytest.approx(16, rel=0.01)
    assert report["mean_cosine"] == pytest.approx(0, abs=0.001)
    assert report["embedding_std"] == pytest.approx(1, rel=0.01)
    assert report["iso_score"] == pytest.approx(1, abs=0.01)


def test_row_order_does_not_change_the_report():
    vectors = np.random.default_rng(0).standard_normal((50, 5))
    assert isotropy_report(vectors[::-1]) == pytest.approx(isotropy_report(vectors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_with_gradient_are_accepted(dtype):
    vectors = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=dtype, requires_grad=True)
    assert isotropy_report(vectors)["effective_rank"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    "vectors", [np.ones(3), np.ones((0, 3)), np.ones((1, 3)), np.ones((3, 1)), [[0.0, np.nan]] * 3]
)
def test_vectors_that_cannot_be_judged_are_refused(vectors):
    with pytest.raises(ValueError, match="expected"):
        isotropy_report(np.asarray(vectors))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_card_measures_what_the_processor_measures():
    rows = np.random.default_rng(0).standard_normal((200, 24), dtype=np.float32)
    assert measure_isotropy(rows, "cuda") == pytest.approx(measure_isotropy(rows), rel=1e-9)


def test_the_measures_of_a_model_are_those_of_its_vectors_in_float64():
    rows = np.random.default_rng(0).standard_normal((200, 24), dtype=np.float32)
    expected = {**isotropy_report(rows.astype(np.float64)), "sigreg": sigreg(rows.astype(np.float64)) / 200}
    assert measure_isotropy(rows) == expected
