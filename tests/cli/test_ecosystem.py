"""beir's own search and evaluation give the ranking and the figures of this package."""

import random

import numpy as np
import pytest
import torch
from conftest import WORDS

from ragcun_hf import IsotropicGaussianModel
from ragcun_hf.errors import UserError
from ragcun_hf.evaluation.beir_search import BeirModel, beir_retriever
from ragcun_hf.evaluation.ranking import build_run
from ragcun_hf.evaluation.retrieval import mean_metrics, per_query_metrics
from ragcun_hf.search.exact import exact_search

pytestmark = pytest.mark.usefixtures("quick_garbage_collection")

SIMILARITIES = ("cosine", "dot", "euclidean")


@pytest.fixture(scope="module")
def data():
    """A corpus, queries and judgements as from beir's loader; the id of the last query is also that of a document."""
    draw = random.Random(3)
    words = WORDS[:-5]
    corpus = {
        f"d{row}": {"title": words[row % 7] if row % 3 else "", "text": " ".join(draw.sample(words, 4 + row % 9))}
        for row in range(150)
    }
    queries = {f"q{row}": " ".join(draw.sample(words, 3)) for row in range(11)}
    queries["d5"] = corpus["d5"]["text"]
    qrels = {query: {draw.choice(list(corpus)): 1 + row % 2 for row in range(4)} for query in queries}
    return (
        corpus,
        queries,
        {query: {name: gain for name, gain in row.items() if name != query} for query, row in qrels.items()},
    )


@pytest.fixture(scope="module")
def make_model(tiny_encoder_folder):
    def make(similarity, **fields):
        torch.manual_seed(0)
        model = IsotropicGaussianModel.from_encoder(
            str(tiny_encoder_folder), similarity_fn_name=similarity, document_prompt="document: ", **fields
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.3 * torch.randn(parameter.shape)
        return model

    return make


def _own_run(model, data, *, k, **options):
    corpus, queries, _ = data
    texts = [(row["title"] + " " + row["text"]).strip() for row in corpus.values()]
    found = exact_search(
        model.encode_query(list(queries.values()), **options),
        model.encode_document(texts),
        k=k + 1,
        similarity=model.config.similarity_fn_name,
    )
    return build_run(list(queries), list(corpus), found, k=k)


def _assert_same_ranking(theirs, ours):
    """Check for the same documents in the same order, except those whose scores are equal in float32."""
    assert theirs.keys() == ours.keys()
    for query, expected in ours.items():
        ranking = sorted(theirs[query], key=lambda name: -theirs[query][name])
        assert set(ranking) == set(expected)
        scores = np.array([expected[name] for name in ranking])
        assert (np.diff(scores) <= 1e-5 * np.abs(scores).max()).all()
        assert ranking[:3] == list(expected)[:3]


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("use_predictor", [False, True])
def test_beir_ranks_and_measures_as_this_package_does(make_model, data, similarity, use_predictor):
    model = make_model(similarity, use_predictor=use_predictor)
    corpus, queries, qrels = data
    retriever = beir_retriever(model, use_predictor=use_predictor)
    run = retriever.retrieve(corpus, queries)
    ours = _own_run(model, data, k=100, use_predictor=use_predictor)
    _assert_same_ranking(run, ours)
    assert all(len(found) == 100 and query not in found for query, found in run.items())
    ndcg, mean_average_precision, recall, _ = retriever.evaluate(qrels, run, retriever.k_values)
    expected = mean_metrics(per_query_metrics(ours, qrels))
    assert ndcg["NDCG@10"] == pytest.approx(expected["ndcg@10"], abs=1e-5)
    assert mean_average_precision["MAP@100"] == pytest.approx(expected["map@100"], abs=1e-5)
    assert recall["Recall@100"] == pytest.approx(expected["recall@100"], abs=1e-5)


def test_the_three_similarities_rank_differently_here(make_model, data):
    # Otherwise the tests above could not distinguish them.
    rankings = [[list(found) for found in _own_run(make_model(name), data, k=10).values()] for name in SIMILARITIES]
    assert rankings[0] != rankings[1] != rankings[2] != rankings[0]


def test_the_extended_vectors_encode_the_distances_exactly(make_model, data):
    model = make_model("euclidean")
    corpus, queries, _ = data
    adapter = BeirModel(model)
    queries_QD = adapter.encode_queries(list(queries.values()))
    documents_ND = adapter.encode_corpus(list(corpus.values()), batch_size=7, convert_to_tensor=True)
    assert queries_QD.dtype == documents_ND.dtype == torch.float64
    plain_QD = queries_QD[:, :-1]
    squared_QN = plain_QD.square().sum(1, keepdim=True) - queries_QD @ documents_ND.T
    torch.testing.assert_close(
        squared_QN, torch.cdist(plain_QD, documents_ND[:, :-1] / 2).square(), rtol=1e-9, atol=1e-9
    )


def test_a_model_without_a_predictor_is_refused_if_one_is_needed(make_model):
    with pytest.raises(UserError, match="got one without"):
        beir_retriever(make_model("dot"), use_predictor=True)
