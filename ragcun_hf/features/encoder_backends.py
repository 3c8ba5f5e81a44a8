"""Two ways to compute features from tokens: the model in PyTorch, or its graph in OpenVINO.

Both take token ids and attention mask, shape (rows, T), on the CPU, and return what `model.compute_features` returns:
shape (rows, H), float32, on the model's device, where the work may still be under way.
"""

from __future__ import annotations

import copy
import ctypes
import importlib.util
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import UserError
from .devices import moved

if TYPE_CHECKING:
    from ..model.modeling_isotropic_gaussian import IsotropicGaussianModel

ComputeFeatures: TypeAlias = Callable[[Tensor, Tensor], Tensor]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BACKENDS = ("torch", "openvino")
# Preparing a graph takes 3 to 6 s, and it encodes 10 to 40 % faster: worth it from about a minute of work.
WORTH_A_GRAPH = 2_000_000  # characters
# Families that others, too, run in float16 by default: their states stay far below its largest number, 65,504. Those
# of T5, Gemma and many decoders exceed it in some texts.
_SAFE_IN_FLOAT16 = frozenset(
    "albert bert camembert distilbert electra ernie modernbert mpnet nomic_bert roberta xlm-roberta".split()
)
_LEAST_CAPABILITY = (7, 0)  # of cards that are much faster in float16
# Without cuDNN's, which prepares a plan for every new shape of a batch.
_ATTENTION_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def choose_dtype(name: str, device: torch.device, *, family: str = "") -> torch.dtype:
    """Return the dtype of the arithmetic of an encoder of a family; `auto` is several times faster than float32.

    On a card, `auto` is float16, which is as fast as bfloat16 and eight times as precise, for families whose numbers
    it can hold. Otherwise it is bfloat16 where that is native, and float32 elsewhere.
    """
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        known = ", ".join(list(DTYPES)[:-1])
        raise UserError(f"expected an encoder dtype of auto, {known} or float16, got {name!r}: change the flag")
    if device.type == "cuda":
        if family in _SAFE_IN_FLOAT16 and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY:
            return torch.float16
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Not every supported torch has a public query; without this private one, float32 is the safe answer.
        query = getattr(torch.cpu, "_is_avx512_bf16_supported", None) if device.type == "cpu" else None
        is_native = bool(query and query())
    return torch.bfloat16 if is_native else torch.float32


def is_openvino_faster(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether OpenVINO is installed and faster than PyTorch: in bfloat16 on a processor, not in float32."""
    return device.type == "cpu" and dtype == torch.bfloat16 and importlib.util.find_spec("openvino") is not None


def feature_function(model: IsotropicGaussianModel, *, dtype: torch.dtype, backend: str = "torch") -> ComputeFeatures:
    """Return the function that computes features of a model in evaluation mode, with arithmetic in `dtype`."""
    if backend not in BACKENDS:
        raise UserError(f"expected an encoder backend of {' or '.join(BACKENDS)}, got {backend!r}: change the flag")
    if backend == "openvino":
        return _openvino_function(model, dtype)

    if model.device.type == "cuda" and model.config.freeze_base and dtype != torch.float32:
        return _card_function(model, dtype)
    return _torch_function(with_cast_weights(model, dtype), dtype)


def _torch_function(model: IsotropicGaussianModel, dtype: torch.dtype, *, needs_casts: bool = True) -> ComputeFeatures:
    is_rounded = needs_casts and dtype != torch.float32

    @torch.inference_mode()
    def compute(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = (moved(each, model.device) for each in (input_ids, attention_mask))
        with torch.autocast(model.device.type, dtype=dtype, enabled=is_rounded), attention_of(model.device):
            return model.compute_features(*tokens).float()

    return compute


def _card_function(model: IsotropicGaussianModel, dtype: torch.dtype) -> ComputeFeatures:
    """Compute without autocast, whose casts take a card as long as the layers between them, where that is possible.

    The code of some encoders, such as M2M100's, makes numbers in float32, which layers in `dtype` refuse.
    """
    whole = _torch_function(with_cast_weights(model, dtype, is_whole=True), dtype, needs_casts=False)
    others: list[ComputeFeatures] = []

    def compute(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if not others:
            try:
                return whole(input_ids, attention_mask)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                others.append(_torch_function(with_cast_weights(model, dtype), dtype))
        return others[0](input_ids, attention_mask)

    return compute


def with_cast_weights(
    model: IsotropicGaussianModel, dtype: torch.dtype, *, is_whole: bool = False
) -> IsotropicGaussianModel:
    """Return a frozen model with weights of its encoder cast, and all others shared; another model as it is.

    Cast are those of linear layers in float32, or all of them. Autocast casts the former to the same values, but again
    in every batch; the latter need no autocast, as all states between layers are in `dtype`, too. The copy lives as
    long as the function that uses it, and other threads may use the model.
    """
    if dtype == torch.float32 or not model.config.freeze_base:
        return model
    shared = [model.tokenizer, *model.parameters(), *model.buffers()]
    rounded = copy.deepcopy(model, {id(each): each for each in shared})
    of_dtypes = tuple(DTYPES.values()) if is_whole else (torch.float32,)
    for module in rounded.encoder.modules():
        if is_whole or isinstance(module, nn.Linear):
            for name, weight in module.named_parameters(recurse=False):
                if weight.dtype in of_dtypes:
                    module.register_parameter(name, nn.Parameter(weight.detach().to(dtype), requires_grad=False))
    return rounded


def attention_of(device: torch.device) -> AbstractContextManager[None]:
    """Choose the kernels of attention for batches of many shapes."""
    return sdpa_kernel(_ATTENTION_KERNELS) if device.type == "cuda" else nullcontext()


def lexical_function(model: IsotropicGaussianModel, lexical: nn.Module) -> ComputeFeatures:
    """Return the function that computes a model's lexical half, before weighting: (rows, L)."""

    @torch.inference_mode()
    def compute(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return lexical(moved(input_ids, model.device), moved(attention_mask, model.device))

    return compute


def _openvino_function(model: IsotropicGaussianModel, dtype: torch.dtype) -> ComputeFeatures:
    if dtype == torch.float16:
        raise UserError("--encoder_backend openvino knows float32 and bfloat16, got float16: use --encoder_dtype auto")
    if model.device.type != "cpu":
        raise UserError(f"--encoder_backend openvino runs on the CPU, got {model.device}: leave the flag out")
    if importlib.util.find_spec("openvino") is None:
        raise UserError("--encoder_backend openvino needs OpenVINO: run pip install openvino")
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    with _same_signal_stack():
        request = openvino.Core().compile_model(_openvino_graph(model), "CPU", settings).create_infer_request()
    compute = _infer_with(request)
    _check_other_shapes(model, compute, least=0.999 if dtype == torch.float32 else 0.98)
    return compute


class _SignalStack(ctypes.Structure):
    """`stack_t` of Linux: where a thread's signal handlers run."""

    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def _same_signal_stack() -> Iterator[None]:
    """Leave the thread's stack for signals as it was.

    Compiling a graph in OpenVINO replaces it, and removes the new one with the graph, from whichever thread that
    happens in. Then the next signal that Python handles, such as an interruption or the end of a child process, would
    end the process without a word.
    """
    if sys.platform != "linux":
        yield
        return
    library, before = ctypes.CDLL(None), _SignalStack()
    library.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        library.sigaltstack(ctypes.byref(before), None)


def _infer_with(request: Any) -> ComputeFeatures:
    def compute(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        (features,) = request.infer([input_ids.numpy(), attention_mask.numpy()], share_inputs=True).values()
        # The request overwrites its output at the next batch.
        return torch.from_numpy(features).clone()

    return compute


@torch.inference_mode()
def _check_other_shapes(model: IsotropicGaussianModel, compute: ComputeFeatures, *, least: float) -> None:
    """Refuse a graph that holds only for texts of the lengths it was traced with, as of Longformer's windows.

    Its features must have a cosine of at least `least` with those of PyTorch.
    """
    words = "what is the sum of a list and where does it stand".split()
    for counts in ((1,), (3,), (17, 5, 40), (min(model.config.max_length, 130),)):
        tokens = model.tokenize([" ".join(words[row % len(words)] for row in range(count)) for count in counts])
        expected = model.compute_features(tokens["input_ids"], tokens["attention_mask"]).float()
        try:
            found = compute(tokens["input_ids"], tokens["attention_mask"])
        except RuntimeError:
            found = torch.empty(0)
        is_whole = found.shape == expected.shape
        cosine = float(nn.functional.cosine_similarity(found, expected).min()) if is_whole else math.nan
        if not cosine >= least:
            shape, family = "x".join(map(str, tokens["input_ids"].shape)), model.config.encoder_config.model_type
            raise UserError(
                f"--encoder_backend openvino gives other features than PyTorch for a {family} encoder (cosine "
                f"{cosine:.3f} for {shape} tokens, nan for none): leave the flag out"
            )


class _FeatureGraph(nn.Module):
    """`compute_features` as a forward pass, which the converter can trace."""

    def __init__(self, model: IsotropicGaussianModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model.compute_features(input_ids, attention_mask)


def _openvino_graph(model: IsotropicGaussianModel) -> Any:
    """Convert through the frontend: `openvino.convert_model` does the same but sends usage data to its makers."""
    import openvino
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    example = model.tokenize(["two texts of", "unlike length"])
    inputs = {name: example[name] for name in ("input_ids", "attention_mask")}
    frontend = FrontEndManager().load_by_framework("pytorch")
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # Tracing warns about every branch on a shape; tests compare the results instead.
            warnings.simplefilter("ignore")
            decoder = TorchScriptPythonDecoder(_FeatureGraph(model), example_input=inputs)
            graph = frontend.convert(frontend.load(decoder))  # reads from the decoder, which must stay alive
    except (RuntimeError, TypeError, openvino.frontend.OpConversionFailure) as error:
        raise UserError(
            f"--encoder_backend openvino cannot convert a {model.config.encoder_config.model_type} encoder "
            f"({str(error).splitlines()[0][:120]}): leave the flag out"
        ) from error
    # Any number of texts of any length; integers as torch has them.
    for given in graph.inputs:
        given.get_node().set_partial_shape(openvino.PartialShape([-1, -1]))
        given.get_node().set_element_type(openvino.Type.i64)
    graph.validate_nodes_and_infer_types()
    return graph
