"""Measures of isotropy, of how evenly vectors fill their space, as an `evaluate` metric.

Load it from its folder: `evaluate.load("<folder of ragcun_hf>/evaluation/metrics/isotropy")`. Each row is a vector,
so vectors can be added in batches and from several processes.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np

from .measures import alignment, isotropy_report, partition_score, rank_me, sigreg, uniformity

_CITATION = """\
@inproceedings{rudman2022isoscore,
  title={IsoScore: Measuring the Uniformity of Embedding Space Utilization},
  author={Rudman, William and Gillman, Nate and Rayne, Taylor and Eickhoff, Carsten},
  booktitle={Findings of ACL},
  year={2022},
}
"""

_DESCRIPTION = """\
Measures of isotropy of embeddings: effective rank and RankMe, IsoScore, average cosine of random pairs, mean
standard deviation, partition score, uniformity, the SIGReg statistic and, for pairs, alignment. The docstrings of
measures.py, in the same folder, explain the meaning, range and paper of each.
"""

_INPUTS = """
Args:
    predictions: Vectors, one per row, all of one width; not normalized, if their scale should count.
    partners: The partner of each vector (a query's document), for the alignment; optional.
Returns:
    A dictionary with the keys effective_rank, rank_me, iso_score, mean_cosine, embedding_std, partition_score,
    uniformity, sigreg_statistic and, with partners, alignment.
Examples:
    metric = evaluate.load("<folder of ragcun_hf>/evaluation/metrics/isotropy")
    metric.compute(predictions=[[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])["iso_score"]  # 1.0
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class Isotropy(evaluate.Metric):
    """Measures of isotropy."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.List(datasets.Value("float32"))}),
        )

    def _compute(self, predictions: list[list[float]], partners: list[list[float]] | None = None) -> dict[str, float]:
        vectors = _array(predictions)
        measures = {
            **isotropy_report(vectors),
            "rank_me": rank_me(vectors),
            "partition_score": partition_score(vectors),
            "uniformity": uniformity(vectors),
            "sigreg_statistic": sigreg(vectors),
        }
        return measures if partners is None else {**measures, "alignment": alignment(vectors, _array(partners))}


def _array(rows: list[list[float]]) -> np.ndarray[Any, Any]:
    widths = {len(row) for row in rows}
    if len(widths) > 1:
        raise ValueError(f"expected vectors of one width, got {sorted(widths)}: give every row as many numbers")
    return np.asarray(rows, dtype=np.float32)
