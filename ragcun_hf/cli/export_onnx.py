"""Write a trained model as one ONNX graph, in float32 and int8, for machines without PyTorch.

    python training/export_onnx.py --model_path checkpoints/mine

The graph contains encoder, pooling, projection and predictor. To use the folder, tokenizers, onnxruntime and NumPy are
enough. Before the export replaces an earlier one, the graphs embed real texts and are compared with the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..command_line import argument, parse_arguments, quiet_libraries, say
from ..errors import UserError
from ..files import check_writable, disk_errors_explained, replaced_folder, weights_digest

_NUM_TEXTS = 48


@dataclass
class ExportArguments:
    """The model, and the graphs to write."""

    model_path: str | None = argument(None, "Folder of the trained model, or its id on the Hub.")
    output_dir: str | None = argument(
        None, "Folder of the export. Default: onnx inside the model's folder, or inside checkpoints/<name of the id>."
    )
    precision: list[str] = argument(["float32", "int8"], "Graphs to write: float32, int8 or both.")
    check_texts: str | None = argument(
        None, "File or BEIR folder of texts to compare on. Default: NumPy's docstrings."
    )


def main(arguments: list[str] | None = None) -> None:
    """Load the model, export and compare it, put the export in place, and print a summary."""
    (args,) = parse_arguments([ExportArguments], description=__doc__ or "", arguments=arguments)
    folder = _output_folder(args)
    from ..model.base_models import load_trained_model
    from ..publishing.onnx_export import CONFIG_FILE, GRAPHS, check_packages, write_onnx

    check_packages()
    check_writable(folder)
    if any(folder.glob("*.safetensors")):
        raise UserError(f"--output_dir expects a folder of its own, got {folder}, which holds a model: name another")
    graphs = [name for name in GRAPHS.values() if (folder / name).exists()]
    if graphs and not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"--output_dir expects a new folder or an earlier export, got {folder} with {graphs[0]} but without "
            f"{CONFIG_FILE}: remove the graph, or name another folder"
        )
    quiet_libraries()
    model = load_trained_model(args.model_path)
    texts = _check_texts(args.check_texts)
    old = [f"{name}*" for name in GRAPHS.values()]
    with disk_errors_explained(folder), replaced_folder(folder, obsolete=old, last=CONFIG_FILE) as unfinished:
        digest = weights_digest(Path(args.model_path))
        config = write_onnx(model, unfinished, texts, precisions=args.precision, weights_sha256=digest)
    _report(config, folder)


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


def _check_texts(source: str | None) -> list[str]:
    """Read texts of all lengths, the shortest and the longest among them."""
    if source is None:
        from ..data.python_docs import build_python_docs

        texts = [text for entry in build_python_docs(["numpy"]) for text in (entry.query, entry.document)]
    else:
        from ..data.documents import document_texts, read_documents

        texts = document_texts(read_documents(source))
    texts.sort(key=len)
    steps = min(_NUM_TEXTS, len(texts))
    return [texts[round(step * (len(texts) - 1) / max(1, steps - 1))] for step in range(steps)]


def _report(config: dict[str, Any], folder: Path) -> None:
    sizes = [f"{name} ({(folder / name).stat().st_size / 2**20:,.1f} MiB)" for name in config["files"].values()]
    say(f"Wrote {folder}: {', '.join(sizes)}; outputs: {', '.join(config['outputs'])}.")
    found = config["parity"]
    largest = found["float32"]["largest_difference"]
    say(f"Compared with PyTorch on {found['num_texts']} texts: float32 within {largest:.1e}")
    if "int8" in found:
        cosine = found["int8"]
        say(f"  int8: mean cosine {cosine['mean_cosine']:.4f}, lowest {cosine['lowest_cosine']:.4f}")
    say(f"Next: from ragcun_hf.publishing.onnx_export import OnnxEncoder; OnnxEncoder(Path({str(folder)!r}))")
