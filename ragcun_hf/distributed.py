"""The collectives that losses and shared work need; each is the identity in a single process.

Convention: a loss value computed on each of W processes has a gradient that data parallelism averages. A function
of all rows, evaluated identically everywhere through these collectives, then gets exactly the gradient that one
process with all rows would compute: the backward pass of a sum over processes is again a sum, W times the share of
each process, and averaging divides by W.
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

# torch's own differentiable collectives are deprecated in one module and private in the other, so the two that are
# needed stand here.


class _Sum(torch.autograd.Function):
    """The sum over processes; its gradient is the sum of the processes' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.detach().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


class _Gather(torch.autograd.Function):
    """All processes' rows, stacked (W, B, ...); the gradient of the own rows is summed over processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        pieces = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(pieces, x.detach().contiguous())
        return torch.stack(pieces)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total[dist.get_rank()]


def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number among those that train together, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def gather_objects(value: Any) -> list[Any]:
    """Collect a picklable value of every process, in rank order; waits as long as the slowest takes."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value, group=_patient_group())
    return gathered


def made_by_first(make: Callable[[], T]) -> T:
    """Let the first process make something picklable, and give it to all; waits as `gather_objects` does."""
    if world_size() == 1:
        return make()
    values: list[Any] = [make() if rank() == 0 else None]
    dist.broadcast_object_list(values, src=0, group=_patient_group())
    made: T = values[0]
    return made


@functools.cache
def _patient_group() -> Any:
    """Make a group that waits for a day: where work is shared, the first to be done waits for the last.

    A process that dies closes its connections, which ends all of them; of a machine that vanishes nobody hears.
    """
    return dist.new_group(backend="gloo", timeout=timedelta(days=1))


def sum_over_processes(x: Tensor) -> Tensor:
    """Add a tensor over all processes; differentiable.

    Args:
        x: Any shape, the same on every process.

    Returns:
        The sum, the same on every process.
    """
    if world_size() == 1:
        return x
    return _Sum.apply(x)


def gather_rows(x: Tensor) -> tuple[Tensor, int]:
    """Stack the rows of all processes in rank order; differentiable, and row counts may differ.

    Args:
        x: Shape (B, ...); B may differ between processes.

    Returns:
        All rows, and the position at which this process's own rows start.
    """
    if world_size() == 1:
        return x, 0
    counts = _row_counts(x)
    padding = x.new_zeros((max(counts) - x.shape[0], *x.shape[1:]))
    padded = torch.cat([x, padding])
    pieces = _Gather.apply(padded)
    rows = torch.cat([piece[:count] for piece, count in zip(pieces, counts, strict=True)])
    return rows, sum(counts[: dist.get_rank()])


def count_rows(x: Tensor) -> tuple[int, int]:
    """Return the number of rows of all processes, and the position at which this process's own rows start."""
    if world_size() == 1:
        return x.shape[0], 0
    counts = _row_counts(x)
    return sum(counts), sum(counts[: dist.get_rank()])


def mean_over_processes(values: Tensor) -> Tensor:
    """Average values over the rows of all processes, so that data-parallel averaging gives the exact gradient.

    Args:
        values: Shape (B,), one value per row of this process.

    Returns:
        Scalar. In one process the mean. In W processes this process's sum times W over the number of all rows:
        the average of these scalars over processes, which is what data parallelism forms, is the mean of all rows.
    """
    if world_size() == 1:
        return values.mean()
    return values.sum() * (world_size() / sum(_row_counts(values)))


def _row_counts(x: Tensor) -> list[int]:
    own = torch.tensor([x.shape[0]], device=x.device)
    counts = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(counts, own)
    return [int(count) for count in counts]
