"""A trained model as one ONNX graph, in a folder that needs tokenizers, onnxruntime and NumPy alone.

    input_ids, attention_mask (B, T), int64 -> embeddings (B, D) and, with a predictor, predictions (B, D), float32

Beside the graph lie tokenizer.json, which cuts and pads as the model does, and onnx_config.json, which says the rest.
Shape letters: B = texts, T = tokens per text, D = embedding width.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError
from ..files import write_whole

if TYPE_CHECKING:
    from ..model.modeling_isotropic_gaussian import IsotropicGaussianModel

CONFIG_FILE = "onnx_config.json"
GRAPHS = {"float32": "model.onnx", "int8": "model_int8.onnx"}
_INPUTS = ("input_ids", "attention_mask")
_OUTPUTS = ("embeddings", "predictions")
_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_LARGEST_FILE = 1_500_000_000  # bytes of weights; protobuf takes 2 GiB, and the weights are not all of a graph
_NOTES = {
    "prompts": "Put prompts[role] before every text; neither the tokenizer nor the graph does.",
    "tokenizer": "tokenizer.json, read by the tokenizers library, cuts to max_length and pads.",
    "empty_text": "A text without any token is one padding token whose attention_mask is 1.",
    "embeddings": "Not of unit length; compare them by similarity_fn_name.",
    "int8": "Scales are taken from each batch, so a vector depends a little on the texts beside it.",
}


class OnnxEncoder:
    """Embeds texts by a folder that `write_onnx` wrote, without PyTorch.

    Args:
        folder: With onnx_config.json, tokenizer.json and the graphs.
        precision: `float32` or `int8`.
        threads: Of one matrix product. Default: all cores.

    Raises:
        UserError: If a package is missing, or the folder holds no such export.

    Example:
        >>> encoder = OnnxEncoder(Path("checkpoints/mine/onnx"), precision="int8")  # doctest: +SKIP
        >>> encoder.run(*encoder.tokenize(["how do I sort?"]))["embeddings"].shape  # doctest: +SKIP
        (1, 384)
    """

    def __init__(self, folder: Path, *, precision: str = "float32", threads: int | None = None) -> None:
        check_packages(["onnxruntime"])
        import onnxruntime
        from tokenizers import Tokenizer

        try:
            self.config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"expected an export with {CONFIG_FILE}, got {folder}: run training/export_onnx.py first"
            ) from error
        if precision not in self.config["files"]:
            held = " and ".join(self.config["files"])
            raise UserError(f"expected a {precision} graph in {folder}, got {held}: export it with --precision")
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3  # errors; it warns of every initializer that its own optimizer makes idle
        self._graph = folder / self.config["files"][precision]
        with _refusals_explained(self._graph):
            self.session = onnxruntime.InferenceSession(str(self._graph), options, providers=["CPUExecutionProvider"])

    def tokenize(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids and mask of texts that have their prompts, both (B, T), int64."""
        encodings = self._tokenizer.encode_batch(list(texts))
        ids = np.array([encoding.ids for encoding in encodings], dtype=np.int64)
        mask = np.array([encoding.attention_mask for encoding in encodings], dtype=np.int64)
        padding = self.config["padding"]
        if ids.shape[1] == 0:
            ids, mask = np.full((len(ids), 1), padding["id"], np.int64), np.zeros((len(ids), 1), np.int64)
        mask[mask.sum(1) == 0, -1 if padding["side"] == "left" else 0] = 1
        return ids, mask

    def run(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> dict[str, np.ndarray]:
        """Map token ids and mask, (B, T), to each output's vectors, (B, D)."""
        inputs = dict(zip(_INPUTS, (input_ids, attention_mask), strict=True))
        with _refusals_explained(self._graph):
            found = self.session.run(self.config["outputs"], inputs)
        return dict(zip(self.config["outputs"], found, strict=True))


@contextmanager
def _refusals_explained(graph: Path) -> Iterator[None]:
    """Turn what onnxruntime raises, by classes without a common parent, for a graph that it refuses into one line."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    errors = tuple(kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))
    try:
        yield
    except errors as error:
        raise UserError(
            f"expected a graph that onnxruntime can run, got {graph.name} ({_first_line(error)}): export it again, or "
            "try another version of onnxruntime"
        ) from error


def write_onnx(
    model: IsotropicGaussianModel,
    folder: Path,
    *,
    precisions: Sequence[str] = tuple(GRAPHS),
    weights_sha256: str | None = None,
) -> dict[str, Any]:
    """Write the graphs with all they need. Compare their vectors with the model's before anybody uses them.

    Args:
        model: Is put on the CPU, into float32 and into evaluation mode.
        folder: Exists and is empty; what lies in it after an error is no export.
        precisions: Of `float32` and `int8`. The latter rounds the encoder's weights to 7 bits, each output channel
            with a scale of its own, and the table of tokens; the head stays in float32.
        weights_sha256: Of the model's weights, for the record.

    Returns:
        What onnx_config.json holds; the graph in float32 is always written and named there.

    Raises:
        UserError: If a package is missing, or encoder or tokenizer cannot be exported.
    """
    check_packages()
    model.float().cpu().eval()
    graph = _GraphOfModel(model)
    with _quiet():
        opset = _write_graph(graph, folder / GRAPHS["float32"])
        if "int8" in precisions:
            _quantize(folder, graph)
    _write_tokenizer(model, folder)
    config = {
        "files": {name: file for name, file in GRAPHS.items() if name in (*precisions, "float32")},
        "outputs": graph.outputs,
        **_description(model),
        "opset": opset,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", *_PACKAGES)},
        "source": {"base_model_name": model.config.base_model_name, "weights_sha256": weights_sha256},
    }
    write_config(config, folder)
    return config


def check_packages(names: Sequence[str] = _PACKAGES) -> None:
    """Refuse to begin where a package of the extra is missing.

    Args:
        names: What is needed.

    Raises:
        UserError: With the command that installs it.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX expects the package {missing[0]}, found none: run pip install 'ragcun_hf[onnx]'")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's and the quantizer's remarks off the screen; errors come as exceptions."""
    handlers, disabled = list(logging.root.handlers), logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        logging.root.handlers[:] = handlers  # the quantizer's call of logging.warning adds one


class _GraphOfModel(nn.Module):
    """Two tensors in, one or two out: what the exporter can trace."""

    def __init__(self, model: IsotropicGaussianModel) -> None:
        super().__init__()
        self.model = model
        self.outputs = list(_OUTPUTS[: 1 if model.predictor is None else 2])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        output = self.model(input_ids, attention_mask)
        return tuple(output[name] for name in self.outputs)

    def name_of(self, part: nn.Module) -> str:
        """Name a part as the graph does."""
        return next(name for name, module in self.named_modules() if module is part)


def _write_graph(graph: _GraphOfModel, path: Path) -> int:
    """Export with free batch and length; returns the version of the operators."""
    example = graph.model.tokenize(["two texts of", "unlike length, this one longer"])
    try:
        program = torch.onnx.export(
            graph,
            tuple(example[name] for name in _INPUTS),
            dynamo=True,
            verbose=False,
            input_names=_INPUTS,
            output_names=graph.outputs,
            dynamic_shapes=dict.fromkeys(_INPUTS, {0: "batch", 1: "length"}),
        )
    except torch.onnx.errors.OnnxExporterError as error:
        family, reason = graph.model.config.encoder_config.model_type, _first_line(error.__cause__ or error)
        raise UserError(
            f"expected an encoder that torch.onnx can export, got the family {family} ({reason}): export a model with "
            "another encoder, or try another version of torch"
        ) from error
    if program is None:
        raise RuntimeError("torch.onnx.export gave no program")
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # they name the source files of this machine
    num_bytes = sum(weight.numel() * weight.element_size() for weight in graph.parameters())
    program.save(path, external_data=num_bytes > _LARGEST_FILE)
    return program.model.opset_imports[""]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _quantize(folder: Path, graph: _GraphOfModel) -> None:
    """Round weights once, and what flows through them at run time.

    Each output channel has a scale: with one per matrix, MiniLM's embeddings have a cosine of .90 to the exact ones
    instead of .99. Seven bits: on processors without VNNI, sums of products with eight overflow.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    source, weights = folder / GRAPHS["float32"], folder / f"{GRAPHS['float32']}.data"
    table = f"{graph.name_of(graph.model.get_input_embeddings())}.weight"
    kept = []  # in float32
    for node in onnx.load(source, load_external_data=False).graph.node:
        is_of_head = any(name.startswith(("model.projection.", "model.predictor.")) for name in node.input)
        # Small tables, such as MPNet's bias by distance, would save nothing.
        if is_of_head or (node.op_type == "Gather" and node.input[0] != table):
            kept += [node.name, f"{node.name}_MatMul"]  # as which the quantizer rewrites Gemm
    quantize_dynamic(
        source,
        folder / GRAPHS["int8"],
        op_types_to_quantize=["MatMul", "Gather"],
        per_channel=True,
        reduce_range=True,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=kept,
        # A quarter of the size, and some that stays as it was.
        use_external_data_format=weights.exists() and weights.stat().st_size > 2 * _LARGEST_FILE,
    )


def _write_tokenizer(model: IsotropicGaussianModel, folder: Path) -> None:
    from tokenizers import Tokenizer

    given = model.tokenizer
    backend = getattr(given, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"expected a tokenizer that the tokenizers library can run, got {type(given).__name__}: save the model "
            "with a fast tokenizer"
        )
    given.save_pretrained(folder)
    own = Tokenizer.from_str(backend.to_str())
    own.enable_truncation(model.config.max_length, direction=given.truncation_side)
    own.enable_padding(direction=given.padding_side, pad_id=given.pad_token_id, pad_token=given.pad_token)
    own.save(str(folder / "tokenizer.json"))


def _description(model: IsotropicGaussianModel) -> dict[str, Any]:
    config, tokenizer = model.config, model.tokenizer
    return {
        "inputs": list(_INPUTS),
        "output_dim": config.output_dim,
        "max_length": config.max_length,
        "similarity_fn_name": config.similarity_fn_name,
        "prompts": {"query": config.query_prompt, "document": config.document_prompt},
        "padding": {"side": tokenizer.padding_side, "id": tokenizer.pad_token_id},
        "notes": _NOTES,
    }


def write_config(config: dict[str, Any], folder: Path) -> None:
    """Write onnx_config.json into the folder of an export, complete or not at all."""
    write_whole(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
