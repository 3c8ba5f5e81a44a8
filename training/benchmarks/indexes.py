"""Compare indexes with exact search in recall, time and memory: lists (IVF), quantization (PQ), graphs (HNSW).

    python training/benchmarks/indexes.py --data_dir data/beir

The collection is all documents of SciFact, NFCorpus and ArguAna and all their sentences: about 160,000 real vectors of
the embedded encoder. The sentences have no relevance judgements and make the search harder. The queries are those of
the three datasets.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from comparison import BenchmarkArguments, figure, report, set_threads

from ragcun_hf.command_line import argument, parse_arguments, quiet_libraries, run_script
from ragcun_hf.errors import UserError

_SETS = ("scifact", "nfcorpus", "arguana")
_K = 100
_RERANKED = 1_000


@dataclass
class Arguments(BenchmarkArguments):
    """The data, and how much of an index to search."""

    data_dir: str = argument("data/beir", "Folder with the BEIR datasets scifact, nfcorpus and arguana.")
    num_probes: int = argument(32, "Number of lists to search per query (IVF).")
    ef_search: int = argument(128, "Number of candidates that a search keeps (HNSW).")


@dataclass(frozen=True)
class Collection:
    """Vectors of queries and documents, their ids, and the relevance judgements."""

    queries: np.ndarray
    documents: np.ndarray
    query_ids: list[str]
    document_ids: list[str]
    qrels: dict[str, dict[str, int]]


def main(arguments: list[str] | None = None) -> None:
    """Embed the texts, search exactly and with every index, and compare."""
    (args,) = parse_arguments([Arguments], description=__doc__ or "", arguments=arguments)
    quiet_libraries()
    threads = set_threads(args.threads)
    import faiss

    faiss.omp_set_num_threads(threads)
    collection = embed(Path(args.data_dir))
    found = {"exact": timed(lambda: exact(collection))}
    for name, build, is_reranked in contenders(args, collection):
        found[name] = search_index(collection, build, is_reranked)
    size = dict(zip(("vectors", "width"), collection.documents.shape, strict=True), queries=len(collection.queries))
    claims = [claim for name, result in found.items() for claim in figures(name, result, found["exact"], collection)]
    report(
        args,
        "indexes",
        claims,
        details={
            "collection": size,
            "num_probes": args.num_probes,
            "ef_search": args.ef_search,
            "code_bytes": code_bytes(collection),
        },
    )


def embed(data_dir: Path) -> Collection:
    """Embed the queries, documents and sentences of all datasets with the frozen encoder."""
    from ragcun_hf.data.beir_folder import load_beir_folder
    from ragcun_hf.features.feature_store import FeatureStore, default_cache_folder
    from ragcun_hf.model.base_models import load_base_model

    missing = [name for name in _SETS if not (data_dir / name).is_dir()]
    if missing:
        raise UserError(f"expected the BEIR dataset {missing[0]} in {data_dir}, found none: name another --data_dir")
    queries: dict[str, str] = {}
    documents: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    for name in _SETS:
        dataset = load_beir_folder(data_dir / name)
        texts = zip(dataset.corpus_ids, dataset.corpus_texts, strict=True)
        documents.update({f"{name}/{identifier}": text for identifier, text in texts})
        queries.update({f"{name}/{identifier}": text for identifier, text in dataset.queries.items()})
        for query, judgements in dataset.qrels.items():
            qrels[f"{name}/{query}"] = {f"{name}/{document}": gain for document, gain in judgements.items()}
    sentences = dict.fromkeys(part for text in documents.values() for part in re.split(r"(?<=[.!?])\s+", text))
    texts_of_all = [*documents.values(), *(sentence for sentence in sentences if len(sentence) > 20)]
    store = FeatureStore(load_base_model("embedded"), cache_folder=default_cache_folder())
    ids = [*documents, *(f"sentence/{number}" for number in range(len(texts_of_all) - len(documents)))]
    return Collection(
        store.features(list(queries.values())).expanded(),
        store.features(texts_of_all).expanded(),
        list(queries),
        ids,
        qrels,
    )


def code_bytes(collection: Collection) -> int:
    """Return the bytes of PQ code per vector: one for every eight numbers."""
    return collection.documents.shape[1] // 8


def contenders(args: Arguments, collection: Collection) -> list[tuple[str, Callable[[], Any], bool]]:
    """Return each index's name, how to build it, and whether to re-rank its best results with the full vectors."""
    import faiss

    width, num_lists = collection.documents.shape[1], round(len(collection.documents) ** 0.5)

    def inverted(kind: str) -> Any:
        index = faiss.index_factory(width, f"IVF{num_lists},{kind}", faiss.METRIC_INNER_PRODUCT)
        index.train(collection.documents)
        index.nprobe = args.num_probes
        index.add(collection.documents)
        return index

    def graph() -> Any:
        index = faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = 200, args.ef_search
        index.add(collection.documents)
        return index

    codes = f"PQ{code_bytes(collection)}"
    return [
        ("IVF", lambda: inverted("Flat"), False),
        ("IVF-PQ", lambda: inverted(codes), False),
        (f"IVF-PQ, best {_RERANKED:,} re-ranked", lambda: inverted(codes), True),
        ("HNSW", graph, False),
    ]


def timed(search: Callable[[], Any]) -> dict[str, Any]:
    """Search once, and time it."""
    started = time.perf_counter()
    return {"found": search(), "seconds": time.perf_counter() - started}


def exact(collection: Collection) -> Any:
    """Search exactly."""
    from ragcun_hf.search.exact import exact_search

    return exact_search(collection.queries, collection.documents, k=_K + 1)


def search_index(collection: Collection, build: Callable[[], Any], is_reranked: bool) -> dict[str, Any]:
    """Build an index and search it; its size is that of its serialized form."""
    import faiss

    from ragcun_hf.search.exact import SearchResult, rank_candidates

    started = time.perf_counter()
    index = build()
    seconds = time.perf_counter() - started

    def search() -> Any:
        scores, rows = index.search(collection.queries, _RERANKED if is_reranked else _K + 1)
        if (rows < 0).any():
            raise UserError("expected every query to find enough vectors, got too few: set --num_probes higher")
        if not is_reranked:
            return SearchResult(scores, rows)
        found = rank_candidates(collection.queries, collection.documents, rows, similarity="cosine")
        return SearchResult(found.scores[:, : _K + 1], found.indices[:, : _K + 1])

    return {**timed(search), "build_seconds": seconds, "num_bytes": len(faiss.serialize_index(index))}


def figures(name: str, result: dict[str, Any], best: dict[str, Any], collection: Collection) -> list[dict[str, Any]]:
    """Make the claims of one index: recall, NDCG@10, time and memory."""
    from ragcun_hf.evaluation.metrics.retrieval.trec_scores import average_scores, score_queries
    from ragcun_hf.evaluation.ranking import build_run
    from ragcun_hf.search.exact import SearchResult

    def first(found: Any, count: int) -> list[set[int]]:
        return [set(row) for row in found.indices[:, :count].tolist()]

    def recall(count: int) -> float:
        pairs = zip(first(result["found"], count), first(best["found"], count), strict=True)
        return float(np.mean([len(some & all_) / count for some, all_ in pairs]))

    run = build_run(collection.query_ids, collection.document_ids, SearchResult(*vars(result["found"]).values()), k=_K)
    metrics = average_scores(score_queries(run, collection.qrels))
    count = len(collection.documents)
    claims = [
        figure(f"{name}: recall of the exact top 10", recall(10), ""),
        figure(f"{name}: recall of the exact top 100", recall(_K), ""),
        figure(f"{name}: NDCG@10", metrics["ndcg@10"], ""),
        figure(f"{name}: milliseconds per query", 1e3 * result["seconds"] / len(collection.queries), "ms"),
    ]
    if "num_bytes" in result:
        claims.append(figure(f"{name}: bytes per vector in memory", result["num_bytes"] / count, "B"))
        claims.append(figure(f"{name}: seconds to build", result["build_seconds"], "s"))
    return claims


if __name__ == "__main__":
    run_script(main)
