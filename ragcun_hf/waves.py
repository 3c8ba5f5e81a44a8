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
    """(..., N, K) to (2, ..., K, T), and the first wave e^(i spacing x), which the gradient is made from."""

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
        """With gradients a of cosines, b of sines: d/dx is the real part of the sum of t (b + i a) e^(i t x)."""
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
