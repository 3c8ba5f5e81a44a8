"""Several processes search one corpus: each its own part, and all get the ranking that one process would find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..distributed import gather_objects, rank, world_size
from .exact import Matrix, SearchResult
from .ties import Order, tie_numbers


@dataclass(frozen=True)
class Shard:
    """The documents of this process, rows `start` to `stop` of a corpus of `num_documents`."""

    start: int
    stop: int
    num_documents: int

    def __len__(self) -> int:
        return self.stop - self.start


def own_shard(num_documents: int, *, block: int) -> Shard:
    """Part a corpus evenly, at multiples of a block.

    Args:
        num_documents: N.
        block: Rows that go through the head at once; a block is never parted, so that a document's embedding is the
            same to the last bit however many processes there are.

    Returns:
        This process's part; with few documents it may be empty.
    """
    num_blocks = -(-num_documents // block)
    start, stop = (
        min(num_documents, block * (num_blocks * number // world_size())) for number in (rank(), rank() + 1)
    )
    return Shard(start, stop, num_documents)


def search_shards(search: Callable[..., SearchResult], shard: Shard) -> Callable[..., SearchResult]:
    """Turn a search of one process's documents into one of all documents; every process has to call it.

    Args:
        search: Called as `exact_search` is, with the documents that lie here.
        shard: Which those are.

    Returns:
        A function with the same arguments, `ties` being a function of the corpus's rows, as are its results. The
        parts' results are merged by score and ties, which is exact where they are.
    """

    def search_all(
        queries: Matrix, documents: Matrix, *, k: int, ties: Order = _by_row, **options: Any
    ) -> SearchResult:
        scores = np.empty((len(queries), 0), dtype=np.float32)
        indices = np.empty((len(queries), 0), dtype=np.int64)
        if len(shard):
            found = search(queries, documents, k=k, ties=lambda rows: ties(rows + shard.start), **options)
            scores, indices = found.scores, found.indices + shard.start
        return _merged([SearchResult(*part) for part in gather_objects((scores, indices))], ties, k)

    return search if world_size() == 1 else search_all


def _by_row(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return rows


def _merged(parts: list[SearchResult], ties: Order, k: int) -> SearchResult:
    """Keep the k best of all parts: by score, then by ties."""
    scores = np.concatenate([part.scores for part in parts], axis=1)
    indices = np.concatenate([part.indices for part in parts], axis=1)
    queries = np.repeat(np.arange(len(scores)), scores.shape[1])
    numbers = tie_numbers(queries, scores.ravel(), indices.ravel(), ties).reshape(scores.shape)
    order = np.lexsort((numbers, -scores), axis=1)[:, :k]
    return SearchResult(np.take_along_axis(scores, order, axis=1), np.take_along_axis(indices, order, axis=1))


def gather_rows_by_number(numbers: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Bring rows of all processes together, in the order of their numbers.

    Args:
        numbers: Shape (R,), different in all processes together.
        rows: Shape (R, D).

    Returns:
        All rows, on every process.
    """
    if world_size() == 1:
        return rows
    all_numbers, all_rows = zip(*gather_objects((numbers, rows)), strict=True)
    return np.concatenate(all_rows)[np.argsort(np.concatenate(all_numbers), kind="stable")]
