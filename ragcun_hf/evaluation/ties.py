"""Which of several documents comes first where a query has the same score for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from ..data.mapped_column import take

Rows: TypeAlias = "np.ndarray[Any, Any]"  # of documents, (P,) int64
Order: TypeAlias = (
    "Callable[[Rows], np.ndarray[Any, Any]]"  # rows -> numbers (P,) that rise in the order of these rows
)


class IdOrder:
    """The lower id comes first; ids are looked up when they are asked for, so that many can stay on the disk.

    Args:
        ids: Id of each document, all different.

    Example:
        >>> IdOrder(["b", "a", "c"])(np.array([2, 0, 2])).tolist()
        [1, 0, 1]
    """

    def __init__(self, ids: Sequence[str]) -> None:
        self._ids = ids

    def __call__(self, rows: Rows) -> Rows:
        """Number some rows (P,) by the order of their ids among them."""
        distinct, places = np.unique(rows, return_inverse=True)
        names = take(self._ids, distinct.tolist())
        ranks = np.empty(len(names), dtype=np.int64)
        ranks[sorted(range(len(names)), key=names.__getitem__)] = np.arange(len(names))
        return ranks[places]


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
