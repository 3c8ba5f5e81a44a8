"""Fit the probability that the first document of a ranking is relevant to held-out queries, and measure it.

Shape letters used in this file: Q = queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from ..model.encoding_isotropic_gaussian import relevance_probability
from .ranking import Run

Array = np.ndarray[Any, Any]

FEWEST_QUERIES = 100  # fewer do not fit three numbers
_BINS, _CHANCE_DRAWS = 10, 1_000


def first_two(run: Run, qrels: Mapping[str, Mapping[str, int]]) -> tuple[Array, Array]:
    """Return the scores (Q, 2) of each query's first two documents, and whether the first is relevant, (Q,).

    Rankings of fewer than two documents are left out.

    >>> first_two({"q": {"a": 0.9, "b": 0.5}}, {"q": {"b": 1}})
    (array([[0.9, 0.5]]), array([0.]))
    """
    firsts = {query: list(ranking.items())[:2] for query, ranking in run.items() if len(ranking) > 1}
    scores = [[score for _, score in first] for first in firsts.values()]
    labels = [qrels.get(query, {}).get(first[0][0], 0) > 0 for query, first in firsts.items()]
    return np.array(scores, dtype=np.float64).reshape(-1, 2), np.array(labels, dtype=np.float64)


def fit_calibration(scores_Q2: Array, labels_Q: Array, *, num_documents: int) -> dict[str, float] | None:
    """Fit the probability of relevance by logistic regression; None for fewer than 100 queries.

    The inputs are the first score and its margin over the second. The targets are Platt's, a little inside 0 and 1, so
    that the fit is finite where the classes do not overlap or only one occurs. The size of the corpus, which is the
    same for all queries, is only noted.
    """
    num_queries, num_relevant = len(labels_Q), float(labels_Q.sum())
    if num_queries < FEWEST_QUERIES:
        return None
    highest, lowest = (num_relevant + 1) / (num_relevant + 2), 1 / (num_queries - num_relevant + 2)
    targets_Q = np.where(labels_Q > 0, highest, lowest)
    inputs_Q2 = np.column_stack([scores_Q2[:, 0], scores_Q2[:, 0] - scores_Q2[:, 1]])
    center_2, spread_2 = inputs_Q2.mean(axis=0), inputs_Q2.std(axis=0)
    spread_2[spread_2 == 0] = 1
    design_Q3 = np.column_stack([np.ones(num_queries), (inputs_Q2 - center_2) / spread_2])

    def loss_and_gradient(weights_3: Array) -> tuple[float, Array]:
        logits_Q = design_Q3 @ weights_3
        loss = float(np.mean(np.logaddexp(0, logits_Q) - targets_Q * logits_Q))
        return loss, design_Q3.T @ (expit(logits_Q) - targets_Q) / num_queries

    bias, *scaled = minimize(loss_and_gradient, np.zeros(3), jac=True, method="BFGS").x
    score, margin = (np.array(scaled) / spread_2).tolist()
    bias = float(bias - score * center_2[0] - margin * center_2[1])
    counts = {"num_queries": num_queries, "num_documents": num_documents}
    return {"bias": bias, "score": score, "margin": margin, **counts}


def expected_calibration_error(probabilities_Q: Array, labels_Q: Array, *, num_bins: int = _BINS) -> float:
    """Return the mean distance of the mean probability from the share of relevant ones, over bins of equal size.

    >>> expected_calibration_error(np.array([0.9, 0.2, 0.8, 0.1]), np.array([1, 0, 0, 0]), num_bins=2)
    0.25
    """
    order_Q = np.argsort(probabilities_Q, kind="stable")
    gaps_Q = (np.asarray(probabilities_Q) - labels_Q)[order_Q]
    return float(sum(abs(part.sum()) for part in np.array_split(gaps_Q, num_bins)) / len(gaps_Q))


def measure_calibration(calibration: dict[str, float], scores_Q2: Array, labels_Q: Array) -> dict[str, float]:
    """Measure a calibration on other queries than those it was fitted to.

    `by_chance` is the calibration error that these probabilities have on average if they are all true: with few
    queries, the share of relevant ones in a bin is far from its probability by chance.
    """
    probabilities_Q = relevance_probability(calibration, scores_Q2).numpy().astype(np.float64)
    draws = np.random.default_rng(0).random((_CHANCE_DRAWS, len(labels_Q))) < probabilities_Q
    return {
        "num_queries": len(labels_Q),
        "mean_probability": float(probabilities_Q.mean()),
        "first_is_relevant": float(labels_Q.mean()),
        "expected_calibration_error": expected_calibration_error(probabilities_Q, labels_Q),
        "by_chance": float(np.mean([expected_calibration_error(probabilities_Q, drawn_Q) for drawn_Q in draws])),
    }
