"""Retrieval figures on held-out pairs, to choose checkpoints during training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..search.exact import Matrix, exact_search, search_device
from .calibration import Array, first_two
from .metrics.retrieval.trec_scores import average_scores, score_queries
from .ranking import Run, build_run
from .results import MAIN_METRIC

if TYPE_CHECKING:
    from ..features.feature_store import FeatureStore
    from ..model.modeling_isotropic_gaussian import IsotropicGaussianModel


class RetrievalValidation:
    """Measures how well the queries of pairs find their own documents among all documents.

    Distractors are relevant to no query. Without a store of features, texts are encoded at every call.
    """

    primary_metric = MAIN_METRIC

    def __init__(
        self,
        queries: Sequence[str],
        documents: Sequence[str],
        *,
        distractors: Sequence[str] = (),
        store: FeatureStore | None = None,
    ) -> None:
        self._queries = list(dict.fromkeys(queries))
        self._documents = list(dict.fromkeys([*documents, *distractors]))
        query_ids = {text: f"q{number}" for number, text in enumerate(self._queries)}
        document_ids = {text: f"d{number}" for number, text in enumerate(self._documents)}
        self._query_ids, self._document_ids = list(query_ids.values()), list(document_ids.values())
        self._qrels: dict[str, dict[str, int]] = {}
        for query, document in zip(queries, documents, strict=True):
            self._qrels.setdefault(query_ids[query], {})[document_ids[document]] = 1
        self._store = store
        self._features: dict[tuple[bool, str], torch.Tensor] = {}  # the same at every call

    @property
    def num_documents(self) -> int:
        """Number of documents that are searched."""
        return len(self._documents)

    def base_figures(self, model: IsotropicGaussianModel) -> dict[str, float]:
        """Return `ndcg@10` of the frozen encoder alone, ranked as its makers rank; nothing if it is not frozen."""
        if self._store is None or not model.config.freeze_base:
            return {}
        features = (self._features_of(model, is_query=is_query) for is_query in (True, False))
        queries, documents = map(model.encoder_part, features)
        return {MAIN_METRIC: self._figure(queries, documents, model.config.encoder_similarity, model.device)}

    def __call__(self, model: IsotropicGaussianModel) -> dict[str, float]:
        """Return `ndcg@10` of the projection and, with a predictor, `ndcg@10_predictor`."""
        queries, predictions, documents = self._vectors(model)
        similarity = model.config.similarity_fn_name
        figures = {MAIN_METRIC: self._figure(queries, documents, similarity, model.device)}
        if predictions is not None:
            figures[f"{MAIN_METRIC}_predictor"] = self._figure(predictions, documents, similarity, model.device)
        return figures

    def first_two(self, model: IsotropicGaussianModel) -> tuple[Array, Array]:
        """Return what a calibration is fitted to, as `calibration.first_two` does, of the projection's rankings."""
        queries, _, documents = self._vectors(model)
        run = self._run(queries, documents, model.config.similarity_fn_name, model.device)
        return first_two(run, self._qrels)

    def _vectors(self, model: IsotropicGaussianModel) -> tuple[Matrix, Matrix | None, Matrix]:
        was_training = model.training
        model.eval()
        try:
            return *self._embed(model, is_query=True), self._embed(model, is_query=False)[0]
        finally:
            model.train(was_training)

    @torch.inference_mode()
    def _embed(self, model: IsotropicGaussianModel, *, is_query: bool) -> tuple[Matrix, Matrix | None]:
        texts = self._queries if is_query else self._documents
        if self._store is None:
            if not is_query:
                return model.encode_document(texts, convert_to_tensor=True), None
            predicts = model.config.use_predictor
            predictions = model.encode_query(texts, convert_to_tensor=True, use_predictor=True) if predicts else None
            return model.encode_query(texts, convert_to_tensor=True), predictions
        features = self._features_of(model, is_query=is_query).to(model.device)
        output = model(features=features, num_predicted=None if is_query else 0)
        predictions = None if output.predictions is None else output.predictions.float().cpu()
        return output.embeddings.float().cpu(), predictions

    def _features_of(self, model: IsotropicGaussianModel, *, is_query: bool) -> torch.Tensor:
        if self._store is None:
            raise ValueError("expected a feature store")
        texts = self._queries if is_query else self._documents
        prompt = model.config.query_prompt if is_query else model.config.document_prompt
        key = (is_query, prompt)
        if key not in self._features:
            self._features[key] = torch.from_numpy(self._store.features(texts, prompt=prompt).expanded())
        return self._features[key]

    def _figure(self, queries: Matrix, documents: Matrix, similarity: str, device: torch.device) -> float:
        run = self._run(queries, documents, similarity, device)
        return average_scores(score_queries(run, self._qrels))[MAIN_METRIC]

    def _run(self, queries: Matrix, documents: Matrix, similarity: str, device: torch.device) -> Run:
        found = exact_search(queries, documents, k=10, similarity=similarity, device=search_device(device))
        return build_run(self._query_ids, self._document_ids, found, drop_identical_ids=False, k=10)
