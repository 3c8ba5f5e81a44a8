"""The isotropy term: SIGReg and its sums of waves, and the covariance penalty of the original project."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ..distributed import sum_over_processes, world_size
from ..features.devices import moved

SIGREG_NULL_FLOOR = 1.0527
"""Expected SIGReg statistic of samples of N(0, I), for any number of rows and any width."""

_INTEGRAL_END, _NUM_KNOTS = 3.0, 17
# Of the (N, K) projections: on a processor, arrays of 1 MiB, a few of which fit in a cache.
ELEMENTS_AT_ONCE, _ELEMENTS_ON_CARD = 2**18, 2**22


def without_autocast(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorate a loss so that autocast does not compute it in half precision."""

    @wraps(function)
    def wrapped(embeddings: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(embeddings.device.type, enabled=False):
            return function(embeddings, *args, **kwargs)

    return wrapped


@without_autocast
def sigreg_loss(
    embeddings: Tensor, *, num_directions: int = 256, seed: int = 0, directions: Tensor | None = None
) -> Tensor:
    """Measure how far a batch is from a standard Gaussian, on a scale that does not depend on the batch size.

    This is [`sigreg_statistic`] divided by the number of rows. It tests location and scale as well as shape: do not
    apply it to L2-normalized vectors.

    Args:
        embeddings: Shape (N, D), any floating dtype, not normalized; N counts the rows of all processes, >= 2.
        num_directions: K, random directions; more directions reduce the noise between calls, at linear cost.
        seed: Of the directions; must be the same on every process, and should differ from step to step.
        directions: Shape (D, K), unit columns, to use instead of drawn ones.

    Returns:
        Scalar float32, >= 0; about 1.05 / N for samples of N(0, I), about 0.40 if all rows are zero.

    Raises:
        ValueError: If the shape is wrong, there are fewer than two rows, or `num_directions` < 1.

    Source:
        Balestriero and LeCun, "LeJEPA", 2025, arXiv:2511.08544.

    Example:
        >>> import torch
        >>> gaussian = torch.randn(4096, 8, generator=torch.Generator().manual_seed(1))
        >>> 4096 * sigreg_loss(gaussian) < 2
        tensor(True)
        >>> round(sigreg_loss(torch.zeros(4096, 8)).item(), 2)
        0.4
    """
    if num_directions < 1:
        raise ValueError(f"`num_directions` must be at least 1, got {num_directions}.")
    if directions is None:
        directions = random_directions(embeddings.shape[-1], num_directions, seed=seed, device=embeddings.device)
    return sigreg_statistic(embeddings, directions) / _num_rows(embeddings)


@without_autocast
def sigreg_statistic(embeddings: Tensor, directions: Tensor) -> Tensor:
    """Compute the sliced Epps-Pulley statistic T of a batch against N(0, I).

    On each direction the empirical characteristic function of the projected rows is compared with that of N(0, 1):
    T = N * integral over [-3, 3] of |phi(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt, averaged over directions.

    Args:
        embeddings: Shape (N, D), any floating dtype, not normalized; N counts the rows of all processes, >= 2.
        directions: Shape (D, K), unit columns, the same on every process.

    Returns:
        Scalar float32, >= 0; about 1.0527 for samples of N(0, I), about 0.40 * N for a collapsed batch.

    Raises:
        ValueError: If the shape is wrong or there are fewer than two rows.

    Source:
        Epps and Pulley, "A test for normality based on the empirical characteristic function", Biometrika 1983;
        sliced and with this quadrature (17 knots on [0, 3], trapezoid rule) in LeJEPA, arXiv:2511.08544.
    """
    num_rows = _num_rows(embeddings)
    spacing = _INTEGRAL_END / (_NUM_KNOTS - 1)
    knots_T = spacing * torch.arange(_NUM_KNOTS, device=embeddings.device)
    target_T = torch.exp(-knots_T.square() / 2)  # characteristic function of N(0, 1), and the weight
    # Both functions are symmetric in t: the integral over [-3, 3] is twice the one over [0, 3].
    step_T = torch.full_like(knots_T, 2 * spacing)
    step_T[:: _NUM_KNOTS - 1].div_(2)  # both ends; for a list of places, a card would wait
    projected_NK = embeddings.float() @ directions.float()
    elements = ELEMENTS_AT_ONCE if projected_NK.device.type == "cpu" else _ELEMENTS_ON_CARD
    chunk = max(1, elements // projected_NK.shape[0])
    parts = [wave_sums(part, spacing=spacing, num_frequencies=_NUM_KNOTS) for part in projected_NK.split(chunk, dim=1)]
    sums_2KT = torch.cat(parts, dim=1)
    cosine_KT, sine_KT = sum_over_processes(sums_2KT) / num_rows
    error_KT = (cosine_KT - target_T).square() + sine_KT.square()
    return (error_KT @ (step_T * target_T)).mean() * num_rows


def random_directions(dim: int, num_directions: int, *, seed: int, device: torch.device | None = None) -> Tensor:
    """Draw unit vectors, uniform on the sphere: (D, K) float32, the same on every device for one seed.

    >>> random_directions(3, 5, seed=0).norm(dim=0).allclose(torch.ones(5))
    True
    """
    directions_DK = torch.randn(dim, num_directions, generator=torch.Generator().manual_seed(seed))
    directions_DK /= directions_DK.norm(dim=0)
    return directions_DK if device is None else moved(directions_DK, device)


@without_autocast
def covariance_isotropy_loss(embeddings: Tensor) -> Tensor:
    """Measure how far the covariance is from a multiple of the identity: ||C - mean_variance * I||_F / D.

    It depends on second moments only, neither on the mean nor on the shape of the distribution.

    Args:
        embeddings: Shape (N, D), not normalized; N counts the rows of all processes, >= 2.

    Returns:
        Scalar float32, >= 0, a variance. With unit variances and all correlations 1: sqrt(D (D - 1)) / D.

    Raises:
        ValueError: If the shape is wrong or there are fewer than two rows.

    Source:
        The isotropy term of github.com/ctn/ragcun.

    Example:
        >>> import torch
        >>> cross = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> covariance_isotropy_loss(cross) < 1e-9
        tensor(True)
    """
    num_rows = _num_rows(embeddings)
    rows_ND = embeddings.float()
    mean_D = sum_over_processes(rows_ND.sum(0)) / num_rows
    centred_ND = rows_ND - mean_D
    covariance_DD = sum_over_processes(centred_ND.T @ centred_ND) / (num_rows - 1)
    dim = rows_ND.shape[1]
    residual_DD = covariance_DD - covariance_DD.trace() / dim * torch.eye(dim, device=rows_ND.device)
    # The root has an infinite slope at 0, the value for a batch of equal rows.
    return (residual_DD.square().sum() + 1e-24).sqrt() / dim


def _num_rows(embeddings: Tensor) -> int:
    """Check the shape and count the rows of all processes."""
    if embeddings.ndim != 2:
        raise ValueError(
            f"Expected embeddings of shape (N, D), got {tuple(embeddings.shape)}: pool token states first."
        )
    num_rows = embeddings.shape[0]
    if world_size() > 1:
        num_rows = int(sum_over_processes(torch.tensor(float(num_rows), device=embeddings.device)))
    if num_rows < 2:
        raise ValueError(f"An isotropy term needs at least two rows, got {num_rows}: drop the last, smaller batch.")
    return num_rows


def wave_sums(x: Tensor, *, spacing: float, num_frequencies: int) -> Tensor:
    """Sum cos(t x) and sin(t x) over the rows of (N, K), for T frequencies t = 0, spacing, 2 spacing, and so on.

    Returns (2, K, T), the sums of the cosines and those of the sines, which can be differentiated once in `x`, also
    under `torch.func.vmap`. Raises ValueError if `x` is not a matrix, or there are fewer than two frequencies.

    >>> wave_sums(torch.zeros(5, 1), spacing=0.5, num_frequencies=3).tolist()
    [[[5.0, 5.0, 5.0]], [[0.0, 0.0, 0.0]]]
    """
    if x.ndim != 2 or num_frequencies < 2:
        raise ValueError(
            f"wave_sums needs x of shape (N, K) and two or more frequencies, got {tuple(x.shape)}, {num_frequencies}."
        )
    if x.device.type == "cpu":
        return _WaveSums.apply(x, spacing, num_frequencies)[0]
    return wave_sums_by_definition(x, spacing=spacing, num_frequencies=num_frequencies)


def wave_sums_by_definition(x: Tensor, *, spacing: float, num_frequencies: int) -> Tensor:
    """Compute `wave_sums` in a few operations on T times as many numbers, as suits a card.

    A processor multiplies waves instead: a cosine costs it more than a product, and another operation nothing.
    """
    frequencies_T = spacing * torch.arange(num_frequencies, device=x.device, dtype=x.dtype)
    angles_NKT = x.unsqueeze(-1) * frequencies_T
    return torch.stack([angles_NKT.cos().sum(0), angles_NKT.sin().sum(0)])


class _WaveSums(torch.autograd.Function):
    """Map (..., N, K) to (2, ..., K, T), and return e^(i spacing x) too, for the gradient."""

    @staticmethod
    def forward(x: Tensor, spacing: float, num_frequencies: int) -> tuple[Tensor, Tensor]:
        angle = x * spacing
        first = torch.complex(angle.cos(), angle.sin())
        sums, wave = [torch.ones_like(first).sum(-2), first.sum(-2)], first
        for _ in range(2, num_frequencies):
            wave = wave * first
            sums.append(wave.sum(-2))
        together = torch.stack(sums, dim=-1)
        return torch.stack([together.real, together.imag]), first

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, int], output: tuple[Tensor, Tensor]) -> None:
        _, ctx.spacing, ctx.num_frequencies = inputs
        _, first = output
        ctx.mark_non_differentiable(first)
        ctx.save_for_backward(first)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, None, None]:
        """For gradients a of cosines and b of sines, d/dx is the real part of the sum of t (b + i a) e^(i t x)."""
        (first,) = ctx.saved_tensors
        frequencies = ctx.spacing * torch.arange(ctx.num_frequencies, device=gradient.device, dtype=gradient.dtype)
        of_cosines, of_sines = (gradient * frequencies).unbind(0)
        coefficients = torch.complex(of_sines, of_cosines).movedim(-1, 0).unsqueeze(-2).unbind(0)
        # Horner's rule, from the highest frequency down.
        value = coefficients[-1].expand_as(first)
        for coefficient in coefficients[-2::-1]:
            value = torch.addcmul(coefficient, value, first)
        return value.real.contiguous(), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None, None], x: Tensor, spacing: float, num_frequencies: int) -> Any:
        return _WaveSums.apply(x.movedim(in_dims[0], 0), spacing, num_frequencies), (1, 0)
