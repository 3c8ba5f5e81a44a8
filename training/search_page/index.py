"""One corpus searched by the frozen base and by the trained model, and where each document stands in both lists.

Every document passes the encoder once: the base compares features by cosine, the trained model what its head makes of
them.

Shape letters used in this file: N = documents, H = encoder width, D = width of the vectors, P = pairs.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ragcun_hf.data.documents import document_text
from ragcun_hf.errors import NotFiniteError, UserError
from ragcun_hf.evaluation.metrics.isotropy.measures import covariance_eigenvalues, isotropy_report
from ragcun_hf.evaluation.model_evaluation import apply_head, sample_rows
from ragcun_hf.evaluation.plots import random_pair_cosines
from ragcun_hf.model.base_models import load_untrained_base
from ragcun_hf.search.exact import normalize_rows

if TYPE_CHECKING:
    from datasets import Dataset

    from ragcun_hf.features.arguments import FeatureArguments
    from ragcun_hf.model.modeling_isotropic_gaussian import IsotropicGaussianModel

Array = np.ndarray[Any, Any]

_LONGEST_QUERY = 20_000  # characters; what follows would only cost time, for an encoder reads a few hundred tokens
_ROWS_AT_ONCE = 8_192  # documents whose differences to the query are held at once


@dataclass(frozen=True)
class Hit:
    """One document in the list of one system.

    Args:
        rank: Its place in this list, from 1.
        other_rank: Its place in the other system's list, which goes over all documents.
        score: Similarity to the query, or the distance where the system compares by distance.
        title: May be "".
        text: May be "" where there is a title.
    """

    rank: int
    other_rank: int
    score: float
    title: str
    text: str


@dataclass(frozen=True)
class Comparison:
    """What both systems find for one query, each best first.

    Args:
        base: The frozen base's list.
        trained: The trained model's list.
        is_cut: The query is longer than what the encoder reads.
    """

    base: list[Hit]
    trained: list[Hit]
    is_cut: bool


@dataclass(frozen=True)
class Spread:
    """How evenly the vectors of some documents fill their space.

    Args:
        eigenvalues: Shape (D,), variances along the principal directions, falling.
        cosines: Shape (P,), of random pairs.
        measures: As `isotropy_report` names them.
        num_documents: How many were looked at.
    """

    eigenvalues: Array
    cosines: Array
    measures: dict[str, float]
    num_documents: int


class SearchIndex:
    """A corpus as the frozen base and as the trained model see it; may be asked from several threads.

    Args:
        model: In evaluation mode.
        documents: With the columns `title` and `text`, at least one row.
        features: How the encoder runs, and where its features are kept.

    Attributes:
        model: As given.
        base_spread: How evenly the base's vectors spread; None with fewer than two documents or dimensions.
        trained_spread: The same of the trained model's.

    Raises:
        NotFiniteError: If the model makes NaN or infinity of a document.
    """

    def __init__(self, model: IsotropicGaussianModel, documents: Dataset, *, features: FeatureArguments) -> None:
        self.model = model
        self._documents = documents
        # Tokenizers and models are not made for several threads at once.
        self._lock = threading.Lock()
        self._encoder = self._base_encoder = _Encoder(model, features)
        if not model.config.freeze_base:
            base: Any = load_untrained_base(model)
            self._base_encoder = _Encoder(base.to(model.device), features)
        texts = [document_text(*parts) for parts in zip(documents["title"], documents["text"], strict=True)]
        features_NH = self._encoder.documents(texts)
        base_NH = features_NH if self._base_encoder is self._encoder else self._base_encoder.documents(texts)
        embeddings_ND, _ = apply_head(model, features_NH, num_predicted=0)
        if not np.isfinite(embeddings_ND).all():
            raise NotFiniteError("expected finite embeddings, got NaN or infinity: check how the model was trained")
        self.base_spread = measure_spread(base_NH)
        self.trained_spread = measure_spread(embeddings_ND)
        self._base_NH = _unit_rows(base_NH)
        self._trained_ND = self._prepared(embeddings_ND)

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self._documents)

    @property
    def similarity(self) -> str:
        """How the trained model compares: cosine, dot or euclidean."""
        return self.model.config.similarity_fn_name

    @property
    def widths(self) -> tuple[int, int]:
        """The dimensions of the base's vectors and of the trained model's."""
        return self._base_NH.shape[1], self._trained_ND.shape[1]

    def summary(self) -> str:
        """Say how many texts were encoded and how many were known."""
        return "\n".join(encoder.summary() for encoder in dict.fromkeys((self._encoder, self._base_encoder)))

    def search(self, query: str, *, top_k: int, use_predictor: bool = False) -> Comparison:
        """Rank all documents for one query by both systems.

        Args:
            query: Any text that is not blank; what the encoder cannot read is left out.
            top_k: Documents wanted of each system; all where there are fewer.
            use_predictor: Let the trained model search with the predictor's output.

        Returns:
            Both lists.

        Raises:
            UserError: If the query is blank, or there is no predictor.
        """
        if not (text := clean_query(query)):
            raise UserError("Nothing to search for: type a few words.")
        if use_predictor and self.model.predictor is None:
            raise UserError("expected a model with a predictor, got one without: search without it")
        with self._lock:
            feature_1H, is_cut = self._encoder.query(text)
            is_shared = self._base_encoder is self._encoder
            base_1H = feature_1H if is_shared else self._base_encoder.query(text)[0]
            embedding_1D, prediction_1D = apply_head(self.model, feature_1H)
        vector_1D = prediction_1D if use_predictor and prediction_1D is not None else embedding_1D
        base_scores_N = compare(_unit_rows(base_1H)[0], self._base_NH, "cosine")
        trained_scores_N = compare(self._prepared(vector_1D)[0], self._trained_ND, self.similarity)
        base_ranks_N, trained_ranks_N = rank_all(base_scores_N), rank_all(trained_scores_N)
        if self.similarity == "euclidean":
            trained_scores_N = -trained_scores_N
        return Comparison(
            base=self._hits(base_scores_N, base_ranks_N, trained_ranks_N, top_k),
            trained=self._hits(trained_scores_N, trained_ranks_N, base_ranks_N, top_k),
            is_cut=is_cut or len(query) > _LONGEST_QUERY,
        )

    def _prepared(self, vectors_ND: Array) -> Array:
        return _unit_rows(vectors_ND) if self.similarity == "cosine" else vectors_ND

    def _hits(self, scores_N: Array, ranks_N: Array, other_ranks_N: Array, top_k: int) -> list[Hit]:
        rows = np.flatnonzero(ranks_N <= top_k)
        rows = rows[np.argsort(ranks_N[rows])]
        found = self._documents[rows.tolist()]
        columns = zip(ranks_N[rows], other_ranks_N[rows], scores_N[rows], found["title"], found["text"], strict=True)
        return [Hit(int(rank), int(other), float(score), title, text) for rank, other, score, title, text in columns]


class _Encoder:
    """An encoder with its prompts; features of documents are kept as the flags say, those of queries never."""

    def __init__(self, model: IsotropicGaussianModel, features: FeatureArguments) -> None:
        self._model = model
        self._document_store = features.store(model)
        self._query_store = replace(features, feature_cache=False).store(model, show_progress=False)

    def documents(self, texts: Sequence[str]) -> Array:
        return self._document_store.features(texts, prompt=self._model.config.document_prompt).expanded()

    def query(self, text: str) -> tuple[Array, bool]:
        """Return the feature (1, H), and whether the query was cut."""
        prompt = self._model.config.query_prompt
        num_tokens = len(self._model.tokenizer(prompt + text, truncation=False, verbose=False)["input_ids"])
        feature_1H = self._query_store.features([text], prompt=prompt).vectors
        return feature_1H, num_tokens > self._model.config.max_length

    def summary(self) -> str:
        return self._document_store.summary()


def clean_query(query: str) -> str:
    """Return what can be encoded of a query.

    Args:
        query: Any text.

    Returns:
        At most 20,000 characters without blanks at either end; halves of surrogate pairs, which are no Unicode, have
        become blanks.

    Example:
        >>> clean_query("  fish" + chr(0xD800) + "and chips ")
        'fish and chips'
    """
    return re.sub("[\ud800-\udfff]", " ", query[:_LONGEST_QUERY]).strip()


def compare(query_D: Array, documents_ND: Array, similarity: str) -> Array:
    """Score all documents for one query.

    Args:
        query_D: Shape (D,), of unit length where cosines are meant.
        documents_ND: Shape (N, D), likewise.
        similarity: `cosine`, `dot`, or `euclidean`.

    Returns:
        Shape (N,), larger is better: the inner product, or minus the distance.

    Example:
        >>> compare(np.array([0.0, 1.0]), np.array([[0.0, 1.0], [0.0, 3.0]]), "euclidean").tolist()
        [-0.0, -2.0]
    """
    if similarity != "euclidean":
        return documents_ND @ query_D
    # From the differences: sums of squares would lose the digits that tell near documents apart.
    blocks = range(0, len(documents_ND), _ROWS_AT_ONCE)
    distances = [np.linalg.norm(documents_ND[start : start + _ROWS_AT_ONCE] - query_D, axis=1) for start in blocks]
    return -np.concatenate(distances)


def rank_all(scores: Array) -> Array:
    """Return the rank of every document, from 1 for the highest score; of equal ones the earlier comes first.

    Args:
        scores: Shape (N,).

    Returns:
        Shape (N,), int64, every rank once.

    Example:
        >>> rank_all(np.array([0.1, 0.9, 0.1])).tolist()
        [2, 1, 3]
    """
    ranks = np.empty(len(scores), dtype=np.int64)
    ranks[np.argsort(-scores, kind="stable")] = np.arange(1, len(scores) + 1)
    return ranks


def measure_spread(vectors: Array) -> Spread | None:
    """Measure how evenly document vectors spread, on 4,096 of them where there are more.

    Args:
        vectors: Shape (N, D), on any scale: what the page shows of them does not depend on it.

    Returns:
        The measures, or None where there are fewer than two vectors or dimensions.
    """
    if min(vectors.shape) < 2:
        return None
    sample_ND = vectors[sample_rows(len(vectors))]
    cosines_P = random_pair_cosines(sample_ND, np.random.default_rng(0))
    return Spread(covariance_eigenvalues(sample_ND), cosines_P, isotropy_report(sample_ND), len(sample_ND))


def _unit_rows(vectors: Array) -> Array:
    return normalize_rows(torch.from_numpy(np.ascontiguousarray(vectors, dtype=np.float32))).numpy()
