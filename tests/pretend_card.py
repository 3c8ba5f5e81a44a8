"""A pretend card: tensors that say they are on `cuda:0` while their values lie in tensors of the processor.

`with pretend_card() as card:` makes `.to("cuda")` and `device="cuda"` give such tensors, and replaces what the package
and its libraries ask of `torch.cuda`. Like a card, it refuses to mix its tensors with those of the processor (single
numbers and indices excepted), its tensors cannot be read as arrays, and what is copied from it without waiting is NaN
until someone waits. It counts the operations that start work on it, the copies from the host, and all that makes the
host wait for a card.

It shows mistakes of devices, early reads and waits, in code that runs in Python or through torch's operations. It
cannot show how fast a card is, what its own kernels compute or refuse (values are those of the processor), how much
memory it has, what two streams or threads do to each other, or code in C++ that asks where a tensor is. Work in other
threads and processes is not seen. Counts are a little lower than those of kernels: one operation may start several.
"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CARD = torch.device("cuda:0")
_aten = torch.ops.aten


def _operations(names):
    return {getattr(_aten, name) for name in names.split()}


# They read sizes or values back, so the host waits.
_WAITING = _operations(
    "_local_scalar_dense is_nonzero equal nonzero masked_select bincount repeat_interleave _linalg_check_errors "
    "unique_dim unique_consecutive _unique _unique2"
)
_WITHOUT_WORK = _operations("empty empty_like empty_strided new_empty new_empty_strided detach _local_scalar_dense")
_INDEXING = _operations("index index_put index_put_ _index_put_impl_ _unsafe_index")


def missing_in_torch() -> list[str]:
    """Return what this file uses of torch, beyond its documented interface, that the installed version lacks."""
    used = {
        torch.Tensor: ["_make_wrapper_subclass"],
        torch._C: ["_disabled_torch_function_impl", "_functorch", "_group_tensors_by_device_and_dtype"],
        getattr(torch._C, "_functorch", None): ["get_unwrapped", "is_functorch_wrapped_tensor"],
        torch.autograd: ["_engine_run_backward"],
        _foreach_utils: ["_foreach_supported_types"],
        torch: ["accelerator"],
    }
    return [name for place, names in used.items() for name in names if not hasattr(place, name)]


@dataclass
class Card:
    """Counts what happened on the card; waits and copies by the line that asked for them."""

    launches: Counter = field(default_factory=Counter)  # by operation
    waits: Counter = field(default_factory=Counter)
    copies: Counter = field(default_factory=Counter)  # from the host, waiting or not
    num_emptied: int = 0  # calls of `empty_cache`
    arriving: list = field(default_factory=list)  # copies to the host that nobody has waited for

    def wait(self, why: str) -> None:
        """Count, and let all copies arrive."""
        self.waits[f"{why}, {_caller()}"] += 1
        self.arrive(self.arriving)

    def arrive(self, copies: list) -> None:
        """Let those of some copies arrive that are still on their way."""
        named = {id(target) for target, _ in copies}
        for target, values in self.arriving:
            if id(target) in named:
                target.copy_(values)
        self.arriving = [each for each in self.arriving if id(each[0]) not in named]

    def clear(self) -> None:
        """Forget all counts."""
        for counts in (self.launches, self.waits, self.copies):
            counts.clear()


_CARDS: list[Card] = []


def _caller() -> str:
    """Return the innermost line outside torch and this file, and that of the package which led to it."""
    frame, places = sys._getframe(1), []
    while frame is not None:
        name = frame.f_code.co_filename
        if "/torch/" not in name and name != __file__:
            places.append((name, frame.f_lineno))
        frame = frame.f_back
    own = [(name, line) for name, line in places if "/ragcun_hf/" in name] or places
    lines = (f"{'/'.join(name.split('/')[-2:])}:{line}" for name, line in (places[0], own[0]))
    return " in ".join(dict.fromkeys(lines))


class CardTensor(torch.Tensor):
    """A tensor on the card; `values_` has its numbers. C++ takes it for one of the processor, and so can train it."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CARD)
    is_cuda, is_cpu = property(lambda self: True), property(lambda self: False)

    @staticmethod
    def __new__(cls, values):
        shape = {"strides": values.stride(), "storage_offset": values.storage_offset()}
        kind = {"dtype": values.dtype, "layout": values.layout, "device": "cpu"}
        made = torch.Tensor._make_wrapper_subclass(cls, values.size(), **shape, **kind)
        made.values_ = values
        return made

    def __repr__(self):
        return f"CardTensor({self.values_!r})"

    def get_device(self):
        return 0

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            made = CardTensor(self.values_.detach().clone()).requires_grad_(self.requires_grad)
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(made, self.requires_grad) if is_parameter else made
        return memo[id(self)]

    # For files: which tensors share memory, and what a checkpoint has of them.
    def untyped_storage(self):
        return self.values_.untyped_storage()

    def data_ptr(self):
        return self.values_.data_ptr()

    def __reduce_ex__(self, protocol):
        return self.values_.detach().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket is _aten.copy_:
            return _copied_in_place(_CARDS[-1], *args, **kwargs)
        _count(_CARDS[-1], func, args, kwargs)
        found = func(*tree_map(_values, args), **tree_map(_values, kwargs))
        given = {id(each.values_): each for each in tree_leaves((args, kwargs)) if isinstance(each, CardTensor)}
        # A view of a tensor that can be trained is one, too.
        is_inference = torch.is_inference_mode_enabled() and not (_is_view(func) and not args[0].is_inference())
        with torch.inference_mode(is_inference):
            return tree_map(lambda each: given.get(id(each), _on_card(each)), found)


def _values(each):
    return each.values_ if isinstance(each, CardTensor) else each


def _on_card(each):
    return CardTensor(each) if type(each) is torch.Tensor else each


def _is_view(func):
    aliases = [each.alias_info for each in func._schema.returns]
    return bool(aliases) and all(each is not None and not each.is_write for each in aliases)


def _count(card, func, args, kwargs):
    """Count an operation on the card, or refuse it."""
    operation, checked = func.overloadpacket, args
    if operation in _INDEXING and isinstance(args[0], CardTensor):
        indices, checked = [each for each in args[1] if each is not None], (args[0], *args[2:])
        if any(each.dtype in (torch.bool, torch.uint8) for each in indices):
            card.wait("mask as index")
        if any(type(each) is torch.Tensor and each.dim() for each in indices):
            card.copies[f"index, {_caller()}"] += 1
            card.wait("index of the host")
    tensors = [each for each in tree_leaves((checked, kwargs)) if isinstance(each, torch.Tensor)]
    if any(each.dim() and not isinstance(each, CardTensor) for each in tensors):
        raise RuntimeError(f"Expected all tensors to be on the same device, got {CARD} and cpu in {func}")
    if operation in _WAITING:
        card.wait(str(operation))
    if operation not in _WITHOUT_WORK and not _is_view(func):
        card.launches[str(operation).removeprefix("aten.")] += 1


def _copied_in_place(card, target, source, non_blocking=False):
    if not isinstance(target, CardTensor):
        card.wait("copy to the host")
        return target.copy_(source.values_)
    if isinstance(source, CardTensor) or not source.dim():
        card.launches["copy_"] += 1
    else:
        _count_copy_to_card(card, source, non_blocking)
    target.values_.copy_(_values(source))
    return target


def _count_copy_to_card(card, source, non_blocking):
    card.copies[_caller()] += 1
    if not (non_blocking and hasattr(source, "is_pretend_pinned")):
        card.wait("copy from the host")


class _Move(torch.autograd.Function):
    """Between host and card; gradients go the other way."""

    @staticmethod
    def forward(ctx, tensor, dtype, non_blocking):
        card, ctx.dtype = _CARDS[-1], tensor.dtype
        if not isinstance(tensor, CardTensor):
            _count_copy_to_card(card, tensor, non_blocking)
            return CardTensor(tensor.to(dtype, copy=True))
        values = tensor.values_.to(dtype, copy=True)
        if not non_blocking:
            card.wait("copy to the host")
            return values
        arriving = torch.full_like(values, float("nan") if dtype.is_floating_point else 0)
        card.arriving.append((arriving, values))
        return arriving

    @staticmethod
    def backward(ctx, gradient):
        return _Move.apply(gradient, ctx.dtype, False), None, None


def _is_card(device):
    return device is not None and torch.device(device).type == "cuda"


def _device_of(tensor):
    """Return the device of a tensor, also inside `torch.func.vmap`."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return CARD if isinstance(tensor, CardTensor) else torch.Tensor.device.__get__(tensor)


def _asked(device=None, dtype=None, non_blocking=False, copy=False, *, other=None, memory_format=None):
    """Return device, dtype and `non_blocking` of a call of `Tensor.to`, in any of its forms."""
    if isinstance(device, torch.dtype):
        return None, device, False
    given = device if isinstance(device, torch.Tensor) else other
    if given is not None:
        return _device_of(given), given.dtype, bool(dtype)
    return torch.device("cuda", device) if isinstance(device, int) else device, dtype, non_blocking


def _to(func, tensor, *args, **kwargs):
    device, dtype, non_blocking = _asked(*args, **kwargs)
    is_there = _is_card(_device_of(tensor))
    if is_there and (device is None or _is_card(device)):
        return func(tensor, dtype or tensor.dtype)
    if device is None or torch.device(device).type not in ("cuda", "cpu") or _is_card(device) == is_there:
        return func(_values(tensor), *args, **kwargs)
    return _Move.apply(tensor, dtype or tensor.dtype, non_blocking)


def _tolist(func, tensor):
    if isinstance(tensor, CardTensor):
        _CARDS[-1].wait("tolist")
    return func(_values(tensor))


def _numpy(func, tensor, *args, **kwargs):
    if isinstance(tensor, CardTensor):
        raise TypeError(f"can't convert {CARD} device type tensor to numpy: copy it to the host first")
    return func(tensor, *args, **kwargs)


def _pinned(func, tensor, *args, **kwargs):
    if isinstance(tensor, CardTensor):
        raise RuntimeError("expected a tensor of the processor to pin")
    pinned = tensor.clone()
    pinned.is_pretend_pinned = True
    return pinned


_METHODS = {
    "to": _to,
    "cuda": lambda func, tensor, *args, **kwargs: _to(torch.Tensor.to, tensor, CARD, **kwargs),
    "cpu": lambda func, tensor, **kwargs: _to(torch.Tensor.to, tensor, "cpu"),
    "tolist": _tolist,
    "numpy": _numpy,
    "__array__": _numpy,
    "pin_memory": _pinned,
    "is_pinned": lambda func, tensor, *args: hasattr(tensor, "is_pretend_pinned"),
}


class _FromCpp(TorchDispatchMode):
    """Sees tensors that C++ makes for an operation on the card, such as the random numbers of a dropout."""

    is_on_card = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        is_new = not any(isinstance(each, torch.Tensor) for each in tree_leaves((args, kwargs)))
        return tree_map(_on_card, found) if self.is_on_card and is_new else found

    @contextmanager
    def during_call_with(self, arguments):
        tensors = (each for each in tree_leaves(arguments) if isinstance(each, torch.Tensor))
        before, self.is_on_card = self.is_on_card, any(_device_of(each) == CARD for each in tensors)
        try:
            yield
        finally:
            self.is_on_card = before


class _FromPython(TorchFunctionMode):
    """Sees the calls in Python that name a device."""

    def __init__(self, from_cpp):
        super().__init__()
        self._from_cpp = from_cpp

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name == "__get__" and func.__self__ is torch.Tensor.device:
            return _device_of(args[0])
        with self._from_cpp.during_call_with((args, kwargs)):
            if name in _METHODS and isinstance(args[0], torch.Tensor):
                return _METHODS[name](func, *args, **kwargs)
            return self._made(func, args, kwargs) if _is_card(kwargs.get("device")) else func(*args, **kwargs)

    def _made(self, func, args, kwargs):
        """Make a tensor on the card; from numbers in Python, by a copy."""
        kwargs["device"] = "cpu"
        self._from_cpp.is_on_card = False
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            return _to(torch.Tensor.to, func(*args, **kwargs), CARD)
        requires_grad = kwargs.pop("requires_grad", False)
        found = CardTensor(func(*tree_map(_values, args), **kwargs))
        if not func.__name__.startswith("empty"):
            _CARDS[-1].launches[func.__name__] += 1
        return found.requires_grad_() if requires_grad else found


class _Event:
    """An event of the only stream: waiting for it lets the copies before it arrive."""

    def __init__(self, *args, **kwargs):
        self._before = []

    def record(self, stream=None):
        self._before = list(_CARDS[-1].arriving)

    def synchronize(self):
        _CARDS[-1].waits[f"event, {_caller()}"] += 1
        _CARDS[-1].arrive(self._before)


class _Autocast(torch.autocast):
    """Autocast of the card, by that of the processor."""

    def __init__(self, device_type, *args, **kwargs):
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def _answers_of_cuda(card: Card) -> dict[str, object]:
    def empty_cache():
        card.num_emptied += 1

    facts = SimpleNamespace(name="a pretend card", total_memory=2**36, major=9, minor=0, multi_processor_count=1)
    constants = {"is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0}
    constants |= {"get_device_name": facts.name, "get_device_capability": (9, 0), "get_device_properties": facts}
    constants |= {"mem_get_info": (2**35, 2**36), "is_bf16_supported": True, "set_device": None}
    constants |= {"current_stream": _STREAM, "manual_seed_all": None, "set_rng_state": None}
    answers = {name: _always(value) for name, value in constants.items()}
    functions = {"synchronize": lambda device=None: card.wait("synchronize"), "empty_cache": empty_cache}
    return {**answers, **functions, "Event": _Event, "get_rng_state": lambda device=None: torch.get_rng_state()}


_STREAM = SimpleNamespace(is_capturing=lambda: False)
_ANSWERS_OF_ACCELERATOR = {
    "is_available": True,
    "current_accelerator": torch.device("cuda"),
    "current_stream": _STREAM,
}


def _always(value):
    return lambda *args, **kwargs: value


def _replacements(card, mode, from_cpp):
    """Yield the place, name and replacement of everything that is not seen as an operation."""
    for name, function in _answers_of_cuda(card).items():
        yield torch.cuda, name, function
        if hasattr(torch.cuda.random, name):
            yield torch.cuda.random, name, function
    for name, value in _ANSWERS_OF_ACCELERATOR.items():
        yield torch.accelerator, name, _always(value)
    yield torch, "autocast", _Autocast
    yield _foreach_utils, "_foreach_supported_types", [*_foreach_utils._foreach_supported_types, CardTensor]
    grouped, run_backward = torch._C._group_tensors_by_device_and_dtype, torch.autograd._engine_run_backward

    def group(tensors, with_indices=False):
        found = grouped(tensors, with_indices)
        return {(_device_of(lists[0][0][0]), dtype): lists for (_, dtype), lists in found.items()}

    def run(*args, **kwargs):
        with mode, from_cpp.during_call_with(args):  # torch has left the mode by then
            return run_backward(*args, **kwargs)

    yield torch._C, "_group_tensors_by_device_and_dtype", group
    yield torch.autograd, "_engine_run_backward", run


def _forget_devices():
    """Let transformers and accelerate look for devices again."""
    from accelerate.state import AcceleratorState
    from transformers.utils import import_utils

    AcceleratorState._reset_state(reset_partial_state=True)
    for name, function in vars(import_utils).items():
        if name.startswith("is_torch") and hasattr(function, "cache_clear"):
            function.cache_clear()


@contextmanager
def pretend_card():
    """Pretend that this machine has one card, and yield its counts."""
    if lacking := missing_in_torch():
        pytest.skip(f"torch {torch.__version__} has no {', '.join(lacking)}, which the pretend card needs")
    card, from_cpp = Card(), _FromCpp()
    mode, future = _FromPython(from_cpp), torch.__future__
    with ExitStack() as stack:
        _forget_devices()
        stack.callback(_forget_devices)
        for place, name, replacement in _replacements(card, mode, from_cpp):
            stack.enter_context(mock.patch.object(place, name, replacement))
        # A parameter stays the same object when its module moves, as on a card.
        before = future.get_swap_module_params_on_conversion()
        stack.callback(future.set_swap_module_params_on_conversion, before)
        future.set_swap_module_params_on_conversion(True)
        _CARDS.append(card)
        stack.callback(_CARDS.pop)
        stack.enter_context(from_cpp)
        stack.enter_context(mode)
        yield card
