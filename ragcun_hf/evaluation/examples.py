"""Examples of a model's rankings, with texts: for a reader who wants to see more than figures."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from ..data.beir_folder import BeirDataset
from ..data.mapped_column import take
from .ranking import Run
from .results import shorten
from .retrieval import split_queries_by_seen_documents

_TEXT_LENGTH = 200
_SEED = 0


def example_rankings(
    dataset: BeirDataset, run: Run, count: int, *, seen_document_ids: Collection[str] = ()
) -> dict[str, dict[str, Any]]:
    """Choose queries at random, always the same ones, and return them with the best document that a run found.

    At random, because chosen by success they would promise too much. If there are queries without a document seen in
    training, only these are chosen from.

    Args:
        dataset: The texts and judgements.
        run: A model's ranking.
        count: How many queries; fewer if there are not so many.
        seen_document_ids: Ids of documents seen in training.

    Returns:
        Query id -> texts on one line, the document's id and score, and whether it is judged relevant.
    """
    judged = {query: dataset.qrels[query] for query in run if run[query]}
    groups = split_queries_by_seen_documents(judged, seen_document_ids)
    queries = groups["unseen_documents"] or groups["seen_documents"]
    chosen = np.random.default_rng(_SEED).permutation(len(queries))[:count]
    best = {queries[place]: next(iter(run[queries[place]])) for place in sorted(chosen)}
    texts = _document_texts(dataset, set(best.values()))
    return {
        query: {
            "query": _one_line(dataset.queries[query]),
            "document_id": document,
            "document": _one_line(texts[document]),
            "score": float(run[query][document]),
            "is_relevant": judged[query].get(document, 0) > 0,
        }
        for query, document in best.items()
    }


def _document_texts(dataset: BeirDataset, ids: Collection[str]) -> dict[str, str]:
    rows = [row for row, identifier in enumerate(dataset.corpus_ids) if identifier in ids]
    return dict(zip(take(dataset.corpus_ids, rows), take(dataset.corpus_texts, rows), strict=True))


def _one_line(text: str) -> str:
    return shorten(" ".join(text.split()), _TEXT_LENGTH)
