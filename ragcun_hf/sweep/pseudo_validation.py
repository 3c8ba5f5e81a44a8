"""Measure how well pseudo-queries of held-out documents find the rest of their documents.

Shape letters used in this file: P = pseudo-queries, N = documents, D = embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..evaluation.model_evaluation import apply_head
from ..search.similarity import normalize_rows, score_pairs, score_rows

if TYPE_CHECKING:
    from ..data.pseudo_queries import PseudoQuery
    from ..features.feature_store import FeatureStore
    from ..model.modeling_isotropic_gaussian import IsotropicGaussianModel

_DEPTH = 10
_QUERIES_AT_ONCE = 1_024


class PseudoValidation:
    """Measures a head on pseudo-queries, which search the rest of their own document and all other documents.

    `documents` is the whole corpus. No head is trained on the documents of `queries`, all of which have a rest.
    `prompts` are prepended to queries and to documents.
    """

    def __init__(
        self, documents: Sequence[str], queries: Sequence[PseudoQuery], store: FeatureStore, prompts: tuple[str, str]
    ) -> None:
        self._documents = store.features(documents, prompt=prompts[1]).expanded()
        self._queries = store.features([query.text for query in queries], prompt=prompts[0]).expanded()
        self._rests = store.features([query.rest or "" for query in queries], prompt=prompts[1]).expanded()
        self._own_rows = torch.tensor([query.document for query in queries])
        kinds = np.array([query.kind for query in queries])
        weights = np.zeros(len(kinds))
        for kind in set(kinds):
            weights[kinds == kind] = 1 / (len(set(kinds)) * np.sum(kinds == kind))
        self.weights = weights
        """Shape (P,), adding up to 1: every kind counts alike."""

    def scores(self, model: IsotropicGaussianModel) -> np.ndarray:
        """Return NDCG@10 of each pseudo-query, shape (P,), by the projection."""
        sides: Any = ((self._documents, 0), (self._queries, None), (self._rests, 0))
        embeddings = [torch.from_numpy(apply_head(model, rows, num_predicted=count)[0]) for rows, count in sides]
        similarity = model.config.similarity_fn_name
        if similarity == "cosine":  # normalise once, not for every block of queries
            embeddings, similarity = [normalize_rows(rows) for rows in embeddings], "dot"
        documents_ND, queries_PD, rests_PD = embeddings
        parts = []
        for start in range(0, len(queries_PD), _QUERIES_AT_ONCE):
            rows = slice(start, start + _QUERIES_AT_ONCE)
            scores_PN = score_pairs(queries_PD[rows], documents_ND, similarity)
            scores_PN[torch.arange(len(scores_PN)), self._own_rows[rows]] = -math.inf
            own_P = score_rows(queries_PD[rows], rests_PD[rows], similarity)
            places_P = (scores_PN >= own_P.unsqueeze(1)).sum(dim=1)  # an equal score counts as a defeat
            gains_P = 1 / torch.log2(places_P.double() + 2)
            parts.append(torch.where(places_P < _DEPTH, gains_P, 0.0))
        return torch.cat(parts).numpy()
