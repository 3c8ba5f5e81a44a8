"""A trained model on retrieval data sets, with the frozen base beside it, through one pipeline."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data.documents import text_digest
from ..data.mapped_column import take
from ..errors import UserError
from ..features.feature_store import TEXTS_AT_ONCE
from ..files import DOCUMENTS_FILE
from ..search.exact import exact_search
from ..search.memory_maps import new_matrix, read_far_apart, release
from ..search.shards import Shard, gather_rows_by_number, own_shard, search_shards
from .metrics.isotropy.measures import isotropy_report
from .metrics.isotropy.published import sigreg
from .results import mean_over_datasets
from .retrieval import (
    BASE_SYSTEM,
    DatasetEvaluation,
    RetrievalDataset,
    Search,
    check_identical_ids,
    evaluate_retrieval,
)

if TYPE_CHECKING:
    from ..features.feature_store import FeatureStore
    from ..model.modeling_isotropic_gaussian import IsotropicGaussianModel

logger = logging.getLogger(__name__)

PROJECTION_SYSTEM, PREDICTOR_SYSTEM = "projection", "predictor"

_HEAD_ROWS = 1_024  # features through the head at once; several processes part a corpus at its multiples


@dataclass(frozen=True)
class ModelEvaluation:
    """All data sets, and what the results file says of them."""

    evaluations: list[DatasetEvaluation]
    datasets: dict[str, Any]
    mean: dict[str, dict[str, float]]
    isotropy: dict[str, dict[str, float]]
    samples: dict[str, np.ndarray]  # system -> document vectors, for plots


def evaluate_model(
    model: IsotropicGaussianModel,
    datasets: Sequence[RetrievalDataset],
    *,
    store: FeatureStore,
    base_store: FeatureStore | None = None,
    base_prompts: tuple[str, str] = ("", ""),
    base_only: bool = False,
    use_predictor: bool = False,
    drop_identical_ids: bool = True,
    k: int = 100,
    seen_document_digests: Collection[str] = (),
    search: Search = exact_search,
    folder: str | Path = ".",
) -> ModelEvaluation:
    """Search every data set with the frozen base, the projection and, if asked, the predictor's output.

    Args:
        model: In evaluation mode.
        datasets: Each with queries, corpus and judgements.
        store: Gives the features of the model's encoder.
        base_store: Gives the features of the untrained base where the model's encoder was trained too;
            otherwise the model's own features are the base's vectors.
        base_prompts: With `base_store`, what the untrained base has put before queries and documents.
        base_only: Leave the head out.
        use_predictor: Also search with the predictor's output as the query vector.
        drop_identical_ids: Drop the document with the query's id from its ranking, as BEIR does.
        k: Documents kept per query, at least 100 for the official figures.
        seen_document_digests: Digests of training documents (hexadecimal); figures then also stand apart
            for queries with and without a relevant document among them.
        search: Finds the documents; called as `exact_search` is.
        folder: Where the vectors of a large corpus lie meanwhile.

    Returns:
        Figures, runs and isotropy, ready for the results file.

    Raises:
        UserError: If there is no predictor to use, or a data set does not fit.
    """
    if use_predictor and model.predictor is None:
        raise UserError(
            "--use_predictor expects a model with a predictor, got one without: leave the flag out, or train with it"
        )
    for dataset in datasets if drop_identical_ids else ():
        check_identical_ids(dataset)
    shards = [own_shard(len(dataset.corpus_ids), block=_HEAD_ROWS) for dataset in datasets]
    sample = VectorSample(shards)
    encoders = _encoders(model, store, base_store, base_prompts)
    systems = _Systems(model, *encoders, Path(folder), base_only, use_predictor)

    def evaluate(dataset: RetrievalDataset, shard: Shard) -> DatasetEvaluation:
        vectors = systems.vectors(dataset, shard)
        for system in (BASE_SYSTEM, PROJECTION_SYSTEM):
            if system in vectors:
                sample.add(system, vectors[system][1])
        own_similarity = dict.fromkeys(vectors, model.config.similarity_fn_name)
        return evaluate_retrieval(
            dataset,
            vectors,
            similarity_by_system={**own_similarity, BASE_SYSTEM: "cosine"},
            k=k,
            drop_identical_ids=drop_identical_ids,
            seen_document_ids=seen_document_ids(dataset, seen_document_digests) or None,
            search=search_shards(search, shard),
            num_vectors=len(shard),
        )

    evaluations = [evaluate(dataset, shard) for dataset, shard in zip(datasets, shards, strict=True)]
    entries = {evaluation.name: evaluation.entry for evaluation in evaluations}
    samples = sample.vectors()
    # The base's vectors on the scale on which the head sees them, so that both are judged alike.
    samples[BASE_SYSTEM] = samples[BASE_SYSTEM] * float(model.config.feature_scale)
    isotropy = {system: isotropy_report(rows, statistic=_sigreg) for system, rows in samples.items()}
    return ModelEvaluation(evaluations, entries, mean_over_datasets(entries), isotropy, samples)


def load_seen_digests(model_path: str | Path) -> set[str]:
    """Read the digests of the documents that a model folder was trained on; empty where none are recorded."""
    path = Path(model_path) / DOCUMENTS_FILE
    return set(path.read_text(encoding="utf-8").split()) if path.is_file() else set()


@dataclass(frozen=True)
class _Encoder:
    """What gives features, and what it is given before texts."""

    store: FeatureStore
    query_prompt: str
    document_prompt: str

    def queries(self, dataset: RetrievalDataset) -> np.ndarray:
        return self.store.features(list(dataset.queries.values()), prompt=self.query_prompt).expanded()

    def documents(self, texts: Sequence[str]) -> np.ndarray:
        return self.store.read(texts, prompt=self.document_prompt).expanded()


def _encoders(
    model: IsotropicGaussianModel,
    store: FeatureStore,
    base_store: FeatureStore | None,
    base_prompts: tuple[str, str],
) -> tuple[_Encoder, _Encoder]:
    """Return the base's and the model's own, which are one unless training moved the encoder."""
    own = _Encoder(store, model.config.query_prompt, model.config.document_prompt)
    return (own if base_store is None else _Encoder(base_store, *base_prompts)), own


@dataclass(frozen=True)
class _Systems:
    """What turns a data set into each system's vectors."""

    model: IsotropicGaussianModel
    base: _Encoder
    own: _Encoder
    folder: Path
    base_only: bool
    use_predictor: bool

    def vectors(self, dataset: RetrievalDataset, shard: Shard) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return each system's vectors of all queries, and of the documents that lie here."""
        base_documents, documents = self._documents(dataset, shard)
        base_queries = self.base.queries(dataset)
        vectors = {BASE_SYSTEM: (base_queries, base_documents)}
        if not self.base_only:
            queries = base_queries if self.own is self.base else self.own.queries(dataset)
            embeddings, predictions = apply_head(self.model, queries)
            vectors[PROJECTION_SYSTEM] = (embeddings, documents)
            if self.use_predictor and predictions is not None:
                vectors[PREDICTOR_SYSTEM] = (predictions, documents)
        return vectors

    def _documents(self, dataset: RetrievalDataset, shard: Shard) -> tuple[np.ndarray, np.ndarray]:
        """Return the base's vectors and the model's embeddings, made block by block."""
        for encoder in dict.fromkeys([self.base] if self.base_only else [self.base, self.own]):
            encoder.store.encode(dataset.corpus_texts, prompt=encoder.document_prompt)
        features = new_matrix(len(shard), self.model.config.feature_dim, self.folder)
        embeddings = new_matrix(0 if self.base_only else len(shard), self.model.config.output_dim, self.folder)
        for start in range(0, len(shard), TEXTS_AT_ONCE):
            rows = slice(start, min(start + TEXTS_AT_ONCE, len(shard)))
            texts = dataset.corpus_texts[shard.start + rows.start : shard.start + rows.stop]
            features[rows] = self.base.documents(texts)
            if not self.base_only:
                own_features = features[rows] if self.own is self.base else self.own.documents(texts)
                embeddings[rows], _ = apply_head(self.model, own_features, num_predicted=0)
            release(features)
            release(embeddings)
        return features, embeddings


@torch.inference_mode()
def apply_head(
    model: IsotropicGaussianModel, features: np.ndarray, *, num_predicted: int | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Put features (N, H) through the head: embeddings (N, D) and, with a predictor, predictions (N, D), float32.

    With `num_predicted` 0 nothing is predicted, for documents, of which no prediction is asked.
    """
    outputs = [
        model(
            features=torch.from_numpy(features[start : start + _HEAD_ROWS]).to(model.device),
            num_predicted=num_predicted,
        )
        # No features give no vectors, but of the right width.
        for start in range(0, max(1, len(features)), _HEAD_ROWS)
    ]
    embeddings = torch.cat([output.embeddings.float().cpu() for output in outputs]).numpy()
    if model.predictor is None:
        return embeddings, None
    return embeddings, torch.cat([output.predictions.float().cpu() for output in outputs]).numpy()


def seen_document_ids(dataset: RetrievalDataset, digests: Collection[str]) -> set[str]:
    """Return the ids of the judged documents whose texts have one of these hexadecimal digests."""
    if not digests:
        return set()
    known = set(digests)
    judged = {document for judgements in dataset.qrels.values() for document in judgements}
    rows = [row for row, identifier in enumerate(dataset.corpus_ids) if identifier in judged]
    texts = zip(take(dataset.corpus_ids, rows), take(dataset.corpus_texts, rows), strict=True)
    return {identifier for identifier, text in texts if text_digest(text).hex() in known}


def _sigreg(rows: torch.Tensor) -> float:
    """The SIGReg statistic per row, which does not grow with the sample: 0.40 when collapsed, 1.05 / N at best.

    Not the losses' own, which would take the same sample on several processes for as many samples.
    """
    return sigreg(rows) / len(rows)


_MOST_ROWS = 4_096


def sample_rows(num_documents: int) -> np.ndarray:
    """Return the rows to look at, rising: 4,096 of them, or all where there are fewer."""
    if num_documents <= _MOST_ROWS:
        return np.arange(num_documents)
    return np.sort(np.random.default_rng(0).choice(num_documents, _MOST_ROWS, replace=False, shuffle=False))


class VectorSample:
    """Rows of several data sets, drawn from all their documents together, and from all processes.

    Args:
        shards: This process's documents of each data set, in order.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = list(shards)
        self._starts = np.cumsum([0, *(shard.num_documents for shard in shards)])
        self._chosen = sample_rows(int(self._starts[-1]))
        self._rows: dict[str, list[np.ndarray]] = {}

    def add(self, system: str, documents: np.ndarray) -> None:
        """Keep the sample's rows of a system's vectors of the next data set, those that lie here."""
        rows = self._rows.setdefault(system, [])
        shard = self._shards[len(rows)]
        rows.append(read_far_apart(documents, self._numbers(len(rows)) - self._starts[len(rows)] - shard.start))

    def vectors(self) -> dict[str, np.ndarray]:
        """Return each system's sample, with the rows of all processes, in the order of the data sets."""
        numbers = np.concatenate([self._numbers(dataset) for dataset in range(len(self._shards))])
        return {system: gather_rows_by_number(numbers, np.concatenate(rows)) for system, rows in self._rows.items()}

    def _numbers(self, dataset: int) -> np.ndarray:
        shard, start = self._shards[dataset], self._starts[dataset]
        first, last = np.searchsorted(self._chosen, (start + shard.start, start + shard.stop))
        return self._chosen[first:last]
