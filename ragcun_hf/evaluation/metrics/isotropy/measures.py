"""How evenly vectors fill their space: measures on the rows of one matrix.

A collapsed or anisotropic space uses few of its directions; a standard Gaussian uses all alike.

Shape letters used in this file: N = vectors, B = vectors in a block, D = vector width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Vectors: TypeAlias = "np.ndarray[Any, Any] | Tensor"

_BLOCK_ROWS = 8_192  # rows in float64 at once: 50 MB at width 768


def covariance_eigenvalues(embeddings: Vectors) -> np.ndarray[Any, Any]:
    """Compute the variances along the principal directions.

    Args:
        embeddings: Shape (N, D), N >= 1, any real dtype; computed in float64 in blocks of rows.

    Returns:
        Shape (D,) float64, falling, >= 0, in squared units of the embeddings; all 1 for N(0, I).
        The covariance divides by N.

    Raises:
        ValueError: If the shape is not (N, D) with N >= 1, or a value is not finite.

    Example:
        >>> covariance_eigenvalues(np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])).tolist()
        [2.0, 0.5]
    """
    mean_D = _mean(embeddings)
    covariance_DD = torch.zeros(len(mean_D), len(mean_D), dtype=torch.float64)
    for x_BD in _float64_blocks(embeddings):
        centred_BD = x_BD - mean_D
        covariance_DD += centred_BD.T @ centred_BD
    eigenvalues_D = torch.linalg.eigvalsh(covariance_DD / len(embeddings)).flip(0)
    return eigenvalues_D.clamp_min(0).numpy()


def effective_rank(embeddings: Vectors) -> float:
    """Count the directions that vectors really use: the exponent of the spectrum's entropy.

    Args:
        embeddings: Shape (N, D), N >= 1.

    Returns:
        Between 1 (all on one line) and min(N - 1, D) (all directions alike); 0 if all rows are equal.

    Source:
        Roy and Vetterli, "The effective rank", EUSIPCO 2007; used on embeddings as RankMe (Garrido et
        al., 2023, arXiv:2210.02885). They take singular values of the uncentred matrix; here it is
        the eigenvalues of the covariance, so a common offset does not count as a direction.

    Example:
        >>> round(effective_rank(np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])), 6)
        2.0
    """
    return _effective_rank(covariance_eigenvalues(embeddings), _mean(embeddings))


def mean_cosine(embeddings: Vectors) -> float:
    """Average the cosine similarity over all pairs of different rows, exactly.

    The sum over all pairs is the squared length of the sum of the unit vectors, so no pair is formed.

    Args:
        embeddings: Shape (N, D), N >= 2. A zero row has cosine 0 to every other.

    Returns:
        In [-1 / (N - 1), 1]; near 0 for isotropic vectors, 1 if all point one way.

    Raises:
        ValueError: If there are fewer than two rows, or a value is not finite.

    Example:
        >>> mean_cosine(np.array([[1.0, 0.0], [0.0, 2.0]]))
        0.0
    """
    num_rows = len(embeddings)
    if num_rows < 2:
        raise ValueError(f"expected at least two vectors to form pairs, got {num_rows}: pass more")
    total_D: Tensor | float = 0.0
    own_pairs = 0.0
    for x_BD in _float64_blocks(embeddings):
        norm_B1 = torch.linalg.vector_norm(x_BD, dim=1, keepdim=True)
        total_D = total_D + (x_BD / torch.where(norm_B1 > 0, norm_B1, 1.0)).sum(dim=0)
        own_pairs += float(torch.count_nonzero(norm_B1))
    return float((torch.as_tensor(total_D).square().sum() - own_pairs) / (num_rows * (num_rows - 1)))


def embedding_std(embeddings: Vectors) -> float:
    """Average the standard deviation over dimensions.

    Args:
        embeddings: Shape (N, D), N >= 1.

    Returns:
        >= 0, in the unit of the embeddings (dividing by N): 1 for N(0, I), 0 after a collapse to one
        point, at most 1 / sqrt(D) for vectors of length 1.

    Example:
        >>> embedding_std(np.array([[1.0, 0.0], [-1.0, 0.0]]))
        0.5
    """
    mean_D = _mean(embeddings)
    squares_D = torch.zeros_like(mean_D)
    for x_BD in _float64_blocks(embeddings):
        squares_D += (x_BD - mean_D).square().sum(dim=0)
    return float((squares_D / len(embeddings)).sqrt().mean())


def iso_score(embeddings: Vectors) -> float:
    """Measure how alike the principal variances are, on a scale from 0 to 1.

    Args:
        embeddings: Shape (N, D), N >= 1, D >= 2.

    Returns:
        0 if all variance lies in one direction (or there is none), 1 if all directions have the same;
        roughly the fraction of dimensions used. Offset and scale do not matter.

    Raises:
        ValueError: If D < 2.

    Source:
        Rudman, Gillman, Rayne and Eickhoff, "IsoScore", Findings of ACL 2022, arXiv:2108.07344.

    Example:
        >>> iso_score(np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
        1.0
    """
    return _iso_score(covariance_eigenvalues(embeddings), _mean(embeddings))


def isotropy_report(
    embeddings: Vectors, *, statistic: Callable[[Tensor], Any] | None = None, statistic_name: str = "sigreg"
) -> dict[str, float]:
    """Compute all measures of this module.

    Args:
        embeddings: Shape (N, D), N >= 2, D >= 2, not normalised if the scale is to be judged.
        statistic: Another measure, called with the float32 tensor (N, D) on the CPU, without gradient.
        statistic_name: Its key in the report.

    Returns:
        `effective_rank`, `mean_cosine`, `embedding_std`, `iso_score` and, if given, the statistic.

    Raises:
        ValueError: If there are too few rows or columns, or a value is not finite.

    Example:
        >>> report = isotropy_report(np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
        >>> {name: round(value, 3) for name, value in report.items()}
        {'effective_rank': 2.0, 'mean_cosine': -0.333, 'embedding_std': 0.707, 'iso_score': 1.0}
    """
    eigenvalues_D, mean_D = covariance_eigenvalues(embeddings), _mean(embeddings)
    report = {
        "effective_rank": _effective_rank(eigenvalues_D, mean_D),
        "mean_cosine": mean_cosine(embeddings),
        "embedding_std": embedding_std(embeddings),
        "iso_score": _iso_score(eigenvalues_D, mean_D),
    }
    if statistic is not None:
        with torch.no_grad():
            report[statistic_name] = float(statistic(_as_tensor(embeddings, slice(None)).float()))
    return report


def _as_tensor(embeddings: Vectors, rows: slice) -> Tensor:
    if isinstance(embeddings, Tensor):
        return embeddings[rows].detach().cpu()
    # A copy, because torch warns about read-only memory maps.
    return torch.from_numpy(np.array(embeddings[rows]))


def _float64_blocks(embeddings: Vectors) -> Iterator[Tensor]:
    if embeddings.ndim != 2 or embeddings.shape[0] < 1:
        raise ValueError(f"expected embeddings (N, D) with N >= 1, got {tuple(embeddings.shape)}: pool token states")
    for start in range(0, len(embeddings), _BLOCK_ROWS):
        block = _as_tensor(embeddings, slice(start, start + _BLOCK_ROWS)).double()
        if not bool(torch.isfinite(block).all()):
            raise ValueError("expected finite embeddings, got NaN or infinity: check the model and its precision")
        yield block


def _mean(embeddings: Vectors) -> Tensor:
    total_D = torch.stack([x_BD.sum(dim=0) for x_BD in _float64_blocks(embeddings)]).sum(dim=0)
    return total_D / len(embeddings)


def _is_collapsed(eigenvalues_D: np.ndarray[Any, Any], mean_D: Tensor) -> bool:
    """Tell a spectrum that is only the rounding of equal rows from a real one."""
    return bool(eigenvalues_D.sum() <= 1e-24 * float(mean_D.square().sum()))


def _effective_rank(eigenvalues_D: np.ndarray[Any, Any], mean_D: Tensor) -> float:
    if _is_collapsed(eigenvalues_D, mean_D):
        return 0.0
    share_D = eigenvalues_D / eigenvalues_D.sum()
    share_D = share_D[share_D > 0]
    return float(np.exp(-(share_D * np.log(share_D)).sum()))


def _iso_score(eigenvalues_D: np.ndarray[Any, Any], mean_D: Tensor) -> float:
    width = len(eigenvalues_D)
    if width < 2:
        raise ValueError(f"expected vectors of at least two dimensions, got {width}: isotropy compares directions")
    if _is_collapsed(eigenvalues_D, mean_D):
        return 0.0
    spectrum_D = math.sqrt(width) * eigenvalues_D / np.linalg.norm(eigenvalues_D)
    defect = np.linalg.norm(spectrum_D - 1) / math.sqrt(2 * (width - math.sqrt(width)))
    fraction = (width - defect**2 * (width - math.sqrt(width))) ** 2 / width**2
    return float((width * fraction - 1) / (width - 1))
