"""Which documents answer which queries, over the whole of the training data and not only within a batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Sampler

_MULTIPLIER = -7046029254386353131  # odd and without pattern (2^64 over the golden ratio): products do not collide


class KnownPairs:
    """Tells of pairs of ids whether they stand in the training data.

    In a batch of a collection with many judgements per query, another row's document often answers the query too; as
    a negative it would teach the opposite of what is known.

    Args:
        query_ids: Shape (N,), integers, equal for equal query texts.
        document_ids: Shape (N,), the document of each row's query, likewise.

    Example:
        >>> known = KnownPairs(torch.tensor([1, 1, 2]), torch.tensor([10, 11, 12]))
        >>> known(torch.tensor([1, 2]), torch.tensor([11, 12]))
        tensor([[ True, False],
                [False,  True]])
    """

    def __init__(self, query_ids: Tensor, document_ids: Tensor) -> None:
        self._keys = _keys(query_ids, document_ids).unique()

    def __call__(self, query_ids: Tensor, document_ids: Tensor) -> Tensor:
        """Look all combinations up.

        Args:
            query_ids: Shape (B,).
            document_ids: Shape (M,).

        Returns:
            Shape (B, M), booleans.
        """
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
    """The ids that a collator gives to the texts of each row, in the rows' order.

    Args:
        query_ids: Shape (N,).
        document_ids: Shape (N,), of the rows' own documents.
    """

    query_ids: Tensor
    document_ids: Tensor

    def num_queries(self) -> int:
        """Count the different queries."""
        return len(self.query_ids.unique())

    def known_pairs(self) -> KnownPairs | None:
        """Return the lookup, or None where every query has one document and nothing can be looked up."""
        if len(_keys(self.query_ids, self.document_ids).unique()) == self.num_queries():
            return None
        return KnownPairs(self.query_ids, self.document_ids)


class QueryBalancedSampler(Sampler[int]):
    """Takes every query once per epoch, in random order, with one of its rows drawn anew.

    Args:
        query_ids: Shape (N,), of the rows.
        seed: The same on every process.
    """

    def __init__(self, query_ids: Tensor, *, seed: int) -> None:
        _, of_row, self._counts = query_ids.unique(return_inverse=True, return_counts=True)
        self._rows = of_row.argsort(stable=True)
        self._starts = self._counts.cumsum(0) - self._counts
        self._seed = seed
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._counts)

    def set_epoch(self, epoch: int) -> None:
        """Let another epoch draw another order and other rows."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        order = torch.randperm(len(self), generator=generator)
        drawn = (torch.rand(len(self), generator=generator) * self._counts).long()
        yield from self._rows[self._starts + drawn][order].tolist()
