"""Configuration: wrong values are refused by name, right ones survive saving."""

import json
import math

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, BertConfig, Gemma3TextConfig, MPNetConfig, Qwen3Config, XLMRobertaConfig

from ragcun_hf import IsotropicGaussianConfig
from ragcun_hf.model.base_models import register_auto_classes

BERT = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 2, "max_position_embeddings": 64}


def _config(**fields):
    return IsotropicGaussianConfig(**{"encoder_config": dict(BERT), "max_length": 32, **fields})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pooling", "median"),
        ("pooling", 3),
        ("projection_kind", "conv"),
        ("projection_init", "zeros"),
        ("similarity_fn_name", "manhattan"),
        ("output_dim", 0),
        ("output_dim", -4),
        ("output_dim", 2.5),
        ("output_dim", "16"),
        ("projection_hidden_dim", 0),
        ("predictor_hidden_dim", 0),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("dropout", math.nan),
        ("dropout", "a little"),
        ("feature_scale", 0.0),
        ("feature_scale", -1.0),
        ("feature_scale", math.inf),
        ("feature_scale", math.nan),
        ("max_length", 0),
        ("max_length", 65),
        ("max_length", 12.0),
        ("normalize_features", "yes"),
        ("use_predictor", "no"),
        ("freeze_base", 1),
        ("query_prompt", None),
        ("document_prompt", ["passage: "]),
        ("default_prompt_name", "passage"),
        ("encoder_config", {"model_type": "no_such_model"}),
        ("encoder_config", "bert"),
        ("relevance_calibration", {}),
        ("relevance_calibration", {"bias": 0.0, "score": 1.0}),
        ("relevance_calibration", {"bias": 0.0, "score": 1.0, "margin": math.nan}),
        ("relevance_calibration", {"bias": 0.0, "score": 1.0, "margin": "a little"}),
        ("relevance_calibration", [0.0, 1.0, 2.0]),
    ],
)
def test_wrong_value_is_refused_at_construction_by_the_field_s_name(field, value):
    with pytest.raises((ValueError, StrictDataclassError), match=field):
        _config(**{field: value})


@pytest.mark.parametrize("layers", [-1, 3])
def test_freezing_more_layers_than_there_are_is_refused(layers):
    with pytest.raises(ValueError, match=r"`freeze_layers` must be between 0 and the encoder's 2"):
        _config(freeze_base=False, freeze_layers=layers)


def test_freezing_some_layers_of_a_frozen_encoder_is_refused():
    with pytest.raises(ValueError, match=r"`freeze_layers` needs `freeze_base=False`"):
        _config(freeze_base=True, freeze_layers=1)


def test_max_length_counts_the_positions_that_the_encoder_family_sets_aside():
    # MPNet and RoBERTa number positions from padding_idx + 1 = 2 on: of 34 positions 32 are usable.
    for family in ("mpnet", "roberta", "xlm-roberta"):
        encoder = {"model_type": family, "hidden_size": 16, "max_position_embeddings": 34, "pad_token_id": 1}
        assert _config(encoder_config=encoder, max_length=32).max_length == 32
        with pytest.raises(ValueError, match=r"`max_length` must be at most the encoder's 32 positions"):
            _config(encoder_config=encoder, max_length=33)


@pytest.mark.parametrize("fields", [{"dropout": 0}, {"feature_scale": 3}, {"dropout": 0.0}])
def test_whole_numbers_are_taken_where_a_real_number_is_meant(fields):
    config = _config(**fields)
    assert {name: getattr(config, name) for name in fields} == fields


def test_widths_that_are_not_given_follow_from_the_encoder():
    config = _config()
    assert (config.feature_dim, config.output_dim, config.hidden_size) == (16, 16, 16)
    assert (config.projection_hidden_dim, config.predictor_hidden_dim) == (32, 32)


def test_predictor_width_follows_from_the_embedding_and_projection_width_from_the_feature():
    config = _config(output_dim=10)
    assert (config.output_dim, config.hidden_size) == (10, 10)
    assert (config.projection_hidden_dim, config.predictor_hidden_dim) == (32, 20)


def test_feature_scale_is_the_root_of_the_width_only_for_unit_length_features():
    assert _config().feature_scale == 4.0
    assert _config(normalize_features=False).feature_scale == 1.0
    assert _config(feature_scale=2.5).feature_scale == 2.5


def test_default_encoder_is_mpnet_base():
    config = IsotropicGaussianConfig()
    assert isinstance(config.encoder_config, MPNetConfig)
    assert (config.feature_dim, config.output_dim, config.max_length) == (768, 768, 384)


FULL = {
    "base_model_name": "org/encoder",
    "pooling": "last",
    "normalize_features": False,
    "feature_scale": 1.5,
    "output_dim": 8,
    "projection_kind": "linear",
    "projection_init": "random",
    "projection_hidden_dim": 12,
    "dropout": 0.25,
    "use_predictor": True,
    "predictor_hidden_dim": 20,
    "similarity_fn_name": "euclidean",
    "query_prompt": "query: ",
    "document_prompt": "document: ",
    "default_prompt_name": "document",
    "max_length": 20,
    "freeze_base": False,
    "freeze_layers": 1,
}


def _fields(config):
    return {name: getattr(config, name) for name in FULL}


def test_round_trip_through_a_dictionary_keeps_every_field():
    config = _config(**FULL)
    assert _fields(config) == FULL
    again = IsotropicGaussianConfig.from_dict(config.to_dict())
    assert _fields(again) == FULL
    assert again.encoder_config.to_dict() == config.encoder_config.to_dict()


@pytest.mark.parametrize(
    "encoder",
    [
        BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2),
        MPNetConfig(hidden_size=24, num_hidden_layers=3, num_attention_heads=2),
        XLMRobertaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2),
        Gemma3TextConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=8),
        Qwen3Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1),
    ],
    ids=lambda encoder: encoder.model_type,
)
def test_saving_and_loading_keeps_every_field_and_any_encoder(encoder, tmp_path):
    register_auto_classes()
    config = IsotropicGaussianConfig(encoder_config=encoder, **FULL)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "isotropic_gaussian"
    for loaded in (IsotropicGaussianConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is IsotropicGaussianConfig
        assert _fields(loaded) == FULL
        assert type(loaded.encoder_config) is type(encoder)
        assert loaded.feature_dim == encoder.hidden_size
        assert loaded.encoder_config.num_hidden_layers == encoder.num_hidden_layers


def test_defaults_that_follow_from_others_are_stored_and_come_back(tmp_path):
    _config(output_dim=6).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert (stored["output_dim"], stored["projection_hidden_dim"], stored["feature_scale"]) == (6, 32, 4.0)
    loaded = IsotropicGaussianConfig.from_pretrained(tmp_path)
    assert (loaded.output_dim, loaded.predictor_hidden_dim, loaded.feature_scale) == (6, 12, 4.0)


def test_two_configurations_do_not_share_their_encoder_s_configuration():
    first, second = IsotropicGaussianConfig(), IsotropicGaussianConfig()
    first.encoder_config.num_hidden_layers = 1
    assert second.encoder_config.num_hidden_layers != 1


def test_the_given_dictionary_is_left_as_it_was():
    encoder = dict(BERT)
    _config(encoder_config=encoder)
    assert encoder == BERT


def test_a_wrong_value_in_a_saved_file_is_refused_when_loaded(tmp_path):
    _config().save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**stored, "pooling": "median"}))
    with pytest.raises((ValueError, StrictDataclassError), match="pooling"):
        IsotropicGaussianConfig.from_pretrained(tmp_path)
