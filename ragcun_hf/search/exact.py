"""Exact nearest-neighbour search over vectors that need not fit in memory.

A first pass in float32 leaves a few candidates of each query, and never loses one of the best (`first_pass`). The
candidates are scored again in float64: order and ties depend on the vectors alone, and not on where a document stands
in its block, which moves the last bits of a product.

Shape letters used in this file: Q = queries, N = documents, M = documents in a block, D = vector width, K = results
per query, P = pairs of a query and a document.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..errors import NotFiniteError, UserError
from .first_pass import CandidatePass, DocumentBlock, Pairs, best_of_each, lengths
from .memory_maps import read_far_apart, release, will_need
from .ties import Order, tie_numbers

SIMILARITIES = ("cosine", "dot", "euclidean")
Matrix: TypeAlias = "np.ndarray[Any, Any] | Tensor"

_RESULTS_AT_ONCE = 2**21  # queries times results; more queries are searched in turns
_RESCORING_VALUES = 2**18  # float64 numbers held at once while scoring candidates again (2 MiB, which caches hold)
# Bound of the relative error of shifting and scaling a vector in float32. That of its length's sum of squares is not
# in here: the first pass doubles its bound of a product's error, which has room for it.
_ROUNDING = 2.0**-21


@dataclass(frozen=True)
class SearchResult:
    """The best documents of every query, best first."""

    scores: np.ndarray[Any, Any]  # (Q, K) float32
    indices: np.ndarray[Any, Any]  # (Q, K) int64, rows of the documents


def exact_search(
    queries: Matrix,
    documents: Matrix,
    *,
    k: int,
    similarity: str = "cosine",
    ties: np.ndarray[Any, Any] | Order | None = None,
    document_block: int = 4_096,
    query_block: int = 1_024,
    device: str | torch.device = "cpu",
) -> SearchResult:
    """Find the k most similar documents of every query, comparing every pair.

    Documents are read block by block, so a memory map larger than the memory works. Memory held is about
    4 * document_block * (2 * D + query_block) bytes, and 200 bytes per query and result. Where very many documents are
    as good as equal, the time grows with the number of such pairs: each is scored again in float64.

    Args:
        queries: Shape (Q, D), NumPy array, memory map or tensor of any real dtype; read as float32.
        documents: Shape (N, D), likewise, N >= 1.
        k: Results per query, >= 1; more than N gives N.
        similarity: `cosine` (a zero vector has similarity 0 to everything), `dot`, or `euclidean`
            (the score is minus the Euclidean distance, so that larger is always better).
        ties: Shape (N,), all different, whole numbers: of documents with equal scores the one with the
            lower number comes first. Or a function that gives such numbers for rows, see `IdOrder`. Default: the row.
        document_block: M, documents compared at once.
        query_block: Queries compared at once.
        device: Where the products of the blocks are computed; scores are refined on the CPU.

    Returns:
        Scores (Q, K) float32 and document rows (Q, K) int64, K = min(k, N), each row from the best to
        the worst.

    Raises:
        UserError: If shapes do not fit, a vector holds NaN or infinity, or scores leave float32.

    Example:
        >>> found = exact_search(np.eye(2), np.array([[0.0, 2.0], [1.0, 1.0], [3.0, 0.0]]), k=2)
        >>> found.indices.tolist()
        [[2, 1], [0, 1]]
        >>> found.scores.round(3).tolist()
        [[1.0, 0.7070000171661377], [1.0, 0.7070000171661377]]
    """
    check_arguments(queries, documents, k, similarity)
    if document_block < 1 or query_block < 1:
        raise UserError(f"expected blocks of at least one row, got {document_block} and {query_block}: enlarge them")
    order = _order(ties, len(documents))
    search = _Search(documents, similarity, order, document_block, query_block, torch.device(device))
    num_results = min(k, len(documents))
    scores = np.empty((len(queries), num_results), dtype=np.float32)
    indices = np.empty((len(queries), num_results), dtype=np.int64)
    with _whole_float32():
        for rows in _blocks(len(queries), max(1, _RESULTS_AT_ONCE // num_results)):
            queries_QD = _read_rows(queries, rows, "query").cpu()
            scores[rows], indices[rows] = search.best(queries_QD, num_results)
    return SearchResult(scores=scores, indices=indices)


def rank_candidates(
    queries: Matrix,
    documents: Matrix,
    candidates: np.ndarray[Any, Any],
    *,
    similarity: str,
    ties: np.ndarray[Any, Any] | Order | None = None,
) -> SearchResult:
    """Score candidates that were found by other means, exactly as `exact_search` scores its own.

    Args:
        queries: Shape (Q, D).
        documents: Shape (N, D).
        candidates: Shape (Q, C), rows of documents, all different within a query.
        similarity: As for `exact_search`.
        ties: As for `exact_search`.

    Returns:
        All candidates, each query's best first.

    Raises:
        UserError: As `exact_search`.
    """
    check_arguments(queries, documents, candidates.shape[1], similarity)
    search = _Search(documents, similarity, _order(ties, len(documents)), 1, 1, torch.device("cpu"))
    found_P = torch.from_numpy(candidates.reshape(-1).astype(np.int64))
    queries_P = torch.arange(len(candidates)).repeat_interleave(candidates.shape[1])
    unknown_P = torch.zeros(len(found_P))
    pairs = Pairs(queries_P, found_P, unknown_P, unknown_P)
    scores, indices = search.ranked(pairs, _read_rows(queries, slice(None), "query").cpu(), candidates.shape[1])
    return SearchResult(scores=scores, indices=indices)


@dataclass(frozen=True)
class _Search:
    """Documents and how they are compared; arguments are already checked."""

    documents: Matrix
    similarity: str
    order: Order | None  # of documents with equal scores
    document_block: int
    query_block: int
    device: torch.device

    def best(self, queries_QD: Tensor, k: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return scores and rows (Q, K) of the best documents of some queries."""
        return self.ranked(self._candidates(queries_QD, k), queries_QD, k)

    def ranked(
        self, candidates: Pairs, queries_QD: Tensor, k: int
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return scores and rows (Q, K) of the best of at least k candidates of each query."""
        scores_P = self._rescored(candidates, queries_QD)
        places_P = best_of_each(candidates.queries, scores_P, self._ties(candidates, scores_P), k)
        return scores_P[places_P].view(-1, k).numpy(), candidates.documents[places_P].view(-1, k).numpy()

    def _ties(self, pairs: Pairs, scores_P: Tensor) -> Tensor:
        if self.order is None:
            return pairs.documents
        queries_P, documents_P = pairs.queries.numpy(), pairs.documents.numpy()
        return torch.from_numpy(tie_numbers(queries_P, scores_P.numpy(), documents_P, self.order))

    def _candidates(self, queries_QD: Tensor, k: int) -> Pairs:
        """Return all pairs that can be among the best, on the CPU."""
        blocks = list(_blocks(len(self.documents), self.document_block))
        # A part that all documents share ranks none before another, and short vectors have small errors.
        origin_D = self._documents(blocks[0]).mean(dim=0)
        prepared_QD, errors_Q = self._prepared(queries_QD.to(self.device), origin_D)

        def choose(pairs: Pairs) -> Tensor:
            on_cpu = pairs.to("cpu")
            scores_P = self._rescored(on_cpu, queries_QD)
            return best_of_each(on_cpu.queries, scores_P, self._ties(on_cpu, scores_P), k).to(pairs.queries.device)

        first_pass = CandidatePass(prepared_QD, errors_Q, k=k, query_block=self.query_block, choose=choose)
        for rows, next_rows in zip(blocks, [*blocks[1:], slice(0, 0)], strict=True):
            will_need(self.documents, next_rows)
            first_pass.add(self._prepared_block(rows, origin_D))
            release(self.documents)
        return first_pass.candidates().to("cpu")

    def _documents(self, rows: slice) -> Tensor:
        """Read some documents onto the device, normalised where cosines are compared."""
        documents_MD = _read_rows(self.documents, rows, "document").to(self.device)
        return normalize_rows(documents_MD) if self.similarity == "cosine" else documents_MD

    def _prepared_block(self, rows: slice, origin_D: Tensor) -> DocumentBlock:
        documents_MD = self._documents(rows)
        distance = float(origin_D.norm())
        if self.similarity == "cosine":  # normalised rows are our own; others may be the caller's
            return DocumentBlock(
                rows.start, documents_MD.sub_(origin_D), None, 1 + distance, _ROUNDING * (1 + distance)
            )
        residuals_MD = documents_MD - origin_D
        farthest = float(lengths(documents_MD).max()) + distance
        if self.similarity == "dot":
            return DocumentBlock(rows.start, residuals_MD, None, farthest, _ROUNDING * farthest)
        # Minus half the squared distance is the product less this, but for a constant of the query.
        offsets_M = residuals_MD.square().sum(dim=1) / -2
        return DocumentBlock(
            rows.start, residuals_MD, offsets_M, float(lengths(residuals_MD).max()), _ROUNDING * farthest
        )

    def _prepared(self, queries_QD: Tensor, origin_D: Tensor) -> tuple[Tensor, Tensor]:
        """Return the queries as the first pass multiplies them, and the lengths of their errors."""
        if self.similarity == "cosine":
            queries_QD = normalize_rows(queries_QD)
        errors_Q = _ROUNDING * lengths(queries_QD)
        if self.similarity == "euclidean":
            return queries_QD - origin_D, errors_Q + _ROUNDING * origin_D.norm()
        return queries_QD, errors_Q

    def _rescored(self, pairs: Pairs, queries_QD: Tensor) -> Tensor:
        """Score pairs from the vectors alone, in float64 rounded to float32: (P,), in their order."""
        # Document by document: a memory map is read forwards, and each document once.
        order_P = torch.argsort(pairs.documents, stable=True)
        pairs = pairs.where(order_P)
        scores_P = torch.empty(len(pairs.queries), dtype=torch.float32)
        for part in _blocks(len(scores_P), max(1, _RESCORING_VALUES // max(1, queries_QD.shape[1]))):
            distinct, places = torch.unique_consecutive(pairs.documents[part], return_inverse=True)
            documents_PD = _read_rows(self.documents, distinct.numpy(), "document").cpu()[places].double()
            queries_PD = queries_QD[pairs.queries[part]].double()
            scores_P[part] = _similarity_of_rows(queries_PD, documents_PD, self.similarity)
        if not bool(scores_P.isfinite().all()):
            raise NotFiniteError("expected similarities within float32, got an overflow: scale the vectors down")
        return torch.empty_like(scores_P).scatter_(0, order_P, scores_P)


def check_arguments(queries: Matrix, documents: Matrix, k: int, similarity: str) -> None:
    """Raise UserError where shapes do not fit, or there is no such similarity."""
    if queries.ndim != 2 or documents.ndim != 2 or queries.shape[1] != documents.shape[1]:
        raise UserError(
            f"expected queries (Q, D) and documents (N, D) of one width, got {tuple(queries.shape)} and "
            f"{tuple(documents.shape)}: encode both with the same model"
        )
    if len(documents) == 0:
        raise UserError("expected at least one document, got none: check the corpus")
    if k < 1:
        raise UserError(f"expected k >= 1 results per query, got {k}: ask for at least one")
    if similarity not in SIMILARITIES:
        raise UserError(f"expected a similarity among {', '.join(SIMILARITIES)}, got {similarity!r}: use one")


def _order(ties: np.ndarray[Any, Any] | Order | None, num_documents: int) -> Order | None:
    """Return what numbers rows in the order of ties."""
    if ties is None or callable(ties):
        return ties
    distinct, ranks = np.unique(ties, return_inverse=True)
    if np.shape(ties) != (num_documents,) or len(distinct) != num_documents:
        raise UserError(
            f"expected {num_documents} different numbers for ties, one per document, got {len(distinct)} in shape "
            f"{np.shape(ties)}: number the documents"
        )
    return ranks.__getitem__


@contextmanager
def _whole_float32() -> Iterator[None]:
    """Keep products from being computed in TF32 or bfloat16, whose errors the first pass does not reckon with."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _blocks(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _read_rows(matrix: Matrix, rows: slice | np.ndarray[Any, Any], what: str) -> Tensor:
    """Read some rows as float32 on the device they lie on, refusing NaN and infinity."""
    if isinstance(matrix, Tensor):
        block = matrix[rows if isinstance(rows, slice) else torch.from_numpy(rows).to(matrix.device)]
        block = block.detach().float()
    else:
        read = matrix[rows] if isinstance(rows, slice) else read_far_apart(matrix, rows)
        array = np.ascontiguousarray(read, dtype=np.float32)
        # torch warns about read-only memory maps; other arrays are shared, so nothing here works in place.
        block = torch.from_numpy(array if array.flags.writeable else array.copy())
    # The sum of a block shows NaN and infinity five times faster; only a sum that overflowed is a false alarm.
    if not bool(torch.isfinite(block.sum())) and not bool(torch.isfinite(block).all()):
        raise NotFiniteError(f"expected finite {what} vectors, got NaN or infinity: check the model and its precision")
    return block


def normalize_rows(x_BD: Tensor) -> Tensor:
    """Scale rows to unit length; zero rows stay zero."""
    norm_B1 = torch.linalg.vector_norm(x_BD, dim=1, keepdim=True)
    if bool(((norm_B1 < 1e-15) | (norm_B1 > 1e15)).any()):
        # Squares of very large or small entries leave float32: scale rows by their largest entry first.
        largest_B1 = x_BD.abs().amax(dim=1, keepdim=True)
        x_BD = x_BD / torch.where(largest_B1 > 0, largest_B1, 1.0)
        norm_B1 = torch.linalg.vector_norm(x_BD, dim=1, keepdim=True)
    return x_BD / torch.where(norm_B1 > 0, norm_B1, 1.0)


def _similarity_of_rows(queries_PD: Tensor, documents_PD: Tensor, similarity: str) -> Tensor:
    """Score row by row, in place; a product of matrices would not treat every row alike."""
    if similarity == "euclidean":
        return -torch.linalg.vector_norm(documents_PD.sub_(queries_PD), dim=1).float()
    if similarity == "cosine":  # squares of float32 numbers stay within float64
        norms_P = torch.linalg.vector_norm(documents_PD, dim=1) * torch.linalg.vector_norm(queries_PD, dim=1)
        return (documents_PD.mul_(queries_PD).sum(dim=1) / torch.where(norms_P > 0, norms_P, 1.0)).float()
    return documents_PD.mul_(queries_PD).sum(dim=1).float()
