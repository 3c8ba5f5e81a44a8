"""From rows of training data to one batch of tensors: tokens, or features computed before.

Both collators lay a batch out alike, so that one forward serves queries, positives and negatives:

    rows of the model's input:  B queries, then B positives, then all hard negatives
    query_ids     (B,)          equal for equal query texts
    document_ids  (M,)          equal for equal document texts; M = B + number of hard negatives
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..data.documents import text_digest

if TYPE_CHECKING:
    from .feature_pairs import FeaturePair


@dataclass
class TextPairCollator:
    """Tokenize pairs of texts, prompts in front, padded to the longest of the batch.

    Args:
        tokenizer: The model's.
        max_length: Tokens kept per text.
        query_prompt: Put before every query.
        document_prompt: Put before every document.

    Example:
        >>> rows = [{"query": "a", "positive": "b c", "negative": ["d"]}]
        >>> batch = TextPairCollator(tokenizer, max_length=8)(rows)  # doctest: +SKIP
        >>> batch["input_ids"].shape  # a, b c, d, each with two special tokens  # doctest: +SKIP
        torch.Size([3, 4])
    """

    tokenizer: Any
    max_length: int
    query_prompt: str = ""
    document_prompt: str = ""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return `query_ids`, `document_ids`, `input_ids` and `attention_mask`."""
        queries = [row["query"] for row in rows]
        documents = [row["positive"] for row in rows]
        documents += [text for row in rows for text in row.get("negative") or []]
        texts = [self.query_prompt + text for text in queries] + [self.document_prompt + text for text in documents]
        tokens = self.tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_token_type_ids=False,
            return_tensors="pt",
        )
        return {
            "query_ids": text_ids(queries),
            "document_ids": text_ids(documents),
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
        }


@dataclass
class FeaturePairCollator:
    """Look up the features of pairs.

    Args:
        query_vectors: Shape (U, H), features of distinct queries.
        document_vectors: Shape (V, H), features of distinct documents.
    """

    query_vectors: np.ndarray
    document_vectors: np.ndarray

    def __call__(self, rows: Sequence[FeaturePair]) -> dict[str, Tensor]:
        """Return `query_ids`, `document_ids` and `features`."""
        queries = np.array([row.query for row in rows])
        documents = np.concatenate([[row.positive for row in rows], *(row.negatives for row in rows)]).astype(np.int64)
        features = np.concatenate([self.query_vectors[queries], self.document_vectors[documents]])
        return {
            "query_ids": torch.from_numpy(queries),
            "document_ids": torch.from_numpy(documents),
            "features": torch.from_numpy(features),
        }


def text_ids(texts: Sequence[str]) -> Tensor:
    """Return (N,) integers, equal for equal texts."""
    return torch.tensor([int.from_bytes(text_digest(text)[:8], "little", signed=True) for text in texts])
