"""The three loss terms, as pure functions of embeddings, unweighted.

Nothing here knows of models, tokenizers, data sets or the Trainer. Where torch.distributed runs, every term is a
function of the rows of all processes and its data-parallel gradient is the one of a single process with all rows.
Everything is computed in float32, whatever the input and autocast say.

Shape letters: B = queries, M = candidate documents, N = rows, D = embedding width, K = random directions,
T = knots of the quadrature.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from ..distributed import count_rows, gather_rows, mean_over_processes
from .isotropy import _without_autocast


@_without_autocast
def info_nce_loss(
    queries: Tensor,
    documents: Tensor,
    *,
    temperature: float | Tensor = 0.05,
    similarity: str = "cosine",
    query_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
    known_pairs: Callable[[Tensor, Tensor], Tensor] | None = None,
    is_bidirectional: bool = False,
) -> Tensor:
    """Measure how well each query picks its own document out of all documents of the batch (InfoNCE).

    Every document of the batch, on every process, is a candidate. Candidates that are the same text as a query's
    document, that belong to a row with the same query, or that are known to answer it are left out: they are no
    negatives.

    Args:
        queries: Shape (B, D).
        documents: Shape (M, D), M >= B; the first B rows are the queries' documents, the others hard negatives.
        temperature: Divides the similarity; smaller concentrates the loss on the hardest candidates. A scalar tensor
            will do, and is not checked.
        similarity: `cosine`, `dot` or `euclidean`; see [`similarity_scores`] for their common scale.
        query_ids: Shape (B,), integers, equal for equal query texts.
        document_ids: Shape (M,), integers, equal for equal document texts.
        known_pairs: Called with ids of queries (B,) and of documents (M,); says, (B, M), which documents answer which
            queries. Needs both kinds of ids; see `ragcun_hf.trainer.known_pairs`.
        is_bidirectional: Also let each document pick its query, and average both directions.

    Returns:
        Scalar float32, >= 0, in nats; log(M) when all scores are equal.

    Raises:
        ValueError: On shapes that do not fit, or a temperature that is not above 0.

    Source:
        van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018, arXiv:1807.03748.

    Example:
        >>> import torch
        >>> vectors = torch.eye(4)
        >>> round(info_nce_loss(vectors, vectors, temperature=1.0).item(), 4)  # -log(e / (e + 3))
        0.7437
    """
    _check_candidates(queries, documents)
    if isinstance(temperature, float | int) and not temperature > 0:
        raise ValueError(f"`temperature` must be above 0, got {temperature}.")
    candidates, start = gather_rows(documents.float())
    is_excluded_BM = _no_negatives(queries, documents, query_ids, document_ids, known_pairs)
    own = torch.arange(start, start + queries.shape[0], device=queries.device)
    scores_BM = similarity_scores(queries.float(), candidates, similarity) / temperature
    scores_BM = scores_BM.masked_fill(is_excluded_BM, -torch.inf)
    loss_B = functional.cross_entropy(scores_BM, own, reduction="none")
    if is_bidirectional:
        back_B = _document_to_query(
            queries,
            documents,
            query_ids,
            document_ids,
            temperature=temperature,
            similarity=similarity,
            known_pairs=known_pairs,
        )
        loss_B = (loss_B + back_B) / 2
    return mean_over_processes(loss_B)


def _document_to_query(
    queries: Tensor,
    documents: Tensor,
    query_ids: Tensor | None,
    document_ids: Tensor | None,
    *,
    temperature: float | Tensor,
    similarity: str,
    known_pairs: Callable[[Tensor, Tensor], Tensor] | None,
) -> Tensor:
    """Return (B,) losses of the other direction: each positive document among all queries."""
    num_queries = queries.shape[0]
    candidates, start = gather_rows(queries.float())
    # The same exclusion with the roles exchanged; hard negatives have no query and take no part.
    positive_ids = None if document_ids is None else document_ids[:num_queries]
    turned = None if known_pairs is None else lambda documents, queries: known_pairs(queries, documents).T
    is_excluded_BB = _no_negatives(documents[:num_queries], queries, positive_ids, query_ids, turned)
    own = torch.arange(start, start + num_queries, device=queries.device)
    scores_BB = similarity_scores(documents[:num_queries].float(), candidates, similarity) / temperature
    return functional.cross_entropy(scores_BB.masked_fill(is_excluded_BB, -torch.inf), own, reduction="none")


@_without_autocast
def triplet_margin_loss(
    queries: Tensor,
    documents: Tensor,
    *,
    margin: float | Tensor = 0.1,
    query_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
    known_pairs: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Ask each query to be nearer to its own document than to the hardest other one, by a margin.

    Args:
        queries: Shape (B, D).
        documents: Shape (M, D), as for [`info_nce_loss`].
        margin: Required gap between the two Euclidean distances, in units of the embedding.
        query_ids: Shape (B,), integers, equal for equal query texts.
        document_ids: Shape (M,), integers, equal for equal document texts.
        known_pairs: As for [`info_nce_loss`].

    Returns:
        Scalar float32, >= 0, a distance. A query that has no other document in the batch counts as 0.

    Raises:
        ValueError: On shapes that do not fit.

    Source:
        The contrastive term of github.com/ctn/ragcun: Euclidean triplet margin, hardest in-batch negative.

    Example:
        >>> import torch
        >>> line = torch.tensor([[0.0], [3.0]])
        >>> round(triplet_margin_loss(line, line + 1.0, margin=0.5).item(), 4)  # 1 - 4 and 1 - 2, both below -0.5
        0.0
    """
    _check_candidates(queries, documents)
    candidates, _ = gather_rows(documents.float())
    is_excluded_BM = _no_negatives(queries, documents, query_ids, document_ids, known_pairs)
    is_excluded_BM = is_excluded_BM | _own_documents(queries, documents)
    distances_BM = _euclidean_distances(queries.float(), candidates)
    positive_B = _row_norms(queries.float() - documents[: queries.shape[0]].float())
    hardest_B = distances_BM.masked_fill(is_excluded_BM, torch.inf).min(dim=1).values
    return mean_over_processes(functional.relu(positive_B - hardest_B + margin))


@_without_autocast
def predictive_loss(predictions: Tensor, targets: Tensor, *, kind: str = "mse") -> Tensor:
    """Measure how far predictions are from the documents' embeddings, which are held fixed.

    Args:
        predictions: Shape (B, D), from the queries.
        targets: Shape (B, D), the documents' embeddings; no gradient flows into them.
        kind: `mse` (mean over rows and coordinates of the squared difference) or `cosine` (1 - cosine).

    Returns:
        Scalar float32, >= 0; with `mse` about 2 for unrelated embeddings of unit variance, with `cosine` at most 2.

    Raises:
        ValueError: On an unknown kind or shapes that differ.

    Source:
        Assran et al., "Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture", 2023,
        arXiv:2301.08243, for the stop-gradient; the mean squared error as in github.com/ctn/ragcun.

    Example:
        >>> import torch
        >>> predictive_loss(torch.zeros(2, 3), 2 * torch.ones(2, 3))
        tensor(4.)
    """
    if predictions.shape != targets.shape or predictions.ndim != 2:
        raise ValueError(
            f"predictive_loss needs two (B, D) tensors, got {tuple(predictions.shape)} and {tuple(targets.shape)}."
        )
    fixed = targets.detach().float()
    if kind == "mse":
        return mean_over_processes((predictions.float() - fixed).square().mean(dim=1))
    if kind == "cosine":
        return mean_over_processes(1 - functional.cosine_similarity(predictions.float(), fixed, dim=1))
    raise ValueError(f"`kind` must be mse or cosine, got {kind!r}.")


def similarity_scores(queries: Tensor, documents: Tensor, similarity: str) -> Tensor:
    """Score all pairs, on a scale on which one temperature suits all three similarities.

    For embeddings of length sqrt(D) the three differ by constants only: dot products are divided by D, and the
    Euclidean score is minus the squared distance over 2 D.

    Args:
        queries: Shape (B, D).
        documents: Shape (M, D).
        similarity: `cosine`, `dot` or `euclidean`.

    Returns:
        Shape (B, M); larger is more alike.

    Raises:
        ValueError: On an unknown similarity.
    """
    dim = queries.shape[1]
    if similarity == "cosine":
        return functional.normalize(queries, dim=1) @ functional.normalize(documents, dim=1).T
    if similarity == "dot":
        return queries @ documents.T / dim
    if similarity == "euclidean":
        squared = queries.square().sum(1, keepdim=True) + documents.square().sum(1) - 2 * queries @ documents.T
        return -squared / (2 * dim)
    raise ValueError(f"`similarity` must be cosine, dot or euclidean, got {similarity!r}.")


def _euclidean_distances(queries: Tensor, documents: Tensor) -> Tensor:
    # The difference itself, not the expanded square: near-equal vectors matter here. Its gradient at 0 is 0.
    return torch.cdist(queries, documents, compute_mode="donot_use_mm_for_euclid_dist")


def _row_norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1)


def _no_negatives(
    queries: Tensor,
    documents: Tensor,
    query_ids: Tensor | None,
    document_ids: Tensor | None,
    known_pairs: Callable[[Tensor, Tensor], Tensor] | None,
) -> Tensor:
    """Return (B, M over all processes), true where a candidate is no negative although it is not the own document."""
    num_queries, device = queries.shape[0], queries.device
    is_own_BM = _own_documents(queries, documents)
    is_excluded_BM = torch.zeros_like(is_own_BM)
    if query_ids is not None:
        # Hard negatives carry the owner -1: they are the positives of no query.
        no_owner = torch.full((documents.shape[0] - num_queries,), -1, dtype=torch.long, device=device)
        owners_M, _ = gather_rows(torch.cat([query_ids, no_owner]))
        is_excluded_BM = is_excluded_BM | (query_ids[:, None] == owners_M)
    if document_ids is not None:
        candidate_ids_M, _ = gather_rows(document_ids)
        is_excluded_BM = is_excluded_BM | (document_ids[:num_queries, None] == candidate_ids_M)
        if known_pairs is not None and query_ids is not None:
            is_excluded_BM = is_excluded_BM | known_pairs(query_ids, candidate_ids_M)
    return is_excluded_BM & ~is_own_BM


def _own_documents(queries: Tensor, documents: Tensor) -> Tensor:
    """Return (B, M over all processes), true where a candidate is the query's own document."""
    num_candidates, start = count_rows(documents)
    rows = torch.arange(num_candidates, device=queries.device)
    return rows == start + rows[: queries.shape[0], None]


def _check_candidates(queries: Tensor, documents: Tensor) -> None:
    if queries.ndim != 2 or documents.ndim != 2 or queries.shape[1] != documents.shape[1]:
        raise ValueError(
            f"Expected queries (B, D) and documents (M, D), got {tuple(queries.shape)} and {tuple(documents.shape)}."
        )
    if not 1 <= queries.shape[0] <= documents.shape[0]:
        raise ValueError(
            f"Expected a document for each of {queries.shape[0]} queries (at least 1), got {documents.shape[0]}."
        )
