"""Approximate search with faiss, for more queries than exact search can handle in time, and how much it misses.

An inverted-file index (IVF) assigns documents to lists around centroids, and each query searches the nearest lists
only. The documents found are scored and ordered as in the exact search, so the only difference is missed documents.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import numpy as np
import torch

from ..errors import NotFiniteError, UserError
from .exact import Matrix, SearchResult, check_arguments, exact_search, rank_candidates
from .similarity import normalize_rows
from .ties import Order, Rows

DEFAULT_PROBES = 32
_POINTS_PER_LIST = 64  # documents that each centroid is learned from; more hardly move it
_BLOCK = 65_536  # documents added at once
_MEASURED_QUERIES = 100  # of each call, searched exactly too
_SPARE = 16  # candidates beyond k, because scoring them again may change their order


def require_faiss() -> None:
    """Raise a UserError with the install command if faiss is missing."""
    if importlib.util.find_spec("faiss") is None:
        raise UserError("--search faiss expects faiss: run pip install faiss-cpu, or leave the flag out")


def approximate_search(
    queries: Matrix,
    documents: Matrix,
    *,
    k: int,
    similarity: str = "cosine",
    ties: Rows | Order | None = None,
    num_probes: int = DEFAULT_PROBES,
    device: str | torch.device = "cpu",
) -> SearchResult:
    """Find about the k most similar documents of every query, with the arguments and the result of `exact_search`.

    `num_probes` is the number of lists that each query searches, of about sqrt(N) lists; more find more and take
    longer. A query whose lists hold fewer than k documents is searched exactly, on `device`.
    """
    require_faiss()
    if num_probes < 1:
        raise UserError(f"--faiss_probes must be at least 1, got {num_probes}: set it to e.g. {DEFAULT_PROBES}")
    check_arguments(queries, documents, k, similarity)
    k = min(k, len(documents))
    index = _build_index(documents, similarity)
    index.nprobe = num_probes
    _, found = index.search(_faiss_vectors(queries, slice(None), similarity), min(k + _SPARE, len(documents)))
    scores = np.empty((len(found), k), dtype=np.float32)
    indices = np.empty((len(found), k), dtype=np.int64)
    is_short = (found < 0).any(axis=1)  # faiss pads short results with -1
    vectors, complete, short = np.asarray(queries), np.flatnonzero(~is_short), np.flatnonzero(is_short)
    if len(complete):
        part = rank_candidates(vectors[complete], documents, found[complete], similarity=similarity, ties=ties)
        scores[complete], indices[complete] = part.scores[:, :k], part.indices[:, :k]
    if len(short):
        part = exact_search(vectors[short], documents, k=k, similarity=similarity, ties=ties, device=device)
        scores[short], indices[short] = part.scores, part.indices
    return SearchResult(scores=scores, indices=indices)


class MeasuredSearch:
    """Approximate search that measures how much it misses, on a sample of each call's queries."""

    def __init__(self, *, num_probes: int) -> None:
        self._num_probes = num_probes
        self.recalls: list[float] = []  # of each call: the share of the exact results that were found

    def __call__(self, queries: Matrix, documents: Matrix, *, k: int, **options: Any) -> SearchResult:
        """Search, with the arguments of `exact_search`."""
        found = approximate_search(queries, documents, k=k, num_probes=self._num_probes, **options)
        rows = np.linspace(0, len(found.indices) - 1, num=min(_MEASURED_QUERIES, len(found.indices)), dtype=np.int64)
        exact = exact_search(np.asarray(queries)[rows], documents, k=k, **options)
        self.recalls.append(recall_of(SearchResult(found.scores[rows], found.indices[rows]), exact))
        return found


def recall_of(found: SearchResult, exact: SearchResult) -> float:
    """Return the share of the exact results that were found, averaged over queries."""
    rows = zip(found.indices, exact.indices, strict=True)
    return float(np.mean([len(np.intersect1d(some, best)) / len(best) for some, best in rows]))


def _build_index(documents: Matrix, similarity: str) -> Any:
    import faiss

    dim, num_lists = documents.shape[1], max(1, round(math.sqrt(len(documents))))
    metric = faiss.METRIC_L2 if similarity == "euclidean" else faiss.METRIC_INNER_PRODUCT
    index = faiss.IndexIVFFlat(faiss.IndexFlat(dim, metric), dim, num_lists, metric)
    index.cp.min_points_per_centroid = 1  # small corpora need no warning
    sample = np.random.default_rng(0).permutation(len(documents))[: _POINTS_PER_LIST * num_lists]
    index.train(_faiss_vectors(documents, np.sort(sample), similarity))
    for start in range(0, len(documents), _BLOCK):
        index.add(_faiss_vectors(documents, slice(start, start + _BLOCK), similarity))
    return index


def _faiss_vectors(matrix: Matrix, rows: Any, similarity: str) -> np.ndarray[Any, Any]:
    """Read some rows as float32, scaled to unit length for cosine similarity."""
    block = np.array(np.asarray(matrix)[rows], dtype=np.float32)
    if not np.isfinite(block).all():
        raise NotFiniteError("expected finite vectors, got NaN or infinity: check the model and its precision")
    return normalize_rows(torch.from_numpy(block)).numpy() if similarity == "cosine" else block
