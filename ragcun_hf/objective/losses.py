"""The contrastive and predictive terms and their similarity, as pure functions of embeddings.

With torch.distributed, every term is a function of the rows of all processes, and its data-parallel gradient equals
that of a single process with all rows. All terms are unweighted and computed in float32, also under autocast.

Shape letters: B = queries, M = candidate documents, N = rows, D = embedding width, K = random directions,
T = knots of the quadrature.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce

import torch
from torch import Tensor
from torch.nn import functional

from ..distributed import count_rows, gather_rows, mean_over_processes
from .isotropy import without_autocast


@without_autocast
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
    """Measure how well each query picks its own document among all documents in the batch (InfoNCE).

    Every document in the batch, on every process, is a candidate. Candidates are left out as false negatives if they
    have the same text as the query's document, belong to a row with the same query, or are known to answer the query.

    Args:
        queries: Shape (B, D).
        documents: Shape (M, D), M >= B; the first B rows are the queries' documents, the others hard negatives.
        temperature: Divides the similarity; a smaller one concentrates the loss on the hardest candidates. A scalar
            tensor is not checked.
        similarity: `cosine`, `dot` or `euclidean`, on the common scale of [`similarity_scores`].
        query_ids: Shape (B,), integers, equal for equal query texts.
        document_ids: Shape (M,), integers, equal for equal document texts.
        known_pairs: Called with ids of queries (B,) and of documents (M,), returns (B, M): which documents answer
            which queries. Needs both kinds of ids; see `ragcun_hf.objective.known_pairs`.
        is_bidirectional: Average both directions: each document also picks its query.

    Returns:
        Scalar float32, >= 0, in nats; log(M) when all scores are equal.

    Raises:
        ValueError: If shapes do not fit or the temperature is not above 0.

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
    score = partial(similarity_scores, similarity=similarity)
    loss_B = _picking_loss(queries, documents, query_ids, document_ids, known_pairs, score, temperature)
    if is_bidirectional:
        # The same with exchanged roles; hard negatives have no query and take no part.
        positives = documents[: queries.shape[0]]
        positive_ids = None if document_ids is None else document_ids[: queries.shape[0]]
        turned = None if known_pairs is None else lambda documents, queries: known_pairs(queries, documents).T
        back_B = _picking_loss(positives, queries, positive_ids, query_ids, turned, score, temperature)
        loss_B = (loss_B + back_B) / 2
    return mean_over_processes(loss_B)


def _picking_loss(
    queries: Tensor,
    documents: Tensor,
    query_ids: Tensor | None,
    document_ids: Tensor | None,
    known_pairs: Callable[[Tensor, Tensor], Tensor] | None,
    score: Callable[[Tensor, Tensor], Tensor],
    temperature: float | Tensor,
) -> Tensor:
    """Return (B,) cross-entropies of each query's own document among all documents of all processes."""
    candidates, start = gather_rows(documents.float())
    is_excluded_BM = _false_negatives(queries, documents, query_ids, document_ids, known_pairs)
    own = torch.arange(start, start + queries.shape[0], device=queries.device)
    scores_BM = score(queries.float(), candidates) / temperature
    return functional.cross_entropy(scores_BM.masked_fill(is_excluded_BM, -torch.inf), own, reduction="none")


@without_autocast
def triplet_margin_loss(
    queries: Tensor,
    documents: Tensor,
    *,
    margin: float | Tensor = 0.1,
    query_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
    known_pairs: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Ask each query to be nearer to its own document than to the hardest other document, by a margin.

    Args:
        queries: Shape (B, D).
        documents: Shape (M, D), as for [`info_nce_loss`].
        margin: Required difference of the two Euclidean distances.
        query_ids: Shape (B,), integers, equal for equal query texts.
        document_ids: Shape (M,), integers, equal for equal document texts.
        known_pairs: As for [`info_nce_loss`].

    Returns:
        Scalar float32, >= 0, a distance. A query without another document in the batch counts as 0.

    Raises:
        ValueError: If shapes do not fit.

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
    is_excluded_BM = _false_negatives(queries, documents, query_ids, document_ids, known_pairs)
    is_excluded_BM = is_excluded_BM | _own_documents(queries, documents)
    # From the differences, not from the expanded square: near-equal vectors matter here. The gradient at 0 is 0.
    distances_BM = torch.cdist(queries.float(), candidates, compute_mode="donot_use_mm_for_euclid_dist")
    positive_B = torch.linalg.vector_norm(queries.float() - documents[: queries.shape[0]].float(), dim=1)
    hardest_B = distances_BM.masked_fill(is_excluded_BM, torch.inf).min(dim=1).values
    return mean_over_processes(functional.relu(positive_B - hardest_B + margin))


@without_autocast
def predictive_loss(predictions: Tensor, targets: Tensor, *, kind: str = "mse") -> Tensor:
    """Measure how far predictions are from document embeddings, which get no gradient.

    Args:
        predictions: Shape (B, D), from the queries.
        targets: Shape (B, D), embeddings of the documents.
        kind: `mse` (mean squared difference over rows and coordinates) or `cosine` (1 - cosine).

    Returns:
        Scalar float32, >= 0; with `mse` about 2 for unrelated embeddings of unit variance, with `cosine` at most 2.

    Raises:
        ValueError: If the kind is unknown or the shapes differ.

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
    """Score all pairs of (B, D) queries and (M, D) documents, on a scale that needs one temperature for all kinds.

    Returns (B, M); larger is more similar. For embeddings of length sqrt(D), the three kinds differ only by constants:
    dot products are divided by D, and the Euclidean score is minus the squared distance over 2 D.
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


def _false_negatives(
    queries: Tensor,
    documents: Tensor,
    query_ids: Tensor | None,
    document_ids: Tensor | None,
    known_pairs: Callable[[Tensor, Tensor], Tensor] | None,
) -> Tensor:
    """Return (B, M over all processes): true for other documents that may answer the query, too."""
    num_queries, num_negatives = queries.shape[0], documents.shape[0] - queries.shape[0]
    is_own_BM = _own_documents(queries, documents)
    reasons = []
    if query_ids is not None:
        # Hard negatives belong to no query, which is written as -1.
        owners_M = functional.pad(query_ids, (0, num_negatives), value=-1) if num_negatives else query_ids
        owners_M, _ = gather_rows(owners_M)
        reasons.append(query_ids[:, None] == owners_M)
    if document_ids is not None:
        candidate_ids_M, _ = gather_rows(document_ids)
        reasons.append(document_ids[:num_queries, None] == candidate_ids_M)
        if known_pairs is not None and query_ids is not None:
            reasons.append(known_pairs(query_ids, candidate_ids_M))
    if not reasons:
        return torch.zeros_like(is_own_BM)
    return reduce(torch.logical_or, reasons) & ~is_own_BM


def _own_documents(queries: Tensor, documents: Tensor) -> Tensor:
    """Return (B, M over all processes), true for the query's own document."""
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
