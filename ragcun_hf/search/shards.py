"""Search of one corpus by several processes: each searches its shard, and all get the ranking of one process."""

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
    """The documents of this process: rows `start` to `stop` of a corpus of `num_documents`."""

    start: int
    stop: int
    num_documents: int

    def __len__(self) -> int:
        return self.stop - self.start


def own_shard(num_documents: int, *, block: int) -> Shard:
    """Divide a corpus evenly among processes, and return this process's shard; it may be empty.

    A `block`, which the head embeds at once, is never divided: any number of processes gives the same embeddings.
    """
    num_blocks = -(-num_documents // block)
    start, stop = (
        min(num_documents, block * (num_blocks * number // world_size())) for number in (rank(), rank() + 1)
    )
    return Shard(start, stop, num_documents)


def search_shards(search: Callable[..., SearchResult], shard: Shard) -> Callable[..., SearchResult]:
    """Turn a search of this process's shard into a search of the whole corpus, which every process must call.

    The new function has the arguments of `search` and takes the shard's documents. Its results, and the rows given to
    `ties`, are rows of the whole corpus. It merges the shards' results by score and ties: exact if `search` is exact.
    """

    def search_all(
        queries: Matrix, documents: Matrix, *, k: int, ties: Order = lambda rows: rows, **options: Any
    ) -> SearchResult:
        scores = np.empty((len(queries), 0), dtype=np.float32)
        indices = np.empty((len(queries), 0), dtype=np.int64)
        if len(shard):
            found = search(queries, documents, k=k, ties=lambda rows: ties(rows + shard.start), **options)
            scores, indices = found.scores, found.indices + shard.start
        parts = gather_objects((scores, indices))
        scores, indices = (np.concatenate(column, axis=1) for column in zip(*parts, strict=True))
        rows = np.repeat(np.arange(len(scores)), scores.shape[1])
        numbers = tie_numbers(rows, scores.ravel(), indices.ravel(), ties).reshape(scores.shape)
        order = np.lexsort((numbers, -scores), axis=1)[:, :k]
        return SearchResult(np.take_along_axis(scores, order, axis=1), np.take_along_axis(indices, order, axis=1))

    return search if world_size() == 1 else search_all


def gather_rows_by_number(numbers: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the rows (R, D) of all processes in the order of their numbers (R,), which are distinct, everywhere."""
    if world_size() == 1:
        return rows
    all_numbers, all_rows = zip(*gather_objects((numbers, rows)), strict=True)
    return np.concatenate(all_rows)[np.argsort(np.concatenate(all_numbers), kind="stable")]
