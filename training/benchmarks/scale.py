"""Measure the cost per million documents and pairs, and compute that of MS MARCO, 100 million and a billion.

    python training/benchmarks/scale.py --pairs pairs/msmarco_small/train.jsonl --encoder embedded

It measures the time of encoding, of training a head on features and of exact search, and the bytes on disk and in
memory. `--encoder mpnet` measures the architecture of all-mpnet-base-v2 with random weights, which are as fast as
trained ones.
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
_PAIRS, _EPOCHS = 500_000, 3  # MS MARCO's training pairs


@dataclass
class Arguments(BenchmarkArguments):
    """The texts, the encoder, and the sizes to measure."""

    pairs: str = argument("pairs/msmarco_small/train.jsonl", "Pairs; their documents and queries are encoded.")
    encoder: Literal["embedded", "mpnet"] = argument(
        "embedded", "Encoder: the embedded one, or mpnet with random weights."
    )
    num_texts: int = argument(1_500, "Number of passages to encode, and of queries.")
    num_vectors: int = argument(250_000, "Number of vectors to search.")
    num_pairs: int = argument(10_000, "Number of pairs to train on, for one epoch.")
    batch_size: int = argument(128, "Pairs per training step.")


def main(arguments: list[str] | None = None) -> None:
    """Measure the parts, and print the computed totals."""
    (args,) = parse_arguments([Arguments], description=__doc__ or "", arguments=arguments)
    quiet_libraries()
    set_threads(args.threads)
    unit = {**measure_encoding(args), **measure_training(args)}
    unit |= measure_search(args.num_vectors, int(unit["width"])) | measure_unshared_work(args)
    claims = [figure(name, value, "") for name, value in unit.items()]
    details = {"texts": args.num_texts, "vectors": args.num_vectors, "pairs": args.num_pairs}
    path = report(args, f"scale_{args.encoder}", claims, details=details)
    say(f"\n{_PAIRS:,} pairs, encoded and trained on for {_EPOCHS} epochs: {hours_of_training(unit):.1f} hours")
    say("\n" + "\n".join(table(unit)) + f"\n\nComputed from the figures above, which are in {path}.")


def measure_encoding(args: Arguments) -> dict[str, float]:
    """Encode passages and queries into an empty cache."""
    from ragcun_hf.features.feature_store import FeatureStore

    passages, queries = (texts[: args.num_texts] for texts in read_texts(args.pairs))
    model = build_model(args.encoder)
    tokens = model.tokenizer(passages, truncation=True, max_length=model.config.max_length)["input_ids"]
    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore(model, cache_folder=folder)
        store.encode([f"warm up {number}" for number in range(64)], prompt="other: ")
        seconds = []
        for texts in (passages, queries):
            started = time.perf_counter()
            store.encode(texts)
            seconds.append(time.perf_counter() - started)
        num_bytes = sum(path.stat().st_size for path in Path(folder).rglob("*.features"))
    return {
        "width": float(model.config.feature_dim),
        "tokens per passage": sum(map(len, tokens)) / len(passages),
        "tokens of passages encoded per second": sum(map(len, tokens)) / seconds[0],
        "hours to encode a million passages": seconds[0] / len(passages) * _MILLION / 3600,
        "hours to encode a million queries": seconds[1] / len(queries) * _MILLION / 3600,
        "GB of features in float32 per million": num_bytes / (len(passages) + len(queries) + 64) * _MILLION / 1e9,
        "GB of text per million": sum(len(text.encode()) for text in passages) / len(passages) * _MILLION / 1e9,
    }


def measure_unshared_work(args: Arguments) -> dict[str, float]:
    """Time the work that several processes cannot share, for texts on disk whose features are cached."""
    import datasets

    from ragcun_hf.data.mapped_column import MappedColumn, take
    from ragcun_hf.features.encoder_loop import WorkShare, encode_in_batches
    from ragcun_hf.features.feature_store import FeatureStore
    from ragcun_hf.features.text_vectors import TEXTS_AT_ONCE

    passages, _ = (texts[: args.num_texts] for texts in read_texts(args.pairs))
    model = build_model(args.encoder)
    num_texts = 8 * TEXTS_AT_ONCE
    rows = {"texts": [passages[row % len(passages)] for row in range(num_texts)]}
    with tempfile.TemporaryDirectory() as folder:
        table = datasets.Dataset.from_generator(_rows, gen_kwargs=rows, cache_dir=folder)
        column = MappedColumn([file["filename"] for file in table.cache_files], "text")
        store = FeatureStore(model, cache_folder=folder, show_progress=False)
        store.encode(column)
        started = time.perf_counter()
        store.encode(column)
        seconds_of_first = time.perf_counter() - started
        share = WorkShare(TEXTS_AT_ONCE - 1, TEXTS_AT_ONCE)  # the last of more processes than blocks: it gets none
        started = time.perf_counter()
        for start in range(0, num_texts, TEXTS_AT_ONCE):
            texts = take(column, list(range(start, start + TEXTS_AT_ONCE)))
            list(encode_in_batches(model, texts, compute=_nothing, share=share))
        seconds_of_all = time.perf_counter() - started
    return {
        "seconds for the first process to look up a million texts": seconds_of_first / num_texts * _MILLION,
        "seconds for every process to find its part of a million texts": seconds_of_all / num_texts * _MILLION,
    }


def _rows(texts: list[str]) -> Any:
    for text in texts:
        yield {"text": text}


def _nothing(*_: Any) -> Any:
    raise AssertionError("a process without a block has nothing to encode")


def read_texts(pairs: str) -> tuple[list[str], list[str]]:
    """Return the distinct passages and the distinct queries in random order."""
    from ragcun_hf.data.pairs import read_pairs

    rows = read_pairs(pairs)
    columns = (list(dict.fromkeys(rows[name])) for name in ("positive", "query"))
    passages, queries = ([texts[row] for row in np.random.default_rng(0).permutation(len(texts))] for texts in columns)
    return passages, queries


def build_model(encoder: str) -> Any:
    """Load the embedded encoder, or build all-mpnet-base-v2's architecture with the embedded encoder's tokenizer."""
    from ragcun_hf import IsotropicGaussianModel
    from ragcun_hf.model.base_models import load_base_model

    embedded = load_base_model("embedded")
    if encoder == "embedded":
        return embedded
    from transformers import MPNetConfig, MPNetModel

    with tempfile.TemporaryDirectory() as folder:
        MPNetModel(MPNetConfig()).save_pretrained(folder)
        embedded.tokenizer.save_pretrained(folder)
        return IsotropicGaussianModel.from_encoder(folder, max_length=384)


def measure_training(args: Arguments) -> dict[str, float]:
    """Train a head on features with all three terms."""
    from types import SimpleNamespace

    run: Any = SimpleNamespace(num_pairs=args.num_pairs, batch_size=args.batch_size, epochs=1)
    train = trainer_run(run, random_features(args.num_pairs))
    train()
    started = time.perf_counter()
    train()
    return {
        "minutes per epoch of a million pairs, width 384": (time.perf_counter() - started)
        / args.num_pairs
        * _MILLION
        / 60
    }


def measure_search(num_vectors: int, width: int) -> dict[str, float]:
    """Search random vectors in a memory map exactly."""
    from ragcun_hf.search.exact import exact_search
    from ragcun_hf.search.memory_maps import new_matrix

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
    return {f"seconds for {_NUM_QUERIES:,} queries over a million vectors": seconds / num_vectors * _MILLION}


def hours_of_training(unit: dict[str, float]) -> float:
    """Return the hours to encode the pairs of MS MARCO and train on them."""
    encoding = unit["hours to encode a million passages"] + unit["hours to encode a million queries"]
    epoch = unit["minutes per epoch of a million pairs, width 384"] / 60
    return (encoding + _EPOCHS * epoch) * _PAIRS / _MILLION


def table(unit: dict[str, float]) -> list[str]:
    """Multiply the unit costs by the collection sizes; return a Markdown table."""
    encode = unit["hours to encode a million passages"]
    search = unit[f"seconds for {_NUM_QUERIES:,} queries over a million vectors"] / 3600
    width, features = unit["width"], unit["GB of features in float32 per million"]
    lines = [
        "| | " + " | ".join(_COLLECTIONS) + " |",
        "|---|" + "--:|" * len(_COLLECTIONS),
    ]
    rows = {
        "hours to encode, one process": lambda millions: f"{encode * millions:,.1f}",
        "processes to encode in a day": lambda millions: f"{max(1, np.ceil(encode * millions / _DAY)):,.0f}",
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
