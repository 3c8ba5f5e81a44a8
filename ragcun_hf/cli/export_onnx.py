"""Write a trained model as one ONNX graph, in float32 and int8, for machines without PyTorch.

    python training/export_onnx.py --model_path checkpoints/mine

Encoder, pooling, projection and predictor are in the graph; the folder needs tokenizers, onnxruntime and NumPy alone.
Before anything is put in place, the graphs embed real texts and are compared with the model.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..command_line import argument, parse_arguments, quiet_libraries, say
from ..errors import UserError

_TOLERANCE = 1e-4  # of the coordinates' root mean square: float32 sums in another order
_NUM_TEXTS = 48
_CHECK_BATCH = 8
_LONGEST_CHECK = 2_048  # tokens


@dataclass
class ExportArguments:
    """Which model, where to, and how exact."""

    model_path: str | None = argument(None, "Folder of the trained model, or its id on the Hub.")
    output_dir: str | None = argument(
        None, "Folder of the export. Default: onnx inside the model's folder, or inside checkpoints/<name of the id>."
    )
    precision: list[str] = argument(["float32", "int8"], "Graphs to write: float32, int8 or both.")
    check_texts: str | None = argument(
        None, "Documents to compare on (a file or a BEIR folder). Default: NumPy's documentation strings."
    )


def main(arguments: list[str] | None = None) -> None:
    """Load, export, compare, put in place, and say what came out."""
    (args,) = parse_arguments([ExportArguments], description=__doc__ or "", arguments=arguments)
    folder = _output_folder(args)
    from ..files import check_writable, disk_errors_explained, replaced_folder, weights_digest
    from ..model.base_models import load_trained_model
    from ..publishing.onnx_export import CONFIG_FILE, GRAPHS, check_packages, write_config, write_onnx

    check_packages()
    check_writable(folder)
    _check_folder(folder)
    quiet_libraries()
    model = load_trained_model(args.model_path)
    texts = _check_texts(args.check_texts)
    graphs = [f"{name}*" for name in GRAPHS.values()]
    with disk_errors_explained(folder), replaced_folder(folder, obsolete=graphs, last=CONFIG_FILE) as unfinished:
        digest = weights_digest(Path(args.model_path))
        config = write_onnx(model, unfinished, precisions=args.precision, weights_sha256=digest)
        config["parity"] = {"num_texts": len(texts), **parity(model, unfinished, list(config["files"]), texts)}
        if "float32" not in args.precision:
            for path in unfinished.glob(f"{config['files'].pop('float32')}*"):
                path.unlink()
        write_config(config, unfinished)
    _report(config, folder, args.model_path)


def _output_folder(args: ExportArguments) -> Path:
    if not args.model_path:
        raise UserError("--model_path expects the folder of a trained model, got none: name it")
    unknown = [name for name in args.precision if name not in ("float32", "int8")]
    if unknown or not args.precision:
        raise UserError(f"--precision expects float32, int8 or both, got {(unknown or ['none'])[0]}: correct it")
    model_folder = Path(args.model_path)
    if not model_folder.is_dir():  # an id on the Hub
        model_folder = Path("checkpoints") / model_folder.name
    return Path(args.output_dir) if args.output_dir else model_folder / "onnx"


def _check_folder(folder: Path) -> None:
    from ..publishing.onnx_export import CONFIG_FILE, GRAPHS

    if any(folder.glob("*.safetensors")):
        raise UserError(f"--output_dir expects a folder of its own, got {folder}, which holds a model: name another")
    graphs = [name for name in GRAPHS.values() if (folder / name).exists()]
    if graphs and not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"--output_dir expects a new folder or an earlier export, got {folder} with {graphs[0]} but without "
            f"{CONFIG_FILE}: remove the graph, or name another folder"
        )


def _check_texts(source: str | None) -> list[str]:
    """Read some texts of all lengths, the shortest and the longest among them."""
    if source is None:
        from ..data.python_docs import build_python_docs

        texts = [text for entry in build_python_docs(["numpy"]) for text in (entry.query, entry.document)]
    else:
        from ..data.documents import document_text, read_documents

        documents = read_documents(source)
        texts = [document_text(row["title"], row["text"]) for row in documents]
    texts.sort(key=len)
    steps = min(_NUM_TEXTS, len(texts))
    return [texts[round(step * (len(texts) - 1) / max(1, steps - 1))] for step in range(steps)]


def parity(model: Any, folder: Path, precisions: Sequence[str], texts: Sequence[str]) -> dict[str, Any]:
    """Compare the model with each graph, which gets its tokens from the tokenizer that lies beside it.

    In float32, the largest difference of a coordinate in units of their root mean square; in int8, cosines. Raises a
    UserError where the former is too large or the tokens are others.
    """
    import numpy as np
    import torch

    from ..publishing.onnx_export import OnnxEncoder

    batches = list(_check_batches(texts, model.config.max_length))
    tokens = [model.tokenize(batch) for batch in batches]
    with torch.inference_mode():
        outputs = [model(**inputs) for inputs in tokens]
    found: dict[str, Any] = {}
    for precision in precisions:
        encoder = OnnxEncoder(folder, precision=precision, threads=torch.get_num_threads())
        own = [encoder.tokenize(batch) for batch in batches]
        _check_tokens(tokens, own, type(model.tokenizer).__name__)
        runs = [encoder.run(*inputs) for inputs in own]
        # Both (outputs, texts, D).
        exact = np.stack([np.concatenate([output[name] for output in outputs]) for name in runs[0]])
        ours = np.stack([np.concatenate([run[name] for run in runs]) for name in runs[0]])
        found[precision] = _difference(exact, ours) if precision == "float32" else _cosines(exact, ours)
    return found


def _check_tokens(expected: Sequence[Any], found: Sequence[tuple[Any, Any]], tokenizer: str) -> None:
    import numpy as np

    for tokens, (ids, mask) in zip(expected, found, strict=True):
        if not (np.array_equal(tokens["input_ids"], ids) and np.array_equal(tokens["attention_mask"], mask)):
            raise UserError(
                f"expected tokenizer.json to give the tokens of {tokenizer}, got others: nothing was written; save "
                "the model with a tokenizer that needs no Python code of its own"
            )


def _check_batches(texts: Sequence[str], max_length: int) -> Iterator[list[str]]:
    """Yield batches in which short texts are padded to the length of long ones, and the extremes alone."""
    ordered = sorted([*texts, ""], key=len)
    num_batches = -(-len(ordered) // _CHECK_BATCH)
    for first in range(num_batches):
        yield ordered[first::num_batches]
    joined = " ".join(texts) + " "
    yield [joined * -(-8 * min(max_length, _LONGEST_CHECK) // len(joined))]  # cut at the model's length
    yield [ordered[1]]


def _difference(expected: Any, found: Any) -> dict[str, float]:
    import numpy as np

    scale = np.sqrt((expected**2).mean((1, 2), keepdims=True))
    largest = float((abs(found - expected) / scale).max())
    if not largest < _TOLERANCE:  # NaN is refused too
        raise UserError(
            f"expected the graph within {_TOLERANCE:g} of PyTorch, got a difference of {largest:.1e}: nothing was "
            "written; try other versions of torch and onnxruntime"
        )
    return {"largest_difference": largest}


def _cosines(expected: Any, found: Any) -> dict[str, float]:
    import numpy as np

    cosines = (expected * found).sum(-1) / (np.linalg.norm(expected, axis=-1) * np.linalg.norm(found, axis=-1))
    return {"mean_cosine": float(cosines.mean()), "lowest_cosine": float(cosines.min())}


def _report(config: dict[str, Any], folder: Path, model_path: str) -> None:
    sizes = [f"{name} ({(folder / name).stat().st_size / 2**20:,.1f} MiB)" for name in config["files"].values()]
    say(f"Wrote {folder}: {', '.join(sizes)}; outputs: {', '.join(config['outputs'])}.")
    found = config["parity"]
    say(f"Against PyTorch, {found['num_texts']} texts: float32 within {found['float32']['largest_difference']:.1e}")
    if "int8" in found:
        cosine = found["int8"]
        say(f"  int8: mean cosine {cosine['mean_cosine']:.4f}, lowest {cosine['lowest_cosine']:.4f}")
    say(f"Next: python training/benchmarks/onnx_speed.py --model_path {shlex.quote(model_path)}")
