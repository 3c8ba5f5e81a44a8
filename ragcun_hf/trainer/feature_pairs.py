"""Training pairs as rows of precomputed features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from ..features.feature_store import FeatureStore

_SAMPLE_ROWS = 4_096  # of queries and of documents


@dataclass(frozen=True)
class FeaturePair:
    """One training pair by the rows of its texts' features.

    Args:
        query: Row among the query features.
        positive: Row among the document features.
        negatives: Rows among the document features.
    """

    query: int
    positive: int
    negatives: np.ndarray


def _evenly(rows: np.ndarray) -> np.ndarray:
    """Take up to 4,096 of some rows, evenly spaced."""
    return rows[:: -(-len(rows) // _SAMPLE_ROWS)] if len(rows) else rows


class FeaturePairs(Dataset):
    """Pairs whose texts were encoded before; equal texts share a row.

    Args:
        queries: One text per pair.
        positives: One text per pair.
        negatives: Any number of texts per pair.
        store: Gives the features.
        query_prompt: Put before every query.
        document_prompt: Put before every document.

    Attributes:
        query_vectors: Shape (U, H), one row per distinct query.
        document_vectors: Shape (V, H), one row per distinct document.
        query_rows: Shape (N,), the row of each pair's query.
        positive_rows: Shape (N,), the row of its document.
        negative_rows: The rows of its hard negatives, pair by pair.
    """

    def __init__(
        self,
        queries: Sequence[str],
        positives: Sequence[str],
        negatives: Sequence[Sequence[str]],
        *,
        store: FeatureStore,
        query_prompt: str = "",
        document_prompt: str = "",
    ) -> None:
        query_table = store.features(queries, prompt=query_prompt)
        flat_negatives = [text for texts in negatives for text in texts]
        document_table = store.features([*positives, *flat_negatives], prompt=document_prompt)
        self.query_vectors = query_table.vectors
        self.document_vectors = document_table.vectors
        self.query_rows = query_table.rows
        self.positive_rows = document_table.rows[: len(positives)]
        ends = np.cumsum([len(texts) for texts in negatives])
        self.negative_rows = np.split(document_table.rows[len(positives) :], ends[:-1]) if len(ends) else []

    def sample(self, num_rows: int) -> np.ndarray:
        """Return features of distinct queries and documents of the first pairs, as many of both where there are many.

        Args:
            num_rows: Pairs that count.

        Returns:
            Shape (S, H), S at most 8,192.
        """
        parts = ((self.query_vectors, self.query_rows), (self.document_vectors, self.positive_rows))
        return np.concatenate([vectors[_evenly(np.unique(rows[:num_rows]))] for vectors, rows in parts])

    def __len__(self) -> int:
        return len(self.query_rows)

    def __getitem__(self, index: int) -> FeaturePair:
        return FeaturePair(
            query=int(self.query_rows[index]),
            positive=int(self.positive_rows[index]),
            negatives=self.negative_rows[index],
        )
