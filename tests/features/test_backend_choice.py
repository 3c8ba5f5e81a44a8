"""`--encoder_backend auto`: OpenVINO for much text where it is faster and right, PyTorch otherwise."""

import pickle
import sys
from unittest import mock

import numpy as np
import pytest

from ragcun_hf import UserError
from ragcun_hf.features import encoder_backends, feature_store, text_vectors
from ragcun_hf.features.feature_cache import list_cached_encoders
from ragcun_hf.features.feature_store import FeatureStore

DOCUMENTS = [
    f"{first} and {second}" for first in "bread food music river stone".split() for second in "sun moon".split()
]
QUERIES = ["what is bread", "the sun"]


@pytest.fixture(autouse=True)
def worth_it_from_100_characters(monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setattr(feature_store, "WORTH_A_GRAPH", 100)


def _store(model, folder, **options):
    given = {"backend": "auto", "dtype": "bfloat16", "show_progress": False, **options}
    return FeatureStore(model, cache_folder=folder, **given)


def _cached(folder):
    return {entry.parts["backend"]: entry.num_texts for entry in list_cached_encoders(folder)}


def _refuse(*args, **kwargs):
    raise AssertionError("texts were encoded again")


def _no_graph(*args):
    raise UserError("no graph here")


def test_much_text_goes_to_openvino_and_little_to_torch(tiny_model, tmp_path):
    store = _store(tiny_model, tmp_path)
    found = store.features(DOCUMENTS).vectors
    store.features(QUERIES)
    assert _cached(tmp_path) == {"openvino": len(DOCUMENTS), "torch": len(QUERIES)}
    assert store.settings()["encoder_backend"] == "torch + openvino"
    assert store.summary().startswith("Features: 12 texts encoded, 0 known before; the cache holds 12 ")
    expected = _store(tiny_model, None, backend="torch").features(DOCUMENTS).vectors
    assert (found * expected).sum(1) == pytest.approx((expected**2).sum(1), rel=0.02)


def test_what_one_of_the_two_has_encoded_is_read_by_later_stores(tiny_model, tmp_path, monkeypatch):
    first = _store(tiny_model, tmp_path)
    expected = [first.features(texts).vectors for texts in (DOCUMENTS, QUERIES)]
    monkeypatch.setattr(text_vectors, "encode_in_batches", _refuse)
    for is_interactive in (False, True):
        again = _store(tiny_model, tmp_path, is_interactive=is_interactive)
        for texts, vectors in zip((DOCUMENTS, QUERIES), expected, strict=True):
            np.testing.assert_array_equal(again.features(texts).vectors, vectors)


def test_new_texts_join_the_cache_that_lacks_least(tiny_model, tmp_path):
    _store(tiny_model, tmp_path).features(DOCUMENTS)
    _store(tiny_model, tmp_path).features([*DOCUMENTS, "why do fish sleep"])
    assert _cached(tmp_path) == {"openvino": len(DOCUMENTS) + 1}


def test_what_torch_has_encoded_is_not_encoded_again(tiny_model, tmp_path):
    _store(tiny_model, tmp_path, backend="torch").features(DOCUMENTS)
    _store(tiny_model, tmp_path).features([*DOCUMENTS, "why do fish sleep"])
    assert _cached(tmp_path) == {"torch": len(DOCUMENTS) + 1}


def test_what_torch_has_encoded_is_not_encoded_again_if_much_is_new(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_store, "WORTH_A_GRAPH", 20)
    _store(tiny_model, tmp_path, backend="torch").features(DOCUMENTS[:6])
    _store(tiny_model, tmp_path).features(DOCUMENTS)
    assert _cached(tmp_path) == {"torch": len(DOCUMENTS)}


def test_one_text_that_torch_has_encoded_does_not_keep_openvino_from_much_text(tiny_model, tmp_path):
    _store(tiny_model, tmp_path, backend="torch").features(DOCUMENTS[:1])
    _store(tiny_model, tmp_path).features(DOCUMENTS)
    assert _cached(tmp_path) == {"torch": 1, "openvino": len(DOCUMENTS)}


def test_texts_of_later_rounds_count_too(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(text_vectors, "TEXTS_PER_ROUND", 1)
    _store(tiny_model, tmp_path, backend="torch").features(DOCUMENTS[:1])
    _store(tiny_model, tmp_path).features(DOCUMENTS)
    assert _cached(tmp_path) == {"torch": 1, "openvino": len(DOCUMENTS)}


def test_no_graph_is_needed_for_a_first_round_that_openvino_has_encoded(tiny_model, tmp_path, monkeypatch):
    _store(tiny_model, tmp_path, backend="openvino").features(DOCUMENTS[:5])
    monkeypatch.setattr(text_vectors, "TEXTS_PER_ROUND", 5)
    monkeypatch.setattr(encoder_backends, "_openvino_function", _no_graph)
    store = _store(tiny_model, tmp_path)
    assert len(store.features(DOCUMENTS).vectors) == len(DOCUMENTS)
    assert _cached(tmp_path) == {"openvino": 5, "torch": len(DOCUMENTS)}


@pytest.mark.parametrize("change", [{"dtype": "float32"}, {"backend": "torch"}])
def test_torch_encodes_where_openvino_is_no_faster(tiny_model, tmp_path, change):
    store = _store(tiny_model, tmp_path, **change)
    store.features(DOCUMENTS)
    assert (_cached(tmp_path), store.backend) == ({"torch": len(DOCUMENTS)}, "torch")


def test_torch_encodes_where_openvino_is_not_installed(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    _store(tiny_model, tmp_path).features(DOCUMENTS)
    assert _cached(tmp_path) == {"torch": len(DOCUMENTS)}


def test_torch_encodes_what_openvino_computes_otherwise(tiny_model, tmp_path, monkeypatch):
    made = []

    def other_features(request):
        made.append(request)
        return lambda input_ids, attention_mask: -tiny_model.compute_features(input_ids, attention_mask)

    monkeypatch.setattr(encoder_backends, "_infer_with", other_features)
    store = _store(tiny_model, tmp_path)
    found = store.features(DOCUMENTS).vectors
    store.features([text.upper() for text in DOCUMENTS])
    assert _cached(tmp_path) == {"torch": 2 * len(DOCUMENTS)}
    assert len(made) == 1  # a graph that was refused is not made again
    np.testing.assert_array_equal(found, _store(tiny_model, None, backend="torch").features(DOCUMENTS).vectors)


@pytest.mark.parametrize("error", [ImportError("no library"), RuntimeError("of the compiler"), MemoryError()])
def test_torch_encodes_where_openvino_breaks(tiny_model, monkeypatch, caplog, error):
    monkeypatch.setattr(encoder_backends, "_openvino_function", mock.Mock(side_effect=error))
    store = _store(tiny_model, None)
    assert (len(store.features(DOCUMENTS).vectors), store.backend) == (len(DOCUMENTS), "torch")
    assert type(error).__name__ in caplog.text
    with pytest.raises(type(error)):  # whoever asks for OpenVINO sees what is wrong with it
        _store(tiny_model, None, backend="openvino").features(DOCUMENTS)


def test_an_interruption_while_a_graph_is_made_ends_the_work_and_hides_no_graph(tiny_model, tmp_path, monkeypatch):
    store = _store(tiny_model, tmp_path)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(encoder_backends, "_openvino_graph", mock.Mock(side_effect=KeyboardInterrupt))
        store.features(DOCUMENTS)
    store.features(DOCUMENTS)
    assert store.backend == "openvino"


def test_a_choice_leaves_a_model_in_training(tiny_model):
    for is_training in (True, False):
        _store(tiny_model.train(is_training), None).features(DOCUMENTS)
        assert tiny_model.training is is_training


def test_without_a_cache_a_corpus_is_not_prepared_for_before_it_is_read(tiny_model, monkeypatch):
    monkeypatch.setattr(encoder_backends, "_openvino_function", _refuse)
    _store(tiny_model, None).encode(DOCUMENTS)


def test_a_store_with_a_choice_can_be_pickled(tiny_model, tmp_path):
    again = pickle.loads(pickle.dumps(_store(tiny_model, tmp_path)))
    assert again.features(DOCUMENTS).vectors.shape == _store(tiny_model, None).features(DOCUMENTS).vectors.shape


def test_a_choice_without_a_cache_keeps_nothing(tiny_model, tmp_path):
    store = _store(tiny_model, None)
    assert len(store.features(DOCUMENTS).vectors) == len(DOCUMENTS)
    assert store.backend == "openvino"


def test_much_text_counts_once_however_often_it_comes(tiny_model, tmp_path):
    _store(tiny_model, tmp_path).features(QUERIES[:1])  # so that there is a cache that tells distinct texts
    store = _store(tiny_model, tmp_path)
    store.features(QUERIES * 50)
    assert store.backend == "torch"
