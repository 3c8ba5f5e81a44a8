"""Sums of cosines and sines at evenly spaced frequencies, the inner loop of SIGReg, with their gradient.

A frequency's wave is the rotation of the one before by the same angle, so that one cosine and one sine per number do
instead of one per number and frequency; nothing of the size of all waves is kept for the gradient.

Shape letters: N = rows, K = columns, T = frequencies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def wave_sums(x: Tensor, *, spacing: float, num_frequencies: int) -> Tensor:
    """Sum cos(t x) and sin(t x) over rows, for the frequencies t = 0, spacing, 2 spacing, and so on.

    Args:
        x: Shape (N, K), float32.
        spacing: Distance between frequencies.
        num_frequencies: T, at least 2.

    Returns:
        Shape (2, K, T), float32: the cosines, then the sines; both within [-N, N]. Differentiable once in `x`, and
        under `torch.func.vmap`.

    Raises:
        ValueError: If `x` is not a matrix, or there are fewer than two frequencies.

    Example:
        >>> sums = wave_sums(torch.zeros(5, 1), spacing=0.5, num_frequencies=3)
        >>> sums[0].tolist(), sums[1].tolist()
        ([[5.0, 5.0, 5.0]], [[0.0, 0.0, 0.0]])
    """
    if x.ndim != 2 or num_frequencies < 2:
        raise ValueError(
            f"wave_sums needs x of shape (N, K) and two or more frequencies, got {tuple(x.shape)}, {num_frequencies}."
        )
    return _WaveSums.apply(x, spacing, num_frequencies)[0]


class _WaveSums(torch.autograd.Function):
    """(..., N, K) to (2, ..., K, T), and the first waves, which the gradient is made from."""

    @staticmethod
    def forward(x: Tensor, spacing: float, num_frequencies: int) -> tuple[Tensor, Tensor, Tensor]:
        angle = x * spacing
        first_cosine, first_sine = angle.cos(), angle.sin()
        sums = x.new_empty(2, *x.shape[:-2], x.shape[-1], num_frequencies)
        sums[0, ..., 0], sums[1, ..., 0] = x.shape[-2], 0
        cosine, sine = first_cosine, first_sine
        for number in range(1, num_frequencies):
            sums[0, ..., number], sums[1, ..., number] = cosine.sum(-2), sine.sum(-2)
            if number + 1 < num_frequencies:
                cosine, sine = _rotated(cosine, sine, first_cosine, first_sine)
        return sums, first_cosine, first_sine

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, int], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, ctx.spacing, ctx.num_frequencies = inputs
        _, first_cosine, first_sine = output
        ctx.mark_non_differentiable(first_cosine, first_sine)
        ctx.save_for_backward(first_cosine, first_sine)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, None, None]:
        """d/dx is the sum over t of t (b cos(t x) - a sin(t x)): the real part of a polynomial in e^(i spacing x)."""
        first_cosine, first_sine = ctx.saved_tensors
        frequencies = ctx.spacing * torch.arange(ctx.num_frequencies, device=gradient.device, dtype=gradient.dtype)
        of_cosine, of_sine = (gradient * frequencies).movedim(-1, 0).unsqueeze(-2).unbind(1)
        # Horner's rule from the highest frequency down, with coefficients b + i a.
        real, imaginary = of_sine[-1].expand_as(first_cosine), of_cosine[-1].expand_as(first_cosine)
        for number in range(ctx.num_frequencies - 2, -1, -1):
            real, imaginary = _rotated(real, imaginary, first_cosine, first_sine)
            real.add_(of_sine[number])
            imaginary.add_(of_cosine[number])
        return real, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None, None], x: Tensor, spacing: float, num_frequencies: int) -> Any:
        return _WaveSums.apply(x.movedim(in_dims[0], 0), spacing, num_frequencies), (1, 0, 0)


def _rotated(real: Tensor, imaginary: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply two complex numbers given by their parts."""
    # Not addcmul_ in place, which vmap would do one by one.
    return (
        torch.addcmul(real * cosine, imaginary, sine, value=-1),
        torch.addcmul(imaginary * cosine, real, sine),
    )
