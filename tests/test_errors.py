"""What a UserError says: flags where a command runs, arguments in Python."""

import pickle

import pytest

from ragcun_hf import errors
from ragcun_hf.errors import NotFiniteError, UserError


@pytest.fixture
def in_python(monkeypatch):
    monkeypatch.setattr(errors, "_is_command", [])


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("--blend 0.5 needs a frozen encoder: leave one out", "blend 0.5 needs a frozen encoder: leave one out"),
        ("leave --no_freeze_base and --no_feature_cache out", "leave freeze_base=False and feature_cache=False out"),
        ("add --val_data, or raise --epochs", "add eval_dataset, or raise num_train_epochs"),
        ("run ragcun card --model_path a b: or --blend", "run ragcun card --model_path a b: or blend"),
        ("python training/x.py --help, or --top_k", "python training/x.py --help, or top_k"),
        ("accelerate launch --config_file f.yaml", "accelerate launch --config_file f.yaml"),
        ("a -- b, a--b, -x, ---", "a -- b, a--b, -x, ---"),
        ("got --unknown: --help lists them", "got unknown: --help lists them"),
    ],
)  # fmt: skip
def test_in_python_a_message_names_arguments_and_leaves_shell_commands_alone(in_python, message, said):
    assert str(UserError(message)) == said
    assert str(NotFiniteError(message)) == said
    assert str(pickle.loads(pickle.dumps(UserError(message)))) == said
    assert UserError(message).args == (message,)


def test_once_a_command_runs_messages_name_flags(in_python):
    error = UserError("--blend 0.5 needs a frozen encoder")
    assert str(error).startswith("blend")
    errors.name_flags()
    assert str(error).startswith("--blend")


def test_a_real_message_names_the_argument_that_a_python_user_gave(in_python, tmp_path):
    from ragcun_hf import IsotropicGaussianTrainingArguments
    from ragcun_hf.sweep.settings import random_settings

    with pytest.raises(UserError, match="^num_settings must be at least 1, got 0"):
        random_settings({"dropout": [0.1]}, 0, seed=0)
    with pytest.raises(UserError, match="^from_recipe expects a recipe or a readable YAML file"):
        IsotropicGaussianTrainingArguments.from_recipe(str(tmp_path / "missing.yaml"))
    with pytest.raises(
        UserError, match="got 'adpt' .*: did you mean adapt[?] check the path, or name one of .*unlabelled"
    ):
        IsotropicGaussianTrainingArguments.from_recipe("adpt")
