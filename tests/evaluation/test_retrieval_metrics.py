"""The official figures: equal to values worked by hand, and as an `evaluate` metric that needs nothing else."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ragcun_hf.evaluation.metrics.retrieval import trec_scores
from ragcun_hf.evaluation.metrics.retrieval.trec_scores import METRICS, average_scores, score_queries


def _ranking(*documents):
    return {document: float(-rank) for rank, document in enumerate(documents)}


def test_graded_ndcg_equals_the_hand_worked_value():
    # Ranking b (gain 1), x (unjudged), a (gain 3); c (gain 2) is not found.
    scores = score_queries({"q": _ranking("b", "x", "a")}, {"q": {"a": 3, "b": 1, "c": 2, "n": 0}})
    gained = 1 / math.log2(2) + 3 / math.log2(4)
    ideal = 3 / math.log2(2) + 2 / math.log2(3) + 1 / math.log2(4)
    assert scores["q"]["ndcg@10"] == pytest.approx(gained / ideal, abs=1e-12)


def test_map_and_recall_equal_the_hand_worked_values():
    scores = score_queries({"q": _ranking("a", "x", "b", "y")}, {"q": {"a": 1, "b": 2, "c": 1}})
    assert scores["q"]["map@100"] == pytest.approx((1 / 1 + 2 / 3) / 3, abs=1e-12)
    assert scores["q"]["recall@10"] == pytest.approx(2 / 3, abs=1e-12)
    assert set(scores["q"]) == set(METRICS)


@pytest.mark.parametrize(("rank", "expected"), [(1, 1.0), (10, 0.1), (11, 0.0)])
def test_mrr_counts_the_first_ten_ranks_only(rank, expected):
    documents = [f"d{place:02d}" for place in range(1, 31)]
    scores = score_queries({"q": _ranking(*documents)}, {"q": {documents[rank - 1]: 1, documents[29]: 1}})
    assert scores["q"]["mrr@10"] == expected


def test_metrics_are_cut_at_their_depth():
    documents = [f"d{place:03d}" for place in range(1, 121)]
    scores = score_queries({"q": _ranking(*documents)}, {"q": {"d011": 1, "d101": 1}})["q"]
    assert scores["ndcg@10"] == scores["recall@10"] == 0
    assert scores["recall@100"] == 0.5
    assert scores["map@100"] == pytest.approx(1 / 11 / 2, abs=1e-12)


def test_a_judged_query_without_a_ranking_counts_as_zero():
    qrels = {"found": {"a": 1}, "empty": {"a": 1}, "absent": {"a": 1}}
    scores = score_queries({"found": _ranking("a"), "empty": {}}, qrels)
    assert list(scores) == ["found", "empty", "absent"]
    assert set(scores["absent"].values()) == set(scores["empty"].values()) == {0.0}
    assert average_scores(scores)["ndcg@10"] == pytest.approx(1 / 3)


def test_a_run_without_any_ranking_is_all_zero():
    assert average_scores(score_queries({}, {"q": {"a": 1}}))["ndcg@10"] == 0.0


def test_queries_without_relevant_documents_score_zero_and_without_judgements_are_left_out():
    qrels = {"none relevant": {"a": 0}, "none judged": {}}
    scores = score_queries({"none relevant": _ranking("a"), "none judged": _ranking("a"), "other": {}}, qrels)
    assert list(scores) == ["none relevant"]
    assert set(scores["none relevant"].values()) == {0.0}


def test_unicode_ids_are_matched():
    scores = score_queries({"q\u00e9": _ranking("文書", "\U0001f600")}, {"q\u00e9": {"\U0001f600": 1}})
    assert scores["q\u00e9"]["mrr@10"] == 0.5


def test_equal_scores_are_ordered_by_falling_id_as_in_trec_eval():
    assert score_queries({"q": {"a": 1.0, "b": 1.0}}, {"q": {"a": 1}})["q"]["mrr@10"] == 0.5


def test_input_is_not_changed():
    run, qrels = {"q": {"q": 1.0, "a": 0.5}, "r": {}}, {"q": {"a": 1}, "r": {"a": 1}, "s": {}}
    before = copy.deepcopy((run, qrels))
    score_queries(run, qrels)
    assert (run, qrels) == before


def test_scores_that_are_not_numbers_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        score_queries({"q": {"a": math.nan}}, {"q": {"a": 1}})


def test_mean_of_no_query_is_refused():
    with pytest.raises(ValueError, match="judged query"):
        average_scores({})


_LOAD_METRIC = """
import json, sys
sys.modules["ragcun_hf"] = None  # the copy that evaluate makes must stand alone
import evaluate
metric = evaluate.load(sys.argv[1])
predictions, references = json.load(sys.stdin)
at_once = metric.compute(predictions=predictions, references=references)
for prediction, reference in zip(predictions, references):
    metric.add(prediction=prediction, reference=reference)
print(json.dumps([at_once, metric.compute()]))
"""


def _rows(values_by_query, name, queries):
    """Turn query -> document -> value into the metric's rows, one per query, also without a ranking."""
    found = {query: values_by_query.get(query, {}) for query in queries}
    return [{"query": key, "documents": list(row), name: list(row.values())} for key, row in found.items()]


@pytest.mark.slow
def test_evaluate_loads_the_metric_offline_and_gives_the_same_figures(tmp_path):
    run = {"q": _ranking("a", "b"), "\u00e9": {"文": 3.25}}
    qrels = {"absent": {"a": 1}, "q": {"b": 2, "a": 1}, "\u00e9": {"文": 1}}
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "m"),
    }
    finished = subprocess.run(
        [sys.executable, "-c", _LOAD_METRIC, str(Path(trec_scores.__file__).parent)],
        input=json.dumps([_rows(run, "scores", qrels), _rows(qrels, "judgements", qrels)]),
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    expected = average_scores(score_queries(run, qrels))
    assert json.loads(finished.stdout.splitlines()[-1]) == [expected, expected]
    assert 0 < expected["ndcg@10"] < 1
