"""BM25: rank documents by the words that they share with the query, as a baseline that needs no encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.mapped_column import take
from ..distributed import broadcast_from_first
from ..errors import UserError
from ..search.exact import SearchResult
from ..search.ties import IdOrder, Order, Rows, best_rows
from .results import BM25_SYSTEM

if TYPE_CHECKING:
    from ..data.beir_folder import BeirDataset

NO_STEMS = "none"
_K1, _B = 1.5, 0.75
# The Snowball languages for which bm25s has stop words, under the same name.
_WITH_STOP_WORDS = frozenset(
    "danish dutch english french german italian norwegian portuguese russian spanish swedish turkish".split()
)


def check_language(language: str) -> None:
    """Raise a UserError unless there is a Snowball stemmer of that name, or it is "none"."""
    import Stemmer

    known = Stemmer.algorithms()
    if language != NO_STEMS and language not in known:
        raise UserError(
            f"expected the language of the words that BM25 compares, got {language!r}: use {NO_STEMS!r} to compare "
            f"whole words, or one of {', '.join(known)}"
        )


class Bm25Index:
    """The words of a corpus, weighted by BM25 in the variant of Lucene, with k1 = 1.5 and b = 0.75.

    A word has at least two letters or digits. It is written in lower case and cut to its stem, and stop words are left
    out. Languages that do not put spaces between words need another index.

    Source:
        Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009. The variant is that of
        Kamphuis et al., "Which BM25 Do You Mean?", ECIR 2020. The index is that of bm25s (Lù, 2024, arXiv:2407.03618).

    Args:
        texts: The documents, as many as memory has room for: 100,000 abstracts need about half a GiB.
        language: A Snowball language such as "german", for stems and stop words; "none" compares whole words.

    Raises:
        UserError: If the language is unknown.

    Example:
        >>> index = Bm25Index(["A cat sleeps.", "Dogs bark.", "The dog and the cat bark."])
        >>> index.search(["barking dogs", "xyz"], k=2).indices.tolist()
        [[1, 2], [-1, -1]]
    """

    def __init__(self, texts: Sequence[str], *, language: str = "english") -> None:
        import bm25s

        check_language(language)
        self._language = language
        self._num_documents = len(texts)
        words = self._words(texts, return_ids=True)
        self._index: Any = None
        if words.vocab:
            self._index = bm25s.BM25(method="lucene", k1=_K1, b=_B)
            self._index.index((words.ids, words.vocab), create_empty_token=False, show_progress=False)

    def _words(self, texts: Sequence[str], *, return_ids: bool) -> Any:
        import bm25s
        import Stemmer

        return bm25s.tokenize(
            texts,  # type: ignore[arg-type]  # any sequence is read once, from start to end
            stopwords=self._language if self._language in _WITH_STOP_WORDS else None,  # type: ignore[arg-type]
            stemmer=None if self._language == NO_STEMS else Stemmer.Stemmer(self._language),
            return_ids=return_ids,
            show_progress=False,
        )

    def search(self, queries: Sequence[str], *, k: int, ties: Order | None = None) -> SearchResult:
        """Find the k best documents of every query, of those that have one of its words.

        Args:
            queries: Q texts.
            k: Documents per query, at least 1.
            ties: Orders documents with equal scores, the lower number first; default: by row.

        Returns:
            Scores (Q, K) float32 and document rows (Q, K) int64, K = min(k, N), each row from best to worst. If a
            query finds fewer, its last places have the row -1 and the score 0.
        """
        num_results = min(k, self._num_documents)
        scores = np.zeros((len(queries), num_results), dtype=np.float32)
        indices = np.full((len(queries), num_results), -1, dtype=np.int64)
        for row, scores_N in self._scored(queries):
            rows = np.flatnonzero(scores_N > 0)
            found = best_rows(scores_N[rows], rows, num_results, ties)
            scores[row, : len(found[0])], indices[row, : len(found[1])] = found
        return SearchResult(scores, indices)

    def scores(self, queries: Sequence[str]) -> Rows:
        """Score every document for every query: (Q, N) float32, 0 for documents without a word of the query."""
        scores = np.zeros((len(queries), self._num_documents), dtype=np.float32)
        for row, scores_N in self._scored(queries):
            scores[row] = scores_N
        return scores

    def _scored(self, queries: Sequence[str]) -> Iterator[tuple[int, Rows]]:
        """Yield the number of each query with a known word, and the scores (N,) of all documents."""
        for row, words in enumerate(self._words(list(queries), return_ids=False) if self._index else ()):
            known = self._index.get_tokens_ids(words)
            if known:
                yield row, self._index.get_scores_from_ids(known)


class Bm25System:
    """BM25 as a system to evaluate, beside those that compare vectors.

    A data set is searched once, however many models are evaluated on it. If several processes share the work, the
    first one searches and sends the others what it found.

    Args:
        language: As for `Bm25Index`.
        is_shared: Whether every process calls `rank`; otherwise, each one that does searches for itself.
    """

    name = BM25_SYSTEM

    def __init__(self, language: str = "english", *, is_shared: bool = True) -> None:
        check_language(language)
        self.language = language
        self._is_shared = is_shared
        self._found: dict[int, tuple[Any, int, SearchResult]] = {}  # a kept data set's id cannot be another's
        self._last: tuple[Any, Bm25Index | None] = (None, None)  # the data set indexed last, and its index

    def settings(self) -> str:
        """Say in a line how documents are ranked, for the results file."""
        has_stop_words = self.language in _WITH_STOP_WORDS
        stems = "whole words" if self.language == NO_STEMS else f"{self.language} stems"
        return f"lucene, k1 {_K1}, b {_B}, {stems}{', without stop words' if has_stop_words else ''}"

    def rank(self, dataset: BeirDataset, rows: Rows, k: int) -> SearchResult:
        """Find the k best documents of some queries, rows of `dataset.queries`; ties in the order of document ids."""
        known, known_k, found = self._found.get(id(dataset), (None, 0, None))
        if known is not dataset or known_k != k or found is None:
            queries = take(list(dataset.queries.values()), rows.tolist())

            def search() -> SearchResult:
                self._last = (dataset, Bm25Index(dataset.corpus_texts, language=self.language))
                return self._last[1].search(queries, k=k, ties=IdOrder(dataset.corpus_ids))

            found = broadcast_from_first(search) if self._is_shared else search()
            self._found[id(dataset)] = (dataset, k, found)
        return found

    def take_index(self, dataset: BeirDataset) -> Bm25Index:
        """Return the index of a data set, and forget it, so that the caller decides how long it is in memory."""
        (known, index), self._last = self._last, (None, None)
        return index if known is dataset and index else Bm25Index(dataset.corpus_texts, language=self.language)
