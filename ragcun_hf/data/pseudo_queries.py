"""Draw pseudo-queries: short texts from a document that ask for it, where nobody has written queries.

People type short queries, often in words that the document does not use. So there are several kinds: a sentence, a run
of words, and the document's rare words in their order.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from .training_rows import DocumentRows, document_generator
from .word_spans import sentence_spans, word_spans

PseudoQueryKind = Literal["sentence", "span", "keywords"]
_SPAN_WORDS = (5, 12)
_KEYWORDS = (3, 7)
_RARE_WORDS = 12  # per document; keywords are drawn from them
_LETTERS = re.compile(r"[^\W\d_][\w-]+")


@dataclass(frozen=True)
class PseudoQuery:
    """A short text that asks for a document."""

    document: int  # position of the document
    kind: PseudoQueryKind
    text: str
    rest: str | None  # the document without the text, for measuring; None for keywords, which occur all over it


class PseudoQueryViews(DocumentRows):
    """Map-style dataset of pseudo-queries and the documents they were drawn from.

    >>> documents = ["One fox. Two dogs."]
    >>> PseudoQueryViews(documents, draw_pseudo_queries(documents, {"sentence": 1}))[0]
    {'query': 'Two dogs.', 'positive': 'One fox. Two dogs.', 'negative': []}
    """

    def __init__(self, documents: Sequence[str], queries: Sequence[PseudoQuery]) -> None:
        super().__init__(documents)
        self._queries = queries

    def __len__(self) -> int:
        return len(self._queries)

    def __getitem__(self, index: int) -> dict[str, str | list[str]]:
        query = self._queries[index]
        return {"query": query.text, "positive": self.documents[query.document], "negative": []}


def draw_pseudo_queries(
    documents: Sequence[str], counts: Mapping[PseudoQueryKind, int], *, seed: int = 0
) -> list[PseudoQuery]:
    """Draw pseudo-queries from every document, in the order of the documents.

    `counts` gives the largest number of each kind per document. A document of one sentence yields no sentence, a short
    one yields no span, and one that shares no word with another document yields no keywords. Queries depend on other
    documents only through the rarity of words.

    >>> [query.text for query in draw_pseudo_queries(["One fox. Two dogs."], {"sentence": 2})]
    ['Two dogs.', 'One fox.']
    """
    num_sentences, num_spans, num_keywords = (counts.get(kind, 0) for kind in get_args(PseudoQueryKind))
    frequencies: Counter[str] = Counter()
    for text in documents if num_keywords else ():
        frequencies.update({word.lower() for word in _LETTERS.findall(text)})
    queries: list[PseudoQuery] = []
    for position, text in enumerate(documents):
        rng = document_generator(seed, 0, position)
        for query, rest in _sentences(text, num_sentences, rng):
            queries.append(PseudoQuery(position, "sentence", query, rest))
        for query, rest in _spans(text, num_spans, rng):
            queries.append(PseudoQuery(position, "span", query, rest))
        rare = _rare_words(text, frequencies, len(documents)) if num_keywords else []
        for query in _keywords(text, rare, num_keywords, rng):
            queries.append(PseudoQuery(position, "keywords", query, None))
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
    """Return the most characteristic words (tf-idf); a word that only this document has may be a misprint."""
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
