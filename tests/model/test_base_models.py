"""Loading models: a wrong flag or folder is a user error that names the way out."""

import pytest

from ragcun_hf.errors import UserError
from ragcun_hf.model.base_models import load_base_model, load_trained_model


@pytest.mark.parametrize("fields", [{"pooling": "max"}, {"output_dim": 0}, {"dropout": 1.5}, {"max_length": 999}])
def test_a_model_flag_that_does_not_fit_is_a_user_error_that_names_it(tiny_encoder_folder, fields):
    with pytest.raises(UserError, match=next(iter(fields))):
        load_base_model(str(tiny_encoder_folder), **fields)


def test_a_base_model_that_cannot_be_loaded_is_a_user_error_that_names_the_way_out(tmp_path):
    with pytest.raises(UserError, match="--base_model embedded"):
        load_base_model("no-such-owner/no-such-model")
    with pytest.raises(UserError, match="no model can be made with .*: Unrecognized model"):
        load_base_model(str(tmp_path))


def test_a_folder_with_another_type_of_model_is_a_user_error(tiny_encoder_folder, tmp_path):
    with pytest.raises(UserError, match="expects a model of type isotropic_gaussian, got bert"):
        load_trained_model(str(tiny_encoder_folder))
    with pytest.raises(UserError, match="--model_path expects a folder"):
        load_trained_model(str(tmp_path / "nothing"))
