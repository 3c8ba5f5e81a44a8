"""The official retrieval figures of each query, computed by `pytrec_eval` (the code of NIST's trec_eval).

This file is copied together with `retrieval.py` by `evaluate.load`, so it imports nothing from the package.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytrec_eval

_OFFICIAL_NAMES = {
    "ndcg@10": "ndcg_cut_10",
    "map@100": "map_cut_100",
    "recall@10": "recall_10",
    "recall@100": "recall_100",
}
METRICS = (*_OFFICIAL_NAMES, "mrr@10")


def score_queries(
    run: Mapping[str, Mapping[str, float]], qrels: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, float]]:
    """Compute the `METRICS` of every judged query: query id (in the order of `qrels`) -> metric -> value in [0, 1].

    The run maps query id -> document id -> score, higher is better; the qrels have an integer gain instead, above 0
    for relevant documents. An empty or missing ranking of a judged query scores 0, whereas `pytrec_eval` alone would
    leave the query out of the mean. Queries without judgements are ignored. As in trec_eval, scores are compared in
    float32, and documents with equal scores are ordered by descending id.

    Source:
        pytrec_eval (Van Gysel and de Rijke, 2018, arXiv:1805.01597). `mrr@10` is its `recip_rank`, set to 0 if the
        first relevant document has a rank above 10.

    >>> scores = score_queries({"q": {"a": 0.9, "b": 0.8}}, {"q": {"b": 1}, "unanswered": {"a": 1}})
    >>> scores["q"]["mrr@10"], scores["unanswered"]["mrr@10"]
    (0.5, 0.0)
    """
    judged = {
        query: {document: int(gain) for document, gain in judgements.items()}
        for query, judgements in qrels.items()
        if judgements
    }
    # The C extension needs plain floats.
    ranked = {query: {name: float(score) for name, score in run.get(query, {}).items()} for query in judged}
    for query, ranking in ranked.items():
        if any(map(math.isnan, ranking.values())):
            raise ValueError(f"expected numbers as scores, got NaN for query {query!r}: check the vectors")
    evaluator = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.10", "map_cut.100", "recall.10,100", "recip_rank"})
    official = evaluator.evaluate(ranked)
    scores = {}
    for query in judged:
        values = {metric: float(official[query][name]) for metric, name in _OFFICIAL_NAMES.items()}
        reciprocal_rank = float(official[query]["recip_rank"])
        values["mrr@10"] = reciprocal_rank if reciprocal_rank >= 1 / 10 else 0.0
        scores[query] = values
    return scores


def average_scores(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Average each metric of `score_queries` over queries, at least one.

    >>> average_scores({"q1": {"mrr@10": 1.0}, "q2": {"mrr@10": 0.5}})
    {'mrr@10': 0.75}
    """
    if not scores:
        raise ValueError("expected at least one judged query to average over, got none: check the judgements")
    metrics = list(next(iter(scores.values())))
    # fsum: the mean does not depend on the order of the queries.
    return {metric: math.fsum(values[metric] for values in scores.values()) / len(scores) for metric in metrics}
