"""The first pass of an exact search: one float32 matrix product, which rules out documents that cannot be found.

The error of the product is bounded. A document whose score is more than twice that bound below the k-th best score is
not among the k best; every other document is a candidate and is scored again later. So no result is lost by rounding.
If a query has too many candidates for memory (a collapsed model, a corpus full of repetitions), they are scored again
at once, and only the k best are kept.

Shape letters used in this file: Q = queries, B = queries in a block, M = documents in a block, D = vector width,
K = results per query, C = columns that share one maximum, P = pairs of a query and a document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NotFiniteError

SPARE_CANDIDATES = 4_096  # a query may have these and four per result before its candidates are scored again
_COLUMNS_PER_MAXIMUM = 16  # columns of scores that are first examined through their maximum
_STALE_SHARE = 0.1  # found scores that may wait before they raise the k-th best, as a share of all results
_LEAST_NORMAL = 2.0**-126  # of float32; smaller products lose some or all of their digits


@dataclass
class Pairs:
    """Pairs of a query and a document, with their score and the largest error of that score; all of shape (P,)."""

    queries: Tensor
    documents: Tensor
    scores: Tensor
    errors: Tensor

    def where(self, selection: Tensor) -> Pairs:
        """Return the pairs that a mask selects, or all pairs in the order of an index."""
        return Pairs(*(column[selection] for column in vars(self).values()))

    def to(self, device: str | torch.device) -> Pairs:
        """Move all columns to a device."""
        return Pairs(*(column.to(device) for column in vars(self).values()))


def best_of_each(queries: Tensor, scores: Tensor, ties: Tensor, k: int) -> Tensor:
    """Return the positions of each query's k best pairs, query by query, best first; all if a query has fewer.

    The three columns have shape (P,). Ties are integers >= 0: of equal scores the lower comes first.
    """
    if not len(queries):
        return queries
    # One sort key for both, the query first.
    order_P = torch.argsort(queries * (ties.max() + 1) + ties)
    sorted_queries, sorted_scores = queries[order_P], scores[order_P]
    places_BX = _places_by_query(sorted_queries, int(sorted_queries[-1]) + 1)
    scores_BX = torch.where(places_BX < 0, -torch.inf, sorted_scores[places_BX])
    order_BX = torch.sort(scores_BX, dim=1, descending=True, stable=True).indices[:, :k]
    best_P = places_BX.gather(1, order_BX).flatten()
    return order_P[best_P[best_P >= 0]]


@dataclass(frozen=True)
class DocumentBlock:
    """A block of documents, prepared for the product."""

    start: int  # row of the block's first document in the corpus
    residuals: Tensor  # (M, D) float32: documents minus one common vector, which does not change the ranking
    offsets: Tensor | None  # (M,), added to each document's products
    longest: float  # upper bound of the residuals' lengths
    error: float  # upper bound of the length of a residual's rounding error


class CandidatePass:
    """Collects the documents that can be among each query's k best, one block of documents at a time.

    Queries (Q, D) are float32; `query_errors` (Q,) bounds the lengths of their rounding errors, and `query_block` is
    the number of queries per product. `choose` scores pairs exactly and returns the positions of each query's k best.
    """

    def __init__(
        self, queries: Tensor, query_errors: Tensor, *, k: int, query_block: int, choose: Callable[[Pairs], Tensor]
    ) -> None:
        self._queries_QD = queries
        self._lengths_Q = lengths(queries)
        self._query_errors_Q = query_errors
        self._k = k
        self._choose = choose
        self._query_block = query_block
        self._most = 4 * k + SPARE_CANDIDATES
        # Lower bounds of each query's k best scores, in falling order.
        self._best_QK = queries.new_full((len(queries), k), -torch.inf)
        no_rows, no_scores = torch.zeros(0, dtype=torch.long, device=queries.device), queries.new_zeros(0)
        self._pool = [Pairs(no_rows, no_rows, no_scores, no_scores)]
        self._pool_size, self._pool_limit = 0, 4 * k * len(queries) + 2**20
        self._unmerged = [self._pool[0]]
        self._products: Tensor | None = None

    def add(self, block: DocumentBlock) -> None:
        """Multiply all queries with a block and keep the pairs that can be among the best."""
        errors_Q = self._errors(block)
        for rows in row_blocks(len(self._queries_QD), self._query_block):
            scores_BM = self._multiply(rows, block.residuals)
            if block.offsets is not None:
                scores_BM.add_(block.offsets)
            errors_B = errors_Q[rows]
            is_first = bool((self._best_QK[rows, -1] == -torch.inf).any())
            if is_first:  # nothing can be ruled out before k scores are known
                self._raise_best(rows, scores_BM - errors_B.unsqueeze(1))
            pairs = _pairs_above(scores_BM, self._best_QK[rows, -1], errors_B)
            pairs.queries += rows.start
            pairs.documents += block.start
            if not is_first:
                self._unmerged.append(pairs)
            self._pool.append(pairs)
            self._pool_size += len(pairs.queries)
            if self._pool_size > self._pool_limit:
                self._prune()
        # Raise the best scores by those found since, as soon as there are enough of them to matter.
        if sum(len(pairs.queries) for pairs in self._unmerged) >= self._k * len(self._queries_QD) * _STALE_SHARE:
            scores_QX = _lower_bounds(_joined(self._unmerged), len(self._queries_QD))
            self._raise_best(slice(0, len(scores_QX)), scores_QX)
            self._unmerged = self._unmerged[:1]

    def candidates(self) -> Pairs:
        """Return all pairs that can be among the best: at least k for each query."""
        self._prune()
        return self._pool[0]

    def _errors(self, block: DocumentBlock) -> Tensor:
        """Return the largest error of each query's scores in a block, shape (Q,)."""
        dim = block.residuals.shape[1]
        longest = 1.001 * block.longest  # rounded up, because computed lengths have an error themselves
        # Relative to the product of both lengths, whatever the order in which dim products are added.
        rounding = (dim + 4) * 2**-23
        errors_Q = self._lengths_Q * (rounding * longest + block.error) + self._query_errors_Q * longest
        errors_Q = errors_Q + 2 * (dim + 4) * _LEAST_NORMAL
        if block.offsets is not None:
            # The last summand: distances that differ by less than this are equal in float32.
            errors_Q = errors_Q + rounding * longest**2 + 2**-23 * (self._lengths_Q + longest).square()
        if not bool(errors_Q.isfinite().all()):
            raise NotFiniteError("expected similarities within float32, got an overflow: scale the vectors down")
        return errors_Q

    def _multiply(self, rows: slice, residuals_MD: Tensor) -> Tensor:
        """Return (B, M), in a buffer that the next call reuses: fresh memory of that size costs page faults."""
        num_rows, num_columns = rows.stop - rows.start, len(residuals_MD)
        if self._products is None:
            self._products = residuals_MD.new_empty(num_rows * num_columns)  # the first block is the largest
        scores_BM = self._products[: num_rows * num_columns].view(num_rows, num_columns)
        return torch.mm(self._queries_QD[rows], residuals_MD.T, out=scores_BM)

    def _raise_best(self, rows: slice, scores_BX: Tensor) -> None:
        together = torch.cat([self._best_QK[rows], scores_BX], dim=1)
        self._best_QK[rows] = torch.topk(together, self._k, dim=1).values

    def _prune(self) -> None:
        """Drop the pairs that better scores have ruled out."""
        pairs = _joined(self._pool)
        pairs = pairs.where(pairs.scores + pairs.errors >= self._best_QK[pairs.queries, -1])
        is_crowded_P = (torch.bincount(pairs.queries) > self._most)[pairs.queries]
        if bool(is_crowded_P.any()):
            crowded = pairs.where(is_crowded_P)
            pairs = _joined([pairs.where(~is_crowded_P), crowded.where(self._choose(crowded))])
        self._pool, self._pool_size = [pairs], len(pairs.queries)


def lengths(vectors: Tensor) -> Tensor:
    """Return the length of each row, even if its square is too large for float32."""
    norms = torch.linalg.vector_norm(vectors, dim=1)
    return norms if bool(norms.isfinite().all()) else torch.linalg.vector_norm(vectors.double(), dim=1).float()


def row_blocks(num_rows: int, step: int) -> Iterator[slice]:
    """Yield slices of `step` rows, the last one shorter."""
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def _pairs_above(scores_BM: Tensor, floors_B: Tensor, errors_B: Tensor) -> Pairs:
    """Find all scores that, given their error, can reach their row's floor."""
    floors_B = floors_B - errors_B
    num_columns = scores_BM.shape[1]
    num_groups = num_columns // _COLUMNS_PER_MAXIMUM
    whole = num_groups * _COLUMNS_PER_MAXIMUM
    # Columns num_groups apart share a maximum, so that maxima are taken over contiguous memory.
    groups_BCG = scores_BM[:, :whole].unflatten(1, (_COLUMNS_PER_MAXIMUM, num_groups))
    rows_P, groups_P = (groups_BCG.amax(dim=1) >= floors_B.unsqueeze(1)).nonzero(as_tuple=True)
    found_PC = groups_BCG[rows_P, :, groups_P]
    places_P, members_P = (found_PC >= floors_B[rows_P].unsqueeze(1)).nonzero(as_tuple=True)
    rest_P, rest_columns_P = (scores_BM[:, whole:] >= floors_B.unsqueeze(1)).nonzero(as_tuple=True)
    queries_P = torch.cat([rows_P[places_P], rest_P])
    documents_P = torch.cat([members_P * num_groups + groups_P[places_P], rest_columns_P + whole])
    return Pairs(queries_P, documents_P, scores_BM[queries_P, documents_P], errors_B[queries_P])


def _joined(parts: list[Pairs]) -> Pairs:
    return Pairs(*(torch.cat(column) for column in zip(*(vars(part).values() for part in parts), strict=True)))


def _lower_bounds(pairs: Pairs, num_rows: int) -> Tensor:
    """Put the lower bounds of a query's scores into its row: (B, most pairs of a query), filled with -infinity."""
    pairs = pairs.where(torch.argsort(pairs.queries))
    places_BX = _places_by_query(pairs.queries, num_rows)
    return torch.where(places_BX < 0, -torch.inf, (pairs.scores - pairs.errors)[places_BX])


def _places_by_query(sorted_queries: Tensor, num_rows: int) -> Tensor:
    """Put the positions of a query's pairs into its row: (B, most pairs of a query), filled with -1."""
    counts_B = torch.bincount(sorted_queries, minlength=num_rows)
    starts_B = counts_B.cumsum(0) - counts_B
    places_P = torch.arange(len(sorted_queries), device=sorted_queries.device)
    laid_out_BX = places_P.new_full((num_rows, int(counts_B.max())), -1)
    laid_out_BX[sorted_queries, places_P - starts_B[sorted_queries]] = places_P
    return laid_out_BX
