"""Compare int8 and binary vectors, with and without rescoring, with exact float32 search: NDCG@10, bytes and time.

    python training/benchmarks/quantized_search.py --data_dir data/beir
    python training/benchmarks/quantized_search.py --data_dir data/beir --model_path MODEL --datasets scifact

sentence-transformers quantizes and searches (`quantize_embeddings`, `semantic_search_faiss`). Rescoring takes some
times as many candidates, and orders them by the full query vector and the restored document vector. faiss has no
index of bytes for inner products: it holds uint8 vectors as float32. If usearch is there (pip install usearch), its
int8 index is measured too. The last contender rescores binary candidates with the float32 vectors, which may lie on
disk.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from comparison import BenchmarkArguments, compare, figure, report, set_threads

from ragcun_hf.command_line import argument, parse_arguments, quiet_libraries, run_script
from ragcun_hf.errors import UserError

_K = 10
_FOUND = _K + 1  # ArguAna's queries are documents, too, which are dropped from their own results


@dataclass
class Arguments(BenchmarkArguments):
    """The model, the datasets, and how many candidates to rescore."""

    data_dir: str = argument("data/beir", "Folder with the BEIR datasets.")
    datasets: list[str] = argument(["scifact", "nfcorpus", "arguana"], "Names of the BEIR datasets.")
    model_path: str | None = argument(None, "A trained model: its folder. Default: the frozen embedded encoder.")
    rescore_multiplier: int = argument(4, "Candidates to rescore, as a multiple of the results.")
    repeats: int = argument(5, "Timed rounds.")
    feature_cache_dir: str | None = argument(None, "Folder of the feature cache. Default: inside HF_HOME.")


@dataclass(frozen=True)
class Contender:
    """A way to search."""

    search: Callable[[], np.ndarray]  # returns document rows (Q, K), best first
    num_bytes: float  # of a document's vectors as stored


def main(arguments: list[str] | None = None) -> None:
    """Search every dataset with every kind of vector, and compare with float32."""
    (args,) = parse_arguments([Arguments], description=__doc__ or "", arguments=arguments)
    if args.rescore_multiplier < 2:
        raise UserError(f"--rescore_multiplier must be at least 2, got {args.rescore_multiplier}: set it to e.g. 4")
    quiet_libraries()
    threads = set_threads(args.threads)
    import faiss

    from ragcun_hf.data.beir_folder import find_beir_dataset
    from ragcun_hf.model.base_models import load_trained_model
    from ragcun_hf.model.modeling_isotropic_gaussian import IsotropicGaussianModel

    faiss.omp_set_num_threads(threads)
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)  # says of float32 that it cannot be rescored
    model = load_trained_model(args.model_path) if args.model_path else IsotropicGaussianModel.from_encoder("embedded")
    if model.config.similarity_fn_name == "euclidean":
        raise UserError("--model_path expects the similarity cosine or dot, got euclidean: name another model")
    claims, details = [], {}
    for dataset in [find_beir_dataset(name, args.data_dir) for name in args.datasets]:
        found, details[dataset.name] = measure(args, dataset, *embed(args, model, dataset))
        claims += found
    report(args, "quantized_search", claims, details=details)


def embed(args: Arguments, model: Any, dataset: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the vectors of queries and documents, as they leave the model."""
    import torch

    from ragcun_hf.evaluation.model_evaluation import TextEncoder, apply_head
    from ragcun_hf.features.feature_store import FeatureStore, default_cache_folder

    store = FeatureStore(model, cache_folder=args.feature_cache_dir or default_cache_folder())
    encoder = TextEncoder(model, store)
    encoder.encode_documents(dataset.corpus_texts)
    features = encoder.queries(dataset), encoder.documents(dataset.corpus_texts)
    embeddings = [apply_head(model, rows, num_predicted=0)[0] for rows in features]
    queries, documents = (model.search_vectors(torch.from_numpy(rows)).numpy() for rows in embeddings)
    return queries, documents


def contenders(queries: np.ndarray, documents: np.ndarray, multiplier: int) -> dict[str, Contender]:
    """Build the indexes, and return how to search each of them."""
    from sentence_transformers.util.quantization import quantize_embeddings, semantic_search_faiss

    from ragcun_hf.search.exact import rank_candidates

    ranges = np.stack([documents.min(axis=0), documents.max(axis=0)])
    width, options = documents.shape[1], {"top_k": _FOUND, "rescore_multiplier": multiplier}

    def in_faiss(precision: Any, **more: Any) -> Callable[[], np.ndarray]:
        stored = quantize_embeddings(documents, precision, ranges=ranges)
        of_precision = {**options, "corpus_precision": precision, "ranges": ranges, **more}
        *_, index = semantic_search_faiss(queries[:2], stored, output_index=True, **of_precision)
        return lambda: rows_of(semantic_search_faiss(queries, corpus_index=index, **of_precision))

    candidates = in_faiss("ubinary", top_k=_FOUND * multiplier, rescore=False)

    def by_float32() -> np.ndarray:
        return rank_candidates(queries, documents, candidates(), similarity="dot").indices[:, :_FOUND]

    return {
        "float32": Contender(in_faiss("float32", rescore=False), 4 * width),
        "uint8": Contender(in_faiss("uint8", rescore=False), width),
        "uint8, rescored": Contender(in_faiss("uint8"), width),
        **(in_usearch(queries, documents, ranges, options) if importlib.util.find_spec("usearch") else {}),
        "binary": Contender(in_faiss("ubinary", rescore=False), width / 8),
        "binary, rescored": Contender(in_faiss("ubinary"), width / 8),
        "binary, rescored with float32": Contender(by_float32, width / 8 + 4 * width),
    }


def in_usearch(
    queries: np.ndarray, documents: np.ndarray, ranges: np.ndarray, options: dict[str, Any]
) -> dict[str, Contender]:
    """Return the contenders that use usearch, whose index holds bytes."""
    from sentence_transformers.util.quantization import quantize_embeddings, semantic_search_usearch

    def prepared(**more: Any) -> Callable[[], np.ndarray]:
        of_precision = {**options, "corpus_precision": "int8", "ranges": ranges, **more}
        stored = quantize_embeddings(documents, "int8", ranges=ranges)
        *_, index = semantic_search_usearch(queries[:2], stored, output_index=True, **of_precision)
        return lambda: rows_of(semantic_search_usearch(queries, corpus_index=index, **of_precision))

    width = documents.shape[1]
    return {
        "int8 in usearch": Contender(prepared(rescore=False), width),
        "int8 in usearch, rescored": Contender(prepared(), width),
    }


def rows_of(answer: tuple[Any, ...]) -> np.ndarray:
    """Return the document rows (Q, K) of an answer of sentence-transformers."""
    return np.array([[hit["corpus_id"] for hit in hits] for hits in answer[0]])


def measure(
    args: Arguments, dataset: Any, queries: np.ndarray, documents: np.ndarray
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the claims of one dataset, and its sizes and times."""
    found = contenders(queries, documents, args.rescore_multiplier)
    times = compare({name: contender.search for name, contender in found.items()}, repeats=args.repeats)
    claims = []
    for name, contender in found.items():
        about = f"{dataset.name}, {name}"
        claims.append(figure(f"{about}: NDCG@10", ndcg(dataset, contender.search()), ""))
        claims.append(figure(f"{about}: bytes per document", contender.num_bytes, "B"))
        claims.append(figure(f"{about}: queries per second, relative to float32", times.ratio("float32", name), "x"))
    size = {"queries": len(queries), "documents": len(documents), "width": documents.shape[1]}
    return claims, {**size, "seconds": times.seconds}


def ndcg(dataset: Any, rows: np.ndarray) -> float:
    """Return NDCG@10 of documents in the order found, without the query's own document."""
    from ragcun_hf.evaluation.metrics.retrieval.trec_scores import average_scores, score_queries
    from ragcun_hf.evaluation.ranking import build_run
    from ragcun_hf.search.exact import SearchResult

    # The metric sorts by score: give the place instead, because distances rise and scores may be equal.
    places = np.broadcast_to(-np.arange(rows.shape[1], dtype=np.float32), rows.shape)
    run = build_run(list(dataset.queries), dataset.corpus_ids, SearchResult(places, rows), k=_K)
    return average_scores(score_queries(run, dataset.qrels))["ndcg@10"]


if __name__ == "__main__":
    run_script(main)
