"""Export a trained model as one ONNX graph, to a folder that needs tokenizers, onnxruntime and NumPy alone.

    input_ids, attention_mask (B, T), int64 -> embeddings (B, D) and, with a predictor, predictions (B, D), float32

A model whose documents keep the encoder's vectors has a further output, documents (B, D).

The folder also holds tokenizer.json, which truncates and pads as the model does, and onnx_config.json, which documents
the rest. Shape letters: B = texts, T = tokens per text, D = embedding width.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..commands import command
from ..errors import UserError
from ..evaluation.results import read_json_object, write_json

if TYPE_CHECKING:
    from ..model.modeling_isotropic_gaussian import IsotropicGaussianModel

CONFIG_FILE = "onnx_config.json"
GRAPHS = {"float32": "model.onnx", "int8": "model_int8.onnx"}
LARGEST_FILE_BYTES = 1_500_000_000  # larger weights get their own file: protobuf, with the graph, ends at 2 GiB

_INPUTS = ("input_ids", "attention_mask")
_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_TOLERANCE = 1e-4  # of the coordinates' root mean square: float32 sums are taken in another order
_CHECK_BATCH = 8
_LONGEST_CHECK = 2_048  # tokens
_NOTES = {
    "prompts": "Put prompts[role] before every text; neither the tokenizer nor the graph does.",
    "tokenizer": "tokenizer.json, read by the tokenizers library, truncates to max_length and pads.",
    "empty_text": "A text without any token is one padding token whose attention_mask is 1.",
    "embeddings": "Of unit length if unit_length is true; compare them by similarity_fn_name.",
    "documents": "If there is such an output, it has the vectors of documents, and embeddings has those of queries.",
    "int8": "Scales are computed for each batch, so a vector depends slightly on the other texts in its batch.",
}


def check_packages(names: Sequence[str] = _PACKAGES) -> None:
    """Refuse to begin if a package of the extra is missing; the `UserError` gives the command that installs it."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX expects the package {missing[0]}, found none: run pip install {' '.join(missing)}")


class OnnxEncoder:
    """Embeds texts with a folder that `write_onnx` wrote, without PyTorch, on all cores if `threads` is None.

    Raises a UserError if a package is missing, or the folder holds no export in this precision.

    >>> encoder = OnnxEncoder(Path("checkpoints/mine/onnx"), precision="int8")  # doctest: +SKIP
    >>> encoder.run(*encoder.tokenize(["how do I sort?"]))["embeddings"].shape  # doctest: +SKIP
    (1, 384)
    """

    def __init__(self, folder: Path, *, precision: str = "float32", threads: int | None = None) -> None:
        check_packages(["onnxruntime"])
        import onnxruntime
        from tokenizers import Tokenizer

        what, remedy = f"an export with {CONFIG_FILE}", f"run {command('export')} first"
        self.config = read_json_object(folder / CONFIG_FILE, what, remedy)
        if precision not in self.config["files"]:
            present = " and ".join(self.config["files"])
            raise UserError(f"expected a {precision} graph in {folder}, got {present}: export it with --precision")
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3  # errors; it warns of every initializer that its own optimizer makes unused
        self._graph = folder / self.config["files"][precision]
        with _refusals_explained(self._graph):
            self.session = onnxruntime.InferenceSession(str(self._graph), options, providers=["CPUExecutionProvider"])

    def tokenize(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids and mask, both (B, T), int64, of texts that already start with their prompts."""
        encodings = self._tokenizer.encode_batch(list(texts))
        ids = np.array([encoding.ids for encoding in encodings], dtype=np.int64)
        mask = np.array([encoding.attention_mask for encoding in encodings], dtype=np.int64)
        padding = self.config["padding"]
        if ids.shape[1] == 0:
            ids, mask = np.full((len(ids), 1), padding["id"], np.int64), np.zeros((len(ids), 1), np.int64)
        mask[mask.sum(1) == 0, -1 if padding["side"] == "left" else 0] = 1
        return ids, mask

    def run(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> dict[str, np.ndarray]:
        """Map token ids and mask, (B, T), to the vectors of each output, (B, D)."""
        inputs = dict(zip(_INPUTS, (input_ids, attention_mask), strict=True))
        with _refusals_explained(self._graph):
            found = self.session.run(self.config["outputs"], inputs)
        return dict(zip(self.config["outputs"], found, strict=True))


@contextmanager
def _refusals_explained(graph: Path) -> Iterator[None]:
    """Turn the errors of onnxruntime about a graph, whose classes have no common parent, into one line."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    errors = tuple(kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))
    try:
        yield
    except errors as error:
        raise UserError(
            f"expected a graph that onnxruntime can run, got {graph.name} ({_first_line(error)}): export it again, or "
            "try another version of onnxruntime"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def write_onnx(
    model: IsotropicGaussianModel,
    folder: Path,
    texts: Sequence[str],
    *,
    precisions: Sequence[str] = tuple(GRAPHS),
    weights_sha256: str | None = None,
) -> dict[str, Any]:
    """Write the graphs with all that they need, compare them with the model on texts, and return onnx_config.json.

    The model is moved to the CPU, converted to float32 and put into evaluation mode. The folder exists and is empty.
    For int8, the encoder's weights and token embeddings are rounded to 7 bits; the head stays in float32.
    """
    check_packages()
    model.float().cpu().eval()
    graph = _GraphOfModel(model)
    with _quiet():
        opset = _write_graph(graph, folder / GRAPHS["float32"])
        if "int8" in precisions:
            _quantize(folder, graph)
    write_tokenizer(model, folder)
    settings, tokenizer = model.config, model.tokenizer
    config = {
        # The graph in float32 is always written: the one in int8 is made from it, and both are compared.
        "files": {name: file for name, file in GRAPHS.items() if name in (*precisions, "float32")},
        "outputs": graph.outputs,
        "inputs": list(_INPUTS),
        "output_dim": settings.output_dim,
        "max_length": settings.max_length,
        "similarity_fn_name": settings.similarity_fn_name,
        "unit_length": settings.has_unit_vectors,
        "prompts": {"query": settings.query_prompt, "document": settings.document_prompt},
        "padding": {"side": "right", "id": tokenizer.pad_token_id},
        "notes": _NOTES,
        "opset": opset,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", *_PACKAGES)},
        "source": {"base_model_name": settings.base_model_name, "weights_sha256": weights_sha256},
    }
    write_json(folder / CONFIG_FILE, config)
    config["parity"] = {"num_texts": len(texts), **compare_with_model(model, folder, list(config["files"]), texts)}
    if "float32" not in precisions:
        for path in folder.glob(f"{config['files'].pop('float32')}*"):
            path.unlink()
    write_json(folder / CONFIG_FILE, config)
    return config


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the remarks of exporter and quantizer off the screen; errors come as exceptions."""
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
    """The model as the exporter can trace it: two tensors in, one to three out."""

    def __init__(self, model: IsotropicGaussianModel) -> None:
        super().__init__()
        self.model = model
        has = {"predictions": model.predictor is not None, "documents": model.config.freeze_documents}
        self.outputs = ["embeddings", *(name for name, is_given in has.items() if is_given)]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        output = self.model(input_ids, attention_mask)
        found = {**output, "documents": output.features * self.model.config.feature_scale}
        return tuple(self.model.search_vectors(found[name]) for name in self.outputs)


def _write_graph(graph: _GraphOfModel, path: Path) -> int:
    """Export the graph for any batch size and length; return the version of its operators."""
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
        raise RuntimeError("torch.onnx.export returned no program")
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # they name the source files of this machine
    num_bytes = sum(weight.numel() * weight.element_size() for weight in graph.state_dict().values())
    program.save(path, external_data=num_bytes > LARGEST_FILE_BYTES)
    return program.model.opset_imports[""]


def _quantize(folder: Path, graph: _GraphOfModel) -> None:
    """Round the weights of the graph once; activations are rounded at run time.

    Each output channel has its own scale: with one scale per matrix, MiniLM's embeddings have a cosine of .90 with the
    exact ones instead of .99. Seven bits: on processors without VNNI, sums of products of eight bits overflow.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    source, weights = folder / GRAPHS["float32"], folder / f"{GRAPHS['float32']}.data"
    tokens = graph.model.get_input_embeddings()
    table = next(f"{name}.weight" for name, module in graph.named_modules() if module is tokens)
    kept = []  # in float32
    for node in onnx.load(source, load_external_data=False).graph.node:
        is_of_head = any(name.startswith(("model.projection.", "model.predictor.")) for name in node.input)
        # Small tables, such as MPNet's bias by distance, would save nothing.
        if is_of_head or (node.op_type == "Gather" and node.input[0] != table):
            kept += [node.name, f"{node.name}_MatMul"]  # the name that the quantizer gives a rewritten Gemm
    quantize_dynamic(
        source,
        folder / GRAPHS["int8"],
        op_types_to_quantize=["MatMul", "Gather"],
        per_channel=True,
        reduce_range=True,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=kept,
        # The result has a quarter of the size, and some parts that stay as they were.
        use_external_data_format=weights.exists() and weights.stat().st_size > 2 * LARGEST_FILE_BYTES,
    )


def write_tokenizer(model: IsotropicGaussianModel, folder: Path) -> None:
    """Write the model's tokenizer with tokenizer.json set to truncate and pad; a `UserError` if it is a slow one."""
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
    own.enable_padding(direction="right", pad_id=given.pad_token_id, pad_token=given.pad_token)
    own.save(str(folder / "tokenizer.json"))


def compare_with_model(
    model: IsotropicGaussianModel, folder: Path, precisions: Sequence[str], texts: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Compare the model with each graph of an export, which gets its tokens from the export's own tokenizer.

    In float32, return the largest difference of a coordinate in units of their root mean square; in int8, cosines. A
    `UserError` says if that difference is too large or the tokens differ.
    """
    batches = list(_check_batches(texts, model.config.max_length))
    tokens = [model.tokenize(batch) for batch in batches]
    with torch.inference_mode():
        graph = _GraphOfModel(model)
        outputs = [dict(zip(graph.outputs, graph(**inputs), strict=True)) for inputs in tokens]
    found = {}
    for precision in precisions:
        encoder = OnnxEncoder(folder, precision=precision, threads=torch.get_num_threads())
        own = [encoder.tokenize(batch) for batch in batches]
        for expected, arrays in zip(tokens, own, strict=True):
            if not all(np.array_equal(expected[name], array) for name, array in zip(_INPUTS, arrays, strict=True)):
                raise UserError(
                    f"expected tokenizer.json to produce the tokens of {type(model.tokenizer).__name__}, got others: "
                    "nothing was written; save the model with a tokenizer that needs no Python code of its own"
                )
        runs = [encoder.run(*inputs) for inputs in own]
        exact = np.stack([np.concatenate([output[name] for output in outputs]) for name in runs[0]])
        ours = np.stack([np.concatenate([run[name] for run in runs]) for name in runs[0]])
        found[precision] = _largest_difference(exact, ours) if precision == "float32" else _cosines(exact, ours)
    return found


def _largest_difference(exact: np.ndarray, ours: np.ndarray) -> dict[str, float]:
    """Both (outputs, texts, D)."""
    largest = float((abs(ours - exact) / np.sqrt((exact**2).mean((1, 2), keepdims=True))).max())
    if not largest < _TOLERANCE:  # also refuses NaN
        raise UserError(
            f"expected the graph within {_TOLERANCE:g} of PyTorch, got a difference of {largest:.1e}: nothing was "
            "written; try other versions of torch and onnxruntime"
        )
    return {"largest_difference": largest}


def _cosines(exact: np.ndarray, ours: np.ndarray) -> dict[str, float]:
    cosines = (exact * ours).sum(-1) / (np.linalg.norm(exact, axis=-1) * np.linalg.norm(ours, axis=-1))
    return {"mean_cosine": float(cosines.mean()), "lowest_cosine": float(cosines.min())}


def _check_batches(texts: Sequence[str], max_length: int) -> Iterator[list[str]]:
    """Yield batches that pad short texts to the length of long ones, then the longest and the shortest text alone."""
    ordered = sorted([*texts, ""], key=len)
    num_batches = -(-len(ordered) // _CHECK_BATCH)
    for first in range(num_batches):
        yield ordered[first::num_batches]
    joined = " ".join(texts) + " "
    yield [joined * -(-8 * min(max_length, _LONGEST_CHECK) // len(joined))]  # truncated at the model's length
    yield [ordered[1]]
