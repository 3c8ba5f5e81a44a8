"""Example rankings: chosen without a look at the figures, with whole facts and shortened texts."""

import pytest

from ragcun_hf import IsotropicGaussianModel, RetrievalEvaluator
from ragcun_hf.data.beir_folder import BeirDataset
from ragcun_hf.evaluation.examples import example_rankings

QUERIES = {"q1": "how do vaccines work", "q2": "capital of\n France", "q3": "baking bread", "none": "not judged"}
CORPUS = {
    "v": "Vaccines train the immune system to recognise a germ.",
    "p": "Paris is the capital of France.",
    "b": "Flour, water, salt and yeast become a loaf in the oven. " * 10,
}
QRELS = {"q1": {"v": 1}, "q2": {"p": 1}, "q3": {"b": 1}}


@pytest.fixture
def dataset():
    return BeirDataset("toy", "test", QUERIES, list(CORPUS), list(CORPUS.values()), QRELS)


@pytest.fixture
def run():
    return {"q1": {"v": 0.9, "p": 0.1}, "q2": {"b": 0.4, "p": 0.3}, "q3": {"b": 0.7}}


def test_an_example_holds_texts_score_and_judgement(dataset, run):
    found = example_rankings(dataset, run, 9)
    assert list(found) == ["q1", "q2", "q3"]
    expected = {"query": QUERIES["q1"], "document_id": "v", "document": CORPUS["v"], "score": 0.9, "is_relevant": True}
    assert found["q1"] == expected
    assert (found["q2"]["query"], found["q2"]["document_id"]) == ("capital of France", "b")
    assert found["q2"]["is_relevant"] is False  # a wrong document is shown as one
    assert len(found["q3"]["document"]) == 200
    assert found["q3"]["document"].endswith("…")


def test_the_same_queries_are_chosen_whatever_the_figures_are(dataset, run):
    chosen = list(example_rankings(dataset, run, 2))
    assert len(chosen) == 2
    swapped = {query: {"p": 0.5} for query in run}
    assert list(example_rankings(dataset, swapped, 2)) == chosen


def test_queries_of_documents_seen_in_training_are_left_out_if_there_are_others(dataset, run):
    assert list(example_rankings(dataset, run, 3, seen_document_ids={"v"})) == ["q2", "q3"]
    assert list(example_rankings(dataset, run, 3, seen_document_ids=set(CORPUS))) == ["q1", "q2", "q3"]


def test_a_query_that_found_nothing_is_no_example(dataset, run):
    assert list(example_rankings(dataset, {**run, "q1": {}}, 3)) == ["q2", "q3"]


@pytest.mark.usefixtures("embedded_folder")
def test_the_evaluator_keeps_examples_only_if_asked_to():
    model = IsotropicGaussianModel.from_encoder("embedded")
    queries = {query: QUERIES[query] for query in QRELS}
    report = RetrievalEvaluator(queries, CORPUS, QRELS, examples=2, show_progress_bar=False)(model)
    examples = report.results["datasets"]["data"]["examples"]
    assert len(examples) == 2
    for query, found in examples.items():
        assert found["is_relevant"]
        vectors = model.encode_query(queries[query]), model.encode_document(CORPUS[found["document_id"]])
        assert found["score"] == pytest.approx(float(model.similarity(*vectors)), abs=5e-3)
    without = RetrievalEvaluator(queries, CORPUS, QRELS, show_progress_bar=False)(model)
    assert "examples" not in without.results["datasets"]["data"]
