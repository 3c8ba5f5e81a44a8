"""Which documents answer which queries, over all training rows instead of one batch; epochs balanced by query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

_MULTIPLIER = -7046029254386353131  # odd, without a pattern (2^64 over the golden ratio), so that keys do not collide


class KnownPairs:
    """Says whether a (query, document) pair occurs in the training data.

    In a collection with many judgements per query, the document of another row in the batch often answers the query
    too, so it must not be a negative. The ids, shape (N,), are integers, equal for equal texts.

    >>> known = KnownPairs(torch.tensor([1, 1, 2]), torch.tensor([10, 11, 12]))
    >>> known(torch.tensor([1, 2]), torch.tensor([11, 12]))
    tensor([[ True, False],
            [False,  True]])
    """

    def __init__(self, query_ids: Tensor, document_ids: Tensor) -> None:
        self._keys = _keys(query_ids, document_ids).unique()

    def __call__(self, query_ids: Tensor, document_ids: Tensor) -> Tensor:
        """Look up all combinations of (B,) queries and (M,) documents; return (B, M) booleans."""
        if self._keys.device != query_ids.device:
            self._keys = self._keys.to(query_ids.device)
        keys_BM = _keys(query_ids[:, None], document_ids[None, :])
        places_BM = torch.searchsorted(self._keys, keys_BM).clamp(max=len(self._keys) - 1)
        return self._keys[places_BM] == keys_BM


def _keys(query_ids: Tensor, document_ids: Tensor) -> Tensor:
    """One number per pair; products wrap around 2^64."""
    return query_ids * _MULTIPLIER + document_ids


@dataclass(frozen=True)
class PairIds:
    """Ids (N,) of the queries and of the documents of rows, as the collator computes them."""

    query_ids: Tensor
    document_ids: Tensor

    def known_pairs(self) -> KnownPairs | None:
        """Return the lookup, or None if it is not needed because every query has one document."""
        if len(_keys(self.query_ids, self.document_ids).unique()) == len(self.query_ids.unique()):
            return None
        return KnownPairs(self.query_ids, self.document_ids)


class QueryBalancedRows(Dataset):
    """A dataset whose epochs use every query once, with one of its rows, drawn at random by seed and epoch."""

    def __init__(self, rows: Any, query_ids: Tensor, *, seed: int) -> None:
        self._rows, self._seed = rows, seed
        _, query_of_row, self._counts = query_ids.unique(return_inverse=True, return_counts=True)
        self._by_query = query_of_row.argsort(stable=True)
        self._starts = self._counts.cumsum(0) - self._counts
        # Shared, so that loader processes that are kept between epochs see the next draw.
        self._drawn = torch.zeros_like(self._counts).share_memory_()
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw order and rows of an epoch."""
        generator = torch.Generator().manual_seed(self._seed + epoch)
        order = torch.randperm(len(self), generator=generator)
        drawn = (torch.rand(len(self), generator=generator) * self._counts).long()
        self._drawn.copy_(self._by_query[self._starts + drawn][order])

    def __len__(self) -> int:
        return len(self._counts)

    def __getitem__(self, index: int) -> Any:
        return self._rows[int(self._drawn[index])]
