"""Cosine similarity, dot product and Euclidean distance: their names, and scores of vectors by them.

A larger score is always better: the Euclidean score is minus the distance.

Shape letters used in this file: B = rows, P = pairs of a query and a document, Q = queries, N = documents,
D = vector width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

SIMILARITIES = ("cosine", "dot", "euclidean")


def normalize_rows(x_BD: Tensor) -> Tensor:
    """Scale rows to unit length; zero rows stay zero."""
    norm_B1 = torch.linalg.vector_norm(x_BD, dim=1, keepdim=True)
    if bool(((norm_B1 < 1e-15) | (norm_B1 > 1e15)).any()):
        # Squares of very large or small entries leave float32: scale rows by their largest entry first.
        largest_B1 = x_BD.abs().amax(dim=1, keepdim=True)
        x_BD = x_BD / torch.where(largest_B1 > 0, largest_B1, 1.0)
        norm_B1 = torch.linalg.vector_norm(x_BD, dim=1, keepdim=True)
    return x_BD / torch.where(norm_B1 > 0, norm_B1, 1.0)


def unit_rows(vectors: Any) -> np.ndarray[Any, Any]:
    """Scale the rows of any real array to unit length in float64; zero rows stay zero."""
    return normalize_rows(torch.from_numpy(np.array(vectors, dtype=np.float64))).numpy()


def score_rows(queries_PD: Tensor, documents_PD: Tensor, similarity: str, *, in_place: bool = False) -> Tensor:
    """Score each query with the document of the same row, shape (P,); a single query is scored with every document.

    Each score depends on its two vectors alone. In a matrix product the last bits also depend on the other rows.
    `in_place` overwrites the documents; fresh memory for large blocks costs more time than the arithmetic.
    """
    work_PD = documents_PD if in_place else torch.empty_like(documents_PD)
    if similarity == "euclidean":
        return -torch.linalg.vector_norm(torch.sub(documents_PD, queries_PD, out=work_PD), dim=1)
    if similarity == "dot":
        return torch.mul(documents_PD, queries_PD, out=work_PD).sum(dim=1)
    norms_P = torch.linalg.vector_norm(documents_PD, dim=1) * torch.linalg.vector_norm(queries_PD, dim=1)
    products_P = torch.mul(documents_PD, queries_PD, out=work_PD).sum(dim=1)
    return products_P / torch.where(norms_P > 0, norms_P, 1.0)


def score_pairs(queries_QD: Tensor, documents_ND: Tensor, similarity: str) -> Tensor:
    """Score every query with every document by matrix products, shape (Q, N)."""
    if similarity == "euclidean":
        return -torch.cdist(queries_QD, documents_ND)
    if similarity == "cosine":
        queries_QD, documents_ND = normalize_rows(queries_QD), normalize_rows(documents_ND)
    return queries_QD @ documents_ND.T


def inner_product_vectors(vectors_BD: Tensor, similarity: str, *, is_query: bool) -> Tensor:
    """Return vectors whose inner products order documents as the similarity orders the given vectors.

    For Euclidean distance they have one dimension more: [2d, -|d|²] for a document d and [q, 1] for a query q give
    2 q·d - |d|² = |q|² - |q - d|², and |q|² is the same for all documents of a query. They are float64, because |d|²
    is much larger than the differences that decide.
    """
    if similarity == "cosine":
        return normalize_rows(vectors_BD)
    if similarity == "dot":
        return vectors_BD
    vectors_BD = vectors_BD.double()
    if is_query:
        return torch.cat([vectors_BD, vectors_BD.new_ones(len(vectors_BD), 1)], dim=1)
    return torch.cat([2 * vectors_BD, -vectors_BD.square().sum(1, keepdim=True)], dim=1)
