"""Measures of isotropy as their papers define them, for comparison with other people's figures.

Shape letters used in this file: N = vectors, B = vectors in a block, D = vector width, K = random directions.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

_BLOCK_ROWS = 1_024
_NUM_DIRECTIONS, _NUM_KNOTS, _LAST_KNOT = 256, 17, 3.0  # as in training, see `sigreg_statistic` of the losses


def rank_me(embeddings: Any) -> float:
    """Count the directions that vectors use, by the singular values of the matrix as it is.

    Args:
        embeddings: Shape (N, D), N >= 1, not all zero.

    Returns:
        Between 1 and min(N, D). A common offset counts as a direction; `effective_rank` leaves it out.

    Source:
        Garrido et al., "RankMe", ICML 2023, arXiv:2210.02885, equation 1; without its epsilon.

    Example:
        >>> round(rank_me([[2.0, 0.0], [0.0, 2.0]]), 6)
        2.0
    """
    singular_values = torch.linalg.svdvals(_matrix(embeddings))
    shares = singular_values / singular_values.sum()
    shares = shares[shares > 0]
    return float((-(shares * shares.log()).sum()).exp())


def partition_score(embeddings: Any) -> float:
    """Compare the partition function Z(c) = sum of exp(c . x) over directions c; 1 where it is the same for all.

    Directions are the eigenvectors of X^T X, each with both signs, as an eigenvector has none.

    Args:
        embeddings: Shape (N, D), N >= 1, at the scale that matters: longer vectors give smaller scores.

    Returns:
        min Z / max Z, in (0, 1].

    Source:
        Mu and Viswanath, "All-but-the-Top", ICLR 2018, arXiv:1702.01417, section 2.

    Example:
        >>> round(partition_score([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]), 6)
        1.0
    """
    x_ND = _matrix(embeddings)
    _, vectors_DD = torch.linalg.eigh(x_ND.T @ x_ND)
    products_ND = x_ND @ vectors_DD
    logs = torch.cat([products_ND.logsumexp(dim=0), (-products_ND).logsumexp(dim=0)])
    return float((logs.min() - logs.max()).exp())


def alignment(embeddings: Any, positives: Any) -> float:
    """Average the squared distance between the unit vectors of pairs that belong together.

    Args:
        embeddings: Shape (N, D), no zero row.
        positives: Shape (N, D), the partner of each row.

    Returns:
        In [0, 4]; 0 where all pairs point one way.

    Raises:
        ValueError: If the shapes differ.

    Source:
        Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
        Hypersphere", ICML 2020, arXiv:2005.10242, with exponent 2.

    Example:
        >>> alignment([[1.0, 0.0]], [[0.0, 3.0]])
        2.0
    """
    x_ND, y_ND = _unit(embeddings), _unit(positives)
    if x_ND.shape != y_ND.shape:
        raise ValueError(f"expected one partner per vector, got {tuple(x_ND.shape)} and {tuple(y_ND.shape)}")
    return float((x_ND - y_ND).square().sum(dim=1).mean())


def uniformity(embeddings: Any) -> float:
    """Average how near different unit vectors are: log of the mean of exp(-2 |x - y|^2) over all pairs.

    Args:
        embeddings: Shape (N, D), N >= 2, no zero row.

    Returns:
        In [-8, 0]; smaller is more uniform, 0 where all point one way.

    Raises:
        ValueError: If there are fewer than two rows.

    Source:
        As for `alignment`, with t = 2.

    Example:
        >>> round(uniformity([[1.0, 0.0], [-1.0, 0.0]]), 6)
        -8.0
    """
    x_ND = _unit(embeddings)
    num_rows = len(x_ND)
    if num_rows < 2:
        raise ValueError(f"expected at least two vectors to form pairs, got {num_rows}: pass more")
    # |x - y|^2 = 2 - 2 x . y; the pairs of a row with itself give exp(0) and are taken off at the end.
    blocks = x_ND.split(_BLOCK_ROWS)
    total = sum(float((4 * (x_BD @ x_ND.T) - 4).exp().sum()) for x_BD in blocks)
    return math.log(max(total - num_rows, 1e-300) / (num_rows * (num_rows - 1)))


def sigreg(embeddings: Any, *, seed: int = 0) -> float:
    """Test against N(0, I): the Epps-Pulley statistic, averaged over 256 random directions.

    Args:
        embeddings: Shape (N, D), N >= 2, not normalised.
        seed: Chooses the directions.

    Returns:
        About 1.05 for samples of N(0, I), up to 0.4 N after a collapse.

    Source:
        Balestriero and LeCun, "LeJEPA", 2025, arXiv:2511.08544: 17 knots on [0, 3], trapezoid rule.
    """
    x_ND = _matrix(embeddings)
    directions_DK = torch.randn(x_ND.shape[1], _NUM_DIRECTIONS, generator=torch.Generator().manual_seed(seed))
    projected_NK = x_ND @ (directions_DK / directions_DK.norm(dim=0)).double()
    knots = torch.linspace(0, _LAST_KNOT, _NUM_KNOTS, dtype=torch.float64)
    gaussian = (-knots.square() / 2).exp()
    errors = [
        ((t * projected_NK).cos().mean(dim=0) - g).square() + (t * projected_NK).sin().mean(dim=0).square()
        for t, g in zip(knots, gaussian, strict=True)
    ]
    # The integrand is even: twice the integral over [0, 3].
    integrals_K = 2 * torch.trapezoid(torch.stack(errors, dim=1) * gaussian, knots, dim=1)
    return float(len(x_ND) * integrals_K.mean())


def _matrix(embeddings: Any) -> Tensor:
    x_ND = torch.from_numpy(np.asarray(embeddings, dtype=np.float64))
    if x_ND.ndim != 2 or len(x_ND) < 1:
        raise ValueError(f"expected embeddings (N, D) with N >= 1, got {tuple(x_ND.shape)}: pass one row per vector")
    if not bool(x_ND.isfinite().all()):
        raise ValueError("expected finite embeddings, got NaN or infinity: check the model and its precision")
    return x_ND


def _unit(embeddings: Any) -> Tensor:
    x_ND = _matrix(embeddings)
    norms_N1 = x_ND.norm(dim=1, keepdim=True)
    if bool((norms_N1 == 0).any()):
        raise ValueError("expected vectors with a direction, got a zero row: leave it out")
    return x_ND / norms_N1
