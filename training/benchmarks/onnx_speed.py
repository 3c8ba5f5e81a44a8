"""Compare the exported ONNX graphs with PyTorch: speed and, with --beir_folder, NDCG@10.

    python training/benchmarks/onnx_speed.py --model_path checkpoints/mine --beir_folder data/beir/scifact

All embed the same batches, made by our encoder loop: texts of similar length, with the next batch tokenized in the
background. `make benchmark` leaves it out, because it needs an export, and --beir_folder takes minutes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparison import BenchmarkArguments, Comparison, at_most, compare, figure, report, set_threads

from ragcun_hf.command_line import argument, parse_arguments, quiet_libraries, run_script, say
from ragcun_hf.errors import UserError

_EXACT = "PyTorch float32"
_MOST_LOST = {"onnxruntime float32": 0.001, "onnxruntime int8": 0.01}  # of NDCG@10


@dataclass
class Arguments(BenchmarkArguments):
    """The model and the texts to embed."""

    model_path: str | None = argument(None, "Folder of the trained model.")
    onnx_dir: str | None = argument(None, "Folder of the ONNX export. Default: onnx inside the model's folder.")
    data: str = argument("python_docs", "Texts to embed: python_docs, or a BEIR folder, whose documents are used.")
    num_texts: int = argument(200, "Number of texts, drawn at random.")
    repeats: int = argument(3, "Timed rounds.")
    beir_folder: str | None = argument(None, "BEIR folder on which to measure NDCG@10.")


def main(arguments: list[str] | None = None) -> None:
    """Time the contenders in turn and print a table; with --beir_folder, measure NDCG@10."""
    (args,) = parse_arguments([Arguments], description=__doc__ or "", arguments=arguments)
    if not args.model_path:
        raise UserError("--model_path expects the folder of a trained model, got none: name one")
    if args.num_texts < 1:
        raise UserError(f"--num_texts must be at least 1, got {args.num_texts}: set it to e.g. 200")
    quiet_libraries()
    from ragcun_hf.data.beir_folder import load_beir_folder
    from ragcun_hf.model.base_models import load_trained_model

    threads = set_threads(args.threads)
    dataset = load_beir_folder(args.beir_folder) if args.beir_folder else None
    texts = _sample_texts(args)
    model = load_trained_model(args.model_path)
    contenders = _contenders(model, Path(args.model_path), args.onnx_dir, threads)
    timed = {name: _embedding(model, texts, compute) for name, compute in contenders.items()}
    seconds = compare(timed, repeats=args.repeats)
    num_tokens = sum(int(mask.sum()) for _, mask in _batches(model, texts))
    say("\n".join(_table(seconds, len(texts), num_tokens)))
    ratios = {name: seconds.ratio(_EXACT, name) for name in contenders if name != _EXACT}
    claims = [figure(f"texts per second, {name} relative to {_EXACT}", ratio, "x") for name, ratio in ratios.items()]
    details: dict[str, Any] = {"data": Path(args.data).name, "texts": len(texts), "tokens": num_tokens}
    details["seconds"] = seconds.seconds
    if dataset is not None:
        exact = [name for name in contenders if name == _EXACT or name in _MOST_LOST]
        details["ndcg@10"] = evaluate(model, dataset, {name: contenders[name] for name in exact})
        claims += _claims_of_quality(dataset.name, details["ndcg@10"])
    report(args, "onnx_speed", claims, details=details)


def _sample_texts(args: Arguments) -> list[str]:
    from ragcun_hf.data.documents import document_texts, read_documents
    from ragcun_hf.data.python_docs import build_python_docs

    if args.data == "python_docs":
        texts = [entry.document for entry in build_python_docs(["numpy", "torch"])]
    else:
        texts = document_texts(read_documents(args.data))
    random.Random(0).shuffle(texts)
    return texts[: args.num_texts]


def _contenders(model: Any, folder: Path, onnx_dir: str | None, threads: int) -> dict[str, Callable[..., Any]]:
    """Return functions, by name, from token ids and mask (B, T) to float32 embeddings (B, D)."""
    import torch

    from ragcun_hf.features.encoder_backends import choose_dtype, feature_function
    from ragcun_hf.files import weights_digest
    from ragcun_hf.publishing.onnx_export import GRAPHS, OnnxEncoder

    def by_torch(dtype: torch.dtype) -> Callable[..., Any]:
        compute = feature_function(model, dtype=dtype)

        @torch.inference_mode()
        def embed(ids: Any, mask: Any) -> Any:
            features = model.join_features(compute(ids, mask), model.lexical_features(ids, mask))
            return model(features=features, num_predicted=0).embeddings

        return embed

    def by_onnxruntime(precision: str) -> Callable[..., Any]:
        export = Path(onnx_dir) if onnx_dir else folder / "onnx"
        encoder = OnnxEncoder(export, precision=precision, threads=threads)
        digest = weights_digest(folder)
        if encoder.config["source"]["weights_sha256"] != digest:
            raise UserError(f"expected an export of {folder}, got {export} with other weights: export the model again")

        def embed(ids: Any, mask: Any) -> Any:
            inputs = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
            return torch.from_numpy(encoder.session.run(["embeddings"], inputs)[0])

        return embed

    contenders = {_EXACT: by_torch(torch.float32)}
    if choose_dtype("auto", torch.device("cpu")) == torch.bfloat16:
        contenders["PyTorch bfloat16"] = by_torch(torch.bfloat16)
    return contenders | {f"onnxruntime {precision}": by_onnxruntime(precision) for precision in GRAPHS}


def _embedding(model: Any, texts: list[str], compute: Callable[..., Any]) -> Callable[[], None]:
    from ragcun_hf.features.encoder_loop import encode_in_batches

    def embed() -> None:
        for _ in encode_in_batches(model, texts, compute=compute):
            pass

    return embed


def _batches(model: Any, texts: list[str]) -> list[tuple[Any, Any]]:
    """Return the batches that the loop passes to the encoder: token ids and masks."""
    import torch

    from ragcun_hf.features.encoder_loop import encode_in_batches

    seen: list[tuple[Any, Any]] = []

    def record(ids: Any, mask: Any) -> Any:
        seen.append((ids, mask))
        return torch.zeros(len(ids), 1)

    for _ in encode_in_batches(model, texts, compute=record):
        pass
    return seen


def _table(seconds: Comparison, num_texts: int, num_tokens: int) -> list[str]:
    """Format the speeds as a Markdown table."""
    lines = [f"| | texts/s | tokens/s | relative to {_EXACT} |", "|---|--:|--:|--:|"]
    for name in seconds.seconds:
        median, ratio = seconds.median(name), seconds.ratio(_EXACT, name)
        lines.append(f"| {name} | {num_texts / median:,.1f} | {num_tokens / median:,.0f} | {ratio:.2f} x |")
    return lines


def evaluate(model: Any, dataset: Any, contenders: Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
    """Return each contender's NDCG@10, and the differences of the exported graphs from PyTorch."""
    import numpy as np

    from ragcun_hf.evaluation.results import BASE_SYSTEM, MAIN_METRIC
    from ragcun_hf.evaluation.retrieval import VectorSystem, evaluate_retrieval
    from ragcun_hf.features.encoder_loop import EncodingProgress, encode_in_batches

    def embed(texts: list[str], prompt: str, compute: Callable[..., Any]) -> Any:
        vectors = np.empty((len(texts), model.config.output_dim), dtype=np.float32)
        with EncodingProgress() as progress:
            for rows, batch in encode_in_batches(model, texts, compute=compute, prompt=prompt, progress=progress):
                vectors[rows] = batch.numpy()
        return vectors

    similarity, systems = model.config.similarity_fn_name, []
    for name, compute in contenders.items():
        queries = embed(list(dataset.queries.values()), model.config.query_prompt, compute)
        documents = embed(dataset.corpus_texts, model.config.document_prompt, compute)
        systems.append(VectorSystem(BASE_SYSTEM if name == _EXACT else name, queries, documents, similarity))
    entry = evaluate_retrieval(dataset, systems).entry
    found = {name: entry["systems"][BASE_SYSTEM if name == _EXACT else name][MAIN_METRIC] for name in contenders}
    return {"systems": found, "comparisons": entry["comparisons"]}


def _claims_of_quality(dataset: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    exact = found["systems"][_EXACT]
    claims = [figure(f"NDCG@10 of {dataset}, {_EXACT}", exact, "")]
    for name, most_lost in _MOST_LOST.items():
        value = found["systems"][name]
        label = f"NDCG@10 of {dataset} lost with {name} ({value:.4f})"
        claims.append(at_most(label, exact - value, most_lost, ""))
    return claims


if __name__ == "__main__":
    run_script(main)
