"""The lexical half: words as vectors, fitted to documents, beside the encoder's part of a feature."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModel

from ragcun_hf import IsotropicGaussianModel
from ragcun_hf.features.feature_store import FeatureStore
from ragcun_hf.model import lexical_isotropic_gaussian
from ragcun_hf.model.lexical_isotropic_gaussian import LexicalHalf, lexical_weight

DOCUMENTS = [
    "how to sort an array",
    "the mean of a list and the sum of a list",
    "the moon is a slow red sun",
    "fish and bird sleep in a river",
    "what is the sum of an array",
    "green food and red bread",
]


@pytest.fixture
def model(tiny_encoder_folder):
    return IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder))


def test_the_start_is_computed_from_as_many_documents_as_are_asked_for(model):
    texts = [f"{text} {word}" for text in DOCUMENTS for word in ("fish", "moon", "bread", "water")]
    model.fit_lexical(texts, weight=0.3, num_start_texts=0)
    every = model._sample_features(texts, 100, 16)
    assert every.shape[0] == len(texts)
    for number in (1, 7, 13, 23):  # 24 texts, of which a whole step would take 1, 6, 12 and 12
        sample = model._sample_features(texts, number, 16)
        assert len(sample) == number
        nearest = torch.cdist(sample, every).min(dim=1)
        assert nearest.values.max() < 1e-4 and len(set(nearest.indices.tolist())) == number


def _random_tokens(generator, vocab_size, length):
    return torch.randint(0, vocab_size, (length,), generator=generator).tolist()


def test_a_text_is_the_sum_of_its_tokens_by_saturated_counts():
    half = LexicalHalf(vocab_size=4, dim=2)
    half.table.copy_(torch.tensor([[0, 0], [1.0, 0], [0, 2.0], [5, 5]]))
    # Token 1 twice: 2 x 2.5 / (2 + 1.5) = 10/7; token 2 once: 1 x 2.5 / (1 + 1.5) = 1, times 2. Token 3 is padding.
    expected = torch.tensor([10 / 7, 2.0]) / math.hypot(10 / 7, 2.0)
    found = half(torch.tensor([[1, 2, 1, 3]]), torch.tensor([[1, 1, 1, 0]]))
    assert torch.allclose(found, expected.unsqueeze(0))


def test_vectors_equal_a_slow_version_wherever_the_padding_is():
    generator = torch.Generator().manual_seed(0)
    half = LexicalHalf(vocab_size=30, dim=5)
    half.table.copy_(torch.randn(30, 5, generator=generator))
    texts = [_random_tokens(generator, 30, length) for length in (1, 4, 9, 20)]
    for side in ("left", "right"):
        ids, mask = torch.zeros(4, 20, dtype=torch.long), torch.zeros(4, 20, dtype=torch.long)
        for row, text in enumerate(texts):
            places = slice(20 - len(text), 20) if side == "left" else slice(len(text))
            ids[row, places], mask[row, places] = torch.tensor(text), 1
        slow = []
        for text in texts:
            total = np.zeros(5)
            for token in set(text):
                count = text.count(token)
                total += count * 2.5 / (count + 1.5) * half.table[token].double().numpy()
            slow.append(total / np.linalg.norm(total))
        assert np.allclose(half(ids, mask).numpy(), slow, atol=1e-6)


def test_a_text_without_a_known_token_is_the_zero_vector():
    half = LexicalHalf(vocab_size=5, dim=3)
    half.fit([[1, 2], [2, 3]])
    assert half(torch.tensor([[4, 4]]), torch.ones(1, 2, dtype=torch.long)).tolist() == [[0.0] * 3]


def test_the_table_spans_the_weighted_documents():
    """With as many directions as documents, the table's part in them is that of an exact decomposition in NumPy."""
    generator = torch.Generator().manual_seed(1)
    documents = [_random_tokens(generator, 40, 12) for _ in range(10)]
    half = LexicalHalf(vocab_size=40, dim=10)
    share = half.fit(documents)
    assert share == pytest.approx(1.0, abs=1e-4)

    counts = np.array([[text.count(token) for token in range(40)] for text in documents], dtype=np.float64)
    frequencies = (counts > 0).sum(0)
    idf = np.log1p((10 - frequencies + 0.5) / (frequencies + 0.5))
    rows = counts * 2.5 / (counts + 1.5) * idf
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    _, singular, directions = np.linalg.svd(rows, full_matrices=False)
    table = idf[:, None] * directions.T / np.sqrt(singular)
    # Directions are unique up to their sign, and the table up to its scale: compare inner products of rows.
    ours, exact = half.table.double().numpy(), table / np.abs(table).max()
    own, other = ours @ ours.T, exact @ exact.T
    assert np.allclose(own / own.max(), other / other.max(), atol=2e-3)


def test_fewer_directions_hold_a_smaller_share_of_the_words():
    generator = torch.Generator().manual_seed(2)
    documents = [_random_tokens(generator, 200, 20) for _ in range(100)]
    shares = [LexicalHalf(vocab_size=200, dim=dim).fit(documents) for dim in (5, 20, 80)]
    assert 0 < shares[0] < shares[1] < shares[2] < 1


def test_ignored_tokens_and_tokens_of_no_document_count_nothing():
    half = LexicalHalf(vocab_size=6, dim=3)
    half.fit([[0, 1, 2], [0, 2, 3], [0, 3, 4]], ignored=[0, 99])
    assert not half.table[[0, 5]].any()
    assert half.table[1:5].any(dim=1).all()


def test_a_fit_is_the_same_every_time_and_leaves_the_random_state_alone():
    generator = torch.Generator().manual_seed(3)
    documents = [_random_tokens(generator, 50, 8) for _ in range(30)]
    tables = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        half = LexicalHalf(vocab_size=50, dim=7)
        half.fit(iter(documents))
        tables.append(half.table)
        after = torch.rand(1)
        torch.manual_seed(seed)
        assert after == torch.rand(1)
    assert torch.equal(*tables)


def test_directions_of_a_large_corpus_come_from_a_sample_but_frequencies_from_all(monkeypatch):
    monkeypatch.setattr(lexical_isotropic_gaussian, "_MAX_FITTED", 10)
    generator = torch.Generator().manual_seed(4)
    documents = [_random_tokens(generator, 20, 5) for _ in range(200)]
    corpus = lexical_isotropic_gaussian._Corpus(documents, 20)
    assert corpus.num_rows == 10 and corpus.num_documents == 200
    assert corpus.frequencies_V.tolist() == [sum(token in text for text in documents) for token in range(20)]
    kept = corpus._tokens.tolist()
    assert kept != [token for text in documents[:10] for token in sorted(set(text))]  # not simply the first ones


@pytest.mark.parametrize("documents", [[], [[1, 2]], [[], [], [3]]])
def test_too_few_documents_are_refused(documents):
    with pytest.raises(ValueError, match=f"at least two documents with words, got {len(documents)} documents"):
        LexicalHalf(vocab_size=5, dim=2).fit(documents)


def test_equal_documents_can_be_fitted():
    half = LexicalHalf(vocab_size=5, dim=3)
    half.fit([[1, 2], [1, 2], [1, 2]])
    assert half.table.isfinite().all() and half.is_fitted


def test_the_weight_is_zero_where_the_directions_hold_little_and_grows_to_a_limit():
    weights = [lexical_weight(share) for share in (0.0, 0.1, 0.2, 0.3, 0.4, 1.0)]
    assert weights[:2] == [0.0, 0.0] and weights == sorted(weights)
    assert weights[2] == pytest.approx(0.15 / 1.15) and weights[-1] == pytest.approx(0.4 / 1.4)


def test_a_feature_joins_both_halves_and_their_similarities(model):
    model.fit_lexical(DOCUMENTS, dim=4, weight=0.25)
    tokens = model.tokenize(DOCUMENTS)
    features = model(**tokens).features
    pooled, lexical = model.compute_features(**tokens), model.lexical_features(**tokens)
    assert features.shape == (6, model.config.encoder_dim + 4) and model.config.feature_dim == features.shape[1]
    assert torch.allclose(features @ features.T, 0.75 * pooled @ pooled.T + 0.25 * lexical @ lexical.T, atol=1e-5)
    assert torch.allclose(features.norm(dim=1), torch.ones(6), atol=1e-5)
    assert torch.allclose(model.encoder_part(features), pooled, atol=1e-6)
    assert np.allclose(model.encoder_part(features.detach().numpy()), pooled.detach().numpy(), atol=1e-6)


def test_a_lexical_half_is_as_long_as_features_that_have_no_unit_length(tiny_encoder_folder):
    model = IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder), normalize_features=False)
    model.fit_lexical(DOCUMENTS, dim=4, weight=0.5)
    parts = model(**model.tokenize(DOCUMENTS)).features.split([model.config.encoder_dim, 4], dim=1)
    encoder, lexical = (part.norm(dim=1).mean().item() for part in parts)
    assert lexical == pytest.approx(encoder, rel=1e-3)
    scale = model.config.lexical_scale
    model.fit_lexical(DOCUMENTS, dim=4, weight=0.5)
    assert model.config.lexical_scale == pytest.approx(scale, rel=1e-5)


def test_autocast_changes_nothing(model):
    model.fit_lexical(DOCUMENTS, dim=4, weight=0.5)
    tokens = model.tokenize(DOCUMENTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model.lexical_features(**tokens)
    assert torch.equal(rounded, model.lexical_features(**tokens))


def test_a_new_head_for_another_width_has_an_empty_half(model):
    model.reset_head(lexical_dim=8)
    assert model.lexical.table.shape[1] == 8 and not model.lexical.is_fitted
    assert model.encode(["red fish"]).shape == (1, model.config.output_dim)


def test_a_token_that_the_encoder_lacks_is_named():
    with pytest.raises(ValueError, match="a token 7, but the encoder only 5 tokens"):
        LexicalHalf(vocab_size=5, dim=2).fit([[1, 2], [3, 7]])


def test_blank_documents_are_refused(model):
    with pytest.raises(ValueError, match="two documents with words, got 3"):
        model.fit_lexical(["", " ", ""])


def test_the_head_starts_at_the_principal_directions_of_both_halves(model):
    alone = model.encode(DOCUMENTS, normalize_embeddings=True)
    model.fit_lexical(DOCUMENTS, weight=0.3)
    features = model(**model.tokenize(DOCUMENTS)).features.detach().numpy()
    vectors = model.encode(DOCUMENTS, normalize_embeddings=True)
    assert vectors.shape == alone.shape  # the width of the embedding stays
    # Six documents have at most six directions, so nothing is lost.
    assert np.allclose(vectors @ vectors.T, features @ features.T, atol=1e-4)
    assert not np.allclose(vectors @ vectors.T, alone @ alone.T, atol=1e-2)


def test_an_embedding_as_wide_as_both_halves_starts_as_both_halves(tiny_encoder_folder):
    width = IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder)).config.encoder_dim
    model = IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder), output_dim=width + 5)
    model.fit_lexical(DOCUMENTS, dim=5, weight=0.3)
    features = model(**model.tokenize(DOCUMENTS)).features.detach().numpy()
    found = model.encode(DOCUMENTS, normalize_embeddings=False)
    assert np.allclose(found, features * model.config.feature_scale, atol=1e-5)


def test_without_a_start_the_head_is_still_the_encoder(model):
    alone = model.encode(DOCUMENTS, normalize_embeddings=True)
    model.fit_lexical(DOCUMENTS, num_start_texts=0, weight=0.3)
    assert np.allclose(model.encode(DOCUMENTS, normalize_embeddings=True), alone, atol=1e-6)


def test_exact_words_decide_between_texts(model):
    model.fit_lexical(DOCUMENTS, weight=0.9)
    scores = model.similarity(model.encode_query(["bread"]), model.encode_document(DOCUMENTS))
    assert scores.argmax().item() == 5


def test_words_of_the_prompts_count_nothing(tiny_encoder_folder):
    prompts = {"query_prompt": "query: ", "document_prompt": "document: "}
    model = IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder), **prompts)
    model.fit_lexical(DOCUMENTS, weight=0.3)
    with_prompt, without = (model.tokenize(["red fish"], prompt) for prompt in ("query: ", ""))
    assert torch.allclose(model.lexical_features(**with_prompt), model.lexical_features(**without))


def test_a_weight_of_zero_adds_no_half(model):
    before = model.encode(DOCUMENTS)
    model.fit_lexical(DOCUMENTS, weight=0.0)
    assert model.lexical is None and model.config.feature_dim == model.config.encoder_dim
    assert np.array_equal(model.encode(DOCUMENTS), before)


def test_a_trained_head_is_refused(model):
    model.is_untrained = False
    with pytest.raises(ValueError, match="untrained head"):
        model.fit_lexical(DOCUMENTS)


def test_a_saved_model_gives_the_same_vectors_everywhere(model, tmp_path):
    from sentence_transformers import SentenceTransformer

    model.fit_lexical(DOCUMENTS, dim=6, weight=0.3)
    expected = model.encode(DOCUMENTS)
    model.save_pretrained(tmp_path)
    loaded = IsotropicGaussianModel.from_pretrained(tmp_path)
    assert loaded.lexical.table.dtype == torch.float16
    assert np.array_equal(loaded.encode(DOCUMENTS), expected)
    auto = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert np.array_equal(auto.encode(DOCUMENTS), expected)
    assert np.allclose(
        SentenceTransformer(str(tmp_path), trust_remote_code=True).encode(DOCUMENTS), expected, atol=1e-6
    )
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_the_published_folder_needs_nothing_installed_but_transformers(model, tmp_path):
    """The folder's own code loads, and encodes, where `ragcun_hf` cannot be imported."""
    model.fit_lexical(DOCUMENTS, dim=6, weight=0.3)
    model.save_pretrained(tmp_path / "model")
    code = (
        "import sys; sys.modules['ragcun_hf'] = None\n"
        "from transformers import AutoModel\n"
        f"model = AutoModel.from_pretrained({str(tmp_path / 'model')!r}, trust_remote_code=True)\n"
        "print(model.encode(['red fish']).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert np.allclose(eval(done.stdout), model.encode(["red fish"]), atol=1e-6)  # noqa: S307


def test_resized_token_embeddings_resize_the_table(model):
    model.fit_lexical(DOCUMENTS, weight=0.3)
    expected = model.encode(DOCUMENTS)
    vocab_size = model.lexical.table.shape[0]
    model.resize_token_embeddings(vocab_size + 3)
    assert model.lexical.table.shape[0] == vocab_size + 3
    assert np.allclose(model.encode(DOCUMENTS), expected, atol=1e-6)


def test_the_store_joins_halves_that_it_keeps_apart(model, tmp_path):
    model.fit_lexical(DOCUMENTS, dim=4, weight=0.3)
    store = FeatureStore(model, cache_folder=tmp_path, dtype="float32", show_progress=False)
    expected = model(**model.tokenize(DOCUMENTS)).features.detach().numpy()
    assert np.allclose(store.features(DOCUMENTS).vectors, expected, atol=1e-5)
    model.config.lexical_weight = 0.6  # needs no new store: halves are joined when they are read
    expected = model(**model.tokenize(DOCUMENTS)).features.detach().numpy()
    assert np.allclose(store.features(DOCUMENTS).vectors, expected, atol=1e-5)


def test_another_fit_encodes_nothing_again(model, tmp_path, monkeypatch):
    model.fit_lexical(DOCUMENTS, dim=4, weight=0.3)
    FeatureStore(model, cache_folder=tmp_path, dtype="float32", show_progress=False).features(DOCUMENTS)
    model.fit_lexical(DOCUMENTS[:4], dim=4, weight=0.3, num_start_texts=0)
    store = FeatureStore(model, cache_folder=tmp_path, dtype="float32", show_progress=False)
    monkeypatch.setattr(model, "compute_features", None)  # the encoder must not run
    found = store.features(DOCUMENTS).vectors
    monkeypatch.undo()
    assert np.allclose(found, model(**model.tokenize(DOCUMENTS)).features.detach().numpy(), atol=1e-5)
    assert "0 texts encoded, 6 known before" in store.summary()


def test_the_store_without_a_cache_joins_halves_too(model):
    model.fit_lexical(DOCUMENTS, dim=4, weight=0.3)
    store = FeatureStore(model, cache_folder=None, dtype="float32", show_progress=False)
    expected = model(**model.tokenize(DOCUMENTS)).features.detach().numpy()
    assert np.allclose(store.features(DOCUMENTS).vectors, expected, atol=1e-5)
