"""What a million documents and a million pairs cost here, and what MS MARCO, 100 million and a billion then would.

    python training/benchmarks/scale.py --passages pairs/msmarco_small/train.jsonl --encoder embedded

Time of encoding, of reading from the feature cache, of training a head, and of exact search; bytes on disk. `--encoder
mpnet` measures the architecture of all-mpnet-base-v2 with random weights, which take as long as trained ones.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from comparison import BenchmarkArguments, figure, report, set_threads
from head_training import random_features, trainer_run

from ragcun_hf.command_line import argument, parse_arguments, quiet_libraries, run_script, say

_MILLION = 1_000_000
_DAY = 24.0  # hours
_COLLECTIONS = {"MS MARCO": 8.8e6, "100 million": 1e8, "a billion": 1e9}
_NUM_QUERIES = 1_000


@dataclass
class Arguments(BenchmarkArguments):
    """What is encoded, and by what."""

    passages: str | None = argument(None, "Pairs whose positives are the passages. Default: documentation strings.")
    encoder: Literal["embedded", "mpnet"] = argument("embedded", "What encodes them.")
    num_passages: int = argument(1_500, "Passages encoded.")
    num_vectors: int = argument(250_000, "Vectors searched.")
    num_pairs: int = argument(10_000, "Pairs trained on, one epoch.")
    batch_size: int = argument(128, "Of them per step.")


def main(arguments: list[str] | None = None) -> None:
    """Measure the parts, and print what they come to."""
    (args,) = parse_arguments([Arguments], description=__doc__ or "", arguments=arguments)
    quiet_libraries()
    set_threads(args.threads)
    unit = {**measure_encoding(args), **measure_training(args)}
    unit |= measure_search(args.num_vectors, int(unit["width"]))
    claims = [figure(name, value, "") for name, value in unit.items()]
    details = {"passages": args.num_passages, "vectors": args.num_vectors, "pairs": args.num_pairs}
    path = report(args, f"scale_{args.encoder}", claims, details=details)
    say("\n" + "\n".join(table(unit)) + f"\n\nComputed from the figures above, which {path} holds.")


def measure_encoding(args: Arguments) -> dict[str, float]:
    """Encode passages into an empty cache, and read them from there."""
    from ragcun_hf.features.feature_store import FeatureStore

    texts = read_passages(args)[: args.num_passages]
    model = build_model(args.encoder)
    num_tokens = sum(
        map(len, model.tokenizer(texts, truncation=True, max_length=model.config.max_length)["input_ids"])
    )
    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore(model, cache_folder=folder)
        store.features([f"warm up {number}" for number in range(64)], prompt="other: ")
        started = time.perf_counter()
        store.encode(texts)
        encoding = time.perf_counter() - started
        store.encode(texts)
        started = time.perf_counter()
        store.read(texts)
        reading = time.perf_counter() - started
        num_bytes = sum(path.stat().st_size for path in Path(folder).rglob("*.arrow"))
    count = len(texts)
    return {
        "width": float(model.config.feature_dim),
        "tokens per passage": num_tokens / count,
        "tokens encoded per second": num_tokens / encoding,
        "hours to encode a million passages": encoding / count * _MILLION / 3600,
        "minutes to read a million features": reading / count * _MILLION / 60,
        "GB of features in float32 per million": num_bytes / (count + 64) * _MILLION / 1e9,
        "GB of text per million": sum(len(text.encode()) for text in texts) / count * _MILLION / 1e9,
    }


def read_passages(args: Arguments) -> list[str]:
    """Return distinct passages, in a random order."""
    from ragcun_hf.data.pairs import read_pairs
    from ragcun_hf.data.python_docs import build_python_docs

    texts = [entry.document for entry in build_python_docs()] if args.passages is None else read_pairs(args.passages)
    if args.passages is not None:
        texts = [row["positive"] for row in texts]
    distinct = list(dict.fromkeys(texts))
    return [distinct[row] for row in np.random.default_rng(0).permutation(len(distinct))]


def build_model(encoder: str) -> Any:
    """Load the embedded encoder, or build the published one's architecture around its tokenizer."""
    from ragcun_hf import IsotropicGaussianModel
    from ragcun_hf.features.base_models import load_base_model

    embedded = load_base_model("embedded")
    if encoder == "embedded":
        return embedded
    from transformers import MPNetConfig, MPNetModel

    with tempfile.TemporaryDirectory() as folder:
        MPNetModel(MPNetConfig()).save_pretrained(folder)
        embedded.tokenizer.save_pretrained(folder)
        return IsotropicGaussianModel.from_encoder(folder, max_length=384)


def measure_training(args: Arguments) -> dict[str, float]:
    """Train a head on features, all three terms."""
    from types import SimpleNamespace

    run: Any = SimpleNamespace(num_pairs=args.num_pairs, batch_size=args.batch_size, epochs=1)
    train = trainer_run(run, random_features(args.num_pairs))
    train()
    started = time.perf_counter()
    train()
    return {"minutes per epoch of a million pairs": (time.perf_counter() - started) / args.num_pairs * _MILLION / 60}


def measure_search(num_vectors: int, width: int) -> dict[str, float]:
    """Search random vectors in a memory map exactly."""
    from ragcun_hf.evaluation.search import exact_search
    from ragcun_hf.evaluation.vector_files import new_matrix

    with tempfile.TemporaryDirectory() as folder:
        documents = new_matrix(num_vectors, width, Path(folder))
        for start in range(0, num_vectors, 50_000):
            block = documents[start : start + 50_000]
            block[:] = np.random.default_rng(start).standard_normal(block.shape, dtype=np.float32)
        queries = np.random.default_rng(1).standard_normal((_NUM_QUERIES, width), dtype=np.float32)
        exact_search(queries, documents[:20_000], k=100)
        started = time.perf_counter()
        exact_search(queries, documents, k=100)
        seconds = time.perf_counter() - started
    return {f"seconds for {_NUM_QUERIES:,} queries against a million vectors": seconds / num_vectors * _MILLION}


def table(unit: dict[str, float]) -> list[str]:
    """Multiply."""
    encode, read = unit["hours to encode a million passages"], unit["minutes to read a million features"] / 60
    search = unit[f"seconds for {_NUM_QUERIES:,} queries against a million vectors"] / 3600
    width, features = unit["width"], unit["GB of features in float32 per million"]
    lines = [
        "| | " + " | ".join(_COLLECTIONS) + " |",
        "|---|" + "--:|" * len(_COLLECTIONS),
    ]
    rows = {
        "hours to encode, one process": lambda millions: f"{encode * millions:,.1f}",
        "processes to encode in a day": lambda millions: f"{max(1, np.ceil(encode * millions / _DAY)):,.0f}",
        "hours to read the features again, one process": lambda millions: f"{read * millions:,.2f}",
        f"hours of exact search, {_NUM_QUERIES:,} queries, one process": lambda millions: f"{search * millions:,.2f}",
        "GB of text": lambda millions: f"{unit['GB of text per million'] * millions:,.1f}",
        "GB of features, float32 / float16": lambda millions: (
            f"{features * millions:,.0f} / {(features - 2e-3 * width) * millions:,.0f}"
        ),
        "GB of vectors while evaluating, base and model": lambda millions: f"{8e-3 * width * millions:,.0f}",
        "GB of memory for the cache's index": lambda millions: f"{24e-3 * millions:,.1f}",
    }
    for name, compute in rows.items():
        values = " | ".join(compute(count / _MILLION) for count in _COLLECTIONS.values())
        lines.append(f"| {name} | {values} |")
    return lines


if __name__ == "__main__":
    run_script(main)
