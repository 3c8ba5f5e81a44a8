"""Exact nearest-neighbour search over vectors that need not fit in memory.

A first pass in float32 leaves a few candidates for each query and never loses one of the best (`first_pass`). The
candidates are scored again in float64, so that order and ties depend on the vectors alone, not on a document's
position in its block, which changes the last bits of a product.

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
from .first_pass import CandidatePass, DocumentBlock, Pairs, best_of_each, lengths, row_blocks
from .memory_maps import read_far_apart, release, will_need
from .similarity import SIMILARITIES, normalize_rows, score_rows
from .ties import Order, Rows, tie_numbers

Matrix: TypeAlias = "np.ndarray[Any, Any] | Tensor"

_BLOCK, _CARD_BLOCK = 4_096, 32_768  # documents; a card waits for the processor several times in each block
RESULTS_AT_ONCE = 2**21  # queries times results; more queries are searched in several rounds
_RESCORING_VALUES = 2**18  # float64 numbers held at once while candidates are scored again (2 MiB, which caches hold)
# Bound of the relative error of shifting and scaling a vector in float32. The error of a computed length is left out:
# there is room for it in the first pass, which takes twice the bound of a product's error.
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
    ties: Rows | Order | None = None,
    document_block: int | None = None,
    query_block: int = 1_024,
    device: str | torch.device = "cpu",
) -> SearchResult:
    """Find the k most similar documents of every query by comparing every pair.

    Queries (Q, D) and documents (N, D), N >= 1, are NumPy arrays, memory maps or tensors of any real dtype, read as
    float32 in blocks: a memory map may be larger than memory. The search holds about
    4 * document_block * (2 * D + query_block) bytes, and 200 bytes per query and result. Blocks are multiplied on
    `device`; by default, they have 4,096 documents, and 32,768 on a card. Documents with almost equal scores cost
    extra time: they are scored again in float64 on the CPU.

    The similarity is `cosine` (a zero vector has similarity 0 to everything), `dot` or `euclidean` (the score is minus
    the distance). `ties` orders documents with equal scores, the lower number first: it holds distinct integers (N,),
    or is a function that numbers some rows, such as `IdOrder`. The default number is the row.

    Returns scores (Q, K) float32 and document rows (Q, K) int64, K = min(k, N), each row from best to worst. Raises a
    UserError if shapes do not fit, a vector holds NaN or infinity, or scores leave float32.

    >>> found = exact_search(np.eye(2), np.array([[0.0, 2.0], [1.0, 1.0], [3.0, 0.0]]), k=2)
    >>> found.indices.tolist()
    [[2, 1], [0, 1]]
    >>> found.scores.round(3).tolist()
    [[1.0, 0.7070000171661377], [1.0, 0.7070000171661377]]
    """
    check_arguments(queries, documents, k, similarity)
    if document_block is None:
        document_block = _CARD_BLOCK if torch.device(device).type == "cuda" else _BLOCK
    if document_block < 1 or query_block < 1:
        raise UserError(f"expected blocks of at least one row, got {document_block} and {query_block}: enlarge them")
    search = _Search(documents, similarity, _order(ties, len(documents)))
    num_results = min(k, len(documents))
    scores = np.empty((len(queries), num_results), dtype=np.float32)
    indices = np.empty((len(queries), num_results), dtype=np.int64)
    with _full_float32_products():
        for rows in row_blocks(len(queries), max(1, RESULTS_AT_ONCE // num_results)):
            queries_QD = _read_rows(queries, rows, "query").cpu()
            pairs = search.candidates(queries_QD, num_results, document_block, query_block, torch.device(device))
            scores[rows], indices[rows] = search.ranked(pairs, queries_QD, num_results)
    return SearchResult(scores=scores, indices=indices)


def search_device(device: str | torch.device) -> torch.device:
    """Return where `exact_search` runs for a model on a device: there, or on the CPU if it is of another kind.

    The search is exact if a device adds products in float32, as processors and CUDA devices do.

    >>> [str(search_device(name)) for name in ("cuda:1", "cpu", "mps")]
    ['cuda:1', 'cpu', 'cpu']
    """
    device = torch.device(device)
    return device if device.type == "cuda" else torch.device("cpu")


def rank_candidates(
    queries: Matrix, documents: Matrix, candidates: Rows, *, similarity: str, ties: Rows | Order | None = None
) -> SearchResult:
    """Rank candidates from another search, (Q, C) distinct rows of documents, as `exact_search` ranks its own."""
    num_candidates = candidates.shape[1]
    check_arguments(queries, documents, num_candidates, similarity)
    search = _Search(documents, similarity, _order(ties, len(documents)))
    documents_P = torch.from_numpy(candidates.reshape(-1).astype(np.int64))
    queries_P = torch.arange(len(candidates)).repeat_interleave(num_candidates)
    unknown_P = torch.zeros(len(documents_P))
    pairs = Pairs(queries_P, documents_P, unknown_P, unknown_P)
    scores, indices = search.ranked(pairs, _read_rows(queries, slice(None), "query").cpu(), num_candidates)
    return SearchResult(scores=scores, indices=indices)


@dataclass(frozen=True)
class _Search:
    """Documents and how they are compared."""

    documents: Matrix
    similarity: str
    order: Order | None  # of documents with equal scores

    def candidates(
        self, queries_QD: Tensor, k: int, document_block: int, query_block: int, device: torch.device
    ) -> Pairs:
        """Return all pairs that can be among the k best, on the CPU."""
        blocks = list(row_blocks(len(self.documents), document_block))
        # Subtracting one common vector changes no ranking, and shorter vectors have smaller errors.
        origin_D = self._read_documents(blocks[0], device).mean(dim=0)
        prepared_QD = queries_QD.to(device)
        if self.similarity == "cosine":
            prepared_QD = normalize_rows(prepared_QD)
        errors_Q = _ROUNDING * lengths(prepared_QD)
        if self.similarity == "euclidean":
            prepared_QD, errors_Q = prepared_QD - origin_D, errors_Q + _ROUNDING * origin_D.norm()

        def choose(pairs: Pairs) -> Tensor:
            return self._best(pairs.to("cpu"), queries_QD, k)[0].to(device)

        first_pass = CandidatePass(prepared_QD, errors_Q, k=k, query_block=query_block, choose=choose)
        for rows, next_rows in zip(blocks, [*blocks[1:], slice(0, 0)], strict=True):
            will_need(self.documents, next_rows)
            first_pass.add(self._block(rows, origin_D))
            release(self.documents)
        return first_pass.candidates().to("cpu")

    def ranked(self, pairs: Pairs, queries_QD: Tensor, k: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return scores and document rows (Q, K) of the best pairs, given at least k for each query."""
        places_P, scores_P = self._best(pairs, queries_QD, k)
        return scores_P[places_P].view(-1, k).numpy(), pairs.documents[places_P].view(-1, k).numpy()

    def _read_documents(self, rows: slice, device: torch.device) -> Tensor:
        documents_MD = _read_rows(self.documents, rows, "document", device)
        return normalize_rows(documents_MD) if self.similarity == "cosine" else documents_MD

    def _block(self, rows: slice, origin_D: Tensor) -> DocumentBlock:
        """Prepare a block of documents for the first pass, with the bounds that its proof needs."""
        documents_MD = self._read_documents(rows, origin_D.device)
        distance = float(origin_D.norm())
        if self.similarity == "cosine":  # in place: normalised rows are a copy, others may be the caller's
            residuals_MD = documents_MD.sub_(origin_D)
            return DocumentBlock(rows.start, residuals_MD, None, 1 + distance, _ROUNDING * (1 + distance))
        residuals_MD = documents_MD - origin_D
        farthest = float(lengths(documents_MD).max()) + distance
        if self.similarity == "dot":
            return DocumentBlock(rows.start, residuals_MD, None, farthest, _ROUNDING * farthest)
        # Minus half the squared distance is the product plus this offset, up to a constant for each query.
        offsets_M = residuals_MD.square().sum(dim=1) / -2
        longest = float(lengths(residuals_MD).max())
        return DocumentBlock(rows.start, residuals_MD, offsets_M, longest, _ROUNDING * farthest)

    def _best(self, pairs: Pairs, queries_QD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the positions of each query's k best pairs, and the exact scores of all pairs, each (P,)."""
        scores_P = self._rescore(pairs, queries_QD)
        ties_P = pairs.documents
        if self.order is not None:
            queries_P, documents_P = pairs.queries.numpy(), pairs.documents.numpy()
            ties_P = torch.from_numpy(tie_numbers(queries_P, scores_P.numpy(), documents_P, self.order))
        return best_of_each(pairs.queries, scores_P, ties_P, k), scores_P

    def _rescore(self, pairs: Pairs, queries_QD: Tensor) -> Tensor:
        """Score pairs from their vectors in float64, rounded to float32: (P,)."""
        # Document by document, so that a memory map is read forwards and each document once.
        order_P = torch.argsort(pairs.documents, stable=True)
        pairs = pairs.where(order_P)
        scores_P = torch.empty(len(pairs.queries), dtype=torch.float32)
        for part in row_blocks(len(scores_P), max(1, _RESCORING_VALUES // max(1, queries_QD.shape[1]))):
            distinct, places = torch.unique_consecutive(pairs.documents[part], return_inverse=True)
            documents_PD = _read_rows(self.documents, distinct.numpy(), "document").cpu()[places].double()
            queries_PD = queries_QD[pairs.queries[part]].double()
            scores_P[part] = score_rows(queries_PD, documents_PD, self.similarity, in_place=True).float()
        if not bool(scores_P.isfinite().all()):
            raise NotFiniteError("expected similarities within float32, got an overflow: scale the vectors down")
        return torch.empty_like(scores_P).scatter_(0, order_P, scores_P)


def check_arguments(queries: Matrix, documents: Matrix, k: int, similarity: str) -> None:
    """Raise a UserError if shapes do not fit, k is below 1, or the similarity is unknown."""
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
        raise UserError(f"expected a similarity among {', '.join(SIMILARITIES)}, got {similarity!r}: use one of these")


def _order(ties: Rows | Order | None, num_documents: int) -> Order | None:
    """Return the function that numbers rows in the order of ties."""
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
def _full_float32_products() -> Iterator[None]:
    """Keep torch from computing products in TF32 or bfloat16, whose errors exceed the first pass's bound."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _read_rows(matrix: Matrix, rows: slice | Rows, what: str, device: torch.device | None = None) -> Tensor:
    """Read some rows as float32, on a device or the one they are on, and refuse NaN and infinity."""
    if isinstance(matrix, Tensor):
        block = matrix[rows if isinstance(rows, slice) else torch.from_numpy(rows).to(matrix.device)]
        block = block.detach().float()
    else:
        read = matrix[rows] if isinstance(rows, slice) else read_far_apart(matrix, rows)
        array = np.ascontiguousarray(read, dtype=np.float32)
        # torch warns about read-only memory maps; other arrays are shared, so they must not be changed in place.
        block = torch.from_numpy(array if array.flags.writeable else array.copy())
    if device is not None:
        block = block.to(device)
    # The sum of a block shows NaN and infinity five times faster; if only the sum overflowed, the second check passes.
    if not bool(torch.isfinite(block.sum())) and not bool(torch.isfinite(block).all()):
        raise NotFiniteError(f"expected finite {what} vectors, got NaN or infinity: check the model and its precision")
    return block
