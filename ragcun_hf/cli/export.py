"""Write a trained model for other libraries: as an ONNX graph, or as a plain folder of sentence-transformers.

    python training/export.py --model_path checkpoints/mine
    python training/export.py --model_path checkpoints/mine --format sentence-transformers

ONNX: one graph of encoder, pooling, projection and predictor, in float32 and int8. To use the folder, tokenizers,
onnxruntime and NumPy are enough. sentence-transformers: a folder of that library's own modules, which loads in its
versions 3 to 6 without trust_remote_code, and holds no predictor. Before an export replaces an earlier one, the graph,
or the head as Dense modules, is compared with the model on real texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..command_line import argument, parse_arguments, quiet_libraries, say
from ..errors import UserError
from ..files import check_writable, disk_errors_explained, owned_folder, replaced_folder, weights_digest

if TYPE_CHECKING:
    from ..model.modeling_isotropic_gaussian import IsotropicGaussianModel

_NUM_TEXTS = 48
_PRECISIONS = ("float32", "int8")


@dataclass
class ExportArguments:
    """The model, and what to write."""

    model_path: str | None = argument(None, "Folder of the trained model, or its id on the Hub.")
    format: Literal["onnx", "sentence-transformers"] = argument(
        "onnx", "What to write: an ONNX graph, or a plain folder of sentence-transformers."
    )
    output_dir: str | None = argument(
        None,
        "Folder of the export. Default: onnx inside the model's folder, or, for sentence-transformers, the model's "
        "folder with -plain at its end. A model on the Hub counts as checkpoints/<name of the id>.",
    )
    precision: list[str] | None = argument(None, "ONNX graphs to write: float32, int8 or both. Default: both.")
    check_texts: str | None = argument(
        None, "File or BEIR folder of texts to compare on. Default: NumPy's docstrings."
    )


def main(arguments: list[str] | None = None) -> None:
    """Load the model, export and compare it, put the export in place, and print a summary."""
    (args,) = parse_arguments([ExportArguments], description=__doc__ or "", arguments=arguments)
    folder = _output_folder(args)
    quiet_libraries()
    (_export_onnx if args.format == "onnx" else _export_plain)(args, folder)


def _output_folder(args: ExportArguments) -> Path:
    if not args.model_path:
        raise UserError("--model_path expects the folder of a trained model, got none: name it")
    if args.precision is not None and args.format != "onnx":
        raise UserError(f"--precision belongs to --format onnx, got --format {args.format}: leave it out")
    unknown = [name for name in args.precision or () if name not in _PRECISIONS]
    if unknown or args.precision == []:
        raise UserError(f"--precision expects float32, int8 or both, got {(unknown or ['none'])[0]}: correct it")
    model_folder = Path(args.model_path)
    if not model_folder.is_dir():  # an id on the Hub
        model_folder = Path("checkpoints") / model_folder.name
    default = model_folder / "onnx" if args.format == "onnx" else _beside(model_folder)
    folder = Path(args.output_dir) if args.output_dir else default
    check_writable(folder)
    return folder


def _beside(folder: Path) -> Path:
    whole = folder.resolve()  # `.` and `..` have no name of their own
    return folder.with_name(f"{folder.name}-plain") if folder.name == whole.name else Path(f"{whole}-plain")


def _export_onnx(args: ExportArguments, folder: Path) -> None:
    from ..publishing.onnx_export import CONFIG_FILE, GRAPHS, check_packages, write_onnx

    check_packages()
    if any(folder.glob("*.safetensors")):
        raise UserError(f"--output_dir expects a folder of its own, got {folder}, which holds a model: name another")
    graphs = [name for name in GRAPHS.values() if (folder / name).exists()]
    if graphs and not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"--output_dir expects a new folder or an earlier export, got {folder} with {graphs[0]} but without "
            f"{CONFIG_FILE}: remove the graph, or name another folder"
        )
    model, texts = _load(args)
    old = [f"{name}*" for name in GRAPHS.values()]
    with (
        disk_errors_explained(folder),
        owned_folder(folder),
        replaced_folder(folder, obsolete=old, last=CONFIG_FILE) as unfinished,
    ):
        digest = weights_digest(Path(str(args.model_path)))
        config = write_onnx(model, unfinished, texts, precisions=args.precision or _PRECISIONS, weights_sha256=digest)
    _report_onnx(config, folder)


def _export_plain(args: ExportArguments, folder: Path) -> None:
    from ..publishing.plain_export import MODULES_FILE, describe, is_plain_folder, write_plain

    if folder.exists() and any(folder.iterdir()) and not is_plain_folder(folder):
        raise UserError(
            f"--output_dir expects a new folder or an earlier export, got {folder} with other files: name another"
        )
    model, texts = _load(args)
    with (
        disk_errors_explained(folder),
        owned_folder(folder),
        replaced_folder(
            folder, obsolete=["*_Normalize", "*_Dense", "*.safetensors*"], last=MODULES_FILE
        ) as unfinished,
    ):
        layers = write_plain(model, unfinished, texts)
    say(f"Wrote {folder}: {describe(model, layers)}")
    say(f"Next: from sentence_transformers import SentenceTransformer; SentenceTransformer({str(folder)!r})")


def _load(args: ExportArguments) -> tuple[IsotropicGaussianModel, list[str]]:
    from ..model.base_models import load_trained_model

    return load_trained_model(str(args.model_path)), check_texts(args.check_texts)


def check_texts(source: str | None) -> list[str]:
    """Read texts of all lengths, the shortest and the longest among them."""
    if source is None:
        from ..data.python_docs import build_python_docs

        texts = [text for entry in build_python_docs(["numpy"]) for text in (entry.query, entry.document)]
    else:
        from ..data.documents import document_texts, read_documents

        texts = document_texts(read_documents(source, unique_ids=False))
    texts.sort(key=len)
    steps = min(_NUM_TEXTS, len(texts))
    return [texts[round(step * (len(texts) - 1) / max(1, steps - 1))] for step in range(steps)]


def _report_onnx(config: dict[str, Any], folder: Path) -> None:
    sizes = [f"{name} ({(folder / name).stat().st_size / 2**20:,.1f} MiB)" for name in config["files"].values()]
    say(f"Wrote {folder}: {', '.join(sizes)}; outputs: {', '.join(config['outputs'])}.")
    found = config["parity"]
    largest = found["float32"]["largest_difference"]
    say(f"Compared with PyTorch on {found['num_texts']} texts: float32 within {largest:.1e}")
    if "int8" in found:
        cosine = found["int8"]
        say(f"  int8: mean cosine {cosine['mean_cosine']:.4f}, lowest {cosine['lowest_cosine']:.4f}")
    say(f"Next: from ragcun_hf.publishing.onnx_export import OnnxEncoder; OnnxEncoder(Path({str(folder)!r}))")
