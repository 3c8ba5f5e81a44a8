"""Parts of gpu.py that run the whole pipeline: an evaluation from texts to figures, its quality, and two processes."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comparison import at_most, figure

from ragcun_hf.command_line import say, shipped_file
from ragcun_hf.errors import UserError

_MS_MARCO = 8_841_823  # passages
_QUERY_WORDS = 12
_PASSAGE_WORDS = 56  # of MS MARCO's, on average
_NUM_TRAINED = 512  # pairs, for two processes
_MOST_DIFFERENCE = 0.001  # of NDCG@10, between a card in half precision and a processor in float32


def evaluation(path: str, words: Sequence[str], num_documents: int, num_queries: int, device: str) -> Any:
    """Evaluate an encoder on made-up passages: read the folder, encode, write the cache, search, and score."""
    from ragcun_hf import IsotropicGaussianModel
    from ragcun_hf.data.writing import write_beir_folder

    generator = random.Random(1)
    documents = {
        f"d{row}": ("", " ".join(generator.choices(words, k=generator.randint(20, 2 * _PASSAGE_WORDS - 20))))
        for row in range(num_documents)
    }
    chosen = generator.sample(sorted(documents), min(num_queries, num_documents))
    queries = {f"q{row}": " ".join(documents[name][1].split()[:_QUERY_WORDS]) for row, name in enumerate(chosen)}
    qrels = {f"q{row}": {name: 1} for row, name in enumerate(chosen)}
    with tempfile.TemporaryDirectory() as folder:
        write_beir_folder(Path(folder) / "passages", documents, queries, {"test": qrels})
        del documents
        model = IsotropicGaussianModel.from_encoder(path).to(device).eval()
        model.encode(["starts the device", "and its libraries"])
        started = time.perf_counter()
        found = _ndcg(model, Path(folder) / "passages", "auto", cache=Path(folder) / "features")
        spent = time.perf_counter() - started
    return [
        figure(f"an evaluation of {num_documents:,} passages, from texts to figures", spent, "s"),
        figure("computed from it, minutes for the passages of MS MARCO", spent / num_documents * _MS_MARCO / 60, ""),
        figure("its NDCG@10", found, ""),
    ]


def quality(path: str, folder: Path, device: str) -> list[dict[str, Any]]:
    """Compare NDCG@10 on a real data set with that of the processor in float32."""
    from ragcun_hf import IsotropicGaussianModel

    model = IsotropicGaussianModel.from_encoder(path).eval()
    exact = _ndcg(model, folder, "float32")
    claims = [figure(f"NDCG@10 on {folder.name}, on the processor in float32", exact, "")]
    for kind in ("auto", "bfloat16", "float16"):
        found = _ndcg(model.to(device), folder, kind)
        what = f"its difference to NDCG@10 on the device, {kind}"
        claims.append(at_most(what, abs(found - exact), _MOST_DIFFERENCE, ""))
    return claims


def _ndcg(model: Any, folder: Path, dtype: str, cache: Path | None = None) -> float:
    from ragcun_hf.data.beir_folder import load_beir_folder
    from ragcun_hf.evaluation.model_evaluation import ModelSystems, TextEncoder, evaluate_model
    from ragcun_hf.evaluation.results import BASE_SYSTEM, MAIN_METRIC
    from ragcun_hf.features.feature_store import FeatureStore

    store = FeatureStore(model, cache_folder=cache, dtype=dtype, show_progress=False)
    systems = ModelSystems(TextEncoder(model, store), heads=(), folder=cache or ".")
    dataset = load_beir_folder(folder, "test")
    return float(evaluate_model(systems, [dataset]).datasets[dataset.name]["systems"][BASE_SYSTEM][MAIN_METRIC])


def two_processes(path: str, texts: Sequence[str], device: str) -> list[dict[str, Any]]:
    """Train a head in one process and in two that share the device, connected by gloo; both take the same steps.

    It shows that the path of several cards runs, as far as one card can; their speed would be that of one card.
    """
    from ragcun_hf.data.writing import write_json_rows

    halves = [words for text in texts[:_NUM_TRAINED] if len(words := text.split()) > 1]
    rows = [
        {"query": " ".join(half[: len(half) // 2]), "positive": " ".join(half[len(half) // 2 :])} for half in halves
    ][: len(halves) // 2 * 2]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_json_rows(rows, folder / "pairs.jsonl")
        try:
            seconds = {number: _train(path, folder, device, number, len(rows) // number) for number in (1, 2)}
        except UserError as error:
            say(f"  Two processes on one device: {error}")
            return []
        difference = _difference(folder / "of_1", folder / "of_2")
    return [
        figure("seconds of a run in two processes on this device, start included", seconds[2], "s"),
        figure("the same in one process", seconds[1], "s"),
        at_most("largest difference between the weights of the two", difference, 1e-3, ""),
    ]


def _train(path: str, folder: Path, device: str, number: int, batch_size: int) -> float:
    """Train a head in `number` processes, all pairs in each step, and return the seconds."""
    sizes = ["--batch_size", str(batch_size), "--epochs", "4", "--logging_steps", "1"]
    exact = ["--optim", "sgd", "--learning_rate", "0.01", "--warmup_steps", "0", "--dropout", "0"]
    exact += ["--encoder_dtype", "float32", "--feature_cache_dir", str(folder / f"features_{number}")]
    where = ["--use_cpu"] if device == "cpu" else ["--ddp_backend", "gloo"] if number > 1 else []
    flags = [
        "--base_model",
        path,
        "--train_data",
        str(folder / "pairs.jsonl"),
        "--output_dir",
        str(folder / f"of_{number}"),
    ]
    launched = ["-m", "ragcun_hf.cli", "train-contrastive", *flags, *sizes, *exact, *where]
    shared = "cuda:0" if device == "cuda" else device
    environment = {**os.environ, "ACCELERATE_TORCH_DEVICE": shared, "ACCELERATE_BYPASS_DEVICE_MAP": "true"}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *(_launcher(device, number) if number > 1 else []), *launched],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"expected {number} to train on {device}, got {reason!r}: run the command alone to see more")
    return time.perf_counter() - started


def _launcher(device: str, number: int) -> list[str]:
    config = shipped_file("accelerate", "two_cpu_processes" if device == "cpu" else "one_machine_gpus")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
    options = ["--config_file", str(config), "--num_processes", str(number), "--main_process_port", port]
    return ["-m", "accelerate.commands.launch", *options, "--mixed_precision", "no"]


def _difference(one: Path, other: Path) -> float:
    from safetensors.torch import load_file

    weights, others = (load_file(each / "model.safetensors") for each in (one, other))
    return max(float((weight - others[name]).abs().max()) for name, weight in weights.items())
