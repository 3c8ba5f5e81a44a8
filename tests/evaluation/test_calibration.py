"""The probability that a first document is relevant: by hand, by a slow version, fitted, saved and refused."""

import json
import math

import numpy as np
import pytest
import torch

from ragcun_hf import IsotropicGaussianModel
from ragcun_hf.evaluation.calibration import (
    expected_calibration_error,
    first_two,
    fit_calibration,
    measure_calibration,
)
from ragcun_hf.evaluation.validation import RetrievalValidation
from ragcun_hf.features.feature_store import FeatureStore
from ragcun_hf.model.encoding_isotropic_gaussian import relevance_probability

CALIBRATION = {"bias": -1.5, "score": 2.0, "margin": 10.0}


def _drawn(num_queries, calibration=CALIBRATION, seed=0):
    """Draw scores, and labels whose probability is exactly that of a calibration."""
    generator = np.random.default_rng(seed)
    scores = np.sort(generator.random((num_queries, 2)), axis=1)[:, ::-1]
    logits = calibration["bias"] + calibration["score"] * scores[:, 0]
    logits = logits + calibration["margin"] * (scores[:, 0] - scores[:, 1])
    return scores, (generator.random(num_queries) < 1 / (1 + np.exp(-logits))).astype(float)


def _slow_error(probabilities, labels, num_bins):
    """Sort, deal into bins whose sizes differ by one at most, the larger ones first, and average the gaps."""
    queue = sorted(zip(probabilities, labels, strict=True), key=lambda pair: pair[0])
    total = 0.0
    for number in range(num_bins):
        size = len(labels) // num_bins + (number < len(labels) % num_bins)
        part, queue = queue[:size], queue[size:]
        if part:
            confidence = sum(probability for probability, _ in part) / size
            total += size / len(labels) * abs(confidence - sum(label for _, label in part) / size)
    assert not queue
    return total


def test_the_probability_is_the_one_worked_out_by_hand():
    # -1.5 + 2 * .8 + 10 * (.8 - .7) = 1.1, and -1.5 + 2 * .25 + 10 * 0 = -1
    found = relevance_probability(CALIBRATION, [[0.8, 0.7, 0.1], [0.25, 0.1, 0.25]])
    assert found.tolist() == pytest.approx([1 / (1 + math.exp(-1.1)), 1 / (1 + math.exp(1))], rel=1e-5)
    assert found[0] == pytest.approx(0.7503, abs=1e-4)
    one = relevance_probability(CALIBRATION, torch.tensor([0.1, 0.7, 0.8], dtype=torch.float64))
    assert one.shape == () and float(one) == pytest.approx(float(found[0]))


@pytest.mark.parametrize("scores", [[0.5], [[0.5], [0.4]], 0.5, [[[0.1, 0.2]]]])
def test_fewer_than_two_scores_or_another_shape_are_refused(scores):
    with pytest.raises(ValueError, match="`scores` must be those of at least two documents"):
        relevance_probability(CALIBRATION, np.array(scores))


def test_the_calibration_error_is_the_one_worked_out_by_hand():
    # Bins (.1, .3) with one relevant of two, (.6, .8) with two of two: (|.2 - .5| + |.7 - 1|) / 2
    error = expected_calibration_error(np.array([0.8, 0.1, 0.6, 0.3]), np.array([1, 0, 1, 1]), num_bins=2)
    assert error == pytest.approx(0.3)


@pytest.mark.parametrize(("num_queries", "num_bins"), [(7, 10), (100, 10), (303, 10), (50, 1), (5, 5)])
def test_the_calibration_error_is_that_of_a_slow_version(num_queries, num_bins):
    generator = np.random.default_rng(num_queries)
    probabilities = generator.random(num_queries)
    labels = generator.integers(0, 2, num_queries)
    error = expected_calibration_error(probabilities, labels, num_bins=num_bins)
    assert error == pytest.approx(_slow_error(probabilities.tolist(), labels.tolist(), num_bins))


def test_the_first_two_scores_and_their_label_are_read_from_a_run():
    run = {"q1": {"b": 0.9, "a": 0.4, "c": 0.1}, "q2": {"a": 0.7}, "q3": {"c": 0.5, "a": 0.5}, "q4": {"a": 1, "b": 0}}
    scores, labels = first_two(run, {"q1": {"b": 2}, "q2": {"a": 1}, "q3": {"c": 0, "a": 1}})
    assert scores.tolist() == [[0.9, 0.4], [0.5, 0.5], [1, 0]]
    assert labels.tolist() == [1, 0, 0]
    assert first_two({}, {})[0].shape == (0, 2)


def test_a_fit_finds_the_numbers_that_drew_the_labels():
    found = fit_calibration(*_drawn(100_000), num_documents=7)
    assert found == {
        **{name: pytest.approx(value, abs=0.15) for name, value in CALIBRATION.items()},
        "num_queries": 100_000,
        "num_documents": 7,
    }


def test_a_fit_is_that_of_plain_gradient_descent_on_platt_s_targets():
    scores, labels = _drawn(150)
    num_relevant = sum(labels)
    inputs = [(1.0, first, first - second) for first, second in scores.tolist()]
    targets = [(num_relevant + 1) / (num_relevant + 2) if label else 1 / (152 - num_relevant) for label in labels]
    weights = np.zeros(3)
    design = np.array(inputs)
    for _ in range(200):  # Newton's method
        probabilities = np.array([1 / (1 + math.exp(-row @ weights)) for row in design])
        hessian = sum(p * (1 - p) * np.outer(row, row) for p, row in zip(probabilities, design, strict=True))
        weights -= np.linalg.solve(hessian, design.T @ (probabilities - targets))
    found = fit_calibration(scores, labels, num_documents=7)
    assert [found["bias"], found["score"], found["margin"]] == pytest.approx(weights.tolist(), rel=1e-2)


@pytest.mark.parametrize("num_queries", [0, 1, 99])
def test_fewer_than_a_hundred_queries_are_not_fitted(num_queries):
    scores, labels = _drawn(100)
    assert fit_calibration(scores[:num_queries], labels[:num_queries], num_documents=7) is None
    assert fit_calibration(scores, labels, num_documents=7) is not None


@pytest.mark.parametrize("kind", ["all relevant", "none relevant", "separable", "equal scores"])
def test_a_fit_to_extreme_labels_or_scores_is_finite(kind):
    scores, labels = _drawn(120)
    if kind == "separable":
        labels = (scores[:, 0] > 0.6).astype(float)
    elif kind == "equal scores":
        scores = np.full_like(scores, 0.5)
    else:
        labels = np.full_like(labels, kind == "all relevant")
    found = fit_calibration(scores, labels, num_documents=7)
    assert all(math.isfinite(value) for value in found.values())
    probabilities = relevance_probability(found, scores).numpy()
    assert probabilities.mean() == pytest.approx(labels.mean(), abs=0.02)
    assert ((probabilities > 0) & (probabilities < 1)).all()


def test_a_true_calibration_has_the_error_of_chance_and_a_wrong_one_more():
    scores, labels = _drawn(20_000, seed=1)
    true = measure_calibration(CALIBRATION, scores, labels)
    wrong = measure_calibration({**CALIBRATION, "bias": 0.5}, scores, labels)
    assert true["expected_calibration_error"] == pytest.approx(true["by_chance"], abs=0.005)
    assert true["by_chance"] < 0.012
    assert wrong["expected_calibration_error"] > 0.1
    assert true["num_queries"] == 20_000
    assert true["mean_probability"] == pytest.approx(true["first_is_relevant"], abs=0.01)


def test_few_queries_have_a_large_error_by_chance():
    figures = [measure_calibration(CALIBRATION, *_drawn(size))["by_chance"] for size in (100, 10_000)]
    assert figures[0] > 5 * figures[1]


def test_validation_gives_the_scores_of_the_model_s_own_similarity(tiny_model, tiny_pairs):
    queries, documents = ([pair[name] for pair in tiny_pairs] for name in ("query", "positive"))
    store = FeatureStore(tiny_model, cache_folder=None, dtype="float32", show_progress=False)
    tiny_model.config.similarity_fn_name = "euclidean"
    scores, labels = RetrievalValidation(queries, documents, store=store).first_two(tiny_model)
    similarities = tiny_model.similarity(tiny_model.encode_query(queries), tiny_model.encode_document(documents))
    np.testing.assert_allclose(scores, similarities.topk(2).values.numpy(), atol=1e-4)
    assert labels.tolist() == (similarities.argmax(1) == torch.arange(8)).tolist()


def test_a_saved_model_tells_the_same_and_one_without_the_field_loads(tiny_model, tmp_path):
    scores = [[0.8, 0.7], [0.3, 0.2]]
    with pytest.raises(ValueError, match="needs a model with a calibration, got one without"):
        tiny_model.relevance_probability(scores)
    tiny_model.config.relevance_calibration = {**CALIBRATION, "num_queries": 100, "num_documents": 7}
    tiny_model.save_pretrained(tmp_path)
    loaded = IsotropicGaussianModel.from_pretrained(tmp_path)
    assert loaded.config.relevance_calibration == tiny_model.config.relevance_calibration
    assert loaded.relevance_probability(scores).tolist() == relevance_probability(CALIBRATION, scores).tolist()
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["relevance_calibration"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert IsotropicGaussianModel.from_pretrained(tmp_path).config.relevance_calibration is None
