"""From vectors of queries and documents to the figures of one data set, every system beside the base.

Nothing here knows about models or features: vectors come in, numbers go out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from ..errors import UserError
from ..search.exact import Matrix, SearchResult, exact_search
from .metrics.retrieval.trec_scores import METRICS, average_scores, score_queries
from .ranking import IdOrder, Run, build_run
from .significance import compare_systems

BASE_SYSTEM = "base"

Search = Callable[..., SearchResult]
PerQuery = dict[str, dict[str, float]]


class RetrievalDataset(Protocol):
    """What an evaluation reads of a data set in BEIR's form; read-only, so a frozen dataclass will do."""

    @property
    def name(self) -> str:
        """How the data set is called in results."""
        ...

    @property
    def split(self) -> str:
        """Which judgements were read, such as `test`."""
        ...

    @property
    def queries(self) -> dict[str, str]:
        """Query id -> text."""
        ...

    @property
    def corpus_ids(self) -> Sequence[str]:
        """Document ids, in the order of the texts; a slice is a list."""
        ...

    @property
    def corpus_texts(self) -> Sequence[str]:
        """Document texts; a slice is a list."""
        ...

    @property
    def qrels(self) -> dict[str, dict[str, int]]:
        """Query id -> document id -> judgement, above 0 is relevant."""
        ...


@dataclass(frozen=True)
class DatasetEvaluation:
    """One data set, evaluated with every system."""

    name: str
    runs: dict[str, Run]  # system -> query -> document -> score
    per_query: dict[str, PerQuery]  # system -> query -> metric -> value
    entry: dict[str, Any]  # the data set's part of the results file, see `results`


def evaluate_retrieval(
    dataset: RetrievalDataset,
    vectors_by_system: Mapping[str, tuple[Matrix, Matrix]],
    *,
    similarity_by_system: Mapping[str, str],
    k: int = 100,
    metric: str = "ndcg@10",
    drop_identical_ids: bool = True,
    seen_document_ids: Collection[str] | None = None,
    search: Search = exact_search,
    num_vectors: int | None = None,
) -> DatasetEvaluation:
    """Search, measure, and compare every system with the frozen base.

    Queries without judgements are not searched. Judgements of documents that are not in the corpus
    count as never found, as in BEIR (ArguAna has five).

    Args:
        dataset: The data set.
        vectors_by_system: System -> query vectors (len(queries), D), in the order of `dataset.queries`,
            and document vectors (len(corpus_ids), D), in the order of `dataset.corpus_ids`. One system
            is `base`.
        similarity_by_system: System -> `cosine`, `dot` or `euclidean`.
        k: Documents kept per query; at least 100 for MAP@100 and recall@100 to be what they say.
        metric: The metric of the comparisons.
        drop_identical_ids: Drop the document with the query's id from its ranking, as BEIR does.
        seen_document_ids: Documents seen in training. If given, figures also stand apart for queries
            with at least one relevant document among them and for the others: a head can memorise
            documents, and only the latter show what it gives on new ones.
        search: Finds the documents; called as `exact_search` is.
        num_vectors: Document vectors per system, where they are of a part of the corpus that `search` knows.

    Returns:
        Runs, figures per query, and the entry for the results file. A subset without queries is left out.

    Raises:
        UserError: If a judged query has no text, nothing is judged, vectors do not fit the data set, or a
            document to be dropped is relevant.
        ValueError: If `base` or a similarity is missing.
    """
    if BASE_SYSTEM not in vectors_by_system:
        raise ValueError(f"expected the system 'base' to compare with, got {sorted(vectors_by_system)}: add it")
    if drop_identical_ids:
        check_identical_ids(dataset)
    judged = _judged_queries(dataset)
    rows = np.array([row for row, query in enumerate(dataset.queries) if query in judged])
    runs: dict[str, Run] = {}
    per_query: dict[str, PerQuery] = {}
    for system in sorted(vectors_by_system, key=lambda name: name != BASE_SYSTEM):
        if system not in similarity_by_system:
            raise ValueError(f"expected a similarity for system {system!r}, got none: name one")
        queries, documents = vectors_by_system[system]
        _check_lengths(dataset, system, queries, documents, num_vectors)
        found = search(
            _take_rows(queries, rows),
            documents,
            k=k + drop_identical_ids,
            similarity=similarity_by_system[system],
            ties=IdOrder(dataset.corpus_ids),
        )
        query_ids = [query for query in dataset.queries if query in judged]
        runs[system] = build_run(query_ids, dataset.corpus_ids, found, drop_identical_ids=drop_identical_ids, k=k)
        per_query[system] = per_query_metrics(runs[system], judged)
    entry = _entry(dataset, judged, per_query, metric, seen_document_ids)
    return DatasetEvaluation(name=dataset.name, runs=runs, per_query=per_query, entry=entry)


def split_queries_by_seen_documents(
    qrels: Mapping[str, Mapping[str, int]], seen_document_ids: Collection[str]
) -> dict[str, list[str]]:
    """Part queries by whether training has seen one of their relevant documents.

    Args:
        qrels: Query id -> document id -> judgement; above 0 is relevant.
        seen_document_ids: Ids of the documents seen in training.

    Returns:
        `seen_documents` and `unseen_documents` -> query ids, in the order of `qrels`.

    Example:
        >>> split_queries_by_seen_documents({"q1": {"a": 1}, "q2": {"a": 0, "b": 1}}, {"a"})
        {'seen_documents': ['q1'], 'unseen_documents': ['q2']}
    """
    seen = set(seen_document_ids)
    parts: dict[str, list[str]] = {"seen_documents": [], "unseen_documents": []}
    for query, judgements in qrels.items():
        is_seen = any(gain > 0 and document in seen for document, gain in judgements.items())
        parts["seen_documents" if is_seen else "unseen_documents"].append(query)
    return parts


def check_identical_ids(dataset: RetrievalDataset) -> None:
    """Refuse to drop documents with the query's id where that would take away a relevant one.

    In ArguAna the same id means the same text. Where queries and documents are merely both numbered
    from 0, query 3 may be answered by document 3.

    Args:
        dataset: The data set.

    Raises:
        UserError: If a query's own id is among its relevant documents and in the corpus.
    """
    relevant = [query for query, judgements in dataset.qrels.items() if judgements.get(query, 0) > 0]
    present = set(relevant).intersection(dataset.corpus_ids) if relevant else set()
    lost = [query for query in relevant if query in present]
    if lost:
        raise UserError(
            f"{dataset.name} {dataset.split}: expected no relevant document with its query's own id, because such "
            f"documents are dropped as BEIR does, got one for query {lost[0]!r} and {len(lost) - 1} more: pass "
            "--keep_identical_ids, or give queries and documents different ids"
        )


def _judged_queries(dataset: RetrievalDataset) -> dict[str, dict[str, int]]:
    judged = {query: judgements for query, judgements in dataset.qrels.items() if judgements}
    if not judged:
        raise UserError(f"{dataset.name} {dataset.split}: expected judgements, got none: check the split's qrels file")
    missing = [query for query in judged if query not in dataset.queries]
    if missing:
        raise UserError(
            f"{dataset.name} {dataset.split}: expected a text for every judged query, got none for {missing[0]!r} "
            f"and {len(missing) - 1} more: add them to queries.jsonl"
        )
    return judged


def _check_lengths(
    dataset: RetrievalDataset, system: str, queries: Matrix, documents: Matrix, num_vectors: int | None
) -> None:
    expected = (len(dataset.queries), len(dataset.corpus_ids) if num_vectors is None else num_vectors)
    if (len(queries), len(documents)) != expected:
        raise UserError(
            f"{dataset.name}, system {system!r}: expected vectors of {expected[0]} queries and {expected[1]} "
            f"documents, got {len(queries)} and {len(documents)}: encode this data set again"
        )


def _take_rows(matrix: Matrix, rows: np.ndarray[Any, Any]) -> Matrix:
    return (
        matrix if len(rows) == len(matrix) else matrix[rows.tolist()] if isinstance(matrix, Tensor) else matrix[rows]
    )


def _entry(
    dataset: RetrievalDataset,
    judged: Mapping[str, Mapping[str, int]],
    per_query: Mapping[str, PerQuery],
    metric: str,
    seen_document_ids: Collection[str] | None,
) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "split": dataset.split,
        "num_queries": len(judged),
        "num_documents": len(dataset.corpus_ids),
        "num_judgements": sum(len(judgements) for judgements in judged.values()),
        **_figures(per_query, metric),
    }
    if seen_document_ids is not None:
        entry["subsets"] = {}
        for subset, queries in split_queries_by_seen_documents(judged, seen_document_ids).items():
            if queries:
                part = {system: {query: values[query] for query in queries} for system, values in per_query.items()}
                entry["subsets"][subset] = {"num_queries": len(queries), **_figures(part, metric)}
    return entry


def _figures(per_query: Mapping[str, PerQuery], metric: str) -> dict[str, Any]:
    """Compute the means of each system and its comparison with the base."""
    return {
        "systems": {system: mean_metrics(values) for system, values in per_query.items()},
        "comparisons": {
            system: {"metric": metric, **asdict(compare_systems(values, per_query[BASE_SYSTEM], metric))}
            for system, values in per_query.items()
            if system != BASE_SYSTEM
        },
    }


__all__ = ["METRICS", "METRIC_FOLDER", "mean_metrics", "per_query_metrics", "rows_for_metric"]

# What `evaluate.load` takes, as a string.
METRIC_FOLDER = Path(__file__).parent / "metrics" / "retrieval"

# One home for the definitions: the `evaluate` metric and this module share the same functions.
per_query_metrics = score_queries
mean_metrics = average_scores


def rows_for_metric(
    run: Mapping[str, Mapping[str, float]], qrels: Mapping[str, Mapping[str, int]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Turn a run and its judgements into the rows that the `evaluate` metric takes.

    Args:
        run: Query id -> document id -> score, higher is better.
        qrels: Query id -> document id -> judgement.

    Returns:
        `predictions` and `references`, one row per judged query, in the order of `qrels`. A query
        without a ranking has an empty list of documents.

    Example:
        >>> predictions, references = rows_for_metric({"q": {"a": 0.5}}, {"q": {"a": 2}})
        >>> predictions
        [{'query': 'q', 'documents': ['a'], 'scores': [0.5]}]
        >>> references
        [{'query': 'q', 'documents': ['a'], 'judgements': [2]}]
    """
    predictions, references = [], []
    for query, judgements in qrels.items():
        ranking = run.get(query, {})
        predictions.append({"query": query, "documents": list(ranking), "scores": list(ranking.values())})
        references.append({"query": query, "documents": list(judgements), "judgements": list(judgements.values())})
    return predictions, references
