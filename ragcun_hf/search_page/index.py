"""Search one corpus with the frozen base and with the trained model, and find each document's rank in both rankings.

Every document is encoded once: the base compares the features as its makers do, the trained model compares its
embeddings of them.

Shape letters used in this file: N = documents, H = encoder width, D = width of the vectors, P = pairs.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data.documents import document_text
from ..errors import NotFiniteError, UserError
from ..evaluation.metrics.isotropy.measures import covariance_eigenvalues, isotropy_report
from ..evaluation.model_evaluation import apply_head, sample_rows
from ..evaluation.plots import random_pair_cosines
from ..model.base_models import load_untrained_base
from ..search.similarity import score_rows

if TYPE_CHECKING:
    from datasets import Dataset

    from ..features.arguments import FeatureArguments
    from ..model.modeling_isotropic_gaussian import IsotropicGaussianModel

Array = np.ndarray[Any, Any]

_LONGEST_QUERY = 20_000  # characters; more would only cost time, because an encoder reads a few hundred tokens


@dataclass(frozen=True)
class Hit:
    """One document in the ranking of one system."""

    rank: int  # in this ranking, from 1
    other_rank: int  # in the other system's ranking of all documents
    score: float  # similarity to the query, or the distance for a Euclidean model
    title: str  # may be ""
    text: str  # may be "" if there is a title


@dataclass(frozen=True)
class BothRankings:
    """The documents that both systems find for a query, best first."""

    base: list[Hit]
    trained: list[Hit]
    is_cut: bool  # the query is longer than the encoder's input
    probability: float | None = None  # that the trained model's first document is relevant, if the model can tell


@dataclass(frozen=True)
class Spread:
    """How evenly the vectors of some documents fill their space."""

    eigenvalues: Array  # (D,), variances along the principal directions, falling
    cosines: Array  # (P,), of random pairs
    measures: dict[str, float]  # as from `isotropy_report`
    num_documents: int  # in the sample


class SearchIndex:
    """A corpus as vectors of the frozen base and of the trained model; several threads may search it.

    Args:
        model: The trained model, in evaluation mode.
        documents: Rows with the columns `title` and `text`, at least one row.
        features: How the encoder runs, and where its features are kept.

    Attributes:
        model: As given.
        base_spread: Spread of the base's vectors; None with fewer than two documents or dimensions.
        trained_spread: Spread of the trained model's vectors.

    Raises:
        NotFiniteError: If an embedding contains NaN or infinity.
    """

    def __init__(self, model: IsotropicGaussianModel, documents: Dataset, *, features: FeatureArguments) -> None:
        self.model = model
        self._documents = documents
        self._lock = threading.Lock()  # tokenizers and models are not safe for several threads
        self._encoder = self._base_encoder = _PromptedEncoder(model, features)
        if not model.config.freeze_base:
            base: Any = load_untrained_base(model)
            self._base_encoder = _PromptedEncoder(base.to(model.device), features)
        texts = [document_text(*parts) for parts in zip(documents["title"], documents["text"], strict=True)]
        features_NH = self._encoder.documents(texts)
        of_base = features_NH if self._base_encoder is self._encoder else self._base_encoder.documents(texts)
        self._base_NH = self._base_encoder.model.encoder_part(of_base)
        self._trained_ND, _ = apply_head(model, features_NH, num_predicted=0)
        if not np.isfinite(self._trained_ND).all():
            raise NotFiniteError("expected finite embeddings, got NaN or infinity: check how the model was trained")
        self.base_spread = measure_spread(self._base_NH)
        self.trained_spread = measure_spread(self._trained_ND)

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self._documents)

    @property
    def similarity(self) -> str:
        """The trained model's similarity: cosine, dot or euclidean."""
        return self.model.config.similarity_fn_name

    @property
    def base_similarity(self) -> str:
        """The similarity by which the base's makers compare its vectors."""
        return self._base_encoder.model.config.encoder_similarity

    @property
    def widths(self) -> tuple[int, int]:
        """The dimensions of the base's vectors and of the trained model's."""
        return self._base_NH.shape[1], self._trained_ND.shape[1]

    def summary(self) -> str:
        """Say how many texts were encoded and how many came from the cache."""
        return "\n".join(encoder.summary() for encoder in dict.fromkeys((self._encoder, self._base_encoder)))

    def search(self, query: str, *, top_k: int, use_predictor: bool = False) -> BothRankings:
        """Rank all documents for one query with both systems, and return the best `top_k` of each.

        Raises a UserError for a blank query, or without the predictor whose output should be the query vector.
        Characters that an encoder cannot read are ignored.
        """
        (found,) = self.search_all([(query, use_predictor)], top_k=top_k)
        if isinstance(found, UserError):
            raise found
        return found

    def search_all(self, queries: Sequence[tuple[str, bool]], *, top_k: int) -> list[BothRankings | UserError]:
        """Search as `search` does for several queries, each with its own choice of the predictor.

        They are encoded together. A query for which `search` would raise a UserError has that as its answer.
        """
        answers: list[BothRankings | UserError | None] = [self._refusal(*query) for query in queries]
        rows = [row for row, refusal in enumerate(answers) if refusal is None]
        if rows:
            for row, found in zip(rows, self._found([queries[row] for row in rows], top_k=top_k), strict=True):
                answers[row] = found
        return [answer for answer in answers if answer is not None]

    def _refusal(self, query: str, use_predictor: bool) -> UserError | None:
        if not clean_query(query):
            return UserError("Nothing to search for: type a few words.")
        if use_predictor and self.model.predictor is None:
            return UserError("expected a model with a predictor, got one without: search without it")
        return None

    def _found(self, queries: Sequence[tuple[str, bool]], *, top_k: int) -> Iterator[BothRankings]:
        """Encode queries and rank all documents for each."""
        texts = [clean_query(query) for query, _ in queries]
        with self._lock:
            features_QH, are_cut = self._encoder.queries(texts)
            is_shared = self._base_encoder is self._encoder
            of_base = features_QH if is_shared else self._base_encoder.queries(texts)[0]
            base_QH = self._base_encoder.model.encoder_part(of_base)
            embeddings_QD, predictions_QD = apply_head(self.model, features_QH)
        for row, (query, use_predictor) in enumerate(queries):
            vectors_QD = predictions_QD if use_predictor and predictions_QD is not None else embeddings_QD
            found = self._rankings(base_QH[row : row + 1], vectors_QD[row : row + 1], top_k, use_predictor)
            yield replace(found, is_cut=are_cut[row] or len(query) > _LONGEST_QUERY)

    def _rankings(self, base_1H: Array, vector_1D: Array, top_k: int, use_predictor: bool) -> BothRankings:
        """Rank all documents for the vectors of one query."""
        base_scores_N = score_documents(base_1H, self._base_NH, self.base_similarity)
        trained_scores_N = score_documents(vector_1D, self._trained_ND, self.similarity)
        probability = None
        # It was fitted to scores of the projection.
        if self.model.config.relevance_calibration is not None and not use_predictor and len(trained_scores_N) > 1:
            probability = float(self.model.relevance_probability(trained_scores_N))
        base_ranks_N, trained_ranks_N = rank_all(base_scores_N), rank_all(trained_scores_N)
        if self.base_similarity == "euclidean":
            base_scores_N = -base_scores_N
        if self.similarity == "euclidean":
            trained_scores_N = -trained_scores_N
        return BothRankings(
            base=self._hits(base_scores_N, base_ranks_N, trained_ranks_N, top_k),
            trained=self._hits(trained_scores_N, trained_ranks_N, base_ranks_N, top_k),
            is_cut=False,
            probability=probability,
        )

    def _hits(self, scores_N: Array, ranks_N: Array, other_ranks_N: Array, top_k: int) -> list[Hit]:
        rows = np.flatnonzero(ranks_N <= top_k)
        rows = rows[np.argsort(ranks_N[rows])]
        found = self._documents[rows.tolist()]
        columns = zip(ranks_N[rows], other_ranks_N[rows], scores_N[rows], found["title"], found["text"], strict=True)
        return [Hit(int(rank), int(other), float(score), title, text) for rank, other, score, title, text in columns]


class _PromptedEncoder:
    """An encoder with its prompts; features of documents are cached as the flags say, those of queries never."""

    def __init__(self, model: IsotropicGaussianModel, features: FeatureArguments) -> None:
        self.model = model
        self._document_store = features.store(model)
        self._query_store = replace(features, feature_cache=False).store(
            model, show_progress=False, is_interactive=True
        )
        self.summary = self._document_store.summary

    def documents(self, texts: Sequence[str]) -> Array:
        return self._document_store.features(texts, prompt=self.model.config.document_prompt).expanded()

    def queries(self, texts: Sequence[str]) -> tuple[Array, list[bool]]:
        """Return the features (Q, H), and for each query whether it is longer than the encoder's input."""
        prompt = self.model.config.query_prompt
        tokens = self.model.tokenizer([prompt + text for text in texts], truncation=False, verbose=False)
        features_QH = self._query_store.features(texts, prompt=prompt).expanded()
        return features_QH, [len(ids) > self.model.config.max_length for ids in tokens["input_ids"]]


def clean_query(query: str) -> str:
    """Return the part of a query that can be encoded: at most 20,000 characters, without spaces at both ends.

    Halves of surrogate pairs, which are not valid Unicode, become spaces.

    >>> clean_query("  fish" + chr(0xD800) + "and chips ")
    'fish and chips'
    """
    return re.sub("[\ud800-\udfff]", " ", query[:_LONGEST_QUERY]).strip()


def score_documents(query_1D: Array, documents_ND: Array, similarity: str, *, block_rows: int = 2_048) -> Array:
    """Score all documents for one query, block by block: (N,), larger is better."""
    query, documents = torch.from_numpy(query_1D), torch.from_numpy(documents_ND)
    return torch.cat([score_rows(query, block, similarity) for block in documents.split(block_rows)]).numpy()


def rank_all(scores: Array) -> Array:
    """Return the rank of each score (N,), from 1 for the highest; of equal scores the earlier comes first.

    >>> rank_all(np.array([0.1, 0.9, 0.1])).tolist()
    [2, 1, 3]
    """
    ranks = np.empty(len(scores), dtype=np.int64)
    ranks[np.argsort(-scores, kind="stable")] = np.arange(1, len(scores) + 1)
    return ranks


def measure_spread(vectors: Array) -> Spread | None:
    """Measure how evenly document vectors (N, D) spread, on a sample of at most 4,096; their scale does not matter.

    Returns None for fewer than two vectors or dimensions.
    """
    if min(vectors.shape) < 2:
        return None
    sample_ND = vectors[sample_rows(len(vectors))]
    cosines_P = random_pair_cosines(sample_ND, np.random.default_rng(0))
    return Spread(covariance_eigenvalues(sample_ND), cosines_P, isotropy_report(sample_ND), len(sample_ND))
