"""The feature cache at 100,000 texts of 768 numbers: memory, room on disk, and what a second use costs.

    python training/benchmarks/feature_store.py

A one-layer encoder of width 768 with random weights stands in for a real one: the cache does not mind.
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
    """Sizes."""

    num_texts: int = argument(100_000, "Distinct texts.")
    step: str | None = argument(None, "For the benchmark's own processes: folder of the cache to fill or to read.")


def main(arguments: list[str] | None = None) -> None:
    """Fill the cache in one process, read it in another, and look at both."""
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
            sizes[dtype] = sum(path.stat().st_size for path in Path(folder).rglob("*.arrow")) / 2**20
    filled, read = steps["filled float32"], steps["read float32"]
    claims = [
        at_most(f"resident memory while {args.num_texts:,} texts are encoded", filled["gib"], _LARGEST_GIB, "GiB"),
        at_most("resident memory while they are read", read["gib"], _LARGEST_GIB, "GiB"),
        at_least("reading against encoding with one layer", filled["seconds"] / read["seconds"], 5),
        figure("seconds to read them", read["seconds"], "s"),
        figure("on disk in float32", sizes["float32"], "MiB"),
        figure("on disk in float16", sizes["float16"], "MiB"),
    ]
    report(args, "feature_store", claims, details={"steps": steps})


def run_process(args: Arguments, folder: str) -> dict[str, float]:
    """Run one step in a process of its own; returns its seconds and its largest resident memory."""
    command = [sys.executable, __file__, "--step", folder, "--num_texts", str(args.num_texts)]
    if args.threads:
        command += ["--threads", str(args.threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, gib = map(float, done.stdout.split()[-2:])
    return {"seconds": seconds, "gib": gib}


def run_step(args: Arguments, folder: Path) -> None:
    """Get the features of all texts, from the cache where it has them."""
    set_threads(args.threads)
    from ragcun_hf.features.feature_store import FeatureStore

    dtype = folder.name  # each kind of features has a folder of its name
    store = FeatureStore(one_layer_model(), cache_folder=folder, feature_dtype=dtype, show_progress=False)
    texts = [f"w{row % NUM_WORDS} w{row // NUM_WORDS} w{row * 7 % NUM_WORDS}" for row in range(args.num_texts)]
    started = time.perf_counter()
    vectors = store.features(texts).vectors
    seconds = time.perf_counter() - started
    assert vectors.shape == (args.num_texts, 768), "every text is another"  # noqa: S101
    # Of this process alone: getrusage would count what its parent held when it was started.
    peak = Path("/proc/self/status").read_text(encoding="utf-8").split("VmHWM:")[1].split()[0]
    print(seconds, int(peak) / 2**20)


def one_layer_model(width: int = 768, **options: Any) -> Any:
    """Build a model with a one-layer encoder and a tokenizer of its own."""
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
