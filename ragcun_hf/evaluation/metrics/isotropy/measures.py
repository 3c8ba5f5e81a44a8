"""Measures of how evenly vectors, the rows of one matrix, fill their space.

A collapsed or anisotropic space uses few of its directions; a standard Gaussian uses all directions equally. This file
is copied together with `isotropy.py` by `evaluate.load`, so it imports nothing from the package.

Shape letters used in this file: N = vectors, B = some of them, D = vector width, K = random directions.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

Vectors: TypeAlias = "np.ndarray[Any, Any] | Tensor"

PAIR_BLOCK_ROWS = 1_024  # rows that are compared with all others at once
_NUM_DIRECTIONS, _NUM_KNOTS, _LAST_KNOT = 256, 17, 3.0  # as `sigreg_statistic` of the losses


def covariance_eigenvalues(embeddings: Vectors) -> np.ndarray[Any, Any]:
    """Compute the variances of vectors (N, D), N >= 1, along the principal directions: (D,) float64, falling, >= 0.

    They are in squared units of the embeddings, all 1 for N(0, I). The covariance divides by N.

    >>> covariance_eigenvalues(np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])).tolist()
    [2.0, 0.5]
    """
    x_ND = _matrix(embeddings)
    centered_ND = x_ND - x_ND.mean(dim=0)
    # Fewer vectors than dimensions: their inner products have the same eigenvalues, without the zeros.
    is_wide = x_ND.shape[0] < x_ND.shape[1]
    products = centered_ND @ centered_ND.T if is_wide else centered_ND.T @ centered_ND
    # A processor is faster than a card with matrices of this size.
    eigenvalues = torch.linalg.eigvalsh(products.cpu() / len(x_ND)).flip(0).clamp_min(0)
    return nn.functional.pad(eigenvalues, (0, x_ND.shape[1] - len(eigenvalues))).numpy()


def effective_rank(embeddings: Vectors) -> float:
    """Count the directions that vectors (N, D) use: the exponential of the spectrum's entropy.

    It lies between 1 (all on one line) and min(N - 1, D) (all directions equal); it is 0 if all rows are equal.

    Source:
        Roy and Vetterli, "The effective rank", EUSIPCO 2007, on the eigenvalues of the covariance instead of the
        singular values of the uncentered matrix, so that a common offset does not count as a direction.

    >>> round(effective_rank(np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])), 6)
    2.0
    """
    eigenvalues_D = _spectrum(embeddings)
    if not eigenvalues_D.any():
        return 0.0
    share_D = eigenvalues_D / eigenvalues_D.sum()
    share_D = share_D[share_D > 0]
    return float(np.exp(-(share_D * np.log(share_D)).sum()))


def iso_score(embeddings: Vectors) -> float:
    """Measure how equal the variances of vectors (N, D), D >= 2, are along the principal directions.

    0: all variance lies in one direction, or there is none. 1: all directions have the same. It is roughly the share
    of dimensions used. Offset and scale do not matter.

    Source:
        Rudman, Gillman, Rayne and Eickhoff, "IsoScore", Findings of ACL 2022, arXiv:2108.07344.

    >>> iso_score(np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
    1.0
    """
    eigenvalues_D = _spectrum(embeddings)
    width = len(eigenvalues_D)
    if width < 2:
        raise ValueError(f"expected vectors of at least two dimensions, got {width}: isotropy compares directions")
    if not eigenvalues_D.any():
        return 0.0
    spectrum_D = math.sqrt(width) * eigenvalues_D / np.linalg.norm(eigenvalues_D)
    defect = np.linalg.norm(spectrum_D - 1) / math.sqrt(2 * (width - math.sqrt(width)))
    fraction = (width - defect**2 * (width - math.sqrt(width))) ** 2 / width**2
    return float((width * fraction - 1) / (width - 1))


def mean_cosine(embeddings: Vectors) -> float:
    """Average the cosine similarity over all pairs of different rows (N, D), N >= 2, exactly.

    The sum over all pairs is the squared length of the sum of the unit vectors, so no pair is formed. The mean lies
    in [-1 / (N - 1), 1]: near 0 for isotropic vectors, 1 if all have one direction. A zero row has cosine 0.

    >>> mean_cosine(np.array([[1.0, 0.0], [0.0, 2.0]]))
    0.0
    """
    x_ND = _matrix(embeddings)
    num_pairs = _num_pairs(x_ND)
    norm_N1 = torch.linalg.vector_norm(x_ND, dim=1, keepdim=True)
    total_D = (x_ND / torch.where(norm_N1 > 0, norm_N1, 1.0)).sum(dim=0)
    return float((total_D.square().sum() - torch.count_nonzero(norm_N1)) / num_pairs)


def embedding_std(embeddings: Vectors) -> float:
    """Average the standard deviation of vectors (N, D) over dimensions, in their unit (dividing by N).

    It is 1 for N(0, I), 0 after a collapse to one point, and at most 1 / sqrt(D) for vectors of length 1.

    >>> embedding_std(np.array([[1.0, 0.0], [-1.0, 0.0]]))
    0.5
    """
    x_ND = _matrix(embeddings)
    return float((x_ND - x_ND.mean(dim=0)).square().mean(dim=0).sqrt().mean())


def isotropy_report(embeddings: Vectors) -> dict[str, float]:
    """Compute `effective_rank`, `mean_cosine`, `embedding_std` and `iso_score` of vectors (N, D), N and D >= 2.

    Do not normalize the vectors if their scale should count.

    >>> report = isotropy_report(np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
    >>> {name: round(value, 3) for name, value in report.items()}
    {'effective_rank': 2.0, 'mean_cosine': -0.333, 'embedding_std': 0.707, 'iso_score': 1.0}
    """
    x_ND = _matrix(embeddings)
    return {measure.__name__: measure(x_ND) for measure in (effective_rank, mean_cosine, embedding_std, iso_score)}


def _spectrum(embeddings: Vectors) -> np.ndarray[Any, Any]:
    """Return the eigenvalues of the covariance (D,), all 0 if they are only rounding errors of equal rows."""
    x_ND = _matrix(embeddings)
    eigenvalues_D = covariance_eigenvalues(x_ND)
    is_collapsed = eigenvalues_D.sum() <= 1e-24 * float(x_ND.mean(dim=0).square().sum())
    return np.zeros_like(eigenvalues_D) if is_collapsed else eigenvalues_D


# The measures below follow their papers exactly, to compare with published figures.


def rank_me(embeddings: Any) -> float:
    """Count the directions that vectors (N, D) use, by the singular values of the uncentered matrix.

    It lies between 1 and min(N, D). A common offset counts as a direction; `effective_rank` leaves it out.

    Source:
        Garrido et al., "RankMe", ICML 2023, arXiv:2210.02885, equation 1; without its epsilon.

    >>> round(rank_me([[2.0, 0.0], [0.0, 2.0]]), 6)
    2.0
    """
    singular_values = torch.linalg.svdvals(_matrix(embeddings))
    shares = singular_values / singular_values.sum()
    shares = shares[shares > 0]
    return float((-(shares * shares.log()).sum()).exp())


def partition_score(embeddings: Any) -> float:
    """Compare the partition function Z(c) = sum of exp(c . x) over directions c, for vectors (N, D): min Z / max Z.

    It lies in (0, 1], and is 1 if Z is the same for all directions. These are the eigenvectors of X^T X with both
    signs, because an eigenvector has no sign. Scale matters: longer vectors give smaller scores.

    Source:
        Mu and Viswanath, "All-but-the-Top", ICLR 2018, arXiv:1702.01417, section 2.

    >>> round(partition_score([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]), 6)
    1.0
    """
    x_ND = _matrix(embeddings)
    _, vectors_DD = torch.linalg.eigh(x_ND.T @ x_ND)
    products_ND = x_ND @ vectors_DD
    logs = torch.cat([products_ND.logsumexp(dim=0), (-products_ND).logsumexp(dim=0)])
    return float((logs.min() - logs.max()).exp())


def alignment(embeddings: Any, positives: Any) -> float:
    """Average the squared distance between the unit vectors of pairs, the rows of two matrices (N, D).

    It lies in [0, 4], and is 0 if both vectors of every pair have the same direction.

    Source:
        Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
        Hypersphere", ICML 2020, arXiv:2005.10242, with exponent 2.

    >>> alignment([[1.0, 0.0]], [[0.0, 3.0]])
    2.0
    """
    x_ND, y_ND = _unit(embeddings), _unit(positives)
    if x_ND.shape != y_ND.shape:
        raise ValueError(f"expected one partner per vector, got {tuple(x_ND.shape)} and {tuple(y_ND.shape)}")
    return float((x_ND - y_ND).square().sum(dim=1).mean())


def uniformity(embeddings: Any) -> float:
    """Compute the log of the mean of exp(-2 |x - y|^2) over all pairs of different unit vectors (N, D), N >= 2.

    It lies in [-8, 0]: smaller is more uniform, 0 if all have one direction.

    Source:
        As for `alignment`, with t = 2.

    >>> round(uniformity([[1.0, 0.0], [-1.0, 0.0]]), 6)
    -8.0
    """
    x_ND = _unit(embeddings)
    num_pairs = _num_pairs(x_ND)
    # |x - y|^2 = 2 - 2 x . y; the pair of a row with itself gives exp(0), which is subtracted at the end.
    blocks = x_ND.split(PAIR_BLOCK_ROWS)
    total = sum(float((4 * (x_BD @ x_ND.T) - 4).exp().sum()) for x_BD in blocks)
    return math.log(max(total - len(x_ND), 1e-300) / num_pairs)


def sigreg(embeddings: Any, *, seed: int = 0) -> float:
    """Test vectors (N, D), not normalized, against N(0, I): the Epps-Pulley statistic over 256 random directions.

    It is about 1.05 for samples of N(0, I), and up to 0.4 N after a collapse.

    Source:
        Balestriero and LeCun, "LeJEPA", 2025, arXiv:2511.08544: 17 knots on [0, 3], trapezoid rule.
    """
    x_ND = _matrix(embeddings)
    directions_DK = torch.randn(x_ND.shape[1], _NUM_DIRECTIONS, generator=torch.Generator().manual_seed(seed))
    projected_NK = x_ND @ (directions_DK / directions_DK.norm(dim=0)).double().to(x_ND.device)
    knots = torch.linspace(0, _LAST_KNOT, _NUM_KNOTS, dtype=torch.float64, device=x_ND.device)
    gaussian = (-knots.square() / 2).exp()
    errors = [
        ((t * projected_NK).cos().mean(dim=0) - g).square() + (t * projected_NK).sin().mean(dim=0).square()
        for t, g in zip(knots, gaussian, strict=True)
    ]
    # The integrand is even: twice the integral over [0, 3].
    integrals_K = 2 * torch.trapezoid(torch.stack(errors, dim=1) * gaussian, knots, dim=1)
    return float(len(x_ND) * integrals_K.mean())


def _matrix(embeddings: Any) -> Tensor:
    # NumPy cannot read a tensor in bfloat16, and torch warns about read-only arrays: copy them.
    is_tensor = isinstance(embeddings, Tensor)
    x_ND = embeddings.detach() if is_tensor else torch.from_numpy(np.array(embeddings, dtype=np.float64))
    if x_ND.device.type != "cuda":  # not every other device has float64
        x_ND = x_ND.cpu()
    if x_ND.ndim != 2 or len(x_ND) < 1:
        raise ValueError(f"expected embeddings (N, D) with N >= 1, got {tuple(x_ND.shape)}: pass one row per vector")
    if not bool(x_ND.isfinite().all()):
        raise ValueError("expected finite embeddings, got NaN or infinity: check the model and its precision")
    return x_ND.double()


def _num_pairs(x_ND: Tensor) -> int:
    if len(x_ND) < 2:
        raise ValueError(f"expected at least two vectors to form pairs, got {len(x_ND)}: pass more")
    return len(x_ND) * (len(x_ND) - 1)


def _unit(embeddings: Any) -> Tensor:
    x_ND = _matrix(embeddings)
    norms_N1 = x_ND.norm(dim=1, keepdim=True)
    if bool((norms_N1 == 0).any()):
        raise ValueError("expected vectors with a direction, got a zero row: leave it out")
    return x_ND / norms_N1
