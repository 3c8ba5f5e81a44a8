"""Masked texts as queries for the texts themselves; the seed, the position of a text and the epoch decide the mask.

This module needs neither torch nor a tokenizer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal, get_args

from ..errors import UserError
from .training_rows import DocumentRows
from .word_spans import word_spans

MaskKind = Literal["word", "span"]
MEAN_SPAN_WORDS = 3.0  # close to the 3.8 subwords (capped at 10) of SpanBERT, arXiv:1907.10529, section 3.1
LONGEST_SPAN_WORDS = 10


def mask_words(text: str, probability: float, *, rng: random.Random, mask_token: str = "[MASK]") -> str:
    """Mask single words, each with the same probability in (0, 1); at least one is masked and at least one is kept.

    A text of fewer than two words is returned unchanged. An empty mask token removes the words, which suits every
    encoder; otherwise use the tokenizer's own (`tokenizer.mask_token`), or it is read as ordinary characters.

    >>> mask_words("one two three four", 0.5, rng=random.Random(0))
    '[MASK] two three [MASK]'
    """
    spans = word_spans(text)
    if len(spans) < 2:
        return text
    chosen = set(rng.sample(range(len(spans)), _words_to_mask(len(spans), probability, rng)))
    return _replace(text, spans, chosen, mask_token, one_per_run=False)


def mask_spans(text: str, probability: float, *, rng: random.Random, mask_token: str = "[MASK]") -> str:
    """Mask runs of words, as `mask_words` masks words; one mask token replaces a whole run, which hides its length.

    The length of a run is geometric with mean 3, at most 10.

    >>> mask_spans("one two three four five six", 0.5, rng=random.Random(0))
    'one two three [MASK]'
    """
    spans = word_spans(text)
    if len(spans) < 2:
        return text
    wanted = _words_to_mask(len(spans), probability, rng)
    chosen: set[int] = set()
    while len(chosen) < wanted:
        length = 1
        while length < LONGEST_SPAN_WORDS and rng.random() > 1 / MEAN_SPAN_WORDS:
            length += 1
        length = min(length, wanted - len(chosen))
        start = rng.randrange(len(spans) - length + 1)
        chosen.update(range(start, start + length))
    return _replace(text, spans, chosen, mask_token, one_per_run=True)


def _words_to_mask(num_words: int, probability: float, rng: random.Random) -> int:
    # Rounded at random, so that the expected share is right for short texts, too.
    count = int(num_words * probability + rng.random())
    return min(max(count, 1), num_words - 1)


def _replace(text: str, spans: list[tuple[int, int]], chosen: set[int], mask_token: str, *, one_per_run: bool) -> str:
    """Replace the chosen words by the mask token; whitespace between other words stays as it is."""
    pieces: list[str] = []
    for position, (start, end) in enumerate(spans):
        is_hidden = not mask_token or (one_per_run and position - 1 in chosen)
        if position in chosen and is_hidden:
            continue
        gap = text[spans[position - 1][1] : start] if position else ""
        pieces.append((gap if pieces else "") + (mask_token if position in chosen else text[start:end]))
    return "".join(pieces)


class MaskedViews(DocumentRows):
    """Map-style dataset of masked texts and their originals. Every document must have two words.

    >>> MaskedViews(["a red fox ran"], kind="word", probability=0.3, seed=1)[0]
    {'query': 'a red [MASK] [MASK]', 'positive': 'a red fox ran', 'negative': []}
    """

    def __init__(
        self,
        documents: Sequence[str],
        kind: MaskKind = "word",
        probability: float = 0.2,
        seed: int = 0,
        mask_token: str = "[MASK]",
    ) -> None:
        if kind not in get_args(MaskKind):
            raise UserError(f"expected a mask kind of {', '.join(get_args(MaskKind))}, got {kind!r}: name one of them")
        if not 0 < probability < 1:
            raise UserError(f"expected a mask probability between 0 and 1, got {probability}: set it to e.g. 0.2")
        super().__init__(documents, seed)
        self.kind = kind
        self.probability = probability
        self.mask_token = mask_token

    def __getitem__(self, index: int) -> dict[str, str | list[str]]:
        text = self.documents[index]
        mask = mask_words if self.kind == "word" else mask_spans
        query = mask(text, self.probability, rng=self.generator(index), mask_token=self.mask_token)
        return {"query": query, "positive": text, "negative": []}
