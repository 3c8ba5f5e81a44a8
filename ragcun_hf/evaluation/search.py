"""Exact nearest-neighbour search over vectors that need not fit in memory.

The product of one block is computed in float32, where equal documents can differ in the last bit by
their place in the block. So each block only proposes candidates; the candidates are scored again in
float64, and order and ties depend on the vectors alone.

Shape letters used in this file: Q = queries, B = queries in a block, N = documents, M = documents in
a block, D = vector width, C = candidates kept per query, K = results per query.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

SIMILARITIES = ("cosine", "dot", "euclidean")
Matrix: TypeAlias = "np.ndarray[Any, Any] | Tensor"

_SPARE_CANDIDATES = 16  # kept beyond k, so that float32 rounding at the border cannot lose a result
_RESCORING_VALUES = 4_000_000  # float64 numbers held at once while scoring candidates again (32 MB)


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
    document_block: int = 16_384,
    query_block: int = 1_024,
    device: str | torch.device = "cpu",
) -> SearchResult:
    """Find the k most similar documents of every query, comparing every pair.

    Documents are read once, block by block, so a memory map larger than the memory works. Memory
    held is about 4 * (document_block * (D + query_block) + query_block * D) bytes, plus 12 bytes per
    query and candidate.

    Args:
        queries: Shape (Q, D), NumPy array, memory map or tensor of any real dtype; read as float32.
        documents: Shape (N, D), likewise, N >= 1.
        k: Results per query, >= 1; more than N gives N.
        similarity: `cosine` (a zero vector has similarity 0 to everything), `dot`, or `euclidean`
            (the score is minus the Euclidean distance, so that larger is always better).
        document_block: M, documents compared at once.
        query_block: B, queries compared at once.
        device: Where the products of the blocks are computed; scores are refined on the CPU.

    Returns:
        Scores (Q, K) float32 and document rows (Q, K) int64, K = min(k, N), each row from the best to
        the worst. Equal scores are ordered by the lower document row.

    Raises:
        UserError: If shapes do not fit, a vector holds NaN or infinity, or scores leave float32.

    Example:
        >>> found = exact_search(np.eye(2), np.array([[0.0, 2.0], [1.0, 1.0], [3.0, 0.0]]), k=2)
        >>> found.indices.tolist()
        [[2, 1], [0, 1]]
        >>> found.scores.round(3).tolist()
        [[1.0, 0.7070000171661377], [1.0, 0.7070000171661377]]
    """
    _check_arguments(queries, documents, k, similarity, document_block, query_block)
    num_results = min(k, len(documents))
    num_candidates = min(k + _SPARE_CANDIDATES, len(documents))
    candidates = _find_candidates(
        queries, documents, num_candidates, similarity, document_block, query_block, torch.device(device)
    )
    scores = np.empty((len(queries), num_results), dtype=np.float32)
    indices = np.empty((len(queries), num_results), dtype=np.int64)
    step = max(1, _RESCORING_VALUES // (num_candidates * max(1, queries.shape[1])))
    for rows in _blocks(len(queries), step):
        block_scores_BC = _rescore(queries, documents, rows, candidates[rows], similarity)
        order_BC = torch.sort(block_scores_BC, dim=1, descending=True, stable=True).indices[:, :num_results]
        scores[rows] = block_scores_BC.gather(1, order_BC).numpy()
        indices[rows] = candidates[rows].gather(1, order_BC).numpy()
    if not np.isfinite(scores).all():
        raise UserError("expected similarities within float32, got an overflow: scale the vectors down")
    return SearchResult(scores=scores, indices=indices)


def _check_arguments(
    queries: Matrix, documents: Matrix, k: int, similarity: str, document_block: int, query_block: int
) -> None:
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
    if document_block < 1 or query_block < 1:
        raise UserError(f"expected blocks of at least one row, got {document_block} and {query_block}: enlarge them")


def _blocks(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _read_rows(matrix: Matrix, rows: slice | np.ndarray[Any, Any], what: str) -> Tensor:
    """Read some rows as float32 on the device they lie on, refusing NaN and infinity."""
    if isinstance(matrix, Tensor):
        block = matrix[rows if isinstance(rows, slice) else torch.from_numpy(rows).to(matrix.device)]
        block = block.detach().float()
    else:
        array = np.ascontiguousarray(matrix[rows], dtype=np.float32)
        # torch warns about read-only memory maps; other arrays are shared, so nothing here works in place.
        block = torch.from_numpy(array if array.flags.writeable else array.copy())
    # The sum of a block shows NaN and infinity five times faster; only a sum that overflowed is a false alarm.
    if not bool(torch.isfinite(block.sum())) and not bool(torch.isfinite(block).all()):
        raise UserError(f"expected finite {what} vectors, got NaN or infinity: check the model and its precision")
    return block


def _normalize(x_BD: Tensor) -> Tensor:
    """Scale rows to unit length; zero rows stay zero."""
    norm_B1 = torch.linalg.vector_norm(x_BD, dim=1, keepdim=True)
    if bool(((norm_B1 < 1e-15) | (norm_B1 > 1e15)).any()):
        # Squares of very large or small entries leave float32: scale rows by their largest entry first.
        largest_B1 = x_BD.abs().amax(dim=1, keepdim=True)
        x_BD = x_BD / torch.where(largest_B1 > 0, largest_B1, 1.0)
        norm_B1 = torch.linalg.vector_norm(x_BD, dim=1, keepdim=True)
    return x_BD / torch.where(norm_B1 > 0, norm_B1, 1.0)


def _find_candidates(
    queries: Matrix,
    documents: Matrix,
    num_candidates: int,
    similarity: str,
    document_block: int,
    query_block: int,
    device: torch.device,
) -> Tensor:
    """Return the rows (Q, C) of the best documents by the float32 product, in increasing order."""
    scores_QC = torch.full((len(queries), num_candidates), -torch.inf, device=device)
    indices_QC = torch.zeros((len(queries), num_candidates), dtype=torch.int64, device=device)
    origin_D: Tensor | None = None
    for document_rows in _blocks(len(documents), document_block):
        documents_MD = _read_rows(documents, document_rows, "document").to(device)
        if origin_D is None:
            # Distances ignore a shift; near the origin |q|^2 + |d|^2 - 2qd loses no digits.
            origin_D = documents_MD.mean(dim=0) if similarity == "euclidean" else torch.zeros_like(documents_MD[0])
        documents_MD = _normalize(documents_MD) if similarity == "cosine" else documents_MD - origin_D
        for rows in _blocks(len(queries), query_block):
            queries_BD = _read_rows(queries, rows, "query").to(device)
            queries_BD = _normalize(queries_BD) if similarity == "cosine" else queries_BD - origin_D
            block_scores_BM = queries_BD @ documents_MD.T
            if similarity == "euclidean":  # the query's own norm does not change its ranking
                block_scores_BM -= documents_MD.square().sum(dim=1) / 2
            columns_BC = _best_columns(block_scores_BM, num_candidates)
            # Rows kept so far come first and are lower, so a stable sort prefers them at equal scores.
            scores_BX = torch.cat([scores_QC[rows], block_scores_BM.gather(1, columns_BC)], dim=1)
            indices_BX = torch.cat([indices_QC[rows], columns_BC + document_rows.start], dim=1)
            sorted_BX = torch.sort(scores_BX, dim=1, descending=True, stable=True)
            scores_QC[rows] = sorted_BX.values[:, :num_candidates]
            indices_QC[rows] = indices_BX.gather(1, sorted_BX.indices[:, :num_candidates])
    return indices_QC.sort(dim=1).values.cpu()


def _best_columns(scores_BM: Tensor, num_columns: int) -> Tensor:
    """Return the columns (B, C) of the highest scores, best first, the lower column at equal scores."""
    if num_columns >= scores_BM.shape[1]:
        return torch.sort(scores_BM, dim=1, descending=True, stable=True).indices
    best = torch.topk(scores_BM, num_columns + 1, dim=1)
    columns_BC = best.indices[:, :num_columns].contiguous()
    # topk takes any of several equal scores at its border: sort those rows fully.
    tied_rows = torch.nonzero(best.values[:, -1] == best.values[:, -2]).flatten()
    if len(tied_rows):
        fully_sorted = torch.sort(scores_BM[tied_rows], dim=1, descending=True, stable=True)
        columns_BC[tied_rows] = fully_sorted.indices[:, :num_columns]
    columns_BC = columns_BC.sort(dim=1).values
    order_BC = torch.sort(scores_BM.gather(1, columns_BC), dim=1, descending=True, stable=True).indices
    return columns_BC.gather(1, order_BC)


def _rescore(queries: Matrix, documents: Matrix, rows: slice, candidates_BC: Tensor, similarity: str) -> Tensor:
    """Score candidates (B, C) again from the vectors alone, in float64 rounded to float32."""
    # Sorted distinct rows: a memory map is read forwards, and repeated documents only once.
    distinct, places = np.unique(candidates_BC.numpy(), return_inverse=True)
    documents_XD = _read_rows(documents, distinct, "document").cpu().double()
    queries_BD = _read_rows(queries, rows, "query").cpu().double()
    places_BC = torch.from_numpy(places.reshape(candidates_BC.shape))
    documents_BCD = documents_XD[places_BC]
    if similarity == "euclidean":
        return -torch.linalg.vector_norm(documents_BCD - queries_BD.unsqueeze(1), dim=2).float()
    # Not a batched product: this sum treats every row alike, so equal documents score equally.
    scores_BC = documents_BCD.mul_(queries_BD.unsqueeze(1)).sum(dim=2)
    if similarity == "cosine":  # squares of float32 numbers stay within float64
        norms_X = torch.linalg.vector_norm(documents_XD, dim=1)
        norms_BC = norms_X[places_BC] * torch.linalg.vector_norm(queries_BD, dim=1, keepdim=True)
        scores_BC /= torch.where(norms_BC > 0, norms_BC, 1.0)
    return scores_BC.float()
