"""What a UserError says: flags where a command runs, arguments in Python."""

import importlib
import pickle

import numpy as np
import pytest

from ragcun_hf import errors
from ragcun_hf.commands import COMMANDS
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


def _train(tiny_model, **changes):
    from ragcun_hf import IsotropicGaussianTrainer, IsotropicGaussianTrainingArguments

    arguments = IsotropicGaussianTrainingArguments(output_dir="unused", use_cpu=True, report_to="none")
    pairs = [{"query": "what is bread", "positive": "bread is food"}] * 4
    IsotropicGaussianTrainer(**{"model": tiny_model, "args": arguments, "train_dataset": pairs, **changes}).train()


def _evaluate(tiny_model, queries, documents, judgements):
    from ragcun_hf import RetrievalEvaluator

    RetrievalEvaluator(queries, documents, judgements)(tiny_model)


def _arguments(**values):
    from ragcun_hf import IsotropicGaussianTrainingArguments

    IsotropicGaussianTrainingArguments(output_dir="unused", use_cpu=True, **values)


def _encoder(**fields):
    from ragcun_hf import IsotropicGaussianModel

    IsotropicGaussianModel.from_encoder("embedded", **fields)


_DOCUMENTS = {"d": "bread", "e": "food"}
_MISTAKES = {
    "no rows": (lambda model: _train(model, train_dataset=[]), "expected rows, got an empty dataset"),
    "rows without texts": (lambda model: _train(model, train_dataset=[{"query": 1, "positive": "a"}]), "got 1"),
    "no model": (lambda model: _train(model, model="embedded"), "expected an IsotropicGaussianModel, got str"),
    "a dictionary as arguments": (lambda model: _train(model, args={}), "TrainingArguments, got dict"),
    "a text as a number": (lambda _: _arguments(temperature="0.05"), "`temperature` must be a number.*'0.05'"),
    "a number below 0": (lambda _: _arguments(temperature=-1), "`temperature` must be a finite number above 0"),
    "an unknown field": (lambda _: _encoder(output_dims=3), "got `output_dims`: did you mean `output_dim`?"),
    "a field of another kind": (lambda _: _encoder(similarity_fn_name="near"), "`similarity_fn_name` must be one of"),
    "an unknown field of a head": (lambda model: model.reset_head(widths=3), "got `widths`: leave it out"),
    "no texts to fit": (lambda model: model.fit_lexical([]), "at least two documents with words, got 0"),
    "a text instead of texts to fit": (lambda model: model.fit_lexical("bread"), "needs a list of texts, got str"),
    "no list to fit": (lambda model: model.fit_lexical(iter(["a"])), "needs a list of texts, got list_iterator"),
    "a number to fit": (lambda model: model.fit_lexical(["a b", 3]), "must be strings, got int at position 1"),
    "a number to encode": (lambda model: model.encode_query(3), "must be a string or a list of strings, got int"),
    "bytes to encode": (lambda model: model.encode([b"a"]), "must be strings, got bytes at position 0"),
    "too many numbers": (lambda model: model.encode(["a"], truncate_dim=10**4), "`truncate_dim` must be between 1"),
    "no queries": (lambda model: _evaluate(model, {}, _DOCUMENTS, {}), "queries: expected at least one entry"),
    "a document that is not there": (
        lambda model: _evaluate(model, {"q": "a"}, _DOCUMENTS, {"q": {"z": 1}}), "relevant_docs",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("mistake", "said"), _MISTAKES.values(), ids=list(_MISTAKES))
def test_a_mistake_in_python_is_a_value_error_that_says_what_came(tiny_model, mistake, said):
    # UserError is a ValueError, too: one `except` is enough. What transformers loads raises an OSError, as there.
    with pytest.raises(ValueError, match=said):
        mistake(tiny_model)


def test_numbers_and_truth_values_of_numpy_are_arguments():
    _arguments(learning_rate=np.float32(1e-3), max_steps=np.int64(3), push_to_hub=np.bool_(False))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_called_from_python_raises_instead_of_leaving(name):
    module = importlib.import_module(f"ragcun_hf.cli.{COMMANDS[name].module}")
    with pytest.raises(UserError, match="no_such_flag|required: --output"):
        module.main(["--no_such_flag"])
