"""Collective operations for losses and shared work; in a single process each of them is the identity.

Every one of W processes computes the same loss of all rows, and data parallelism averages their gradients. The average
equals the gradient in one process with all rows: the backward pass of a collective sums over the W processes, and
averaging divides by W.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def _all_reduced(x: Tensor) -> Tensor:
    total = x.detach().contiguous().clone()
    dist.all_reduce(total)
    return total


# These two are our own, because torch's differentiable collectives are either deprecated or private.


class _Sum(torch.autograd.Function):
    """Sum over processes. Its gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _all_reduced(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _all_reduced(gradient)


class _Gather(torch.autograd.Function):
    """Stack the rows of all processes, shape (W, B, ...). A row's gradient is summed over processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        pieces = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(pieces, x.detach().contiguous())
        return torch.stack(pieces)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _all_reduced(gradient)[dist.get_rank()]


def world_size() -> int:
    """Return the number of processes that work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def gather_objects(value: Any) -> list[Any]:
    """Collect one picklable value from every process, in rank order; wait for the slowest process."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value, group=_patient_group())
    return gathered


def broadcast_from_first(make: Callable[[], T]) -> T:
    """Call `make` in the first process and send its picklable result to all; wait like `gather_objects`."""
    if world_size() == 1:
        return make()
    values: list[Any] = [make() if rank() == 0 else None]
    dist.broadcast_object_list(values, src=0, group=_patient_group())
    made: T = values[0]
    return made


@functools.cache
def _patient_group() -> Any:
    """Create a process group that waits a day for the slowest process; if one dies, the others still fail at once."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=1))


def sum_over_processes(x: Tensor) -> Tensor:
    """Sum a tensor of any shape over all processes; differentiable, and equal on every process."""
    if world_size() == 1:
        return x
    return _Sum.apply(x)


def gather_rows(x: Tensor) -> tuple[Tensor, int]:
    """Concatenate the rows of all processes, shape (B, ...) with any B, in rank order; differentiable.

    Returns all rows, and the position of this process's first row among them.
    """
    if world_size() == 1:
        return x, 0
    counts = _row_counts(x)
    padding = x.new_zeros((max(counts) - x.shape[0], *x.shape[1:]))
    pieces = _Gather.apply(torch.cat([x, padding]))
    rows = torch.cat([piece[:count] for piece, count in zip(pieces, counts, strict=True)])
    return rows, sum(counts[: dist.get_rank()])


def count_rows(x: Tensor) -> tuple[int, int]:
    """Return the number of rows over all processes, and the position of this process's first row among them."""
    if world_size() == 1:
        return x.shape[0], 0
    counts = _row_counts(x)
    return sum(counts), sum(counts[: dist.get_rank()])


def mean_over_processes(values: Tensor) -> Tensor:
    """Reduce the values (B,) of this process's rows to a scalar, whose average over processes is the mean of all."""
    if world_size() == 1:
        return values.mean()
    return values.sum() * (world_size() / sum(_row_counts(values)))


def _row_counts(x: Tensor) -> list[int]:
    own = torch.tensor([x.shape[0]], device=x.device)
    counts = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(counts, own)
    return [int(count) for count in counts]
