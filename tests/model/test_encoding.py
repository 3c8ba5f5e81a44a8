"""`encode*` with all its options, and `similarity*`: equal to what sentence-transformers computes."""

import inspect
import typing

import numpy as np
import pytest
import torch

from ragcun_hf.model.encoding_isotropic_gaussian import EncodingMixin, default_batch_size, quantize

TEXTS = ["sort an array", "the sun", "why do fish sleep in the water of the river", "bread is food", "moon", ""]


@pytest.fixture
def model(tiny_model):
    tiny_model.config.query_prompt, tiny_model.config.document_prompt = "query: ", "document: "
    return tiny_model


@pytest.fixture(scope="module")
def vectors():
    rows = np.random.default_rng(0).normal(size=(300, 20)).astype(np.float32)
    rows[:, 3] = 0.5  # a coordinate without range
    rows[0, 5] = 0.0
    return rows


# Prompts


def test_encode_adds_no_prompt_and_names_or_texts_of_prompts_when_given(model):
    np.testing.assert_array_equal(model.encode(TEXTS, prompt_name="query"), model.encode_query(TEXTS))
    np.testing.assert_array_equal(model.encode(TEXTS, prompt_name="document"), model.encode_document(TEXTS))
    np.testing.assert_array_equal(model.encode(TEXTS, prompt="query: "), model.encode_query(TEXTS))
    assert np.abs(model.encode(TEXTS) - model.encode_query(TEXTS)).max() > 0.01
    np.testing.assert_array_equal(model.encode(TEXTS), model.encode_query(TEXTS, prompt=""))


def test_a_prompt_wins_over_its_name_and_a_name_over_the_method(model):
    np.testing.assert_array_equal(
        model.encode(TEXTS, prompt="query: ", prompt_name="document"), model.encode_query(TEXTS)
    )
    np.testing.assert_array_equal(model.encode_query(TEXTS, prompt_name="document"), model.encode_document(TEXTS))
    np.testing.assert_array_equal(model.encode_document(TEXTS, prompt="query: "), model.encode_query(TEXTS))


def test_encode_adds_the_default_prompt_of_the_config(model):
    model.config.default_prompt_name = "document"
    np.testing.assert_array_equal(model.encode(TEXTS), model.encode_document(TEXTS))
    np.testing.assert_array_equal(model.encode(TEXTS, prompt=""), model.encode_query(TEXTS, prompt=""))


@pytest.mark.parametrize("name", ["passage", ""])
def test_an_unknown_prompt_name_is_refused_with_the_known_ones(model, name):
    for encode in (model.encode, model.encode_query, model.encode_document):
        with pytest.raises(ValueError, match="`prompt_name` must be one of query, document, got"):
            encode(TEXTS, prompt_name=name)


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int4"}, "`precision` must be one of float32, int8, uint8, binary, ubinary, got 'int4'"),
        ({"truncate_dim": 0}, "`truncate_dim` must be between 1 and the model's 16, got 0"),
        ({"truncate_dim": 17}, "`truncate_dim` must be between 1 and the model's 16, got 17"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"ranges": np.zeros((2, 16))}, "belongs to the precisions int8 and uint8"),
        ({"ranges": np.zeros((2, 16)), "precision": "int8", "truncate_dim": 4}, r"has the shape \(2, 4\)"),
    ],
)
def test_invalid_options_are_refused_before_any_text_is_encoded(model, options, message, monkeypatch):
    monkeypatch.setattr(model, "tokenize", None)
    for encode in (model.encode, model.encode_query, model.encode_document):
        with pytest.raises(ValueError, match=message):
            encode(TEXTS, **options)


def test_one_text_has_no_ranges_and_is_refused_before_it_is_encoded(model, monkeypatch):
    monkeypatch.setattr(model, "tokenize", None)
    with pytest.raises(ValueError, match="needs `ranges`, or at least two texts"):
        model.encode("the sun", precision="int8")


def test_truncation_comes_before_normalization(model):
    whole = model.encode_document(TEXTS, normalize_embeddings=False)
    cut = model.encode_document(TEXTS, truncate_dim=5, normalize_embeddings=False)
    np.testing.assert_array_equal(cut, whole[:, :5])
    unit = model.encode_document(TEXTS, truncate_dim=5)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
    assert model.encode_document("the sun", truncate_dim=5).shape == (5,)


def test_a_batch_that_memory_does_not_hold_is_halved_until_it_fits(model):
    texts = [f"moon {number}" for number in range(40)]
    expected, sizes = model.encode(texts), []

    def memory_for_ten_texts(_module, _args, given):
        sizes.append(len(given["input_ids"]))
        if sizes[-1] > 10:
            raise torch.OutOfMemoryError("no memory for more than ten texts")

    hook = model.register_forward_pre_hook(memory_for_ten_texts, with_kwargs=True)
    np.testing.assert_allclose(model.encode(texts), expected, atol=1e-6)
    assert sizes == [32, 16, *[8] * 5]
    hook.remove()
    model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory at all")))
    with pytest.raises(torch.OutOfMemoryError, match="no memory at all"):
        model.encode(texts)


def test_a_batch_holds_more_short_texts_on_a_card_and_what_is_asked_for_everywhere(model):
    sizes, tokenize = [], model.tokenize
    model.tokenize = lambda texts, prompt: sizes.append(len(texts)) or tokenize(texts, prompt)
    model.encode(["moon"] * 40)
    model.encode(["moon"] * 40, batch_size=25)
    assert sizes == [32, 8, 25, 15]
    by_length = [default_batch_size(torch.device("cuda"), max_length) for max_length in (128, 512, 8_192)]
    assert by_length == [512, 128, 32]


def test_the_model_moves_to_the_device_and_stays_there(model):
    moved = []
    model.to = lambda device: moved.append(device)
    model.encode(TEXTS, device="cpu")
    model.encode(TEXTS)
    assert moved == ["cpu"]


@pytest.mark.parametrize("name", ["encode", "encode_query", "encode_document"])
def test_the_signatures_for_type_checkers_are_those_of_the_methods(name):
    method = getattr(EncodingMixin, name)
    overloads = typing.get_overloads(method)
    assert [inspect.signature(one).return_annotation for one in overloads] == [np.ndarray, torch.Tensor]
    actual = dict(inspect.signature(method).parameters)
    del actual["convert_to_tensor"]
    for one in overloads:
        shown = dict(inspect.signature(one).parameters)
        assert typing.get_args(shown.pop("convert_to_tensor").annotation) == (one is overloads[1],)
        assert shown == actual


# Precision


@pytest.mark.parametrize("precision", ["float32", "int8", "uint8", "binary", "ubinary"])
def test_quantization_equals_that_of_sentence_transformers(vectors, precision):
    package = pytest.importorskip("sentence_transformers")
    expected = package.quantize_embeddings(vectors, precision)
    found = quantize(vectors, precision)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(found)) > 100
    if precision.endswith("int8"):
        ranges = np.stack([vectors.min(0), vectors.max(0)]) * np.float32(0.7)  # some values lie outside
        np.testing.assert_array_equal(
            quantize(vectors, precision, ranges), package.quantize_embeddings(vectors, precision, ranges=ranges)
        )


@pytest.mark.parametrize(
    ("precision", "dtype", "width"),
    [("int8", "int8", 16), ("uint8", "uint8", 16), ("binary", "int8", 2), ("ubinary", "uint8", 2)],
)
def test_encode_quantizes_what_it_would_return(model, precision, dtype, width):
    options = {"truncate_dim": 16, "normalize_embeddings": True}
    found = model.encode_query(TEXTS, precision=precision, use_predictor=True, **options)
    assert (found.dtype, found.shape) == (dtype, (len(TEXTS), width))
    np.testing.assert_array_equal(found, quantize(model.encode_query(TEXTS, use_predictor=True, **options), precision))
    tensor = model.encode_query(TEXTS, precision=precision, use_predictor=True, convert_to_tensor=True, **options)
    np.testing.assert_array_equal(tensor.numpy(), found)
    assert model.encode_query([], precision=precision).shape == (0, width)
    assert model.encode_query([], precision=precision).dtype == dtype


def test_one_query_is_quantized_by_the_ranges_of_the_documents(model):
    documents = model.encode_document(TEXTS)
    ranges = np.stack([documents.min(0), documents.max(0)])
    one = model.encode_document(TEXTS[2], precision="int8", ranges=ranges)
    np.testing.assert_array_equal(one, model.encode_document(TEXTS, precision="int8")[2])


def test_ranges_of_few_texts_are_warned_about(model, vectors, caplog):
    model.encode(TEXTS, precision="binary")
    quantize(vectors, "int8")
    assert not caplog.records
    model.encode(TEXTS, precision="int8")
    assert "ranges from only 6 texts" in caplog.text


# Similarity


@pytest.mark.parametrize("name", ["cosine", "dot", "euclidean"])
def test_similarity_equals_that_of_sentence_transformers(model, vectors, name):
    package = pytest.importorskip("sentence_transformers")
    function = package.SimilarityFunction
    model.config.similarity_fn_name = name
    a, b = vectors[:7], vectors[100:112]
    expected = function.to_similarity_fn(name)(a, b)
    forms = [(a, b), (torch.tensor(a), torch.tensor(b)), (list(a), list(torch.tensor(b))), (a.tolist(), b.tolist())]
    for one, other in [*forms, (a.astype(np.float64), torch.tensor(b))]:
        found = model.similarity(one, other)
        assert (found.shape, found.dtype) == ((7, 12), torch.float32)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.similarity(a[0], b), expected[:1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.similarity(a, b[0]), expected[:, :1], rtol=1e-5, atol=1e-5)
    pairwise = function.to_similarity_pairwise_fn(name)
    torch.testing.assert_close(model.similarity_pairwise(a, b[:7]), pairwise(a, b[:7]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        model.similarity_pairwise(a, b[:7]), model.similarity(a, b[:7]).diagonal(), rtol=1e-4, atol=1e-4
    )
    assert model.similarity_pairwise(a[0], b[0]).shape == pairwise(a[0], b[0]).shape == ()


def test_similarity_takes_quantized_and_read_only_vectors(model, vectors):
    model.config.similarity_fn_name = "dot"
    codes = quantize(vectors, "int8")
    codes.setflags(write=False)
    expected = codes.astype(np.float64) @ codes.astype(np.float64).T
    np.testing.assert_allclose(model.similarity(codes, codes).numpy(), expected, rtol=1e-6)


def test_similarity_of_unlike_shapes_is_refused(model):
    with pytest.raises(ValueError, match=r"vectors of one width, got shapes \(2, 3\) and \(2, 4\)"):
        model.similarity(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"vectors of one width, got shapes \(2, 3, 4\)"):
        model.similarity(np.zeros((2, 3, 4)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"equal numbers of vectors of one width, got shapes \(2, 3\) and \(1, 3\)"):
        model.similarity_pairwise(np.zeros((2, 3)), np.zeros((1, 3)))
