"""Compare exact search with the bare matrix product, with `beir`'s exact search, and with faiss.

    python training/benchmarks/exact_search.py

The data are a million random documents of width 384 and 1,000 queries: in a memory map for the matrix product, and in
memory, at top-1000, for beir. For faiss there are fewer documents, in clusters, because its lists are useless for
evenly spread vectors.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from comparison import BenchmarkArguments, at_least, at_most, compare, figure, report, set_threads

from ragcun_hf.command_line import argument, parse_arguments, quiet_libraries, run_script

_DIM = 384
_BLOCK = 4_096
_MEMORY_SCRIPT = """
import sys
import numpy as np, torch
from ragcun_hf.search.exact import exact_search
torch.set_num_threads(int(sys.argv[2]))
documents = np.load(sys.argv[1], mmap_mode="r")
queries = np.random.default_rng(1).standard_normal((int(sys.argv[3]), documents.shape[1]), dtype=np.float32)
exact_search(queries, documents, k=100)
print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])
"""


@dataclass
class Arguments(BenchmarkArguments):
    """Sizes of the collections."""

    num_documents: int = argument(1_000_000, "Number of documents for the matrix product and beir.")
    num_queries: int = argument(1_000, "Number of queries.")
    clustered_documents: int = argument(200_000, "Number of documents for faiss.")
    repeats: int = argument(2, "Timed rounds.")


def main(arguments: list[str] | None = None) -> None:
    """Generate the data and run the three comparisons."""
    (args,) = parse_arguments([Arguments], description=__doc__ or "", arguments=arguments)
    quiet_libraries()
    threads = set_threads(args.threads)
    claims: list[dict[str, Any]] = []
    details: dict[str, Any] = {}
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output) as folder:
        path = write_documents(Path(folder) / "documents.npy", args.num_documents)
        claims += against_product(args, path, threads, details)
    claims += against_beir(args, details)
    claims += against_faiss(args, details)
    report(args, "exact_search", claims, details=details)


def random_rows(count: int, seed: int) -> np.ndarray:
    """Draw rows from the standard normal distribution."""
    return np.random.default_rng(seed).standard_normal((count, _DIM), dtype=np.float32)


def write_documents(path: Path, count: int) -> Path:
    """Write random documents, block by block."""
    documents = np.lib.format.open_memmap(path, "w+", np.float32, (count, _DIM))
    for start in range(0, count, 50_000):
        block = documents[start : start + 50_000]
        block[:] = random_rows(len(block), seed=start)
    documents.flush()
    return path


def against_product(args: Arguments, path: Path, threads: int, details: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare with the matrix product that every exact search needs; measure memory in a new process."""
    import torch

    from ragcun_hf.search.exact import exact_search

    documents, queries = np.load(path, mmap_mode="r"), random_rows(args.num_queries, seed=1)

    def product() -> None:
        left = torch.from_numpy(queries)
        scores = torch.empty(len(queries), _BLOCK)
        for start in range(0, len(documents), _BLOCK):
            block = torch.from_numpy(np.array(documents[start : start + _BLOCK]))
            torch.mm(left, block.T, out=scores[:, : len(block)].view(len(queries), len(block)))

    contenders: dict[str, Callable[[], Any]] = {
        "matrix product": product,
        "ours, top-100": lambda: exact_search(queries, documents, k=100),
        "ours, top-1000": lambda: exact_search(queries, documents, k=1_000),
    }
    seconds = compare(contenders, repeats=args.repeats)
    details["product_seconds"] = seconds.seconds
    command = [sys.executable, "-c", _MEMORY_SCRIPT, str(path), str(threads), str(args.num_queries)]
    memory = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 2**20
    size = f"{args.num_queries:,} queries, {args.num_documents:,} documents"
    return [
        at_most(
            f"top-100 of {size}, relative to the product alone", seconds.ratio("ours, top-100", "matrix product"), 1.4
        ),
        figure(f"top-1000 of {size}, relative to the product", seconds.ratio("ours, top-1000", "matrix product"), "x"),
        at_most("resident memory", memory, 1.5, "GiB"),
    ]


class GivenVectors:
    """A model for beir that returns given vectors; texts have one length, so beir requests them in order."""

    def __init__(self, queries: np.ndarray, documents: np.ndarray) -> None:
        self._queries, self._documents = queries, documents
        self._start = 0

    def encode_queries(self, queries: list[str], **_: Any) -> Any:
        """Return all query vectors, and start again at the first document."""
        import torch

        self._start = 0
        return torch.from_numpy(self._queries)

    def encode_corpus(self, corpus: list[dict[str, str]], **_: Any) -> Any:
        """Return the vectors of the next documents."""
        import torch

        start, self._start = self._start, self._start + len(corpus)
        return torch.from_numpy(self._documents[start : self._start])


def against_beir(args: Arguments, details: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare top-1000 with beir's exact search on the same vectors, in time and in ranking."""
    import logging

    from beir.retrieval.search.dense import DenseRetrievalExactSearch

    from ragcun_hf.evaluation.ranking import build_run
    from ragcun_hf.search.exact import exact_search

    logging.getLogger("beir").setLevel(logging.ERROR)
    queries, documents = random_rows(args.num_queries, seed=2), random_rows(args.num_documents, seed=3)
    query_ids = [f"q{row}" for row in range(len(queries))]
    document_ids = [f"d{row}" for row in range(len(documents))]
    query_texts = dict(zip(query_ids, map(str, range(len(queries))), strict=True))
    corpus = {name: {"title": "", "text": "same"} for name in document_ids}
    peer = DenseRetrievalExactSearch(GivenVectors(queries, documents), batch_size=128)
    ties = np.argsort(np.argsort(np.array(document_ids)))
    found: dict[str, Any] = {}

    def beir() -> None:
        found["beir"] = peer.search(corpus, query_texts, top_k=1_000, score_function="cos_sim")

    def ours() -> None:
        result = exact_search(queries, documents, k=1_001, ties=ties)
        found["ours"] = build_run(query_ids, document_ids, result, k=1_000)

    seconds = compare({"beir": beir, "ours": ours}, repeats=min(args.repeats, 2), warm_up=False)
    details["beir_seconds"] = seconds.seconds
    same = sum(same_ranking(found["beir"][query], found["ours"][query]) for query in query_ids) / len(query_ids)
    return [
        at_least("top-1000 of the same size, relative to beir's exact search", seconds.ratio("beir", "ours"), 2.0),
        at_least("share of queries with beir's ranking", same, 1.0, ""),
    ]


def same_ranking(theirs: dict[str, float], ours: dict[str, float]) -> bool:
    """Return whether two rankings agree, ignoring the order of scores that are equal within float32's precision."""
    if abs(min(theirs.values()) - min(ours.values())) > 1e-5:
        return False
    border = min(ours.values()) + 1e-5
    if {name for name, score in theirs.items() if score > border} - ours.keys():
        return False
    ordered = sorted(theirs, key=lambda name: (-theirs[name], name))
    return all(
        first == second or abs(theirs[first] - theirs.get(second, ours[second])) < 1e-5
        for first, second in zip(ordered, ours, strict=True)
    )


def against_faiss(args: Arguments, details: dict[str, Any]) -> list[dict[str, Any]]:
    """Find the number of queries from which building an index saves time, and the index's recall."""
    from ragcun_hf.search.approximate import DEFAULT_PROBES, approximate_search, recall_of
    from ragcun_hf.search.exact import exact_search

    rng = np.random.default_rng(4)
    centres, count = random_rows(2_000, seed=5), args.clustered_documents
    documents = centres[rng.integers(0, len(centres), count)] + random_rows(count, seed=6)
    chosen = rng.integers(0, count, 2 * args.num_queries)
    queries = documents[chosen] + 0.5 * random_rows(len(chosen), seed=7)
    few, many = queries[:1], queries
    times: dict[str, float] = {}
    found: dict[str, Any] = {}
    for name, search in (("exact", exact_search), ("faiss", approximate_search)):
        search(few, documents[:20_000], k=100)  # warm-up
        for label, some in (("few", few), ("many", many)):
            started = time.perf_counter()
            found[f"{name} {label}"] = search(some, documents, k=100)
            times[f"{name} {label}"] = time.perf_counter() - started
    details["faiss_seconds"] = times
    build = times["faiss few"]
    per_query = {name: (times[f"{name} many"] - times[f"{name} few"]) / (len(many) - 1) for name in ("exact", "faiss")}
    gained = per_query["exact"] - per_query["faiss"]
    size = f"{args.clustered_documents:,} documents"
    return [
        figure(f"number of queries from which faiss is faster, {size}", build / gained if gained > 0 else 0.0, ""),
        figure(
            f"faiss's recall of the exact top-100, {DEFAULT_PROBES} lists searched",
            recall_of(found["faiss many"], found["exact many"]),
            "",
        ),
    ]


if __name__ == "__main__":
    run_script(main)
