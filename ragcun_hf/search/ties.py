"""The order of documents that have the same score for a query."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from ..data.mapped_column import take

Rows: TypeAlias = "np.ndarray[Any, Any]"  # rows of documents, (P,) int64
Order: TypeAlias = "Callable[[Rows], Rows]"  # numbers some rows (P,): the lower number comes first


class IdOrder:
    """Orders documents by distinct ids, which are read when they are needed: a large column can stay on disk.

    >>> IdOrder(["b", "a", "c"])(np.array([2, 0, 2])).tolist()
    [1, 0, 1]
    """

    def __init__(self, ids: Sequence[str]) -> None:
        self._ids = ids

    def __call__(self, rows: Rows) -> Rows:
        """Number rows (P,) by the order of their ids among these rows."""
        distinct, places = np.unique(rows, return_inverse=True)
        names = take(self._ids, distinct.tolist())
        ranks = np.empty(len(names), dtype=np.int64)
        ranks[sorted(range(len(names)), key=names.__getitem__)] = np.arange(len(names))
        return ranks[places]


def tie_numbers(queries: Rows, scores: np.ndarray[Any, Any], rows: Rows, order: Order) -> Rows:
    """Number the pairs of a query and a document, each given by three arrays (P,), in the order of ties.

    Pairs without an equal score for the same query get 0; `order` is asked about the others only.
    """
    by_score = np.lexsort((scores, queries))
    is_as_before = (np.diff(queries[by_score]) == 0) & (np.diff(scores[by_score]) == 0)
    is_tied = np.zeros(len(rows), dtype=bool)
    is_tied[by_score[1:][is_as_before]] = is_tied[by_score[:-1][is_as_before]] = True
    numbers = np.zeros(len(rows), dtype=np.int64)
    if is_tied.any():
        numbers[is_tied] = order(rows[is_tied])
    return numbers


def best_rows(
    scores: np.ndarray[Any, Any], rows: Rows, k: int, ties: Order | None
) -> tuple[np.ndarray[Any, Any], Rows]:
    """Return scores and rows of the k best of some documents, given by two arrays (P,); all if there are fewer."""
    if len(rows) > k:  # all that tie with the last one stay, so that `ties` decides
        is_best = scores >= np.partition(scores, -k)[-k]
        scores, rows = scores[is_best], rows[is_best]
    numbers = rows if ties is None else tie_numbers(np.zeros_like(rows), scores, rows, ties)
    order = np.lexsort((numbers, -scores))[:k]
    return scores[order], rows[order]
