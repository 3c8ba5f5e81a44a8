"""One part of a document as a query for the other part; every word is in one of the two.

This module needs neither torch nor a tokenizer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal, get_args

from ..errors import UserError
from .training_rows import DocumentRows
from .word_spans import sentence_spans, word_spans

SplitMethod = Literal["half", "random", "prefix", "suffix", "sentence"]


def split_text(text: str, method: SplitMethod, *, rng: random.Random, fraction: float = 0.25) -> tuple[str, str]:
    """Split a text of at least two words into a query and the rest, neither empty, without whitespace at their ends.

    "half": the first half is the query. "random": the text is split anywhere, and the shorter part is the query.
    "prefix" or "suffix": the first or last `fraction` of the words is the query. "sentence": one random sentence is
    the query and the others are the rest; a text of one sentence is halved.

    >>> split_text("one two three four", "half", rng=random.Random(0))
    ('one two', 'three four')
    >>> split_text("One. Two. Three.", "sentence", rng=random.Random(0))
    ('Two.', 'One. Three.')
    """
    if method == "sentence":
        sentences = sentence_spans(text)
        if len(sentences) > 1:
            return _take_sentence(text, sentences, rng)
        method = "half"
    words = word_spans(text)
    count = len(words)
    if count < 2:
        raise UserError(f"expected a text of at least two words to split, got {text[:60]!r}: leave it out")
    share = min(max(round(count * fraction), 1), count - 1)
    cut = {"half": count // 2, "prefix": share, "suffix": count - share}.get(method) or rng.randrange(1, count)
    first = text[words[0][0] : words[cut - 1][1]]
    second = text[words[cut][0] : words[-1][1]]
    is_last_the_query = method == "suffix" or (method == "random" and cut > count - cut)
    return (second, first) if is_last_the_query else (first, second)


def _take_sentence(text: str, sentences: list[tuple[int, int]], rng: random.Random) -> tuple[str, str]:
    chosen = rng.randrange(len(sentences))
    start, end = sentences[chosen]
    before = text[: sentences[chosen - 1][1]].strip() if chosen else ""
    after = text[sentences[chosen + 1][0] :].strip() if chosen + 1 < len(sentences) else ""
    # Whatever separated the sentence from the one before joins the parts: nothing in Chinese or Japanese.
    gap = text[sentences[chosen - 1][1] : start] if chosen else ""
    return text[start:end], (before + gap + after).strip() if before and after else before or after


class SplitViews(DocumentRows):
    """Map-style dataset of two parts of each document: query and positive. Every document must have two words.

    >>> SplitViews(["one two three four"], method="half")[0]
    {'query': 'one two', 'positive': 'three four', 'negative': []}
    """

    def __init__(
        self, documents: Sequence[str], method: SplitMethod = "half", seed: int = 0, *, fraction: float = 0.25
    ) -> None:
        if method not in get_args(SplitMethod):
            known = ", ".join(get_args(SplitMethod))
            raise UserError(f"expected a split method of {known}, got {method!r}: name one of them")
        if not 0 < fraction < 1:
            raise UserError(f"expected a split fraction between 0 and 1, got {fraction}: set it to e.g. 0.25")
        super().__init__(documents, seed)
        self.method: SplitMethod = method
        self.fraction = fraction

    def __getitem__(self, index: int) -> dict[str, str | list[str]]:
        rng = self.generator(index)
        query, rest = split_text(self.documents[index], self.method, rng=rng, fraction=self.fraction)
        return {"query": query, "positive": rest, "negative": []}
