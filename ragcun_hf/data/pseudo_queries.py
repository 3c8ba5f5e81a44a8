"""Pseudo-queries: short texts out of a document that ask for it, where nobody has written queries.

A sentence, a run of words, or the document's rare words in their order: what people type is short, and what they type
is rarely in the same words, so several of each kind are drawn.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from .masking import view_rng
from .training_rows import DrawnRows
from .word_spans import sentence_spans, word_spans

PseudoQueryKind = Literal["sentence", "span", "keywords"]
_SPAN_WORDS = (5, 12)
_KEYWORDS = (3, 7)
_RARE_WORDS = 12  # of a document; keywords are drawn from them
_LETTERS = re.compile(r"[^\W\d_][\w-]+")


@dataclass(frozen=True)
class PseudoQuery:
    """A short text that asks for a document.

    Args:
        document: Position of the document.
        kind: How the text was made.
        text: The query.
        rest: The document without it, for measuring; None for keywords, which stand all over the document.
    """

    document: int
    kind: PseudoQueryKind
    text: str
    rest: str | None


class PseudoQueryViews(DrawnRows):
    """A map-style dataset of pseudo-queries and their documents.

    Args:
        documents: The texts.
        queries: Of these documents.

    Example:
        >>> documents = ["One fox. Two dogs."]
        >>> PseudoQueryViews(documents, draw_pseudo_queries(documents, {"sentence": 1}))[0]
        {'query': 'Two dogs.', 'positive': 'One fox. Two dogs.', 'negative': []}
    """

    def __init__(self, documents: Sequence[str], queries: Sequence[PseudoQuery]) -> None:
        self.documents = documents
        self._queries = queries

    def __len__(self) -> int:
        return len(self._queries)

    def __getitem__(self, index: int) -> dict[str, str | list[str]]:
        query = self._queries[index]
        return {"query": query.text, "positive": self.documents[query.document], "negative": []}


def draw_pseudo_queries(
    documents: Sequence[str], counts: Mapping[PseudoQueryKind, int], *, seed: int = 0
) -> list[PseudoQuery]:
    """Draw pseudo-queries of every document.

    Args:
        documents: The texts.
        counts: Kind -> how many per document at most. A document of one sentence gives no sentence, one of a few
            words no span, one without a word that others have no keywords.
        seed: Another seed draws others; a document's do not depend on its neighbours, but for how rare a word is.

    Returns:
        Document by document.

    Example:
        >>> [query.text for query in draw_pseudo_queries(["One fox. Two dogs."], {"sentence": 2})]
        ['Two dogs.', 'One fox.']
    """
    frequencies: Counter[str] = Counter()
    if counts.get("keywords"):
        for text in documents:
            frequencies.update({word.lower() for word in _LETTERS.findall(text)})
    queries: list[PseudoQuery] = []
    for position, text in enumerate(documents):
        rng = view_rng(seed, 0, position)
        for query, rest in _sentences(text, counts.get("sentence", 0), rng):
            queries.append(PseudoQuery(position, "sentence", query, rest))
        for query, rest in _spans(text, counts.get("span", 0), rng):
            queries.append(PseudoQuery(position, "span", query, rest))
        rare = _rare_words(text, frequencies, len(documents)) if counts.get("keywords") else []
        for words in _keywords(text, rare, counts.get("keywords", 0), rng):
            queries.append(PseudoQuery(position, "keywords", words, None))
    return queries


def _sentences(text: str, count: int, rng: random.Random) -> Iterator[tuple[str, str]]:
    sentences = sentence_spans(text) if count else []
    if len(sentences) > 1:
        for start, end in rng.sample(sentences, min(count, len(sentences))):
            yield text[start:end], _without(text, start, end)


def _spans(text: str, count: int, rng: random.Random) -> Iterator[tuple[str, str]]:
    words = word_spans(text) if count else []
    for _ in range(count):
        length = rng.randint(*_SPAN_WORDS)
        if len(words) > length + _SPAN_WORDS[0]:
            first = rng.randrange(len(words) - length + 1)
            start, end = words[first][0], words[first + length - 1][1]
            yield text[start:end], _without(text, start, end)


def _without(text: str, start: int, end: int) -> str:
    return f"{text[:start].rstrip()} {text[end:].lstrip()}".strip()


def _rare_words(text: str, frequencies: Mapping[str, int], num_documents: int) -> list[str]:
    """Return the words that tell this document from others best; a word of this document alone may be a misprint."""
    counts = Counter(word.lower() for word in _LETTERS.findall(text))
    weights = {
        word: count * math.log(num_documents / frequencies[word])
        for word, count in counts.items()
        if frequencies[word] > 1
    }
    return sorted(weights, key=lambda word: (-weights[word], word))[:_RARE_WORDS]


def _keywords(text: str, rare: Sequence[str], count: int, rng: random.Random) -> Iterator[str]:
    for _ in range(count if rare else 0):
        chosen = set(rng.sample(rare, min(len(rare), rng.randint(*_KEYWORDS))))
        in_order: dict[str, str] = {}
        for word in _LETTERS.findall(text):
            if word.lower() in chosen:
                in_order.setdefault(word.lower(), word)
        yield " ".join(in_order.values())
