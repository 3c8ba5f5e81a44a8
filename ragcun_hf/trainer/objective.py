"""The weighted sum of the three terms, for whoever trains: one head in the Trainer, or many at once in a sweep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .isotropy import covariance_isotropy_loss, sigreg_loss
from .losses import info_nce_loss, predictive_loss, triplet_margin_loss

TERMS = ("contrastive", "isotropy", "predictive")
Scalar = float | Tensor


@dataclass(frozen=True)
class Objective:
    """What is minimised. Numbers may be scalar tensors, so that `torch.func.vmap` can give each head its own.

    Args:
        weights: Term -> weight; terms that are not named are not computed.
        contrastive_kind: `info_nce` or `triplet`.
        temperature: Of info_nce.
        margin: Of triplet.
        similarity: How info_nce compares embeddings.
        is_bidirectional: Whether documents also pick their queries in info_nce.
        isotropy_kind: `sigreg` or `covariance`.
        predictive_kind: `mse` or `cosine`.
        known_pairs: Says of ids of queries and of documents which of them belong together, in the batch or not.
    """

    weights: dict[str, Scalar]
    contrastive_kind: str = "info_nce"
    temperature: Scalar = 0.05
    margin: Scalar = 0.1
    similarity: str = "cosine"
    is_bidirectional: bool = False
    isotropy_kind: str = "sigreg"
    predictive_kind: str = "mse"
    known_pairs: Callable[[Tensor, Tensor], Tensor] | None = None

    def terms(
        self, outputs: Any, query_ids: Tensor, document_ids: Tensor, *, directions: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Compute the unweighted terms of one batch.

        Args:
            outputs: `embeddings`, B queries then M documents, shape (B + M, D), and `predictions`, shape (B, D).
            query_ids: Shape (B,), equal for equal query texts.
            document_ids: Shape (M,), equal for equal document texts.
            directions: Shape (D, K), of SIGReg.

        Returns:
            Term -> scalar, in the order of `TERMS`.
        """
        num_queries = query_ids.shape[0]
        embeddings = outputs.embeddings.float()
        queries, documents = embeddings[:num_queries], embeddings[num_queries:]
        terms = {}
        if "contrastive" in self.weights:
            terms["contrastive"] = self._contrastive(queries, documents, query_ids, document_ids)
        if "isotropy" in self.weights:
            terms["isotropy"] = (
                sigreg_loss(embeddings, directions=directions)
                if self.isotropy_kind == "sigreg"
                else covariance_isotropy_loss(embeddings)
            )
        if "predictive" in self.weights:
            targets = documents[:num_queries]
            terms["predictive"] = predictive_loss(outputs.predictions, targets, kind=self.predictive_kind)
        return terms

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """Weigh and add up."""
        return torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()

    def _contrastive(self, queries: Tensor, documents: Tensor, query_ids: Tensor, document_ids: Tensor) -> Tensor:
        ids = {"query_ids": query_ids, "document_ids": document_ids, "known_pairs": self.known_pairs}
        if self.contrastive_kind == "triplet":
            return triplet_margin_loss(queries, documents, margin=self.margin, **ids)
        return info_nce_loss(
            queries,
            documents,
            temperature=self.temperature,
            similarity=self.similarity,
            is_bidirectional=self.is_bidirectional,
            **ids,
        )


def resolve_weights(arguments: Any, *, use_predictor: bool) -> dict[str, float]:
    """Look up the weight of each term.

    Args:
        arguments: With `lambda_contrastive`, `lambda_isotropy` and `lambda_predictive` (None: 1 with a predictor).
        use_predictor: Whether the head has a predictor.

    Returns:
        Term -> weight, zeros included.
    """
    weights = {term: getattr(arguments, f"lambda_{term}") for term in TERMS}
    if weights["predictive"] is None:
        weights["predictive"] = float(use_predictor)
    return weights
