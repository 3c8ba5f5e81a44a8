"""Official retrieval figures from a run (query -> document -> score) and its judgements."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .metrics.retrieval.trec_scores import METRICS, average_scores, score_queries

__all__ = ["METRICS", "METRIC_FOLDER", "mean_metrics", "per_query_metrics", "rows_for_metric"]

# What `evaluate.load` takes, as a string.
METRIC_FOLDER = Path(__file__).parent / "metrics" / "retrieval"

# One home for the definitions: the `evaluate` metric and this module share the same functions.
per_query_metrics = score_queries
mean_metrics = average_scores


def rows_for_metric(
    run: Mapping[str, Mapping[str, float]], qrels: Mapping[str, Mapping[str, int]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Turn a run and its judgements into the rows that the `evaluate` metric takes.

    Args:
        run: Query id -> document id -> score, higher is better.
        qrels: Query id -> document id -> judgement.

    Returns:
        `predictions` and `references`, one row per judged query, in the order of `qrels`. A query
        without a ranking has an empty list of documents.

    Example:
        >>> predictions, references = rows_for_metric({"q": {"a": 0.5}}, {"q": {"a": 2}})
        >>> predictions
        [{'query': 'q', 'documents': ['a'], 'scores': [0.5]}]
        >>> references
        [{'query': 'q', 'documents': ['a'], 'judgements': [2]}]
    """
    predictions, references = [], []
    for query, judgements in qrels.items():
        ranking = run.get(query, {})
        predictions.append({"query": query, "documents": list(ranking), "scores": list(ranking.values())})
        references.append({"query": query, "documents": list(judgements), "judgements": list(judgements.values())})
    return predictions, references
