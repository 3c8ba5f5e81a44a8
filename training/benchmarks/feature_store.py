"""Measure the feature cache with 100,000 texts of width 768: memory, disk space, and the time to read it again.

    python training/benchmarks/feature_store.py

A one-layer encoder of width 768 with random weights replaces a real one, because the cache costs the same with both.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparison import BenchmarkArguments, at_least, at_most, figure, report, set_threads

from ragcun_hf.command_line import argument, parse_arguments, quiet_libraries, run_script

NUM_WORDS = 997
_LARGEST_GIB = 1.0


@dataclass
class Arguments(BenchmarkArguments):
    """Number of texts."""

    num_texts: int = argument(100_000, "Distinct texts.")
    step: str | None = argument(None, "Internal: folder of the cache that this process fills or reads.")


def main(arguments: list[str] | None = None) -> None:
    """Fill the cache in one process, read it in another, and compare the two."""
    (args,) = parse_arguments([Arguments], description=__doc__ or "", arguments=arguments)
    quiet_libraries()
    if args.step:
        run_step(args, Path(args.step))
        return
    set_threads(args.threads)
    steps = {}
    sizes = {}
    for dtype in ("float32", "float16"):
        with tempfile.TemporaryDirectory() as folder:
            for name in ("filled", "read") if dtype == "float32" else ("filled",):
                steps[f"{name} {dtype}"] = run_process(args, f"{folder}/{dtype}")
            sizes[dtype] = sum(path.stat().st_size for path in Path(folder).rglob("*.features")) / 2**20
    filled, read = steps["filled float32"], steps["read float32"]
    claims = [
        at_most(f"resident memory while encoding {args.num_texts:,} texts", filled["gib"], _LARGEST_GIB, "GiB"),
        at_most("resident memory while reading them", read["gib"], _LARGEST_GIB, "GiB"),
        at_least("reading relative to encoding with one layer", filled["seconds"] / read["seconds"], 5),
        figure("seconds to read them", read["seconds"], "s"),
        figure("on disk in float32", sizes["float32"], "MiB"),
        figure("on disk in float16", sizes["float16"], "MiB"),
    ]
    report(args, "feature_store", claims, details={"steps": steps})


def run_process(args: Arguments, folder: str) -> dict[str, float]:
    """Run one step in a new process; return its seconds and its peak resident memory."""
    command = [sys.executable, __file__, "--step", folder, "--num_texts", str(args.num_texts)]
    if args.threads:
        command += ["--threads", str(args.threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, gib = map(float, done.stdout.split()[-2:])
    return {"seconds": seconds, "gib": gib}


def run_step(args: Arguments, folder: Path) -> None:
    """Get the features of all texts, and print the seconds and this process's peak memory."""
    set_threads(args.threads)
    from ragcun_hf.features.feature_store import FeatureStore

    dtype = folder.name  # the folder has the name of the dtype
    store = FeatureStore(one_layer_model(), cache_folder=folder, feature_dtype=dtype, show_progress=False)
    texts = [f"w{row % NUM_WORDS} w{row // NUM_WORDS} w{row * 7 % NUM_WORDS}" for row in range(args.num_texts)]
    started = time.perf_counter()
    vectors = store.features(texts).vectors
    seconds = time.perf_counter() - started
    assert vectors.shape == (args.num_texts, 768), "all texts differ"  # noqa: S101
    # getrusage would include the memory that the parent held when it started this process.
    peak = Path("/proc/self/status").read_text(encoding="utf-8").split("VmHWM:")[1].split()[0]
    print(seconds, int(peak) / 2**20)


def one_layer_model(width: int = 768, **options: Any) -> Any:
    """Build a model from a one-layer encoder with random weights and a word-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    from ragcun_hf import IsotropicGaussianModel

    vocabulary = {"[PAD]": 0, "[UNK]": 1, **{f"w{row}": row + 2 for row in range(NUM_WORDS)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        config = BertConfig(
            vocab_size=len(vocabulary), num_hidden_layers=1, hidden_size=width, intermediate_size=width
        )
        BertModel(config).save_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
        tokenizer.save_pretrained(folder)
        return IsotropicGaussianModel.from_encoder(folder, **options)


if __name__ == "__main__":
    run_script(main)
