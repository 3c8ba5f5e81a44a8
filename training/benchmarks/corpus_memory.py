"""Measure memory and time of an evaluation with 50,000 and with 1,000,000 documents.

    python training/benchmarks/corpus_memory.py

The documents have 100 words, of which a one-layer encoder of width 384 reads the first eight. training/eval_beir.py
evaluates the frozen base and a head in a new process, once with an empty feature cache and once with a full one.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from comparison import BenchmarkArguments, at_most, figure, report, set_threads
from feature_store import NUM_WORDS, one_layer_model

from ragcun_hf.command_line import argument, parse_arguments, quiet_libraries, run_script

_WIDTH = 384
_WORDS_PER_DOCUMENT = 100
_NUM_QUERIES = 200
_MOST_GROWTH_MIB = 100.0


@dataclass
class Arguments(BenchmarkArguments):
    """Sizes of the corpora."""

    num_documents: list[int] = argument([50_000, 1_000_000], "Numbers of documents, in increasing order.")


def main(arguments: list[str] | None = None) -> None:
    """Evaluate a corpus of each size twice."""
    (args,) = parse_arguments([Arguments], description=__doc__ or "", arguments=arguments)
    quiet_libraries()
    set_threads(args.threads)
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    steps = {}
    for num_documents in args.num_documents:
        with tempfile.TemporaryDirectory(dir=output) as folder:
            steps[num_documents] = measure(Path(folder), num_documents)
    least, most = (steps[size] for size in (args.num_documents[0], args.num_documents[-1]))
    sizes = f"from {args.num_documents[0]:,} to {args.num_documents[-1]:,} documents"
    claims = [
        at_most(
            f"growth of resident memory, {name}, {sizes}",
            most[name]["mib"] - least[name]["mib"],
            _MOST_GROWTH_MIB,
            "MiB",
        )
        for name in ("encoding", "cached")
    ]
    claims += [
        figure(f"resident memory with {size:,} documents, {name}", step["mib"], "MiB")
        for size, pair in steps.items()
        for name, step in pair.items()
    ]
    claims += [
        figure(f"minutes with {args.num_documents[-1]:,} documents, {name}", step["seconds"] / 60, "min")
        for name, step in most.items()
    ]
    report(args, "corpus_memory", claims, details={"steps": steps})


def measure(folder: Path, num_documents: int) -> dict[str, dict[str, float]]:
    """Write a corpus and a model; evaluate them with an empty feature cache (encoding) and a full one (cached)."""
    write_collection(folder / "data" / "synthetic", num_documents)
    model = one_layer_model(_WIDTH, max_length=8)
    model.save_pretrained(folder / "model")
    flags = {
        "--model_path": folder / "model",
        "--data_dir": folder / "data",
        "--output_dir": folder / "results",
        "--feature_cache_dir": folder / "features",
        "--datasets": "synthetic",
    }
    return {name: run_process(flags, folder / "datasets") for name in ("encoding", "cached")}


def write_collection(folder: Path, num_documents: int) -> None:
    """Write a BEIR folder in which each query is the beginning of a document."""
    (folder / "qrels").mkdir(parents=True)
    generator = np.random.default_rng(0)
    answers = set(generator.choice(num_documents, _NUM_QUERIES, replace=False).tolist())
    with contextlib.ExitStack() as files:
        corpus, queries, qrels = (
            files.enter_context((folder / name).open("w", encoding="utf-8"))
            for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv")
        )
        for number in range(num_documents):
            words = [f"w{word}" for word in generator.integers(0, NUM_WORDS, _WORDS_PER_DOCUMENT)]
            print(json.dumps({"_id": f"document-{number}", "title": "", "text": " ".join(words)}), file=corpus)
            if number in answers:
                print(json.dumps({"_id": f"query-{number}", "text": " ".join(words[:8])}), file=queries)
                print(f"query-{number}\tdocument-{number}\t1", file=qrels)


def run_process(flags: dict[str, object], datasets_cache: Path) -> dict[str, float]:
    """Evaluate in a new process; return its seconds and its peak resident memory."""
    script = Path(__file__).resolve().parents[1] / "eval_beir.py"
    # getrusage would include the memory that the parent held when it started the process.
    code = (
        "import runpy, sys; sys.argv[0] = sys.argv[1]; del sys.argv[1]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as done: assert not done.code\n"
        "print('KiB', open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    words = [str(word) for pair in flags.items() for word in pair]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, str(script), *words, "--no_bm25"],  # its index is in memory
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_DATASETS_CACHE": str(datasets_cache)},
    )
    return {"seconds": time.perf_counter() - started, "mib": int(done.stdout.split("KiB")[-1]) / 2**10}


if __name__ == "__main__":
    run_script(main)
