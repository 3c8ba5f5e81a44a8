"""The weighted sum of the three terms, used by the Trainer for one head and by sweeps for many heads at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import UserError
from .isotropy import covariance_isotropy_loss, sigreg_loss
from .losses import info_nce_loss, predictive_loss, triplet_margin_loss

TERMS = ("contrastive", "isotropy", "predictive")
Scalar = float | Tensor


@dataclass(frozen=True)
class Objective:
    """The loss; its weights, temperature and margin may be tensors, so that `torch.func.vmap` can vary them."""

    weights: dict[str, Scalar]  # of terms; others are not computed
    contrastive_kind: str = "info_nce"  # or triplet
    temperature: Scalar = 0.05  # of info_nce
    margin: Scalar = 0.1  # of triplet
    similarity: str = "cosine"  # by which info_nce compares
    is_bidirectional: bool = False  # in info_nce, documents also pick their queries
    isotropy_kind: str = "sigreg"  # or covariance
    predictive_kind: str = "mse"  # or cosine
    matryoshka_dims: tuple[int, ...] = ()  # widths to which the contrastive term also cuts embeddings
    known_pairs: Callable[[Tensor, Tensor], Tensor] | None = None  # as for info_nce

    @classmethod
    def of_arguments(cls, arguments: Any, weights: dict[str, Scalar], **fields: Any) -> Self:
        """Take the kinds, temperature and margin from training arguments; `fields` are the other fields."""
        names = ("contrastive_kind", "temperature", "margin", "isotropy_kind", "predictive_kind")
        shared = {name: getattr(arguments, name) for name in names}
        shared |= {"is_bidirectional": arguments.bidirectional, "matryoshka_dims": tuple(arguments.matryoshka_dims)}
        return cls(weights, **{**shared, **fields})

    def terms(
        self, outputs: Any, query_ids: Tensor, document_ids: Tensor, *, directions: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return term -> unweighted scalar, in the order of `TERMS`, of one batch.

        `outputs` holds `embeddings` (B + M, D) of B queries and then M documents, and `predictions` (B, D). Ids, (B,)
        and (M,), are equal for equal texts. `directions` (D, K) are for SIGReg. With `matryoshka_dims`, the
        contrastive term is the mean over these widths and the whole (Kusupati et al., 2022, arXiv:2205.13147).
        """
        num_queries = query_ids.shape[0]
        embeddings = outputs.embeddings.float()
        queries, documents = embeddings.split([num_queries, len(embeddings) - num_queries])
        terms = {}
        if "contrastive" in self.weights:
            ids = {"query_ids": query_ids, "document_ids": document_ids, "known_pairs": self.known_pairs}
            widths = (*self.matryoshka_dims, embeddings.shape[1])
            cut = [self._contrastive(queries[:, :width], documents[:, :width], ids) for width in widths]
            terms["contrastive"] = torch.stack(cut).mean() if self.matryoshka_dims else cut[0]
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

    def _contrastive(self, queries: Tensor, documents: Tensor, ids: dict[str, Any]) -> Tensor:
        if self.contrastive_kind == "triplet":
            return triplet_margin_loss(queries, documents, margin=self.margin, **ids)
        options = {"similarity": self.similarity, "is_bidirectional": self.is_bidirectional, **ids}
        return info_nce_loss(queries, documents, temperature=self.temperature, **options)

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """Return the weighted sum."""
        return torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()


def resolve_weights(arguments: Any, *, use_predictor: bool) -> dict[str, float]:
    """Return term -> weight, zeros included; the predictive weight is 1 with a predictor if the arguments set none."""
    weights = {term: getattr(arguments, f"lambda_{term}") for term in TERMS}
    if weights["predictive"] is None:
        weights["predictive"] = float(use_predictor)
    if weights["predictive"] > 0 and not use_predictor:
        raise UserError(
            f"--lambda_predictive {weights['predictive']} needs a predictor, got a model without one: add "
            "--use_predictor, or leave the weight out (1 with a predictor, 0 without)"
        )
    if not any(weights.values()):
        raise UserError(
            "expected a term to train, got --lambda_contrastive 0 and --lambda_isotropy 0 without a predictor, which "
            "leaves nothing to train: set one above 0, or add --use_predictor"
        )
    return weights
