"""Evaluation of one data set: from vectors to the entry of the results file."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from ragcun_hf.errors import UserError
from ragcun_hf.evaluation.environment import environment_facts
from ragcun_hf.evaluation.results import mean_over_datasets, write_results
from ragcun_hf.evaluation.retrieval import VectorSystem, evaluate_retrieval, split_queries_by_seen_documents
from ragcun_hf.search.exact import SearchResult


@dataclass
class _Dataset:
    queries: dict
    corpus_ids: list
    qrels: dict
    name: str = "toy"
    split: str = "test"
    corpus_texts: list = field(default_factory=list)


@pytest.fixture
def dataset():
    return _Dataset(
        queries={"q1": "one", "unjudged": "none", "é": "two", "d3": "three"},
        corpus_ids=["d0", "d1", "d2", "d3", "文"],
        qrels={"q1": {"d0": 1}, "é": {"文": 2, "d1": 1}, "d3": {"d2": 1, "not in the corpus": 1}},
    )


@pytest.fixture
def systems():
    """Base: the judged queries point at documents 0, 4 and 2 (the last at 3 too). Projection: the last one misses."""
    documents = np.eye(5, dtype=np.float32)
    base = np.array([[1, 0.5, 0, 0, 0], [0, 0, 0, 1, 0], [0, 0.5, 0, 0, 1], [0, 0, 0.5, 1, 0]], dtype=np.float32)
    projection = base.copy()
    projection[3] = [1, 0, 0, 1, 0]
    return [
        VectorSystem("projection", torch.from_numpy(projection), documents, "cosine"),
        VectorSystem("base", base, documents, "cosine"),
    ]


def test_the_entry_holds_the_hand_worked_figures(dataset, systems):
    entry = evaluate_retrieval(dataset, systems).entry
    assert (entry["num_queries"], entry["num_documents"], entry["num_judgements"]) == (3, 5, 5)
    assert list(entry["systems"]) == ["base", "projection"]
    # q1 and é are perfect; d3 finds one of two relevant documents, first once d3 itself is dropped.
    last = 1 / (1 + 1 / np.log2(3))
    assert entry["systems"]["base"]["ndcg@10"] == pytest.approx((1 + 1 + last) / 3)
    assert entry["systems"]["base"]["mrr@10"] == 1.0
    compared = entry["comparisons"]["projection"]
    assert (compared["metric"], compared["wins"], compared["ties"], compared["losses"]) == ("ndcg@10", 0, 2, 1)
    assert compared["difference"] == pytest.approx(
        entry["systems"]["projection"]["ndcg@10"] - entry["systems"]["base"]["ndcg@10"]
    )


def test_identical_ids_are_dropped_unless_asked_otherwise(dataset, systems):
    assert list(evaluate_retrieval(dataset, systems).runs["base"]["d3"])[0] == "d2"
    kept = evaluate_retrieval(dataset, systems, drop_identical_ids=False)
    assert list(kept.runs["base"]["d3"])[:2] == ["d3", "d2"]
    assert kept.per_query["base"]["d3"]["mrr@10"] == 0.5


def test_a_relevant_document_is_not_dropped_for_its_id(dataset, systems):
    dataset.qrels["d3"]["d3"] = 1
    with pytest.raises(UserError, match=r"got one for query 'd3' .*--keep_identical_ids"):
        evaluate_retrieval(dataset, systems)
    assert evaluate_retrieval(dataset, systems, drop_identical_ids=False).per_query["base"]["d3"]["mrr@10"] == 1.0


@pytest.mark.parametrize("own_judgement", [{"d3": 0}, {"d3": -1}], ids=["judged 0", "judged -1"])
def test_an_irrelevant_document_is_dropped_for_its_id(dataset, systems, own_judgement):
    dataset.qrels["d3"].update(own_judgement)
    assert "d3" not in evaluate_retrieval(dataset, systems).runs["base"]["d3"]


def test_a_relevant_id_that_is_not_in_the_corpus_drops_nothing(dataset, systems):
    dataset.qrels["q1"]["q1"] = 1
    assert list(evaluate_retrieval(dataset, systems).runs["base"]["q1"])[0] == "d0"


def test_queries_without_judgements_are_not_counted(dataset, systems):
    evaluation = evaluate_retrieval(dataset, systems)
    assert set(evaluation.runs["base"]) == set(evaluation.per_query["base"]) == {"q1", "é", "d3"}


def test_each_system_is_searched_with_its_own_similarity(dataset, systems):
    base = replace(systems[1], documents=systems[1].documents * np.array([1, 9, 1, 1, 1])[:, None])
    evaluation = evaluate_retrieval(dataset, [base, replace(base, name="dot", similarity="dot")])
    assert next(iter(evaluation.runs["base"]["q1"])) == "d0"
    assert next(iter(evaluation.runs["dot"]["q1"])) == "d1"


def test_a_system_needs_no_vectors(dataset, systems):
    class Alphabetical:
        """Ranks documents by id for every query."""

        name = "alphabetical"

        def rank(self, dataset, rows, k):
            order = np.argsort(dataset.corpus_ids)[:k]
            scores = -np.arange(len(order), dtype=np.float32)
            return SearchResult(np.tile(scores, (len(rows), 1)), np.tile(order, (len(rows), 1)))

    evaluation = evaluate_retrieval(dataset, [Alphabetical(), *systems])
    assert list(evaluation.runs["alphabetical"]["q1"]) == sorted(dataset.corpus_ids)
    assert list(evaluation.entry["systems"]) == ["base", "alphabetical", "projection"]
    assert evaluation.entry["comparisons"].keys() == {"alphabetical", "projection"}


def test_subsets_split_queries_by_whether_a_relevant_document_was_seen(dataset, systems):
    subsets = evaluate_retrieval(dataset, systems, seen_document_ids={"d1", "d3"}).entry["subsets"]
    assert {name: part["num_queries"] for name, part in subsets.items()} == {
        "seen_documents": 1,
        "unseen_documents": 2,
    }
    assert subsets["seen_documents"]["comparisons"]["projection"]["ties"] == 1
    assert subsets["unseen_documents"]["comparisons"]["projection"]["losses"] == 1


def test_subsets_average_to_the_whole(dataset, systems):
    entry = evaluate_retrieval(dataset, systems, seen_document_ids={"d0"}).entry
    total = sum(part["num_queries"] * part["systems"]["projection"]["map@100"] for part in entry["subsets"].values())
    assert total / entry["num_queries"] == pytest.approx(entry["systems"]["projection"]["map@100"])


def test_an_empty_subset_is_omitted_and_without_seen_documents_there_are_no_subsets(dataset, systems):
    entry = evaluate_retrieval(dataset, systems, seen_document_ids={"d0", "d1", "d2", "d3", "d4"}).entry
    assert set(entry["subsets"]) == {"seen_documents"}
    assert entry["num_seen_queries"] == entry["num_queries"]
    assert "subsets" not in evaluate_retrieval(dataset, systems, seen_document_ids=set()).entry


def test_that_no_document_was_seen_is_not_that_nothing_is_known(dataset, systems):
    assert evaluate_retrieval(dataset, systems, seen_document_ids={"d1", "d3"}).entry["num_seen_queries"] == 1
    assert evaluate_retrieval(dataset, systems, seen_document_ids=set()).entry["num_seen_queries"] == 0
    assert "num_seen_queries" not in evaluate_retrieval(dataset, systems).entry


def test_a_judgement_of_zero_does_not_make_a_document_seen():
    parts = split_queries_by_seen_documents({"q": {"a": 0, "b": 1}, "none": {"a": 0}}, {"a"})
    assert parts == {"seen_documents": [], "unseen_documents": ["q", "none"]}


def test_the_entry_fits_the_results_file(dataset, systems, tmp_path):
    datasets = {"toy": evaluate_retrieval(dataset, systems, seen_document_ids={"d1"}).entry}
    model = {"path": "p", "name": "n", "similarity": "cosine", "base_model": "b", "use_predictor": True}
    results = {
        "schema_version": 1, "created": "now", "command": "c", **environment_facts(), "model": model, "settings": {},
        "datasets": datasets, "mean": mean_over_datasets(datasets), "isotropy": {},
    }  # fmt: skip
    write_results(tmp_path / "results.json", results)


def test_inputs_are_not_changed(dataset, systems):
    before = repr(dataset), repr(systems)
    evaluate_retrieval(dataset, systems, seen_document_ids={"d1"})
    assert (repr(dataset), repr(systems)) == before


def test_vectors_of_another_data_set_are_refused(dataset, systems):
    systems[0] = replace(systems[0], documents=np.eye(5, dtype=np.float32)[:4])
    with pytest.raises(UserError, match="system 'projection': .* got 4 and 4: encode"):
        evaluate_retrieval(dataset, systems)


def test_a_judged_query_without_text_is_refused(dataset, systems):
    dataset.qrels["lost"] = {"d0": 1}
    with pytest.raises(UserError, match="lost"):
        evaluate_retrieval(dataset, systems)


def test_a_data_set_without_judgements_is_refused(dataset, systems):
    dataset.qrels = {"q1": {}}
    with pytest.raises(UserError, match="toy test: expected judgements"):
        evaluate_retrieval(dataset, systems)


def test_without_a_base_systems_are_compared_with_bm25_or_not_at_all(dataset, systems):
    projection, base = systems
    entry = evaluate_retrieval(dataset, [projection, replace(base, name="bm25")]).entry
    assert list(entry["systems"]) == ["bm25", "projection"]
    assert entry["comparisons"] == {
        "projection": evaluate_retrieval(dataset, systems).entry["comparisons"]["projection"]
    }
    assert evaluate_retrieval(dataset, [projection]).entry["comparisons"] == {}


def test_distinct_names_are_required(dataset, systems):
    for wrong in ([], [*systems, systems[0]]):
        with pytest.raises(ValueError, match="distinct systems"):
            evaluate_retrieval(dataset, wrong)


def test_an_unknown_similarity_is_refused(dataset, systems):
    with pytest.raises(UserError, match="expected a similarity among"):
        evaluate_retrieval(dataset, [replace(systems[1], similarity="manhattan")])
