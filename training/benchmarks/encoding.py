"""Compare the speed of our encoder loop with `SentenceTransformer.encode` at its defaults.

    python training/benchmarks/encoding.py --data_dir data/beir

The texts are documents of SciFact, or documentation strings if --data_dir has no SciFact. By default, ours computes in
bfloat16 if the processor supports it, and sentence-transformers in float32. Ours in float32 is measured too.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparison import BenchmarkArguments, at_least, at_most, compare, figure, report, set_threads

from ragcun_hf.command_line import argument, parse_arguments, quiet_libraries, run_script

_PEAK_SIZE = 4_096  # rows and columns of the matrix product that defines the peak


@dataclass
class Arguments(BenchmarkArguments):
    """The texts to encode."""

    data_dir: str = argument("data/beir", "Folder with the BEIR dataset scifact.")
    num_texts: int = argument(300, "Number of documents, drawn at random.")
    repeats: int = argument(2, "Timed rounds.")


def main(arguments: list[str] | None = None) -> None:
    """Encode the same texts with both, and relate the speed to the processor's peak."""
    (args,) = parse_arguments([Arguments], description=__doc__ or "", arguments=arguments)
    quiet_libraries()
    import torch
    from sentence_transformers import SentenceTransformer

    from ragcun_hf.features.encoder_backends import BACKENDS, choose_dtype
    from ragcun_hf.model.base_models import embedded_model_folder, load_base_model

    set_threads(args.threads)
    texts, source = sample_texts(args)
    model, peer = load_base_model("embedded"), SentenceTransformer(str(embedded_model_folder()), device="cpu")
    dtype = choose_dtype("auto", torch.device("cpu"))
    matrix = torch.randn(_PEAK_SIZE, _PEAK_SIZE).to(dtype)
    contenders: dict[str, Callable[[], Any]] = {
        "sentence-transformers": lambda: peer.encode(texts),
        **{f"ours, {backend}": encoder(model, texts, dtype, backend) for backend in BACKENDS},
        "ours, float32": encoder(model, texts, torch.float32, "torch"),
        "peak": lambda: matrix @ matrix,
    }
    seconds = compare(contenders, repeats=args.repeats)
    operations, num_tokens = count_operations(model, texts)
    peak = 2 * _PEAK_SIZE**3 / min(seconds.seconds["peak"])
    word = str(dtype).removeprefix("torch.")
    claims = []
    for backend in BACKENDS:
        name = f"ours, {backend}"
        speed_up = seconds.ratio("sentence-transformers", name)
        claims += [
            at_least(f"texts per second, {backend} in {word} relative to sentence-transformers", speed_up, 2.5),
            at_least(f"share of the {word} peak, {backend}", operations / seconds.median(name) / peak, 0.55, ""),
            figure(f"tokens per second, {backend}", num_tokens / seconds.median(name), ""),
        ]
    same = seconds.ratio("sentence-transformers", "ours, float32")
    claims.append(figure("texts per second, torch in float32 relative to sentence-transformers", same, "x"))
    claims.append(at_most("share of padding", padding_share(model, texts), 0.03, ""))
    report(args, "encoding", claims, details={"texts": source, "dtype": str(dtype), "seconds": seconds.seconds})


def sample_texts(args: Arguments) -> tuple[list[str], str]:
    """Return the documents, and a description of them."""
    from ragcun_hf.data.beir_folder import load_beir_folder
    from ragcun_hf.data.python_docs import build_python_docs

    folder = Path(args.data_dir) / "scifact"
    if folder.is_dir():
        texts, source = load_beir_folder(folder).corpus_texts, "SciFact documents"
    else:
        texts, source = [entry.document for entry in build_python_docs()], "documentation strings"
    random.Random(0).shuffle(texts)
    return texts[: args.num_texts], f"{min(args.num_texts, len(texts))} {source}"


def encoder(model: Any, texts: list[str], dtype: Any, backend: str) -> Callable[[], None]:
    """Make a function that encodes the texts as the feature store does, but without a cache."""
    from ragcun_hf.features.encoder_backends import feature_function
    from ragcun_hf.features.encoder_loop import encode_in_batches

    compute = feature_function(model, dtype=dtype, backend=backend)

    def encode() -> None:
        for _ in encode_in_batches(model, texts, compute=compute):
            pass

    return encode


def count_operations(model: Any, texts: list[str]) -> tuple[float, int]:
    """Count the additions and multiplications in the matrix products of a BERT-like encoder, and the tokens."""
    config = model.config.encoder_config
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    lengths = [len(ids) for ids in token_ids(model, texts)]
    per_token = layers * 2 * (4 * width**2 + 2 * width * inner)
    attention = layers * 4 * width * sum(length**2 for length in lengths)
    return per_token * sum(lengths) + attention, sum(lengths)


def padding_share(model: Any, texts: list[str]) -> float:
    """Return the share of padding in the batches of one block, which holds up to 1,024 texts."""
    from ragcun_hf.features.encoder_loop import batches_by_tokens

    lengths = [len(ids) for ids in token_ids(model, texts)]
    padded = sum(len(rows) * max(lengths[row] for row in rows) for rows in batches_by_tokens(lengths))
    return 1 - sum(lengths) / padded


def token_ids(model: Any, texts: list[str]) -> list[list[int]]:
    """Tokenize as the encoder loop does."""
    options = {"truncation": True, "max_length": model.config.max_length, "return_token_type_ids": False}
    return model.tokenizer(texts, **options)["input_ids"]


if __name__ == "__main__":
    run_script(main)
