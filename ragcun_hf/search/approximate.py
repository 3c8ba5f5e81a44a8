"""Approximate search with faiss, for more queries than an exact search is worth, and how much it misses.

Documents are parted into lists around centroids, and a query looks into the nearest lists only (IVF). What it finds is
scored and ordered as the exact search does it, so the two differ in what is missed alone.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import numpy as np
import torch

from ..errors import NotFiniteError, UserError
from .exact import Matrix, SearchResult, check_arguments, exact_search, normalize_rows, rank_candidates
from .ties import Order

DEFAULT_PROBES = 32
_POINTS_PER_LIST = 64  # that a centroid is learned from; more move it little
_BLOCK = 65_536  # documents added at once
_MEASURED_QUERIES = 100  # of each call
_SPARE = 16  # candidates beyond k, whose order may change when they are scored again


def require_faiss() -> None:
    """Tell early where faiss is not installed.

    Raises:
        UserError: With the command that installs it.
    """
    if importlib.util.find_spec("faiss") is None:
        raise UserError("--search faiss expects faiss: run pip install 'ragcun_hf[faiss]', or leave the flag out")


def approximate_search(
    queries: Matrix,
    documents: Matrix,
    *,
    k: int,
    similarity: str = "cosine",
    ties: np.ndarray[Any, Any] | Order | None = None,
    num_probes: int = DEFAULT_PROBES,
) -> SearchResult:
    """Find about the k most similar documents of every query.

    Args:
        queries: Shape (Q, D).
        documents: Shape (N, D).
        k: Results per query; more than N gives N.
        similarity: `cosine`, `dot` or `euclidean`.
        ties: As for `exact_search`.
        num_probes: Lists that each query looks into, of about sqrt(N); more find more and take longer.

    Returns:
        As `exact_search`. A query whose lists hold fewer than k documents is searched exactly.

    Raises:
        UserError: As `exact_search`, or if faiss is not installed or `num_probes` is below 1.
    """
    require_faiss()
    if num_probes < 1:
        raise UserError(f"--faiss_probes must be at least 1, got {num_probes}: set it to e.g. {DEFAULT_PROBES}")
    check_arguments(queries, documents, k, similarity)
    k = min(k, len(documents))
    index = _build_index(documents, similarity)
    index.nprobe = num_probes
    wanted = min(k + _SPARE, len(documents))
    _, found = index.search(_prepared(queries, slice(None), similarity), wanted)
    # Short answers are filled up with -1.
    is_short = (found < 0).any(axis=1)
    scores = np.empty((len(found), k), dtype=np.float32)
    indices = np.empty((len(found), k), dtype=np.int64)
    vectors, whole, short = np.asarray(queries), np.flatnonzero(~is_short), np.flatnonzero(is_short)
    if len(whole):
        part = rank_candidates(vectors[whole], documents, found[whole], similarity=similarity, ties=ties)
        scores[whole], indices[whole] = part.scores[:, :k], part.indices[:, :k]
    if len(short):
        part = exact_search(vectors[short], documents, k=k, similarity=similarity, ties=ties)
        scores[short], indices[short] = part.scores, part.indices
    return SearchResult(scores=scores, indices=indices)


class MeasuredSearch:
    """Approximate search that looks, for some queries of each call, how much it misses.

    Args:
        num_probes: As for `approximate_search`.

    Attributes:
        recalls: Of each call, the share of the exact results that were found.
    """

    def __init__(self, *, num_probes: int) -> None:
        self._num_probes = num_probes
        self.recalls: list[float] = []

    def __call__(self, queries: Matrix, documents: Matrix, *, k: int, **options: Any) -> SearchResult:
        """Search, called as `exact_search` is."""
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
    quantizer = faiss.IndexFlat(dim, metric)
    index = faiss.IndexIVFFlat(quantizer, dim, num_lists, metric)
    index.cp.min_points_per_centroid = 1  # small corpora are fine, and need no warning
    sample = np.random.default_rng(0).permutation(len(documents))[: _POINTS_PER_LIST * num_lists]
    index.train(_prepared(documents, np.sort(sample), similarity))
    for start in range(0, len(documents), _BLOCK):
        index.add(_prepared(documents, slice(start, start + _BLOCK), similarity))
    return index


def _prepared(matrix: Matrix, rows: Any, similarity: str) -> np.ndarray[Any, Any]:
    """Read some rows as float32, of unit length where cosines are compared."""
    block = np.array(np.asarray(matrix)[rows], dtype=np.float32)
    if not np.isfinite(block).all():
        raise NotFiniteError("expected finite vectors, got NaN or infinity: check the model and its precision")
    return normalize_rows(torch.from_numpy(block)).numpy() if similarity == "cosine" else block
