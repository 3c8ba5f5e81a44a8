"""Checkpoints of the original project: the same vectors, and nothing but weights."""

import importlib
import json
import pickle
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from ragcun_hf.errors import UserError
from ragcun_hf.model.base_models import load_trained_model
from ragcun_hf.model.original_checkpoint import convert_original, difference_to_original, read_original_checkpoint

pytestmark = pytest.mark.usefixtures("quick_garbage_collection")

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["the sun is red", "fish sleep in the water", "bread"]


class _Original(torch.nn.Module):
    """The original's module tree, from its description: a list with an `auto_model`, and two plain sequences."""

    def __init__(self, encoder, width=16, hidden=24, out=10, predictor=True):
        super().__init__()
        transformer = torch.nn.Module()
        transformer.auto_model = encoder
        self.base = torch.nn.ModuleList([transformer])
        self.projection = self._head(width, hidden, out)
        if predictor:
            self.predictor = self._head(out, 18, out)

    @staticmethod
    def _head(inside, hidden, outside):
        layers = torch.nn.Linear(inside, hidden), torch.nn.GELU(), torch.nn.Dropout(0.1)
        return torch.nn.Sequential(*layers, torch.nn.Linear(hidden, outside))

    @torch.no_grad()
    def embed(self, tokenizer, text):
        tokens = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        states = self.base[0].auto_model(**tokens).last_hidden_state
        return self.projection(torch.nn.functional.normalize(states.mean(1), dim=-1))


@pytest.fixture
def original(tiny_encoder_folder):
    torch.manual_seed(0)
    return _Original(AutoModel.from_pretrained(tiny_encoder_folder)).eval()


@pytest.fixture
def convert(tmp_path, tiny_encoder_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module("ragcun_hf.cli.convert_checkpoint")

    def run(content, *flags):
        torch.save(content, tmp_path / "best_model.pt")
        module.main(["best_model.pt", "--base_model", str(tiny_encoder_folder), *flags])
        return tmp_path / "checkpoints" / "best_model"

    return run


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_converted_folder_gives_the_vectors_of_the_original(
    original, convert, tiny_encoder_folder, wrapped, capsys
):
    state = original.state_dict()
    training = {"epoch": 3, "loss": 0.5, "config": {"name": "jepa"}, "optimizer_state_dict": {"state": {}}}
    folder = convert({**training, "model_state_dict": state} if wrapped else state)
    model = load_trained_model(str(folder))
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder_folder)
    for text in TEXTS:
        expected = original.embed(tokenizer, text)
        torch.testing.assert_close(
            model.encode_document(text, convert_to_tensor=True), expected[0], atol=1e-5, rtol=1e-5
        )
        predicted = model.encode_query(text, use_predictor=True, convert_to_tensor=True)
        torch.testing.assert_close(predicted, original.predictor(expected)[0], atol=1e-5, rtol=1e-5)
    config = model.config
    assert (config.output_dim, config.projection_hidden_dim, config.predictor_hidden_dim) == (10, 24, 18)
    assert (config.similarity_fn_name, config.projection_init, config.freeze_base) == ("euclidean", "random", True)
    said = capsys.readouterr().out
    assert "the frozen encoder of --base_model, 10 dimensions" in said
    assert "--use_predictor --datasets YOUR_DATASET" in said


def test_a_checkpoint_without_a_predictor_and_with_idle_keys(original, convert, tiny_encoder_folder):
    state = {key: value for key, value in original.state_dict().items() if not key.startswith("predictor")}
    state["base.0.auto_model.embeddings.position_ids"] = torch.arange(32)
    state["base.0.auto_model.pooler.dense.weight"] = torch.eye(16)
    folder = convert(state)
    assert load_trained_model(str(folder)).predictor is None


def test_a_trained_encoder_is_kept_and_marked(original, convert, tiny_encoder_folder, capsys):
    state = original.state_dict()
    name = next(key for key in state if key.endswith("attention.self.query.weight"))
    state[name] = state[name] + 0.5
    folder = convert(state)
    model = load_trained_model(str(folder))
    assert model.config.freeze_base is False
    assert "an encoder that was trained too" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder_folder)
    found = model.encode_document(TEXTS[0], convert_to_tensor=True)
    torch.testing.assert_close(found, original.embed(tokenizer, TEXTS[0])[0], atol=1e-5, rtol=1e-5)
    untouched = AutoModel.from_pretrained(tiny_encoder_folder)
    assert not torch.equal(untouched.state_dict()[name.removeprefix("base.0.auto_model.")], state[name])


def test_a_wrong_conversion_is_seen_by_the_comparison(original, tiny_encoder_folder, tmp_path):
    torch.save(original.state_dict(), tmp_path / "a.pt")
    state = read_original_checkpoint(tmp_path / "a.pt")
    model, _ = convert_original(state, str(tiny_encoder_folder))
    assert difference_to_original(model, state, TEXTS) < 1e-4
    model.config.feature_scale = 1.01
    assert difference_to_original(model, state, TEXTS) > 1e-3


class _Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def _with(state, **changes):
    return {**state, **{key.replace("__", "."): value for key, value in changes.items()}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: _with(state, classifier__weight=torch.ones(2)), "got 'classifier.weight'"),
        (lambda state: _with(state, projection__1__weight=torch.ones(2)), "got 'projection.1.weight'"),
        (
            lambda state: _with(state, projection__0__weight="text"),
            "tensor under 'projection.0.weight'",
        ),
        (
            lambda state: _with(state, projection__3__bias=torch.full((10,), torch.nan)),
            "NaN or infinity.*n.3.bias",
        ),
        (
            lambda state: _with(state, projection__3__weight=torch.ones(10, 23)),
            r"shape \(10, 24\) under",
        ),
        (lambda state: {k: v for k, v in state.items() if k != "predictor.3.bias"}, "key 'predictor.3.bias'"),
        (
            lambda state: {k: v for k, v in state.items() if "word_embeddings" not in k},
            "got no .*word_embeddings.weight. in the checkpoint",
        ),
        (lambda state: _with(state, base__0__auto_model__more=torch.ones(1)), "got no .*more. in the encoder"),
        (lambda state: {"model_state_dict": [1, 2]}, "expected a state dict, got list"),
        (lambda state: {**state, "epoch": 3}, "got 'epoch'"),
        (lambda state: {}, "expected a state dict"),
    ],
)
def test_a_file_with_anything_else_is_refused_by_its_key(original, convert, change, message):
    with pytest.raises(UserError, match=message):
        convert(change(original.state_dict()))
    assert not Path("checkpoints/best_model/model.safetensors").exists()


def test_what_a_pickle_holds_is_not_run(convert, tmp_path):
    with pytest.raises(UserError, match="none of its code was run"):
        convert({"model_state_dict": _Bomb()})
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps({"a": 1}, protocol=2)[:-2]])
def test_a_broken_file_is_refused(tmp_path, content):
    (tmp_path / "broken.pt").write_bytes(content)
    with pytest.raises(UserError, match="broken.pt: expected"):
        read_original_checkpoint(tmp_path / "broken.pt")
    with pytest.raises(UserError, match="could not read"):
        read_original_checkpoint(tmp_path / "none.pt")


def test_a_model_is_replaced_only_when_told(original, convert):
    folder = convert(original.state_dict())
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds a model"):
        convert(original.state_dict())
    convert(original.state_dict(), "--overwrite")
    assert (folder / "notes.txt").read_text() == "mine"
    assert not list(folder.parent.glob(".*.tmp"))


def test_a_model_that_replaces_a_trained_one_does_not_keep_its_record(original, convert):
    folder = convert(original.state_dict())
    record = {"checksums": {"model.safetensors": "of the trained model"}}
    (folder / "training_record.json").write_text(json.dumps(record), encoding="utf-8")
    (folder / "training_documents.txt").write_text("a digest\n", encoding="utf-8")
    convert(original.state_dict(), "--overwrite")
    load_trained_model(str(folder))
    assert not list(folder.glob("training_*"))
