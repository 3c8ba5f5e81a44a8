"""What users of transformers expect of any model: outputs, saving, embeddings, checkpointing, precision, copies."""

import copy
import os
import stat
import warnings

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from ragcun_hf import IsotropicGaussianConfig, IsotropicGaussianModel, register_auto_classes
from ragcun_hf.model.modeling_isotropic_gaussian import IsotropicGaussianOutput, encoder_layers

TEXTS = ["sort an array", "the sun", "why do fish sleep in the water of the river", "bread is food", "moon"]


@pytest.fixture(params=["bert", "mpnet", "decoder"])
def folder(request, tiny_encoder_folder, tiny_mpnet_folder, tiny_decoder_folder):
    return {"bert": tiny_encoder_folder, "mpnet": tiny_mpnet_folder, "decoder": tiny_decoder_folder}[request.param]


def _make(folder, **fields):
    """A model whose head is far from its start."""
    torch.manual_seed(0)
    model = IsotropicGaussianModel.from_encoder(str(folder), use_predictor=True, **fields)
    with torch.no_grad():
        for parameter in [*model.projection.parameters(), *model.predictor.parameters()]:
            parameter += 0.3 * torch.randn(parameter.shape)
    return model


@pytest.fixture
def model(folder):
    return _make(folder)


@pytest.fixture
def tokens(model):
    return model.tokenize(TEXTS)


def _assert_equal_outputs(one, other):
    assert list(one) == list(other)
    for name in one:
        parts = (one[name], other[name]) if isinstance(one[name], tuple) else ((one[name],), (other[name],))
        assert all(torch.equal(a, b) for a, b in zip(*parts, strict=True)), name


# Outputs


@pytest.mark.parametrize("by", ["argument", "config"])
def test_a_tuple_has_the_values_of_the_output(model, tokens, by):
    expected = model(**tokens, output_hidden_states=True)
    options = {"return_dict": False} if by == "argument" else {}
    model.config.return_dict = by == "argument"
    found = model(**tokens, output_hidden_states=True, **options)
    assert type(found) is tuple
    assert len(found) == len(expected) == 4
    _assert_equal_outputs(IsotropicGaussianOutput(*found), expected)
    assert isinstance(model(**tokens, return_dict=True), IsotropicGaussianOutput)
    assert model.encode_query(TEXTS).shape == (5, 16)  # whatever the config says


@pytest.mark.parametrize("by", ["argument", "config"])
def test_hidden_states_are_those_of_the_encoder(model, tokens, by):
    expected = model.encoder(**tokens, output_hidden_states=True)
    model.config.output_hidden_states = by == "config"
    output = model(**tokens, **({"output_hidden_states": True} if by == "argument" else {}))
    assert len(output.hidden_states) == 3
    assert all(torch.equal(a, b) for a, b in zip(output.hidden_states, expected.hidden_states, strict=True))
    assert torch.equal(output.hidden_states[-1], expected.last_hidden_state)
    assert model(**tokens, output_hidden_states=False).hidden_states is None
    assert model(features=output.features, output_hidden_states=True).hidden_states is None


def test_attentions_are_those_of_the_encoder(folder, tmp_path):
    _make(folder).save_pretrained(tmp_path)
    model = IsotropicGaussianModel.from_pretrained(tmp_path, attn_implementation="eager")
    tokens = model.tokenize(TEXTS)
    output = model(**tokens, output_attentions=True)
    expected = model.encoder(**tokens, output_attentions=True).attentions
    batch, length = tokens["input_ids"].shape
    assert [attention.shape for attention in output.attentions] == [(batch, 2, length, length)] * 2
    assert all(torch.equal(a, b) for a, b in zip(output.attentions, expected, strict=True))
    sums = output.attentions[0].sum(-1)[tokens["attention_mask"].bool()[:, None].expand(-1, 2, -1)]
    torch.testing.assert_close(sums, torch.ones_like(sums))
    plain = model(**tokens)
    assert (plain.attentions, plain.hidden_states) == (None, None)
    assert torch.equal(plain.embeddings, output.embeddings)


def test_an_attention_implementation_without_weights_gives_none(tiny_model):
    tokens = tiny_model.tokenize(TEXTS)
    assert tiny_model.encoder.config._attn_implementation == "sdpa"
    assert tiny_model(**tokens, output_attentions=True).attentions is None


def test_the_method_for_sentence_transformers_passes_the_same_options(model, tokens):
    output = model(**tokens, output_hidden_states=True)
    text = model.get_text_features(**tokens, output_hidden_states=True)
    expected = torch.nn.functional.normalize(output.embeddings, dim=1)
    assert torch.equal(text.pooler_output, expected)
    assert len(text.hidden_states) == 3
    assert torch.equal(model.get_text_features(**tokens, return_dict=False)[0], expected)


# Evaluation mode, copies, precision


def test_evaluation_is_deterministic_and_training_is_not(folder):
    model = _make(folder, dropout=0.5)
    tokens = model.tokenize(TEXTS)
    _assert_equal_outputs(model(**tokens), model(**tokens))
    model.train()
    assert not torch.equal(model(**tokens).embeddings, model(**tokens).embeddings)


def test_a_deep_copy_gives_equal_outputs_and_shares_no_weights(model, tokens):
    expected = model(**tokens)
    other = copy.deepcopy(model)
    _assert_equal_outputs(other(**tokens), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    _assert_equal_outputs(model(**tokens), expected)
    np.testing.assert_array_equal(model.encode_query(TEXTS), copy.deepcopy(model).encode_query(TEXTS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close(model, tokens, dtype):
    expected = model(**tokens)
    half = copy.deepcopy(model).half() if dtype == torch.float16 else copy.deepcopy(model).to(dtype)
    output = half(**tokens)
    assert output.embeddings.dtype == output.predictions.dtype == dtype
    assert output.features.dtype == torch.float32
    for name in ("embeddings", "predictions"):
        assert torch.nn.functional.cosine_similarity(output[name].float(), expected[name]).min() > 0.99
    assert half.encode_query(TEXTS).dtype == np.float32


# Saving and loading


def test_loading_gives_all_outputs_back(model, tokens, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = IsotropicGaussianModel.from_pretrained(tmp_path)
    _assert_equal_outputs(loaded(**tokens, output_hidden_states=True), model(**tokens, output_hidden_states=True))


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "5KB"}])
def test_saved_files_follow_the_umask(tiny_model, tmp_path, shards):
    before = os.umask(0o027)
    try:
        tiny_model.save_pretrained(tmp_path / "model", **shards)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()}
    assert (len([name for name in modes if name.endswith(".safetensors")]) > 1) is bool(shards)
    assert set(modes.values()) == {0o640}, modes


def test_a_model_made_of_a_config_is_saved_without_a_tokenizer_and_says_so(model, tokens, tmp_path, caplog):
    made = IsotropicGaussianModel(IsotropicGaussianConfig.from_dict(model.config.to_dict())).eval()
    made.save_pretrained(tmp_path / "first")
    assert "saved without a tokenizer" in caplog.text
    caplog.clear()
    loaded = IsotropicGaussianModel.from_pretrained(tmp_path / "first")
    _assert_equal_outputs(loaded(**tokens), made(**tokens))
    for one in (made, loaded):
        with pytest.raises(ValueError, match="The model has no tokenizer"):
            one.encode_query("the sun")
    loaded.save_pretrained(tmp_path / "second")
    assert "saved without a tokenizer" in caplog.text
    caplog.clear()
    loaded.tokenizer = model.tokenizer
    loaded.save_pretrained(tmp_path / "third")
    assert not caplog.records
    whole = IsotropicGaussianModel.from_pretrained(tmp_path / "third")
    np.testing.assert_array_equal(whole.encode_query(TEXTS), loaded.encode_query(TEXTS))


def test_a_config_of_a_saved_folder_makes_a_model_with_its_tokenizer(model, tmp_path):
    register_auto_classes()
    model.save_pretrained(tmp_path / "saved")
    made = AutoModel.from_config(AutoConfig.from_pretrained(tmp_path / "saved"))
    assert made.tokenizer.get_vocab() == model.tokenizer.get_vocab()


def test_a_tokenizer_that_cannot_be_loaded_leaves_no_files(tiny_model, tmp_path):
    tiny_model.tokenizer = None
    tiny_model.name_or_path = "no/such/folder"
    with pytest.raises(OSError, match="no/such/folder"):
        tiny_model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("changed", "expected"), [(5, 5), (20, 20), (500, 32), (int(1e30), 9), (None, 9)])
def test_a_length_that_was_changed_in_the_tokenizer_alone_is_that_of_the_model(folder, tmp_path, changed, expected):
    register_auto_classes()
    _make(folder, max_length=9).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.model_max_length = changed
    tokenizer.save_pretrained(tmp_path)
    for loader in (IsotropicGaussianModel, AutoModel):
        assert loader.from_pretrained(tmp_path).config.max_length == expected
        assert loader.from_pretrained(tmp_path, max_length=7).config.max_length == 7


# Token embeddings


def test_token_embeddings_can_be_replaced(model, tokens):
    expected = model(**tokens).embeddings
    old = model.get_input_embeddings()
    new = copy.deepcopy(old)
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is new
    assert model.encoder.get_input_embeddings() is new
    torch.nn.init.normal_(new.weight)
    assert (model(**tokens).embeddings - expected).abs().max() > 0.1
    larger = torch.nn.Embedding(100, 16)
    model.set_input_embeddings(larger)
    assert model.config.encoder_config.vocab_size == model.encoder.config.vocab_size == 100
    assert not larger.weight.requires_grad


@pytest.mark.parametrize("change", [7, -3])
def test_resized_token_embeddings_survive_saving(model, tokens, tmp_path, change):
    kept = tokens["input_ids"] < 40  # the words that stay
    tokens = {"input_ids": tokens["input_ids"].where(kept, 0), "attention_mask": tokens["attention_mask"]}
    expected = model(**tokens)
    size = model.get_input_embeddings().num_embeddings + change
    torch.manual_seed(0)
    assert model.resize_token_embeddings(size) is model.get_input_embeddings()
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    _assert_equal_outputs(model(**tokens), expected)
    assert not model.get_input_embeddings().weight.requires_grad  # it was frozen
    model.save_pretrained(tmp_path)
    loaded = IsotropicGaussianModel.from_pretrained(tmp_path)
    for one in (model, loaded):
        assert one.config.encoder_config.vocab_size == one.encoder.config.vocab_size == size
        assert one.get_input_embeddings().weight.shape == (size, 16)
    before, after = model.state_dict(), loaded.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    last = {"input_ids": torch.tensor([[2, size - 1, 3]])}
    torch.testing.assert_close(loaded(**last).embeddings, model(**last).embeddings, rtol=1e-5, atol=1e-5)


# Gradient checkpointing


def _gradients(model, tokens):
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.zero_grad()
    model(**tokens).predictions[:, 0].sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_checkpointing_gives_equal_gradients_or_a_clear_error(folder):
    model = _make(folder, freeze_base=False, dropout=0.0)
    model.encoder.config.attention_dropout = 0.0
    tokens = model.tokenize(TEXTS)
    plain = _gradients(model, tokens)
    is_supported = model.config.encoder_config.model_type != "mpnet"
    assert model.supports_gradient_checkpointing is is_supported
    if not is_supported:
        with pytest.raises(ValueError, match="encoder that supports it, got MPNetModel, which does not"):
            model.activation_checkpointing_enable()
        with warnings.catch_warnings(), pytest.raises(ValueError, match="got MPNetModel, which does not"):
            warnings.simplefilter("ignore", FutureWarning)  # the name that transformers 5 still accepts
            model.gradient_checkpointing_enable()
        return
    layer = encoder_layers(model.encoder)[0]
    calls = []
    next(layer.children()).register_forward_pre_hook(lambda *_: calls.append(1))
    model.activation_checkpointing_enable()
    assert layer.gradient_checkpointing
    checkpointed = _gradients(model, tokens)
    assert len(calls) == 2  # forward, and again in the backward pass
    assert checkpointed.keys() == plain.keys()
    assert all(torch.allclose(plain[name], checkpointed[name], atol=1e-4) for name in plain)
    model.activation_checkpointing_disable()
    assert not layer.gradient_checkpointing
