"""Lay out token ids of texts in flat arrays, from which batches are padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

CHARACTERS_PER_TOKEN = 4  # of English


def text_size(text: str, *, max_length: int) -> int:
    """Estimate the cost of encoding a text, in characters; truncated characters cost nothing."""
    return 1 + min(len(text), CHARACTERS_PER_TOKEN * max_length)


@dataclass(frozen=True)
class TokenBlock:
    """Token ids of some texts, one after the other, and how a batch of them is padded."""

    positions: list[int]  # of the texts
    token_ids: np.ndarray[Any, Any]  # (tokens,) int64
    lengths: np.ndarray[Any, Any]  # (texts,) int64
    pad_id: int

    @classmethod
    def of(cls, tokenizer: Any, positions: list[int], token_ids: Sequence[Sequence[int]]) -> TokenBlock:
        """Lay out the token ids of texts."""
        if tokenizer.pad_token_id is None:
            raise UserError(
                f"expected a tokenizer with a padding token, got {type(tokenizer).__name__} without: set its pad_token"
            )
        # A blank text without special tokens becomes one padding token, as in the model's own `tokenize`.
        token_ids = [ids or [tokenizer.pad_token_id] for ids in token_ids]
        lengths = np.fromiter(map(len, token_ids), np.int64, len(token_ids))
        flat = np.fromiter(chain.from_iterable(token_ids), np.int64, int(lengths.sum()))
        return cls(positions, flat, lengths, tokenizer.pad_token_id)

    def batch(self, rows: list[int], length: int) -> tuple[Tensor, Tensor]:
        """Return token ids and attention mask of some texts, padded on the right to a length: (rows, length) int64."""
        lengths_B1 = self.lengths[rows, None]
        starts_B1 = (np.cumsum(self.lengths) - self.lengths)[rows, None]
        is_token_BT = np.arange(length) < lengths_B1
        places_BT = (starts_B1 + np.arange(length)) * is_token_BT
        token_ids_BT = np.where(is_token_BT, self.token_ids[places_BT], self.pad_id)
        return torch.from_numpy(token_ids_BT), torch.from_numpy(is_token_BT.astype(np.int64))
