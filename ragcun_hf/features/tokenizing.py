"""Turn texts into flat arrays of token ids, and read no more of a long text than it takes."""

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
_READ_PER_TOKEN = 2 * CHARACTERS_PER_TOKEN  # characters that are read first
_NUM_COMPARED = 8  # texts of a block


def text_size(text: str, *, max_length: int) -> int:
    """Estimate the cost of encoding a text, in characters; truncated characters cost nothing."""
    return 1 + min(len(text), CHARACTERS_PER_TOKEN * max_length)


def token_ids(tokenizer: Any, texts: Sequence[str], *, max_length: int) -> list[list[int]]:
    """Return what `tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]` returns, faster.

    Of a long text, only the first words are read; if they give fewer than `max_length` tokens, all of it is. This
    changes nothing for tokenizers whose tokens end where words do.
    """
    may_cut = tokenizer.truncation_side == "right"
    begun = [_beginning(text, _READ_PER_TOKEN * max_length) if may_cut else text for text in texts]
    found = _ids(tokenizer, begun, max_length)
    if short := [row for row, ids in enumerate(found) if len(ids) < max_length and len(begun[row]) < len(texts[row])]:
        for row, ids in zip(short, _ids(tokenizer, [texts[row] for row in short], max_length), strict=True):
            found[row] = ids
    return found


def _beginning(text: str, num_characters: int) -> str:
    """Return the whole words before some character, or the whole text if there are none."""
    if len(text) <= num_characters:
        return text
    end = max(text.rfind(space, 0, num_characters) for space in (" ", "\n"))
    return text[: max(end, 0)].rstrip() or text


def _ids(tokenizer: Any, texts: list[str], max_length: int) -> list[list[int]]:
    """Tokenize without offsets and masks where the tokenizer has a backend in Rust that agrees with it."""

    def by_transformers(texts: list[str]) -> list[list[int]]:
        options = {"truncation": True, "max_length": max_length, "return_attention_mask": False}
        return tokenizer(texts, return_token_type_ids=False, **options)["input_ids"]

    if not tokenizer.is_fast or len(texts) <= _NUM_COMPARED:
        return by_transformers(texts)
    # A tokenizer may do more than its backend. This call also sets truncation and padding in the backend.
    expected = by_transformers(texts[:_NUM_COMPARED])
    found = [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts)]
    return found if found[:_NUM_COMPARED] == expected else by_transformers(texts)


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
