"""Which of several documents comes first where a query has the same score for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

Rows: TypeAlias = "np.ndarray[Any, Any]"  # of documents, (P,) int64
Order: TypeAlias = (
    "Callable[[Rows], np.ndarray[Any, Any]]"  # rows -> numbers (P,) that rise in the order of these rows
)


def tie_numbers(queries: Rows, scores: np.ndarray[Any, Any], rows: Rows, order: Order) -> Rows:
    """Number the pairs of a query and a document among those that have the same score for the same query.

    Args:
        queries: Shape (P,), the query of each pair.
        scores: Shape (P,).
        rows: Shape (P,), the document of each pair.
        order: Asked only for documents that are as good as another.

    Returns:
        Shape (P,), whole numbers from 0; 0 for pairs whose score no other pair of the query has.
    """
    by_score = np.lexsort((scores, queries))
    is_as_before = (np.diff(queries[by_score]) == 0) & (np.diff(scores[by_score]) == 0)
    is_tied = np.zeros(len(rows), dtype=bool)
    is_tied[by_score[1:][is_as_before]] = is_tied[by_score[:-1][is_as_before]] = True
    numbers = np.zeros(len(rows), dtype=np.int64)
    if is_tied.any():
        numbers[is_tied] = order(rows[is_tied])
    return numbers
