"""Runs: identical ids, cut-offs, and TREC files."""

import numpy as np
import pytest

from ragcun_hf.errors import UserError
from ragcun_hf.evaluation.ranking import build_run, check_trec_ids, write_trec_run
from ragcun_hf.search.exact import SearchResult


def _found(scores, rows):
    return SearchResult(np.array(scores, dtype=np.float32), np.array(rows, dtype=np.int64))


def test_the_document_with_the_querys_id_is_dropped_before_the_cut():
    found = _found([[0.9, 0.8, 0.7], [0.9, 0.8, 0.7]], [[0, 1, 2], [1, 2, 0]])
    run = build_run(["a", "other"], ["a", "b", "c"], found, k=2)
    assert {query: list(ranking) for query, ranking in run.items()} == {"a": ["b", "c"], "other": ["b", "c"]}


def test_identical_ids_are_kept_on_request():
    run = build_run(["a"], ["a", "b"], _found([[0.9, 0.8]], [[0, 1]]), drop_identical_ids=False, k=1)
    assert list(run["a"]) == ["a"]


def test_fewer_documents_than_k_are_all_kept():
    run = build_run(["q"], ["a", "b"], _found([[0.9, 0.8]], [[1, 0]]), k=100)
    assert list(run["q"].items()) == [("b", pytest.approx(0.9)), ("a", pytest.approx(0.8))]


def test_a_corpus_of_only_the_query_gives_an_empty_ranking():
    assert build_run(["a"], ["a"], _found([[1.0]], [[0]]), k=10) == {"a": {}}


def test_a_search_too_short_for_k_is_refused():
    with pytest.raises(ValueError, match="search for k"):
        build_run(["q"], ["a", "b", "c"], _found([[0.9, 0.8]], [[0, 1]]), k=2)


@pytest.mark.parametrize(
    ("query_ids", "document_ids"), [(["q", "q"], ["a", "b"]), (["q", "r"], ["a", "a"]), (["q"], ["a", "b"])]
)
def test_repeated_or_missing_ids_are_refused(query_ids, document_ids):
    with pytest.raises(ValueError, match="expected"):
        build_run(query_ids, document_ids, _found([[0.9, 0.8]] * 2, [[0, 1]] * 2))


def test_every_score_can_be_read_back_exactly_from_a_run_file(tmp_path):
    scores = np.random.default_rng(0).standard_normal((3, 20)).astype(np.float32)
    rows = np.argsort(-scores, axis=1)
    found = _found(np.take_along_axis(scores, rows, axis=1), rows)
    run = build_run(["q1", "é\u00a0文", "q3"], [f"文書{row}" for row in range(20)], found, k=20)
    write_trec_run(tmp_path / "run.trec", run, "base")
    lines = [line.split(" ") for line in (tmp_path / "run.trec").read_text(encoding="utf-8").splitlines()]
    read = {query: {words[2]: float(words[4]) for words in lines if words[0] == query} for query in run}
    assert read == run
    assert {words[1] for words in lines} == {"Q0"}
    assert {words[5] for words in lines} == {"base"}


def test_run_lines_are_ordered_by_score_and_then_document_id(tmp_path):
    write_trec_run(tmp_path / "run.trec", {"q2": {"a": 0.5}, "q1": {"b": 1.0, "c": 2.0, "a": 1.0}}, "tag")
    assert (tmp_path / "run.trec").read_text(encoding="utf-8") == (
        "q1 Q0 c 1 2.0 tag\nq1 Q0 a 2 1.0 tag\nq1 Q0 b 3 1.0 tag\nq2 Q0 a 1 0.5 tag\n"
    )


def test_run_bytes_do_not_depend_on_insertion_order_and_leave_no_other_file(tmp_path):
    write_trec_run(tmp_path / "one", {"a": {"x": 1.0, "y": 1.0}, "b": {"x": 2.0}}, "t")
    write_trec_run(tmp_path / "two", {"b": {"x": 2.0}, "a": {"y": 1.0, "x": 1.0}}, "t")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize(
    ("run", "tag"),
    [({"q 1": {"a": 1.0}}, "t"), ({"q": {"a\tb": 1.0}}, "t"), ({"q": {"": 1.0}}, "t"), ({"q": {"a": 1.0}}, "my tag"),
     ({"q": {"a": float("nan")}}, "t")],
)  # fmt: skip
def test_content_that_a_run_file_cannot_hold_is_refused_and_nothing_is_written(tmp_path, run, tag):
    with pytest.raises(UserError):
        write_trec_run(tmp_path / "run", run, tag)
    assert list(tmp_path.iterdir()) == []


def test_ids_that_a_run_file_cannot_hold_are_found_in_advance():
    check_trec_ids(["q1", "é\u00a0文"], "query id")
    for bad in ("a b", "a\t", ""):
        with pytest.raises(UserError, match="expected a document id of toy without spaces"):
            check_trec_ids(["good", bad], "document id of toy")
