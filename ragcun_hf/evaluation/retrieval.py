"""Evaluate retrieval systems on one data set: search, official figures, and a paired comparison with the base.

A system has a name and ranks documents. This file knows nothing of models or features.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch

from ..data.beir_folder import BeirDataset
from ..errors import UserError
from ..search.exact import Matrix, SearchResult, exact_search
from ..search.shards import Shard, search_shards
from ..search.ties import IdOrder, Rows
from .metrics.retrieval.trec_scores import average_scores, score_queries
from .ranking import Run, build_run
from .results import MAIN_METRIC, reference_system, system_order
from .significance import compare_systems

Search = Callable[..., SearchResult]  # called as `exact_search`
PerQuery = dict[str, dict[str, float]]  # query id -> metric -> value


class System(Protocol):
    """Ranks documents for queries, by vectors or by anything else."""

    @property
    def name(self) -> str:
        """Name in tables and files."""
        ...

    def rank(self, dataset: BeirDataset, rows: Rows, k: int) -> SearchResult:
        """Find the k best documents of some queries, rows of `dataset.queries`."""
        ...


@dataclass(frozen=True)
class VectorSystem:
    """Ranks documents by the similarity of their vectors to the query's vector."""

    name: str
    queries: Matrix  # (Q, D), in the order of `dataset.queries`
    documents: Matrix  # (N, D), in the order of `dataset.corpus_ids`
    similarity: str
    search: Search = exact_search
    shard: Shard | None = None  # the rows of the corpus in `documents`, if several processes share it; None: all
    kept: dict[tuple[str, str], SearchResult] | None = None  # (system, data set) -> ranking, to search only once
    device: str | torch.device = "cpu"  # where documents and queries are multiplied

    def rank(self, dataset: BeirDataset, rows: Rows, k: int) -> SearchResult:
        """Find the k best documents of some queries, rows of `dataset.queries`; ties in the order of document ids."""
        num_documents = len(dataset.corpus_ids if self.shard is None else self.shard)
        if (len(self.queries), len(self.documents)) != (len(dataset.queries), num_documents):
            raise UserError(
                f"{dataset.name}, system {self.name!r}: expected vectors of {len(dataset.queries)} queries and "
                f"{num_documents} documents, got {len(self.queries)} and {len(self.documents)}: encode this data set "
                "again"
            )
        key = (self.name, dataset.name)
        if self.kept is not None and key in self.kept:
            return self.kept[key]
        search = self.search if self.shard is None else search_shards(self.search, self.shard)
        queries = self.queries if len(rows) == len(self.queries) else self.queries[rows]
        ties = IdOrder(dataset.corpus_ids)
        found = search(queries, self.documents, k=k, similarity=self.similarity, ties=ties, device=self.device)
        if self.kept is not None:
            self.kept[key] = found
        return found


@dataclass(frozen=True)
class DatasetEvaluation:
    """The evaluation of all systems on one data set."""

    name: str
    runs: dict[str, Run]  # by system
    per_query: dict[str, PerQuery]  # by system
    entry: dict[str, Any]  # the data set's entry in the results file


def evaluate_retrieval(
    dataset: BeirDataset,
    systems: Sequence[System],
    *,
    k: int = 100,
    drop_identical_ids: bool = True,
    seen_document_ids: Collection[str] | None = None,
) -> DatasetEvaluation:
    """Rank with every system, compute the official figures, and compare each system with the base.

    Without a base, the other systems are compared with BM25.

    Queries without judgements are not searched. Judged documents that are not in the corpus count as never found, as
    in BEIR (ArguAna has five); BEIR also drops the document with the query's own id from its ranking.

    With `seen_document_ids` of training documents, queries with a relevant document among them are counted. If there
    are any, they and all others are also reported separately: a head can memorize documents, and only the second group
    shows what it gains on new ones.
    """
    names = [system.name for system in systems]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"expected distinct systems, got {names}: rename or add one")
    if drop_identical_ids:
        check_identical_ids(dataset)
    judged = {query: judgements for query, judgements in dataset.qrels.items() if judgements}
    if not judged:
        raise UserError(f"{dataset.name} {dataset.split}: expected judgements, got none: check the split's qrels file")
    missing = [query for query in judged if query not in dataset.queries]
    if missing:
        raise UserError(
            f"{dataset.name} {dataset.split}: expected a text for every judged query, got none for {missing[0]!r} "
            f"and {len(missing) - 1} more: add them to queries.jsonl"
        )
    rows = np.array([row for row, query in enumerate(dataset.queries) if query in judged])
    query_ids = [query for query in dataset.queries if query in judged]
    runs: dict[str, Run] = {}
    per_query: dict[str, PerQuery] = {}
    for system in sorted(systems, key=lambda system: system_order(system.name)):
        found = system.rank(dataset, rows, k + drop_identical_ids)
        run = build_run(query_ids, dataset.corpus_ids, found, drop_identical_ids=drop_identical_ids, k=k)
        runs[system.name], per_query[system.name] = run, score_queries(run, judged)
    entry: dict[str, Any] = {
        "split": dataset.split,
        "num_queries": len(judged),
        "num_documents": len(dataset.corpus_ids),
        "num_judgements": sum(len(judgements) for judgements in judged.values()),
        **_figures(per_query),
    }
    if seen_document_ids is not None:
        groups = split_queries_by_seen_documents(judged, seen_document_ids)
        entry["num_seen_queries"] = len(groups["seen_documents"])
    if seen_document_ids is not None and groups["seen_documents"]:
        entry["subsets"] = {
            group: {"num_queries": len(queries), **_figures(select_queries(per_query, queries))}
            for group, queries in groups.items()
            if queries
        }
    return DatasetEvaluation(name=dataset.name, runs=runs, per_query=per_query, entry=entry)


def _figures(per_query: Mapping[str, PerQuery]) -> dict[str, Any]:
    """Average each system's figures and compare it with the base, or with BM25 if there is none."""
    reference = reference_system(per_query)
    return {
        "systems": {system: average_scores(values) for system, values in per_query.items()},
        "comparisons": {
            system: {"metric": MAIN_METRIC, **asdict(compare_systems(values, per_query[reference], MAIN_METRIC))}
            for system, values in per_query.items()
            if reference is not None and system != reference
        },
    }


def select_queries(per_query: Mapping[str, PerQuery], queries: Collection[str]) -> dict[str, PerQuery]:
    """Keep the figures of some queries, for every system."""
    return {system: {query: values[query] for query in queries} for system, values in per_query.items()}


def split_queries_by_seen_documents(
    qrels: Mapping[str, Mapping[str, int]], seen_document_ids: Collection[str]
) -> dict[str, list[str]]:
    """Split queries by whether one of their relevant documents was seen in training.

    >>> split_queries_by_seen_documents({"q1": {"a": 1}, "q2": {"a": 0, "b": 1}}, {"a"})
    {'seen_documents': ['q1'], 'unseen_documents': ['q2']}
    """
    seen = set(seen_document_ids)
    groups: dict[str, list[str]] = {"seen_documents": [], "unseen_documents": []}
    for query, judgements in qrels.items():
        is_seen = any(gain > 0 and document in seen for document, gain in judgements.items())
        groups["seen_documents" if is_seen else "unseen_documents"].append(query)
    return groups


def check_identical_ids(dataset: BeirDataset) -> None:
    """Raise a UserError if dropping documents with the query's own id would drop a relevant one.

    In ArguAna an equal id means an equal text. But in a data set that numbers both queries and documents from 0,
    document 3 may be relevant to query 3.
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
