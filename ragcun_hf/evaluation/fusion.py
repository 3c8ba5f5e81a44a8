"""Fusion: rank documents by the base's similarity and by BM25 together, as a baseline that needs no training.

Shape letters used in this file: Q = queries, B = queries in a block, N = documents, M = documents of this process,
C = candidates, D = vector width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from ..data.beir_folder import BeirDataset
from ..data.mapped_column import take
from ..distributed import broadcast_from_first, gather_objects, rank
from ..search.exact import Matrix, SearchResult
from ..search.first_pass import row_blocks
from ..search.memory_maps import read_far_apart, release
from ..search.shards import Shard, search_shards
from ..search.similarity import score_rows, unit_rows
from ..search.ties import IdOrder, Order, Rows, best_rows
from .bm25 import Bm25Index, Bm25System
from .results import FUSION_SYSTEM
from .retrieval import VectorSystem

FUSION_SETTINGS = "0.7 x base + 0.3 x bm25, each standardized over all documents of the corpus for each query"
_WEIGHTS = (0.7, 0.3)
_SCORES_AT_ONCE = 2**24  # queries times documents; more queries are ranked in several rounds
_DOCUMENT_BLOCK = 4_096
_ROUNDING = 1e-12  # above the relative errors of a score in float64, and of a standard deviation that should be 0
_FLOAT32_ROUNDING = 2.0**-22  # of a score; what may tie with the last one after rounding is a candidate, too


class FusionSystem:
    """The weighted sum of the base's similarity and BM25, as a system to evaluate.

    For each query, both kinds of scores are standardized over all documents of the corpus: mean 0, standard deviation
    1. A document without a word of the query has a BM25 score of 0. Where all scores of a kind are equal, it counts
    nothing. Several processes rank the documents whose vectors they have; the first one has the index of BM25.

    Args:
        base: The frozen base.
        bm25: BM25, with the same data sets.
    """

    name = FUSION_SYSTEM

    def __init__(self, base: VectorSystem, bm25: Bm25System) -> None:
        self._base, self._bm25 = base, bm25

    def rank(self, dataset: BeirDataset, rows: Rows, k: int) -> SearchResult:
        """Find the k best documents of some queries, rows of `dataset.queries`; ties in the order of document ids."""
        kept, key = self._base.kept, (self.name, dataset.name)
        if kept is not None and key in kept:
            return kept[key]
        num_documents = len(dataset.corpus_ids)
        index: Any = self._bm25.take_index(dataset) if rank() == 0 else None
        texts = take(list(dataset.queries.values()), rows.tolist())
        queries = np.asarray(self._base.queries)[rows]
        blocks = []
        for block in row_blocks(len(rows), max(1, _SCORES_AT_ONCE // num_documents)):
            lexical_BN = broadcast_from_first(partial(_scores_of, index, texts[block]))
            blocks.append(self._rank_block(queries[block], lexical_BN, k, IdOrder(dataset.corpus_ids)))
        scores, indices = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
        found = SearchResult(scores, indices)
        if kept is not None:
            kept[key] = found
        return found

    def _rank_block(self, queries: Rows, lexical_BN: Rows, k: int, ties: Order) -> tuple[Rows, Rows]:
        documents, num_documents = self._base.documents, lexical_BN.shape[1]
        own = self._base.shard  # which is false if it is empty
        shard = Shard(0, num_documents, num_documents) if own is None else own
        base_BM = _base_scores(queries, documents, self._base.similarity)
        lexical_BM = lexical_BN[:, shard.start : shard.stop]
        parts = []
        for scores_BM, weight in zip((base_BM, lexical_BM), _WEIGHTS, strict=True):
            mean_B, deviation_B = _moments(scores_BM, num_documents)
            is_flat = deviation_B <= _ROUNDING * np.maximum(1, np.abs(mean_B))
            parts.append((scores_BM, mean_B, np.where(is_flat, 0.0, weight / np.where(is_flat, 1.0, deviation_B))))
        search = search_shards(partial(_search, parts, self._base.similarity), shard)
        found = search(queries, documents, k=k, ties=ties)
        return found.scores, found.indices


def _scores_of(index: Bm25Index, texts: list[str]) -> Rows:
    return index.scores(texts)


def _base_scores(queries: Rows, documents: Matrix, similarity: str) -> Rows:
    """Score every query with every document of this process in float64: (B, M)."""
    queries_BD = _exact_rows(queries, similarity)
    scores_BM = np.empty((len(queries), len(documents)))
    for part in row_blocks(len(documents), _DOCUMENT_BLOCK):
        documents_PD = _exact_rows(documents[part], similarity)
        if similarity == "euclidean":
            rows = (torch.from_numpy(queries_BD), torch.from_numpy(documents_PD))
            scores_BM[:, part] = -torch.cdist(*rows, compute_mode="donot_use_mm_for_euclid_dist").numpy()
        else:
            scores_BM[:, part] = queries_BD @ documents_PD.T
        release(documents)
    return scores_BM


def _exact_rows(vectors: Any, similarity: str) -> Rows:
    return unit_rows(vectors) if similarity == "cosine" else np.asarray(vectors, dtype=np.float64)


def _moments(scores_BM: Rows, num_documents: int) -> tuple[Rows, Rows]:
    """Return the mean and the standard deviation of each query's scores over the documents of all processes."""
    mean_B = sum(gather_objects(scores_BM.sum(axis=1, dtype=np.float64))) / num_documents
    # One query at a time, to hold no second matrix.
    squares = [np.square(scores_M - mean).sum() for scores_M, mean in zip(scores_BM, mean_B, strict=True)]
    return mean_B, np.sqrt(sum(gather_objects(np.array(squares))) / num_documents)


def _search(
    parts: list[tuple[Rows, Rows, Rows]], similarity: str, queries: Rows, documents: Matrix, *, k: int, ties: Order
) -> SearchResult:
    """Find the k best documents of this process, given scores, mean and factor of the base and of BM25."""
    (base_BM, mean_B, factor_B), (lexical_BM, lexical_mean_B, lexical_factor_B) = parts
    num_results = min(k, len(documents))
    scores = np.empty((len(queries), num_results), dtype=np.float32)
    indices = np.empty((len(queries), num_results), dtype=np.int64)
    for row, query in enumerate(queries):
        lexical_M = lexical_factor_B[row] * (lexical_BM[row] - lexical_mean_B[row])
        fused_M = factor_B[row] * (base_BM[row] - mean_B[row]) + lexical_M
        least = np.partition(fused_M, -num_results)[-num_results]
        largest = max(1.0, np.abs(base_BM[row]).max())
        margin = _ROUNDING * largest * factor_B[row] + _FLOAT32_ROUNDING * abs(least)
        candidates_C = np.flatnonzero(fused_M >= least - margin)
        exact_C = _exact_scores(query, documents, candidates_C, similarity)
        fused_C = factor_B[row] * (exact_C - mean_B[row]) + lexical_M[candidates_C]
        scores[row], indices[row] = best_rows(fused_C.astype(np.float32), candidates_C, num_results, ties)
    return SearchResult(scores, indices)


def _exact_scores(query: Rows, documents: Any, rows: Rows, similarity: str) -> Rows:
    """Compute scores that depend on the two vectors alone, so that equal documents tie: (C,) float64."""
    documents_CD = torch.from_numpy(np.asarray(read_far_apart(documents, rows), dtype=np.float64))
    return score_rows(torch.from_numpy(query).double()[None], documents_CD, similarity, in_place=True).numpy()
