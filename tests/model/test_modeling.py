"""The model: starts of the head, pooling, encoding, freezing, saving."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from ragcun_hf import IsotropicGaussianConfig, IsotropicGaussianModel
from ragcun_hf.model.base_models import register_auto_classes
from ragcun_hf.model.pooling_isotropic_gaussian import pool

TEXTS = [
    "sort an array",
    "the sun",
    "why do fish sleep in the water of the river",
    "bread is food and water is drink",
    "moon",
    "a bird and a fish are in the tree",
    "",
]


@pytest.fixture(params=["bert", "mpnet", "decoder"])
def any_encoder_folder(request, tiny_encoder_folder, tiny_mpnet_folder, tiny_decoder_folder):
    return {"bert": tiny_encoder_folder, "mpnet": tiny_mpnet_folder, "decoder": tiny_decoder_folder}[request.param]


def _start(folder, **fields):
    torch.manual_seed(0)
    return IsotropicGaussianModel.from_encoder(str(folder), **fields)


def _perturb(module, seed=0):
    """Move every head parameter, as training would, so that no start value hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return module


def _features(rows=50, width=16, seed=3):
    # Unlike energies per direction, so that principal directions exist.
    scales = torch.linspace(0.1, 2.0, width)
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * scales


# The start of the head


def test_a_predictor_that_is_switched_off_is_left_out_and_a_lack_of_memory_is_no_wrong_path(
    tiny_encoder_folder, tmp_path, monkeypatch
):
    from ragcun_hf.model.base_models import load_trained_model

    IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder), use_predictor=True).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "use_predictor": False}), encoding="utf-8")
    assert load_trained_model(str(tmp_path)).predictor is None

    def refuse(*_args, **_options):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(IsotropicGaussianModel, "from_pretrained", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        load_trained_model(str(tmp_path))


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_identity_start_gives_exactly_the_scaled_encoder_features(tiny_encoder_folder, kind):
    model = _start(tiny_encoder_folder, projection_kind=kind)
    tokens = model.tokenize(TEXTS)
    output = model(**tokens)
    assert model.config.feature_scale == 4.0
    assert torch.equal(output.embeddings, output.features * 4.0)
    states = model.encoder(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    mean = (states * mask).sum(1) / mask.sum(1)
    assert torch.allclose(output.features, mean / mean.norm(dim=1, keepdim=True), atol=1e-6)


def test_orthonormal_start_of_a_wider_embedding_keeps_inner_products(tiny_encoder_folder):
    model = _start(tiny_encoder_folder, output_dim=24)
    features = _features()
    embeddings = model(features=features).embeddings
    assert embeddings.shape == (50, 24)
    expected = features @ features.T * model.config.feature_scale**2
    assert torch.allclose(embeddings @ embeddings.T, expected, rtol=1e-4, atol=1e-3)


def test_start_of_a_narrower_embedding_is_a_set_of_orthonormal_directions(tiny_encoder_folder):
    weight = _start(tiny_encoder_folder, output_dim=6).projection.linear.weight
    assert torch.allclose(weight @ weight.T, torch.eye(6), atol=1e-5)


def test_principal_start_equals_an_independent_singular_value_decomposition(tiny_encoder_folder):
    model = _start(tiny_encoder_folder, output_dim=6)
    features = _features() + 0.5  # a mean, which the uncentred moment must count
    model.start_from_features(features)
    _, _, directions = np.linalg.svd(features.double().numpy(), full_matrices=False)
    weight = model.projection.linear.weight.detach().double().numpy()
    # Signs and rotations inside the subspace are free: compare the projectors.
    np.testing.assert_allclose(weight.T @ weight, directions[:6].T @ directions[:6], atol=1e-5)


def test_principal_start_keeps_more_energy_than_the_random_subspace_it_replaces(tiny_encoder_folder):
    model = _start(tiny_encoder_folder, output_dim=6)
    features = _features()
    before = model(features=features).embeddings.square().sum()
    model.start_from_features(features)
    after = model(features=features).embeddings.square().sum()
    total = (features * model.config.feature_scale).square().sum()
    assert before / total < 0.6
    assert 0.65 < after / total <= 1.0


@pytest.mark.parametrize("fields", [{}, {"output_dim": 20}, {"output_dim": 6, "projection_init": "random"}])
def test_principal_start_leaves_every_other_start_alone(tiny_encoder_folder, fields):
    model = _start(tiny_encoder_folder, **fields)
    before = copy.deepcopy(model.state_dict())
    model.start_from_features(_features())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("output_dim", [6, 16, 20])
def test_whitened_start_evens_out_the_variances_and_keeps_the_mean_length(tiny_encoder_folder, output_dim):
    model = _start(tiny_encoder_folder, output_dim=output_dim)
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(200, 16, generator=generator) * torch.linspace(0.5, 3.0, 16) + 0.3
    model.start_from_features(features)
    plain = model(features=features).embeddings.detach()
    model.start_from_features(features, whitening=0.3)
    white = model(features=features).embeddings.detach()

    def spread(rows):
        return torch.linalg.eigvalsh(torch.cov(rows.T))[-min(output_dim, 16) :].log().std()

    assert spread(white) < 0.7 * spread(plain)
    if output_dim >= 16:
        assert torch.allclose(white.norm(dim=1).mean(), plain.norm(dim=1).mean(), rtol=1e-4)


def test_whitening_map_equals_the_formula_for_independent_coordinates(tiny_encoder_folder):
    # Coordinates +-a_i in all combinations: mean 0, covariance diag(a_i^2), so the map is diagonal.
    model = _start(tiny_encoder_folder)
    signs = torch.tensor([[1.0 if row >> bit & 1 else -1.0 for bit in range(4)] for row in range(16)]).repeat(1, 4)
    features = torch.zeros(64, 16)
    scales = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for block in range(4):  # four coordinates at a time, the others 0
        features[block * 16 : (block + 1) * 16, block * 4 : block * 4 + 4] = signs[:, :4] * scales
    model.start_from_features(features, whitening=0.5)
    variances = (scales.square() / 4).repeat(4)  # each coordinate is 0 in three quarters of the rows
    expected = (variances / variances.mean() + 0.05) ** -0.5
    weight = model.projection.linear.weight.detach()
    assert torch.allclose(weight / weight[0, 0], torch.diag(expected / expected[0]), atol=1e-5)


def test_random_start_has_the_layers_of_the_original_and_no_others(tiny_encoder_folder):
    model = _start(tiny_encoder_folder, projection_init="random", use_predictor=True, output_dim=10, dropout=0.2)
    for head, widths in ((model.projection, (16, 32, 10)), (model.predictor, (10, 20, 10))):
        assert head.linear is None
        first, gelu, dropout, last = head.mlp
        assert isinstance(gelu, nn.GELU)
        assert dropout.p == 0.2
        assert (first.in_features, first.out_features, last.out_features) == widths
        assert last.weight.abs().sum() > 0
    x = _features()
    by_hand = model.projection.mlp[3](nn.functional.gelu(model.projection.mlp[0](x)))
    assert torch.allclose(model.projection(x), by_hand)


def test_linear_random_start_is_one_layer(tiny_encoder_folder):
    model = _start(tiny_encoder_folder, projection_init="random", projection_kind="linear", output_dim=10)
    assert model.projection.mlp is None
    assert sum(parameter.numel() for parameter in model.projection.parameters()) == 16 * 10 + 10
    assert not torch.allclose(model.projection.linear.weight @ model.projection.linear.weight.T, torch.eye(10))


@pytest.mark.parametrize("output_dim", [6, 16, 24])
def test_predictor_starts_as_the_identity(tiny_encoder_folder, output_dim):
    output = _start(tiny_encoder_folder, use_predictor=True, output_dim=output_dim)(features=_features())
    assert output.embeddings.shape == (50, output_dim)
    assert torch.equal(output.predictions, output.embeddings)


def test_residual_branch_that_starts_at_zero_can_learn(tiny_encoder_folder):
    model = _start(tiny_encoder_folder)
    model(features=_features()).embeddings.square().sum().backward()
    assert model.projection.mlp[3].weight.grad.abs().sum() > 0


# Pooling and forward


STATES = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [5.0, 10.0]], [[1.0, 0.0], [7.0, 8.0], [9.0, 4.0]]])


@pytest.mark.parametrize(
    ("pooling", "mask", "expected"),
    [
        # Row 0 is padded on the right, row 1 on the left.
        ("mean", [[1, 1, 0], [0, 1, 1]], [[2.0, 4.0], [8.0, 6.0]]),
        ("cls", [[1, 1, 0], [0, 1, 1]], [[1.0, 2.0], [7.0, 8.0]]),
        ("last", [[1, 1, 0], [0, 1, 1]], [[3.0, 6.0], [9.0, 4.0]]),
        ("mean", [[1, 1, 1], [1, 1, 1]], [[3.0, 6.0], [17 / 3, 4.0]]),
        ("cls", [[1, 1, 1], [1, 1, 1]], [[1.0, 2.0], [1.0, 0.0]]),
        ("last", [[1, 1, 1], [1, 1, 1]], [[5.0, 10.0], [9.0, 4.0]]),
        ("cls", [[1, 0, 0], [0, 0, 1]], [[1.0, 2.0], [9.0, 4.0]]),
        ("last", [[1, 0, 0], [0, 0, 1]], [[1.0, 2.0], [9.0, 4.0]]),
    ],
)
def test_pooling_sees_attended_tokens_only_with_padding_on_either_side(pooling, mask, expected):
    assert torch.allclose(pool(STATES, torch.tensor(mask), pooling), torch.tensor(expected))


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_company_in_a_batch_does_not_change_a_vector(any_encoder_folder, pooling, side):
    model = _start(any_encoder_folder, pooling=pooling)
    if side == "left" and model.config.encoder_config.model_type == "bert":
        pytest.skip("BERT counts positions from the left edge of the batch; its tokenizers pad on the right")
    model.tokenizer = copy.deepcopy(model.tokenizer)
    model.tokenizer.padding_side = side
    together = model(**model.tokenize(TEXTS)).embeddings
    alone = torch.cat([model(**model.tokenize([text])).embeddings for text in TEXTS])
    assert torch.isfinite(together).all()
    assert torch.allclose(together, alone, atol=2e-5)
    # The first token of a causal decoder sees itself only.
    assert (alone[0] - alone[1]).abs().max() > 0.1 or (pooling == "cls" and "gemma" in model.encoder.config.model_type)


def test_poolings_differ(tiny_encoder_folder):
    vectors = [_start(tiny_encoder_folder, pooling=name).encode_query("the sun is red") for name in ("mean", "cls")]
    vectors.append(_start(tiny_encoder_folder, pooling="last").encode_query("the sun is red"))
    assert min(np.abs(vectors[i] - vectors[j]).max() for i, j in ((0, 1), (0, 2), (1, 2))) > 0.01


def test_forward_of_features_equals_forward_of_tokens(tiny_model):
    _perturb(tiny_model.projection)
    _perturb(tiny_model.predictor, seed=1)
    by_tokens = tiny_model(**tiny_model.tokenize(TEXTS))
    by_features = tiny_model(features=by_tokens.features)
    assert torch.equal(by_features.embeddings, by_tokens.embeddings)
    assert torch.equal(by_features.predictions, by_tokens.predictions)
    assert not torch.allclose(by_tokens.predictions, by_tokens.embeddings, atol=0.1)


def test_both_or_neither_of_tokens_and_features_is_refused(tiny_model):
    tokens = tiny_model.tokenize(["the sun"])
    with pytest.raises(ValueError, match="either `input_ids` or `features`"):
        tiny_model(**tokens, features=torch.zeros(1, 16))
    with pytest.raises(ValueError, match="either `input_ids` or `features`"):
        tiny_model()


def test_a_missing_attention_mask_means_that_every_token_counts(tiny_model):
    tokens = tiny_model.tokenize(["sort an array"])
    assert torch.equal(tiny_model(input_ids=tokens["input_ids"]).features, tiny_model(**tokens).features)


def test_normalize_features_is_what_makes_features_unit_length(tiny_encoder_folder):
    tokens = _start(tiny_encoder_folder).tokenize(TEXTS)
    unit = _start(tiny_encoder_folder)(**tokens)
    raw = _start(tiny_encoder_folder, normalize_features=False)(**tokens)
    assert torch.allclose(unit.features.norm(dim=1), torch.ones(len(TEXTS)), atol=1e-6)
    assert (raw.features.norm(dim=1) - 1).abs().min() > 0.1
    assert torch.allclose(raw.features / raw.features.norm(dim=1, keepdim=True), unit.features, atol=1e-6)
    assert torch.equal(raw.embeddings, raw.features)


# Encoding


def test_one_string_gives_one_vector_and_a_list_gives_rows(tiny_model):
    one = tiny_model.encode_query("the sun")
    many = tiny_model.encode_query(["the sun"])
    assert (one.shape, many.shape, one.dtype) == ((16,), (1, 16), np.float32)
    assert isinstance(one, np.ndarray)
    np.testing.assert_array_equal(one, many[0])


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_encoding_keeps_the_order_of_texts_of_any_length(tiny_model, batch_size):
    expected = np.stack([tiny_model.encode_document(text) for text in TEXTS])
    vectors = tiny_model.encode_document(TEXTS, batch_size=batch_size)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert np.abs(np.diff(expected, axis=0)).max(axis=1).min() > 0.1  # the rows can be told apart


def test_prompts_are_put_before_queries_and_documents(tiny_encoder_folder):
    plain = _start(tiny_encoder_folder)
    model = _start(tiny_encoder_folder, query_prompt="query: ", document_prompt="document: ")
    np.testing.assert_allclose(model.encode_query("the sun"), plain.encode_query("query: the sun"), atol=1e-6)
    np.testing.assert_allclose(model.encode_document("the sun"), plain.encode_document("document: the sun"), atol=1e-6)
    assert np.abs(model.encode_query("the sun") - model.encode_document("the sun")).max() > 0.01
    assert np.abs(model.encode_query("the sun") - plain.encode_query("the sun")).max() > 0.01


def test_encoding_gives_torch_and_raw_vectors_when_asked(tiny_model):
    vectors = tiny_model.encode_query(TEXTS, convert_to_tensor=True, normalize_embeddings=False)
    assert isinstance(vectors, torch.Tensor)
    assert (vectors.dtype, vectors.device.type, vectors.requires_grad) == (torch.float32, "cpu", False)
    unit = tiny_model.encode_query(TEXTS, convert_to_tensor=True, normalize_embeddings=True)
    assert torch.allclose(unit, vectors / vectors.norm(dim=1, keepdim=True), atol=1e-6)
    assert (vectors.norm(dim=1) - 1).abs().min() > 0.1


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
def test_vectors_leave_a_cosine_model_with_unit_length_and_others_unchanged(tiny_encoder_folder, similarity):
    model = _start(tiny_encoder_folder, similarity_fn_name=similarity, use_predictor=True)
    tokens = model.tokenize(TEXTS)
    with torch.no_grad():
        raw = model(**tokens)
        found = {
            "query": (model.encode_query(TEXTS), raw.embeddings),
            "document": (model.encode_document(TEXTS), raw.embeddings),
            "predicted": (model.encode_query(TEXTS, use_predictor=True), raw.predictions),
            "sentence-transformers": (model.get_text_features(**tokens).pooler_output.numpy(), raw.embeddings),
        }
    for name, (vectors, expected) in found.items():
        lengths = np.linalg.norm(vectors, axis=1)
        if similarity == "cosine":
            expected = expected / expected.norm(dim=1, keepdim=True)
            np.testing.assert_allclose(lengths, 1, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(vectors, expected, atol=1e-5, err_msg=name)


def test_vectors_can_be_trained_on(tiny_model):
    vectors = tiny_model.encode_query(TEXTS, convert_to_tensor=True)
    tiny_model.predictor(vectors).sum().backward()
    assert tiny_model.predictor.linear.weight.grad is not None


def test_use_predictor_returns_the_predictor_s_output(tiny_model):
    _perturb(tiny_model.predictor)
    raw = {"convert_to_tensor": True, "normalize_embeddings": False}
    embeddings = tiny_model.encode_query(TEXTS, **raw)
    predictions = tiny_model.encode_query(TEXTS, use_predictor=True, **raw)
    assert torch.allclose(predictions, tiny_model.predictor(embeddings), rtol=1e-4, atol=1e-4)
    assert (predictions - embeddings).abs().max() > 0.1


def test_use_predictor_without_a_predictor_is_refused(tiny_encoder_folder):
    with pytest.raises(ValueError, match="`use_predictor` needs a model with a predictor"):
        _start(tiny_encoder_folder).encode_query("the sun", use_predictor=True)


@pytest.mark.parametrize(("texts", "place"), [(["the sun", None], 1), ([3], 0), ([["the sun"]], 0)])
def test_what_is_no_string_is_refused_with_its_position(tiny_model, texts, place):
    with pytest.raises(ValueError, match=f"must be strings, got .* at position {place}"):
        tiny_model.encode_document(texts)


def test_no_texts_give_no_rows(tiny_model):
    assert tiny_model.encode_query([]).shape == (0, 16)
    assert tiny_model.encode_document([], convert_to_tensor=True, normalize_embeddings=True).shape == (0, 16)


def test_encoding_cuts_texts_at_max_length(tiny_encoder_folder):
    model = _start(tiny_encoder_folder, max_length=6)  # four words and two special tokens
    np.testing.assert_allclose(
        model.encode_query("sort an array in the tree"), model.encode_query("sort an array in"), atol=1e-6
    )
    assert np.abs(model.encode_query("sort an array in") - model.encode_query("sort an array")).max() > 0.01


def test_encoding_uses_no_dropout_and_gives_the_mode_back(tiny_encoder_folder):
    model = _start(tiny_encoder_folder, freeze_base=False, dropout=0.5)
    _perturb(model.projection)
    expected = model.encode_query(TEXTS)
    model.train()
    np.testing.assert_array_equal(model.encode_query(TEXTS), expected)
    assert model.training
    assert model.projection.mlp[2].training


def test_encoding_that_fails_gives_the_mode_back(tiny_encoder_folder):
    model = _start(tiny_encoder_folder, freeze_base=False).train()
    model.tokenizer = None
    model.config._name_or_path = model.name_or_path = "no/such/folder"
    with pytest.raises(OSError, match="no/such/folder"):
        model.encode_query("the sun")
    assert model.training


def test_encoding_shows_progress_only_when_asked(tiny_model, capfd):
    tiny_model.encode_query(TEXTS)
    assert "Encoding" not in capfd.readouterr().err
    tiny_model.encode_query(TEXTS, show_progress_bar=True)
    assert "Encoding" in capfd.readouterr().err


# Freezing


def _trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _assert_frozen_encoder(model):
    assert _trainable(model) == {name for name, _ in model.named_parameters() if not name.startswith("encoder.")}
    model.train()
    assert not any(module.training for module in model.encoder.modules())
    assert all(module.training for module in model.projection.modules())
    model.eval()
    assert not model.projection.training


def test_a_frozen_encoder_stays_frozen_through_train_and_loading(any_encoder_folder, tmp_path):
    model = _start(any_encoder_folder)
    _assert_frozen_encoder(model)
    model.save_pretrained(tmp_path)
    _assert_frozen_encoder(IsotropicGaussianModel.from_pretrained(tmp_path))
    loaded, info = IsotropicGaussianModel.from_pretrained(tmp_path, output_loading_info=True)
    _assert_frozen_encoder(loaded)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_a_model_built_from_a_config_alone_is_frozen_as_it_says(tiny_model):
    torch.manual_seed(0)
    _assert_frozen_encoder(IsotropicGaussianModel(tiny_model.config))


def test_features_of_a_frozen_encoder_in_training_have_no_dropout(tiny_model):
    tokens = tiny_model.tokenize(TEXTS)
    expected = tiny_model(**tokens).features
    assert tiny_model.encoder.config.hidden_dropout_prob > 0
    tiny_model.train()
    assert torch.equal(tiny_model(**tokens).features, expected)


def test_backward_reaches_the_head_and_not_the_frozen_encoder(tiny_model):
    tiny_model.train()
    output = tiny_model(**tiny_model.tokenize(TEXTS))
    assert not output.features.requires_grad
    (output.embeddings.square().sum() + output.predictions.square().sum()).backward()
    assert all(parameter.grad is None for parameter in tiny_model.encoder.parameters())
    for head in (tiny_model.projection, tiny_model.predictor):
        assert head.linear.weight.grad.abs().sum() > 0


def test_without_freezing_everything_trains(any_encoder_folder, tmp_path):
    model = _start(any_encoder_folder, freeze_base=False)
    assert _trainable(model) == {name for name, _ in model.named_parameters()}
    model.train()
    assert model.encoder.training
    model(**model.tokenize(TEXTS)).embeddings[:, 0].sum().backward()
    without = [name for name, p in model.encoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not [name for name in without if "norm" not in name.lower() and "bias" not in name]
    model.save_pretrained(tmp_path)
    loaded = IsotropicGaussianModel.from_pretrained(tmp_path)
    assert _trainable(loaded) == _trainable(model)


def _first_layer_prefixes(model_type):
    return {
        "bert": ("encoder.embeddings.", "encoder.encoder.layer.0."),
        "mpnet": ("encoder.embeddings.", "encoder.encoder.layer.0."),
        "gemma3_text": ("encoder.embed_tokens.", "encoder.layers.0."),
    }[model_type]


def test_freeze_layers_freezes_exactly_the_embeddings_and_the_first_layers(any_encoder_folder, tmp_path):
    model = _start(any_encoder_folder, freeze_base=False, freeze_layers=1)
    prefixes = _first_layer_prefixes(model.config.encoder_config.model_type)
    expected = {name for name, _ in model.named_parameters() if not name.startswith(prefixes)}
    names = [name for name, _ in model.named_parameters()]
    assert all(any(name.startswith(prefix) for name in names) for prefix in prefixes)
    model.save_pretrained(tmp_path)
    for one in (model, IsotropicGaussianModel.from_pretrained(tmp_path)):
        assert _trainable(one) == expected
        one.train()
        frozen = [name for name, module in one.named_modules() if f"{name}.".startswith(prefixes)]
        assert frozen
        assert not any(one.get_submodule(name).training for name in frozen)
        assert one.encoder.training


def test_freezing_all_layers_leaves_what_is_outside_them(tiny_encoder_folder):
    model = _start(tiny_encoder_folder, freeze_base=False, freeze_layers=2)
    assert not [name for name in _trainable(model) if name.startswith("encoder.encoder.layer.")]
    assert not [name for name in _trainable(model) if name.startswith("encoder.embeddings.")]
    assert _trainable(model)
    assert not model.train().encoder.embeddings.dropout.training


def test_an_encoder_stored_in_half_precision_gives_a_float32_model_that_survives_saving(tiny_encoder_folder, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    AutoModel.from_pretrained(tiny_encoder_folder).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(tiny_encoder_folder).save_pretrained(tmp_path / "half")
    model = IsotropicGaussianModel.from_encoder(str(tmp_path / "half"))
    torch.nn.init.normal_(model.projection.mlp[3].weight)
    model.save_pretrained(tmp_path / "saved")
    loaded = IsotropicGaussianModel.from_pretrained(tmp_path / "saved")
    for one in (model, loaded):
        assert {parameter.dtype for parameter in one.parameters()} == {torch.float32}
    np.testing.assert_allclose(loaded.encode_query("the sun"), model.encode_query("the sun"), atol=1e-5)


def test_the_encoder_has_no_pooler_that_nothing_uses(tiny_model):
    assert not [name for name in tiny_model.state_dict() if "pooler" in name]


# Starting from folders written by sentence-transformers


def _sentence_transformers_folder(source, folder, *, pooling, normalize=True, length=None, prompts=None):
    shutil.copytree(source, folder)
    modules = ["Transformer", "Pooling"] + ["Normalize"] * normalize
    (folder / "modules.json").write_text(
        json.dumps(
            [
                {
                    "idx": i,
                    "name": str(i),
                    "path": "" if i == 0 else f"{i}_{name}",
                    "type": f"sentence_transformers.models.{name}",
                }
                for i, name in enumerate(modules)
            ]
        )
    )
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if length is not None:
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": length}))
    if prompts is not None:
        (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    return folder


def _modes(chosen):
    names = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    return {"word_embedding_dimension": 16, "include_prompt": True} | {
        f"pooling_mode_{name}": name in chosen for name in names
    }


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        (_modes(["mean_tokens"]) | {"include_prompt": False}, "mean"),
        (_modes(["mean_tokens"]), "mean"),
        (_modes(["cls_token"]), "cls"),
        (_modes(["lasttoken"]), "last"),
        ({"embedding_dimension": 16, "pooling_mode": "mean", "include_prompt": True}, "mean"),
        ({"embedding_dimension": 16, "pooling_mode": "cls", "include_prompt": True}, "cls"),
        ({"embedding_dimension": 16, "pooling_mode": "lasttoken", "include_prompt": True}, "last"),
    ],
)
def test_pooling_follows_the_sentence_transformers_folder(tiny_encoder_folder, tmp_path, pooling, expected):
    folder = _sentence_transformers_folder(tiny_encoder_folder, tmp_path / "st", pooling=pooling)
    assert _start(folder).config.pooling == expected


@pytest.mark.parametrize(
    "pooling",
    [
        _modes(["cls_token", "mean_tokens"]),
        _modes(["mean_tokens", "max_tokens"]),
        {"pooling_mode": "median"},
        {"pooling_mode": ["mean", "max"]},
        {},
    ],
)
def test_a_pooling_that_is_unknown_is_refused_unless_given(tiny_encoder_folder, tmp_path, pooling):
    folder = _sentence_transformers_folder(tiny_encoder_folder, tmp_path / "st", pooling=pooling)
    with pytest.raises(ValueError, match="weighted_mean is supported: pass it as `pooling`"):
        _start(folder)
    assert _start(folder, pooling="cls").config.pooling == "cls"


@pytest.mark.parametrize("normalize", [True, False])
def test_normalisation_follows_the_sentence_transformers_folder(tiny_encoder_folder, tmp_path, normalize):
    folder = _sentence_transformers_folder(
        tiny_encoder_folder, tmp_path / "st", pooling=_modes(["mean_tokens"]), normalize=normalize
    )
    config = _start(folder).config
    assert config.normalize_features is normalize
    assert config.feature_scale == (4.0 if normalize else 1.0)


@pytest.mark.parametrize(("length", "expected"), [(12, 12), (500, 32), (None, 32)])
def test_length_follows_the_sentence_transformers_folder_and_the_encoder(
    tiny_encoder_folder, tmp_path, length, expected
):
    folder = _sentence_transformers_folder(
        tiny_encoder_folder, tmp_path / "st", pooling=_modes(["mean_tokens"]), length=length
    )
    assert _start(folder).config.max_length == expected


def test_prompts_follow_the_sentence_transformers_folder_and_given_fields_win(tiny_encoder_folder, tmp_path):
    prompts = {"query": "search: ", "document": "document: ", "other": "x"}
    folder = _sentence_transformers_folder(
        tiny_encoder_folder, tmp_path / "st", pooling=_modes(["mean_tokens"]), prompts=prompts
    )
    config = _start(folder).config
    assert (config.query_prompt, config.document_prompt) == ("search: ", "document: ")
    given = _start(folder, query_prompt="query: ", max_length=8, normalize_features=False).config
    assert (given.query_prompt, given.document_prompt) == ("query: ", "document: ")
    assert (given.max_length, given.normalize_features) == (8, False)


def test_a_text_as_long_as_the_encoder_allows_can_be_encoded(any_encoder_folder):
    model = _start(any_encoder_folder)
    assert model.config.max_length == 32
    assert np.isfinite(model.encode_document("the sun " * 40)).all()


def test_from_encoder_keeps_the_pretrained_weights_and_names_their_source(any_encoder_folder):
    model = _start(any_encoder_folder)
    pretrained = AutoModel.from_pretrained(any_encoder_folder).state_dict()
    ours = model.encoder.state_dict()
    assert set(ours) == {name for name in pretrained if not name.startswith("pooler.")}
    assert all(torch.equal(tensor, pretrained[name]) for name, tensor in ours.items())
    assert model.config.base_model_name == any_encoder_folder.name
    assert not model.training
    # One that trains is loaded again for comparisons.
    assert _start(any_encoder_folder, freeze_base=False).config.base_model_name == str(any_encoder_folder)


# Saving and loading


def test_saving_and_loading_keeps_weights_and_vectors_bit_for_bit(any_encoder_folder, tmp_path):
    model = _start(any_encoder_folder, use_predictor=True, output_dim=10, query_prompt="query: ")
    _perturb(model.projection)
    _perturb(model.predictor, seed=1)
    model.save_pretrained(tmp_path)
    loaded = IsotropicGaussianModel.from_pretrained(tmp_path)
    before, after = model.state_dict(), loaded.state_dict()
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    np.testing.assert_array_equal(loaded.encode_query(TEXTS), model.encode_query(TEXTS))
    np.testing.assert_array_equal(
        loaded.encode_query(TEXTS, use_predictor=True), model.encode_query(TEXTS, use_predictor=True)
    )
    np.testing.assert_array_equal(loaded.encode_document(TEXTS), model.encode_document(TEXTS))
    # Buffers that are not saved must come back as they were, not as uninitialised memory.
    buffers = dict(loaded.named_buffers())
    assert all(torch.equal(tensor, buffers[name]) for name, tensor in model.named_buffers())


def test_a_saved_folder_holds_all_that_loading_needs_and_no_pickle(tiny_model, tmp_path):
    tiny_model.config.query_prompt = "query: "
    tiny_model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "config_sentence_transformers.json",
        "modules.json",
        "sentence_bert_config.json",
        "configuration_isotropic_gaussian.py",
        "sentence_transformers_isotropic_gaussian.py",
        "modeling_isotropic_gaussian.py",
    } <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))]
    settings = json.loads((tmp_path / "config_sentence_transformers.json").read_text())
    assert settings["similarity_fn_name"] == "cosine"
    assert settings["prompts"] == {"query": "query: ", "document": ""}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_isotropic_gaussian.IsotropicGaussianModel"
    assert config["auto_map"]["AutoConfig"] == "configuration_isotropic_gaussian.IsotropicGaussianConfig"


def test_the_saved_tokenizer_cuts_where_the_model_does(tiny_encoder_folder, tmp_path):
    from transformers import AutoTokenizer

    _start(tiny_encoder_folder, max_length=6).save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 6


def test_what_was_loaded_can_be_saved_again_without_being_used(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "first")
    IsotropicGaussianModel.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    shutil.rmtree(tmp_path / "first")
    loaded = IsotropicGaussianModel.from_pretrained(tmp_path / "second")
    np.testing.assert_array_equal(loaded.encode_query(TEXTS), tiny_model.encode_query(TEXTS))


def test_other_processes_write_nothing(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".json", ".safetensors")]


@pytest.mark.parametrize("name", ["bert", "decoder"])
def test_loading_in_bfloat16_works_and_is_close(name, tiny_encoder_folder, tiny_decoder_folder, tmp_path):
    model = _start(tiny_encoder_folder if name == "bert" else tiny_decoder_folder, use_predictor=True)
    _perturb(model.projection)
    model.save_pretrained(tmp_path)
    loaded = IsotropicGaussianModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    expected, vectors = model.encode_query(TEXTS), loaded.encode_query(TEXTS, use_predictor=True)
    assert vectors.dtype == np.float32
    cosines = (expected * vectors).sum(1) / np.linalg.norm(expected, axis=1) / np.linalg.norm(vectors, axis=1)
    assert cosines.min() > 0.98


def test_auto_classes_know_the_model_without_remote_code(tiny_model, tmp_path):
    register_auto_classes()
    tiny_model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), IsotropicGaussianConfig)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is IsotropicGaussianModel
    assert type(AutoModel.from_config(tiny_model.config)) is IsotropicGaussianModel
    np.testing.assert_array_equal(loaded.encode_query(TEXTS), tiny_model.encode_query(TEXTS))


@pytest.mark.slow
def test_the_real_encoder_at_identity_start_equals_sentence_transformers(embedded_folder):
    from sentence_transformers import SentenceTransformer

    model = IsotropicGaussianModel.from_encoder(str(embedded_folder))
    assert (model.config.pooling, model.config.normalize_features, model.config.max_length) == ("mean", True, 256)
    texts = ["Which bird sleeps in water?", "", "A tree. " * 300, "Sort an array."]
    expected = SentenceTransformer(str(embedded_folder), device="cpu").encode(texts)
    np.testing.assert_allclose(model.encode_document(texts, normalize_embeddings=True), expected, atol=1e-5)


def test_only_the_first_rows_get_a_prediction_where_so_many_are_asked_for(tiny_model):
    features = torch.randn(5, 16)
    whole, part = tiny_model(features=features), tiny_model(features=features, num_predicted=2)
    assert part.embeddings.shape == (5, 16)
    torch.testing.assert_close(part.predictions, whole.predictions[:2])


def test_a_frozen_encoder_is_set_right_by_train_even_where_somebody_else_set_it_wrong(tiny_model):
    torch.nn.Module.train(tiny_model.encoder, True)
    tiny_model.train()
    assert not any(module.training for module in tiny_model.encoder.modules())
    assert all(module.training for module in tiny_model.projection.modules())
    tiny_model.eval()
    assert not any(module.training for module in tiny_model.modules())
