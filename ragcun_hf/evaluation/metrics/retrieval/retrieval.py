"""NDCG@10, MAP@100, recall and MRR@10 as an `evaluate` metric.

Load it from its folder: `evaluate.load("<folder of ragcun_hf>/evaluation/metrics/retrieval")`. Each row
is a query, so rankings can be added in batches and from several processes.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from .trec_scores import average_scores, score_queries

_CITATION = """\
@inproceedings{VanGysel2018pytreceval,
  title={Pytrec\\_eval: An Extremely Fast Python Interface to trec\\_eval},
  author={Van Gysel, Christophe and de Rijke, Maarten},
  publisher={ACM},
  booktitle={SIGIR},
  year={2018},
}
"""

_DESCRIPTION = """\
The official retrieval figures of trec_eval, averaged over the judged queries: NDCG@10 with graded gains,
MAP@100, recall@10, recall@100 and MRR@10. A judged query without a ranking counts as 0.
"""

_INPUTS = """
Args:
    predictions: One row per query: {"query": id, "documents": [ids], "scores": [numbers, higher is better]}.
    references: One row per query: {"query": id, "documents": [ids], "judgements": [integers, 0 = not relevant]}.
        Rows are matched by the query's id, not by position.
Returns:
    A dictionary with the keys ndcg@10, map@100, recall@10, recall@100 and mrr@10, each in [0, 1].
Examples:
    metric = evaluate.load("<folder of ragcun_hf>/evaluation/metrics/retrieval")
    metric.compute(
        predictions=[{"query": "q", "documents": ["a", "b"], "scores": [0.9, 0.8]}],
        references=[{"query": "q", "documents": ["b"], "judgements": [1]}],
    )["mrr@10"]  # 0.5
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class Retrieval(evaluate.Metric):
    """The official retrieval figures."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": {
                        "query": datasets.Value("string"),
                        "documents": datasets.List(datasets.Value("string")),
                        "scores": datasets.List(datasets.Value("float64")),
                    },
                    "references": {
                        "query": datasets.Value("string"),
                        "documents": datasets.List(datasets.Value("string")),
                        "judgements": datasets.List(datasets.Value("int64")),
                    },
                }
            ),
            reference_urls=["https://github.com/cvangysel/pytrec_eval"],
        )

    def _compute(self, predictions: list[dict[str, Any]], references: list[dict[str, Any]]) -> dict[str, float]:
        run = _by_query(predictions, "predictions", "scores")
        qrels = _by_query(references, "references", "judgements")
        return average_scores(score_queries(run, qrels))


def _by_query(rows: list[dict[str, Any]], side: str, values: str) -> dict[str, dict[str, Any]]:
    """Turn rows into query -> document -> value."""
    by_query: dict[str, dict[str, Any]] = {}
    for row in rows:
        if len(row["documents"]) != len(row[values]):
            raise ValueError(
                f"{side}: expected as many {values} as documents for query {row['query']!r}, got {len(row[values])} "
                f"for {len(row['documents'])}: give one per document"
            )
        if row["query"] in by_query:
            raise ValueError(f"{side}: expected one row per query, got several for {row['query']!r}: merge them")
        by_query[row["query"]] = dict(zip(row["documents"], row[values], strict=True))
    return by_query
