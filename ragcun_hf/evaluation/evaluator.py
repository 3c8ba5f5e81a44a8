"""Evaluate a model on your own queries, documents and judgements, in Python or during training."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator

from ..data.beir_folder import BeirDataset, dataset_of_pairs, load_beir_folder
from ..data.documents import document_text, document_texts, read_documents
from ..data.pairs import read_pairs
from ..distributed import world_size
from ..errors import UserError
from ..features.arguments import FeatureArguments
from ..model.base_models import load_untrained_base
from ..search.exact import SearchResult, search_device
from ..search.similarity import SIMILARITIES
from .bm25 import Bm25System
from .environment import environment_facts, now
from .model_evaluation import (
    ModelEvaluation,
    ModelSystems,
    TextEncoder,
    evaluate_model,
    evaluation_settings,
    load_seen_digests,
    measure_isotropy,
    sample_rows,
    saved_weights_digest,
)
from .report import RetrievalReport
from .results import (
    MAIN_METRIC,
    MODEL_SYSTEM,
    PREDICTOR_SYSTEM,
    PROJECTION_SYSTEM,
    SCHEMA_VERSION,
    mean_over_datasets,
    model_settings,
)
from .retrieval import System, VectorSystem, check_identical_ids, evaluate_retrieval

if TYPE_CHECKING:
    from ..model.modeling_isotropic_gaussian import IsotropicGaussianModel

_MODEL_TYPE = "isotropic_gaussian"
_PYTHON_NAME = "RetrievalEvaluator"


class RetrievalEvaluator(BaseEvaluator):
    """Search a corpus with a model, and report NDCG@10 and recall beside those of its frozen base and of BM25.

    Call it with a model. It is also an `evaluator=` of sentence-transformers' Trainer, where it needs a `name` if it
    is not the only one, and of `IsotropicGaussianTrainer`, where it always needs one: without it, its `ndcg@10` would
    be logged as `eval_ndcg@10`, which is that of the held-out pairs. The model is one of these:

    - an `IsotropicGaussianModel`: the systems `base` (its frozen encoder), `bm25`, `fusion` (of both), `projection`
      and, if it has a predictor, `predictor`, each compared with `base`. The encoder's features come from the cache.
    - a `SentenceTransformer`. One that holds such a model is evaluated as that model, unless several processes train
      it; any other is the system `model`, compared with `bm25`.
    - any object with `encode_query` and `encode_document`, which take a list of texts and return vectors (N, D).
      `similarity_fn_name` says how they are compared; the default is cosine.

    BM25, the base of one encoder and their fusion search only once. If a model of this package is as it was loaded
    from a folder, or as our Trainer saved it, the report names its weights, as a model card that is pushed needs it.
    If that folder has the digests of the training documents, queries with seen and with unseen ones are also reported
    separately.

    Args:
        queries: Query id -> text.
        corpus: Document id -> text, or -> `{"title": ..., "text": ...}`; at least two documents.
        relevant_docs: Query id -> ids of its relevant documents, or -> document id -> gain (an integer; 0 is not
            relevant). Queries without judgements are not searched.
        name: Prefix of the figures' names, and name of the data in tables.
        split: Name of the judgements in tables.
        k: Documents kept per query, at least 100 for the official figures.
        bm25: Whether BM25 and its fusion with the base are measured, too.
        drop_identical_ids: Whether a document with the query's own id is never found, as in BEIR.
        batch_size: Texts that a model of another kind encodes at once; this package's models choose their own.
        language: Language of BM25's stems and stop words, or "none" (see `Bm25Index`).
        examples: Queries to keep with the best document that a model of this package finds. Their texts are in the
            results file, and public with a card that is rendered from it.
        show_progress_bar: Whether encoding shows its progress.

    Raises:
        UserError: If one of the first three is empty or has another form, an id is judged that is not there, or the
            language is unknown.

    Example:
        >>> from ragcun_hf import RetrievalEvaluator
        >>> corpus = {"d1": "The capital of France is Paris.", "d2": {"title": "Bread", "text": "Flour and water."}}
        >>> evaluator = RetrievalEvaluator({"q1": "how to bake bread"}, corpus, {"q1": {"d2"}})
        >>> report = evaluator(model)  # doctest: +SKIP
        >>> print(report)  # doctest: +SKIP
        >>> report["ndcg@10"], report["base_ndcg@10"]  # doctest: +SKIP
    """

    def __init__(
        self,
        queries: Mapping[str, str],
        corpus: Mapping[str, Any],
        relevant_docs: Mapping[str, Any],
        *,
        name: str = "",
        split: str = "test",
        k: int = 100,
        bm25: bool = True,
        drop_identical_ids: bool = False,
        batch_size: int = 32,
        language: str = "english",
        examples: int = 0,
        show_progress_bar: bool = True,
    ) -> None:
        super().__init__()
        self._dataset = _checked_dataset(queries, corpus, relevant_docs, name or "data", split)
        if k < 100:
            raise UserError(f"expected k of at least 100, for MAP@100 and recall@100, got {k}: raise it")
        self.name = name
        self.primary_metric = f"{name}_{MAIN_METRIC}" if name else MAIN_METRIC
        self.greater_is_better = True
        self._options: dict[str, Any] = {"k": k, "drop_identical_ids": drop_identical_ids}
        self._batch_size, self._show_progress_bar = batch_size, show_progress_bar
        self._num_examples = examples
        # Every process searches for itself: some trainers evaluate in the first process only.
        self._bm25 = Bm25System(language, is_shared=False) if bm25 else None
        self._base_rankings: dict[str, dict[tuple[str, str], SearchResult]] = {}  # by what changes its features
        self._untrained: dict[str, Any] = {}
        self._made = f"{_PYTHON_NAME}(queries, corpus, relevant_docs)"
        if drop_identical_ids:
            check_identical_ids(self._dataset)

    @classmethod
    def from_beir(
        cls, folder: str | os.PathLike[str], split: str = "test", *, drop_identical_ids: bool = True, **options: Any
    ) -> Self:
        """Evaluate on a BEIR folder, as `training/eval_beir.py` does.

        Args:
            folder: A folder with corpus.jsonl, queries.jsonl and qrels/.
            split: Name of the judgements.
            drop_identical_ids: As BEIR does; see the class.
            **options: The other keyword arguments of the class.

        Returns:
            The evaluator.

        Raises:
            UserError: If the folder cannot be read.
        """
        dataset = load_beir_folder(folder, split)
        evaluator = cls(*_PLACEHOLDER, split=split, **options)
        evaluator._dataset = dataset  # as the folder has it: the texts of a large corpus stay on disk
        evaluator._options["drop_identical_ids"] = drop_identical_ids
        evaluator._made = f"{_PYTHON_NAME}.from_beir({dataset.name!r}, split={split!r})"
        if drop_identical_ids:
            check_identical_ids(dataset)
        return evaluator

    @classmethod
    def from_pairs(cls, pairs: Any, corpus: Any = None, *, split: str = "test", **options: Any) -> Self:
        """Evaluate on pairs: a query's relevant documents are those that it has a pair with.

        The queries search the documents of all pairs, their negatives, and the corpus. Equal texts are one document.

        Args:
            pairs: A `Dataset`, a list of rows, a file or a Hub dataset, with the texts `query` and `positive`.
            corpus: More documents, likewise: strings, or rows with a `text` and optionally a `title`.
            split: The split to read, if the pairs have splits.
            **options: The other keyword arguments of the class.

        Returns:
            The evaluator.

        Raises:
            UserError: If a source cannot be read or a row lacks a text.
        """
        texts = [] if corpus is None else document_texts(read_documents(corpus, name="corpus", unique_ids=False))
        dataset = dataset_of_pairs(read_pairs(pairs, split=split, name="pairs"), texts, split=split)
        by_id = dict(zip(dataset.corpus_ids, dataset.corpus_texts, strict=True))
        evaluator = cls(dataset.queries, by_id, dataset.qrels, split=split, **options)
        evaluator._made = f"{_PYTHON_NAME}.from_pairs(pairs{'' if corpus is None else ', corpus'})"
        return evaluator

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> RetrievalReport:
        """Evaluate a model, which keeps its mode (training or evaluation).

        Args:
            model: See the class.
            output_path: A folder to write the results file to; by default none is written.
            epoch: For the model card of sentence-transformers only.
            steps: The training step, for the name of the file.

        Returns:
            The figures, whose `str` is a table.

        Raises:
            UserError: If the model is of no known kind, or its vectors cannot be compared.
        """
        own = _own_model(model)
        evaluation, facts = self._evaluate_encoder(model) if own is None else self._evaluate_own(own)
        results = {
            **{"schema_version": SCHEMA_VERSION, "created": now(), "command": f"{self._made}(model)"},
            **environment_facts(),
            **facts,
            **{"datasets": evaluation.datasets, "mean": evaluation.mean, "isotropy": evaluation.isotropy},
        }
        runs = {each.name: each.runs for each in evaluation.evaluations}
        report = RetrievalReport(results, runs, name=self.name)
        if output_path is not None:
            parts = ["retrieval", self.name, f"step_{steps}" if steps >= 0 else ""]
            report.save(Path(output_path) / f"{'_'.join(filter(None, parts))}.json", with_runs=False)
        if isinstance(model, SentenceTransformer):
            self.store_metrics_in_model_card_data(model, dict(report), epoch, steps)  # type: ignore[arg-type]
        return report

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings that sentence-transformers shows in its model card.

        Returns:
            Name -> value.
        """
        return {**self._options, "bm25": self._bm25 is not None}

    def _evaluate_own(self, model: IsotropicGaussianModel) -> tuple[ModelEvaluation, dict[str, Any]]:
        was_training, weights = model.training, saved_weights_digest(model)
        # With other weights, the model may have seen more documents by now.
        seen = load_seen_digests(model.name_or_path) if weights and model.name_or_path else ()
        options = {"bm25": self._bm25, "seen_document_digests": seen, **self._options}
        model.eval()
        try:
            systems = self._systems(model)
            evaluation = evaluate_model(systems, [self._dataset], num_examples=self._num_examples, **options)
        finally:
            model.train(was_training)
        base = model.config.base_model_name or "encoder"
        name = Path(model.name_or_path or "").name or f"head-on-{base.rstrip('/').split('/')[-1]}"
        facts = {"path": name, "name": name, **model_settings(model.config)}
        facts["weights_sha256"] = weights
        settings = evaluation_settings(systems, split=self._dataset.split, bm25=self._bm25, **self._options)
        return evaluation, {"model": facts, "settings": settings}

    def _systems(self, model: IsotropicGaussianModel) -> ModelSystems:
        heads = (PROJECTION_SYSTEM,) if model.predictor is None else (PROJECTION_SYSTEM, PREDICTOR_SYSTEM)
        # Features of an encoder that trains are used once: the cache would only grow.
        cache = FeatureArguments(feature_cache=model.config.freeze_base)
        encoder = TextEncoder(model, cache.store(model, show_progress=self._show_progress_bar))
        base = encoder if model.config.freeze_base else self._untrained_base(model)
        config = base.model.config
        parts = [base.store.key_parts(prompt) for prompt in (config.query_prompt, config.document_prompt)]
        key = str([*parts, config.encoder_similarity])
        kept = self._base_rankings.setdefault(key, {})
        return ModelSystems(encoder, None if base is encoder else base, heads=heads, base_rankings=kept)

    def _untrained_base(self, model: IsotropicGaussianModel) -> TextEncoder:
        config = model.config
        key = str((config.base_model_name, config.base_model_revision, config.pooling, config.max_length))
        if key not in self._untrained:
            self._untrained[key] = load_untrained_base(model).eval()
        base = self._untrained[key].to(model.device)
        return TextEncoder(base, FeatureArguments().store(base, show_progress=self._show_progress_bar))

    def _evaluate_encoder(self, model: Any) -> tuple[ModelEvaluation, dict[str, Any]]:
        """Evaluate any other encoder, in this process alone: trainers may run an evaluator in the first one only."""
        dataset, similarity = self._dataset, _similarity(model)
        queries, documents = (self._vectors(model, is_query=is_query) for is_query in (True, False))
        device = search_device(getattr(model, "device", "cpu"))
        systems: list[System] = [VectorSystem(MODEL_SYSTEM, queries, documents, similarity, device=device)]
        if self._bm25 is not None:
            systems.append(self._bm25)
        found = evaluate_retrieval(dataset, systems, **self._options)
        entries = {dataset.name: found.entry}
        samples = {MODEL_SYSTEM: documents[sample_rows(len(documents))]}
        isotropy = {system: measure_isotropy(rows, device) for system, rows in samples.items()}
        name = _encoder_name(model)
        facts = {"path": name, "name": name, "similarity": similarity, "base_model": None, "use_predictor": False}
        settings = {"split": dataset.split, "document_text": "title + ' ' + text", "top_k": self._options["k"]}
        settings["identical_ids_dropped"] = self._options["drop_identical_ids"]
        settings |= {"bm25": self._bm25.settings()} if self._bm25 else {}
        evaluation = ModelEvaluation([found], entries, mean_over_datasets(entries), isotropy, samples)
        return evaluation, {"model": facts, "settings": settings}

    def _vectors(self, model: Any, *, is_query: bool) -> np.ndarray:
        texts = list(self._dataset.queries.values() if is_query else self._dataset.corpus_texts)
        options: dict[str, Any] = {}
        if isinstance(model, SentenceTransformer):
            options = {"batch_size": self._batch_size, "show_progress_bar": self._show_progress_bar}
        found = (model.encode_query if is_query else model.encode_document)(texts, **options)
        vectors = found.detach().float().cpu().numpy() if hasattr(found, "detach") else np.asarray(found)
        if vectors.ndim != 2 or len(vectors) != len(texts) or not np.issubdtype(vectors.dtype, np.floating):
            raise UserError(
                f"expected one vector of the same width for each of {len(texts)} texts, got an array of shape "
                f"{vectors.shape} and type {vectors.dtype}: return a (N, D) array of floats from encode_query and "
                "encode_document"
            )
        return vectors


# Passes the checks of the class, which are stricter than BEIR: its folders may judge documents outside their corpus.
_PLACEHOLDER: tuple[Any, Any, Any] = ({"q": "q"}, {"d": "d", "e": "e"}, {"q": {"d"}})


def _own_model(model: Any) -> Any:
    """Return the model of this package that this is, or that a SentenceTransformer holds; None if there is none."""
    is_wrapper = isinstance(model, SentenceTransformer)
    if not is_wrapper and getattr(getattr(model, "config", None), "model_type", None) == _MODEL_TYPE:
        return model
    if not (hasattr(model, "encode_query") and hasattr(model, "encode_document")):
        raise UserError(
            f"expected a model with encode_query and encode_document, got {type(model).__name__}: load it with "
            "IsotropicGaussianModel or SentenceTransformer"
        )
    inner = getattr(model[0], "model", None) if is_wrapper and len(model) == 1 else None
    config: Any = getattr(inner, "config", None)
    if getattr(config, "model_type", None) != _MODEL_TYPE or world_size() > 1:
        return None
    # Set otherwise in the wrapper, they give other vectors than the model itself.
    wrapped = (model.prompts.get("query", ""), model.prompts.get("document", ""), _similarity(model))
    inside = (config.query_prompt, config.document_prompt, config.similarity_fn_name)
    is_same = wrapped == inside and model.truncate_dim is None and model.max_seq_length == config.max_length
    return inner if is_same else None


def _similarity(model: Any) -> str:
    name = getattr(model, "similarity_fn_name", None) or "cosine"
    similarity = str(getattr(name, "value", name))
    if similarity not in SIMILARITIES:
        known = ", ".join(SIMILARITIES)
        raise UserError(f"expected a model that compares by {known}, got {similarity!r}: set similarity_fn_name")
    return similarity


def _encoder_name(model: Any) -> str:
    """Name an encoder by the last part of where it was loaded from, or by its class."""
    inner = getattr(model[0], "model", None) if isinstance(model, SentenceTransformer) else None
    source = getattr(model, "name_or_path", None) or getattr(inner, "name_or_path", None)
    return Path(str(source)).name if source else type(model).__name__


def _checked_dataset(queries: Any, corpus: Any, relevant_docs: Any, name: str, split: str) -> BeirDataset:
    for what, given in (("queries", queries), ("corpus", corpus), ("relevant_docs", relevant_docs)):
        if not isinstance(given, Mapping):
            hint = "for rows of pairs, use RetrievalEvaluator.from_pairs"
            raise UserError(f"{what}: expected a dictionary by id, got {type(given).__name__}: {hint}")
        if not given:
            raise UserError(f"{what}: expected at least one entry, got an empty dictionary: check how it was made")
        for identifier in given:
            if not isinstance(identifier, str) or not identifier:
                raise UserError(f"{what}: expected ids that are texts, got {identifier!r}: convert them with str")
    for identifier, text in queries.items():
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"queries[{identifier!r}]: expected a text, got {text!r}: correct or remove the query")
    texts = {identifier: _document_text(identifier, document) for identifier, document in corpus.items()}
    if len(texts) < 2:
        raise UserError(f"corpus: expected at least two documents, got {len(texts)}: add some to search among")
    qrels = {query: _judgements(query, judged) for query, judged in relevant_docs.items()}
    qrels = {query: judged for query, judged in qrels.items() if judged}
    if not qrels:
        raise UserError("relevant_docs: expected a relevant document for some query, got none: add one")
    _check_ids(qrels, queries, texts)
    judged = {query: queries[query] for query in queries if query in qrels}
    return BeirDataset(
        name, split, judged, list(texts), list(texts.values()), {query: qrels[query] for query in judged}
    )


def _document_text(identifier: str, document: Any) -> str:
    given = {"text": document} if isinstance(document, str) else document
    if not isinstance(given, Mapping) or not given or not set(given) & {"title", "text"}:
        raise UserError(
            f"corpus[{identifier!r}]: expected a text or a dictionary with title and text, got {document!r}: "
            "convert it"
        )
    title, text = ("" if given.get(part) is None else given[part] for part in ("title", "text"))
    if not isinstance(title, str) or not isinstance(text, str):
        raise UserError(f"corpus[{identifier!r}]: expected texts as title and text, got {document!r}: convert them")
    return document_text(title, text)


def _judgements(query: str, judged: Any) -> dict[str, int]:
    place = f"relevant_docs[{query!r}]"
    if isinstance(judged, str) or not isinstance(judged, Collection):
        raise UserError(
            f"{place}: expected a set of document ids, or a dictionary of their gains, got {judged!r}: put it in a set"
        )
    gains = dict(judged) if isinstance(judged, Mapping) else dict.fromkeys(judged, 1)
    for document, gain in gains.items():
        if not isinstance(document, str):
            raise UserError(f"{place}: expected document ids that are texts, got {document!r}: convert them with str")
        if isinstance(gain, bool) or not isinstance(gain, int | np.integer):
            raise UserError(f"{place}[{document!r}]: expected an integer as gain, got {gain!r}: use 1 for relevant")
    return {document: int(gain) for document, gain in gains.items()}


def _check_ids(qrels: Mapping[str, Mapping[str, int]], queries: Collection[str], documents: Collection[str]) -> None:
    judged = {document: query for query, judgements in qrels.items() for document in judgements}
    for what, unknown in (
        ("queries", [query for query in qrels if query not in queries]),
        ("corpus", [document for document in judged if document not in documents]),
    ):
        if unknown:
            more = f" and {len(unknown) - 1} more" if unknown[1:] else ""
            raise UserError(
                f"relevant_docs: expected only ids of {what}, got {unknown[0]!r}{more}: add the missing entries to "
                f"{what}, or remove the judgements"
            )
