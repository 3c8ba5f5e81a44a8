"""Evaluate a trained model and its frozen base on retrieval data sets, in the same way."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open

from ..data.beir_folder import BeirDataset
from ..data.documents import text_digest
from ..data.mapped_column import take
from ..errors import UserError
from ..features.feature_store import SAMPLE_ROWS
from ..features.text_vectors import TEXTS_AT_ONCE
from ..files import DOCUMENTS_FILE, weights_digest
from ..search.exact import SearchResult, exact_search, search_device
from ..search.first_pass import row_blocks
from ..search.memory_maps import new_matrix, read_far_apart, release
from ..search.shards import Shard, gather_rows_by_number, own_shard
from .bm25 import Bm25System
from .closed_form import ClosedForm
from .examples import example_rankings
from .fusion import FUSION_SETTINGS, FusionSystem
from .metrics.isotropy.measures import isotropy_report, sigreg
from .results import (
    BASE_SYSTEM,
    CLOSED_FORM_SYSTEM,
    MOVED_SYSTEM,
    PREDICTOR_SYSTEM,
    PROJECTION_SYSTEM,
    mean_over_datasets,
)
from .retrieval import DatasetEvaluation, Search, System, VectorSystem, check_identical_ids, evaluate_retrieval

if TYPE_CHECKING:
    from ..features.feature_store import FeatureStore
    from ..model.modeling_isotropic_gaussian import IsotropicGaussianModel

HEAD_ROWS = 1_024  # features given to the head at once; a corpus is divided among processes at multiples of this


def saved_weights_digest(model: IsotropicGaussianModel) -> str | None:
    """Return the digest of the weights in the folder that a model was loaded from, or that the Trainer saved it in.

    None if there is no such folder on this machine, or if the model has other weights by now.
    """
    if not model.name_or_path:
        return None
    folder, own = Path(model.name_or_path), model.state_dict()
    return weights_digest(folder) if _are_saved(own, sorted(folder.glob("*.safetensors"))) else None


def _are_saved(weights: Mapping[str, Any], files: Sequence[Path]) -> bool:
    """Return whether safetensors files hold exactly these weights."""
    num_equal = 0
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys(), key=_is_of_encoder):  # the head differs first
                own = weights.get(name)
                # A sharded tensor would have to be gathered by all processes.
                if own is None or hasattr(own, "full_tensor"):
                    return False
                saved, own = file.get_tensor(name), own.cpu()
                if saved.dtype != own.dtype or not torch.equal(saved, own):
                    return False
                num_equal += 1
    return num_equal == len(weights)


def _is_of_encoder(name: str) -> bool:
    return name.startswith("encoder.")


@dataclass(frozen=True)
class TextEncoder:
    """A model's encoder, with the store of its features and the prompts from its config."""

    model: IsotropicGaussianModel
    store: FeatureStore

    def queries(self, dataset: BeirDataset) -> np.ndarray:
        """Return the features of all queries, shape (Q, H + L)."""
        return self.query_features(list(dataset.queries.values()))

    def query_features(self, texts: list[str]) -> np.ndarray:
        """Return the features of some queries, shape (Q, H + L)."""
        return self.store.features(texts, prompt=self.model.config.query_prompt).expanded()

    def encode_documents(self, texts: Sequence[str]) -> None:
        """Fill the cache, if there is one, with the features of a whole corpus."""
        self.store.encode(texts, prompt=self.model.config.document_prompt)

    def documents(self, texts: Sequence[str]) -> np.ndarray:
        """Return the features of some documents, shape (N, H + L)."""
        return self.store.read(texts, prompt=self.model.config.document_prompt).expanded()


@dataclass(frozen=True)
class ModelSystems:
    """Makes the systems of one model: the frozen base, and outputs of the trained head."""

    encoder: TextEncoder  # of the model in evaluation mode
    base: TextEncoder | None = None  # the untrained base, if training changed the encoder
    heads: tuple[str, ...] = (PROJECTION_SYSTEM,)  # the predictor's output is another query vector
    search: Search = exact_search
    folder: str | Path = "."  # for temporary files with the vectors of a large corpus
    base_rankings: dict[tuple[str, str], SearchResult] | None = None  # kept to search with the base only once

    def __post_init__(self) -> None:
        if PREDICTOR_SYSTEM in self.heads and self.encoder.model.predictor is None:
            raise UserError(
                "--use_predictor expects a model with a predictor, got one without: leave the flag out, or train one"
            )

    def of(self, dataset: BeirDataset, shard: Shard) -> list[VectorSystem]:
        """Compute the vectors of all queries and of this process's documents, block by block."""
        model, base, folder = self.encoder.model, self.base or self.encoder, Path(self.folder)
        for encoder in dict.fromkeys([base, self.encoder] if self.heads else [base]):
            encoder.encode_documents(dataset.corpus_texts)
        features = new_matrix(len(shard), base.model.config.encoder_dim, folder)
        embeddings = new_matrix(len(shard) if self.heads else 0, model.config.output_dim, folder)
        for rows in row_blocks(len(shard), TEXTS_AT_ONCE):
            texts = dataset.corpus_texts[shard.start + rows.start : shard.start + rows.stop]
            of_base = base.documents(texts)
            features[rows] = base.model.encoder_part(of_base)
            if self.heads:
                own_features = of_base if self.encoder is base else self.encoder.documents(texts)
                embeddings[rows], _ = apply_head(model, own_features, num_predicted=0)
            release(features)
            release(embeddings)
        base_queries = base.queries(dataset)
        kept = self.base_rankings
        of_encoder = base.model.encoder_part(base_queries)
        published, device = base.model.config.encoder_similarity, search_device(model.device)
        systems = [VectorSystem(BASE_SYSTEM, of_encoder, features, published, self.search, shard, kept, device)]
        if self.heads:
            own_queries = base_queries if self.encoder is base else self.encoder.queries(dataset)
            outputs = apply_head(model, own_queries)
            queries: dict[str, Any] = dict(zip((PROJECTION_SYSTEM, PREDICTOR_SYSTEM), outputs, strict=True))
            similarity = model.config.similarity_fn_name
            systems += [
                VectorSystem(head, queries[head], embeddings, similarity, self.search, shard, device=device)
                for head in self.heads
            ]
        return systems

    def moved(self, closed_form: ClosedForm, dataset: BeirDataset, own: Sequence[VectorSystem]) -> list[VectorSystem]:
        """Return the base, and the projection of a cosine model, with known documents moved to their queries."""
        base, model = self.base or self.encoder, self.encoder.model

        def of_base(texts: list[str]) -> np.ndarray:
            return base.model.encoder_part(base.query_features(texts))

        def of_projection(texts: list[str]) -> np.ndarray:
            return apply_head(model, self.encoder.query_features(texts))[0]

        moved = [closed_form.system(CLOSED_FORM_SYSTEM, dataset, own[0], of_base, self.folder)]
        for system in own:
            # Moved documents have length 1: beside others, only a cosine ranks them.
            if system.name == PROJECTION_SYSTEM and system.similarity == "cosine":
                moved.append(closed_form.system(MOVED_SYSTEM, dataset, system, of_projection, self.folder))
        return moved


@dataclass(frozen=True)
class ModelEvaluation:
    """All data sets, and their parts of the results file."""

    evaluations: list[DatasetEvaluation]
    datasets: dict[str, Any]
    mean: dict[str, dict[str, float]]
    isotropy: dict[str, dict[str, float]]
    samples: dict[str, np.ndarray]  # system -> document vectors, for plots


def evaluate_model(
    systems: ModelSystems,
    datasets: Sequence[BeirDataset],
    *,
    k: int = 100,
    drop_identical_ids: bool = True,
    seen_document_digests: Collection[str] = (),
    bm25: Bm25System | None = None,
    closed_form: ClosedForm | None = None,
    num_examples: int = 0,
) -> ModelEvaluation:
    """Evaluate a model's systems on every data set, and measure the isotropy of their document vectors.

    With hexadecimal digests of training documents, queries with and without a relevant document among them are also
    reported separately. With `bm25`, its figures and those of its fusion with the base stand beside the model's, and
    with `closed_form` those of the base, and of the projection of a cosine model, whose known documents were moved to
    their training queries. `num_examples` queries of each data set are kept with the best document of the projection,
    and with their texts.
    """
    for dataset in datasets if drop_identical_ids else ():
        check_identical_ids(dataset)
    shards = [own_shard(len(dataset.corpus_ids), block=HEAD_ROWS) for dataset in datasets]
    sample = VectorSample(shards)

    def evaluate(dataset: BeirDataset, shard: Shard) -> DatasetEvaluation:  # frees its vectors before the next one
        own = systems.of(dataset, shard)
        for system in own:
            if system.name != PREDICTOR_SYSTEM:  # which searches the projection's documents
                sample.add(system.name, system.documents)
        # No digest is not the same as none of these documents: it means that nothing was recorded.
        seen = seen_document_ids(dataset, seen_document_digests) if seen_document_digests else None
        every: list[System] = [*own] if bm25 is None else [*own, bm25, FusionSystem(own[0], bm25)]
        if closed_form is not None:
            every += systems.moved(closed_form, dataset, own)
        found = evaluate_retrieval(dataset, every, k=k, drop_identical_ids=drop_identical_ids, seen_document_ids=seen)
        if num_examples and PROJECTION_SYSTEM in found.runs:
            run = found.runs[PROJECTION_SYSTEM]
            found.entry["examples"] = example_rankings(dataset, run, num_examples, seen_document_ids=seen or ())
        return found

    evaluations = [evaluate(dataset, shard) for dataset, shard in zip(datasets, shards, strict=True)]
    entries = {evaluation.name: evaluation.entry for evaluation in evaluations}
    samples = sample.vectors()
    # Scale the base's vectors as the head's input is scaled, so that both systems are measured at one scale.
    samples[BASE_SYSTEM] = samples[BASE_SYSTEM] * float(systems.encoder.model.config.feature_scale)
    device = systems.encoder.model.device
    isotropy = {system: measure_isotropy(rows, device) for system, rows in samples.items()}
    return ModelEvaluation(evaluations, entries, mean_over_datasets(entries), isotropy, samples)


def measure_isotropy(rows: np.ndarray, device: str | torch.device = "cpu") -> dict[str, float]:
    """Measure how evenly vectors (N, D), N >= 2, are spread, with SIGReg per row, on the device of their model."""
    # SIGReg per row does not grow with the sample: 0.40 after a collapse, 1.05 / N at best. The function is not the
    # loss's, which would count this sample once for each process.
    vectors_ND = torch.tensor(rows, dtype=torch.float64).to(search_device(device))
    return {**isotropy_report(vectors_ND), "sigreg": sigreg(vectors_ND) / len(rows)}


def evaluation_settings(
    systems: ModelSystems, *, split: str, k: int, drop_identical_ids: bool, bm25: Bm25System | None
) -> dict[str, Any]:
    """Return what a results file says of how a model was evaluated."""
    return {
        "split": split,
        "max_length": systems.encoder.model.config.max_length,
        "document_text": "title + ' ' + text",
        "identical_ids_dropped": drop_identical_ids,
        "top_k": k,
        **systems.encoder.store.settings(),
        "base_similarity": (systems.base or systems.encoder).model.config.encoder_similarity,
        **({} if bm25 is None else {"bm25": bm25.settings(), "fusion": FUSION_SETTINGS}),
    }


@torch.inference_mode()
def apply_head(
    model: IsotropicGaussianModel, features: np.ndarray, *, num_predicted: int | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Apply the head to features (N, H + L): embeddings (N, D) and, with a predictor, predictions (N, D), float32.

    Pass `num_predicted=0` for documents, which need no prediction.
    """
    was_training = model.training
    model.eval()  # a Trainer leaves dropout on
    try:
        outputs = [
            model(
                features=torch.from_numpy(features[start : start + HEAD_ROWS]).to(model.device),
                num_predicted=num_predicted,
            )
            # Zero features still need one call, for an empty result of the right width.
            for start in range(0, max(1, len(features)), HEAD_ROWS)
        ]
    finally:
        model.train(was_training)
    embeddings = torch.cat([output.embeddings.float().cpu() for output in outputs]).numpy()
    if model.predictor is None:
        return embeddings, None
    return embeddings, torch.cat([output.predictions.float().cpu() for output in outputs]).numpy()


def load_seen_digests(model_path: str | Path) -> set[str]:
    """Read the digests of the documents that a model folder was trained on; empty if none are recorded."""
    path = Path(model_path) / DOCUMENTS_FILE
    return set(path.read_text(encoding="utf-8").split()) if path.is_file() else set()


def seen_document_ids(dataset: BeirDataset, digests: Collection[str]) -> set[str]:
    """Return the ids of the judged documents whose texts have one of these hexadecimal digests."""
    if not digests:
        return set()
    known = set(digests)
    judged = {document for judgements in dataset.qrels.values() for document in judgements}
    rows = [row for row, identifier in enumerate(dataset.corpus_ids) if identifier in judged]
    texts = zip(take(dataset.corpus_ids, rows), take(dataset.corpus_texts, rows), strict=True)
    return {identifier for identifier, text in texts if text_digest(text).hex() in known}


def sample_rows(num_documents: int) -> np.ndarray:
    """Return the rows to measure isotropy on, in rising order: 4,096 random ones, or all if there are fewer."""
    if num_documents <= SAMPLE_ROWS:
        return np.arange(num_documents)
    return np.sort(np.random.default_rng(0).choice(num_documents, SAMPLE_ROWS, replace=False, shuffle=False))


class VectorSample:
    """A random sample of document vectors over all data sets and processes, from each process's shards."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        chosen, start = sample_rows(sum(shard.num_documents for shard in shards)), 0
        # Documents are numbered through all data sets; these are each shard's first number, and its chosen ones.
        self._chosen: list[tuple[int, np.ndarray]] = []
        for shard in shards:
            first = start + shard.start
            self._chosen.append((first, chosen[(chosen >= first) & (chosen < first + len(shard))]))
            start += shard.num_documents
        self._rows: dict[str, list[np.ndarray]] = {}

    def add(self, system: str, documents: Any) -> None:
        """Keep the sampled rows of a system's vectors of the next data set."""
        rows = self._rows.setdefault(system, [])
        first, numbers = self._chosen[len(rows)]
        rows.append(read_far_apart(documents, numbers - first))

    def vectors(self) -> dict[str, np.ndarray]:
        """Return each system's sample from all processes, in the order of the data sets."""
        numbers = np.concatenate([numbers for _, numbers in self._chosen])
        return {system: gather_rows_by_number(numbers, np.concatenate(rows)) for system, rows in self._rows.items()}
