"""Loading models: a wrong flag or folder is a user error that names the way out."""

import os
import subprocess
import sys

import datasets
import pytest
from huggingface_hub import constants

from ragcun_hf.cli import eval_beir, train_contrastive
from ragcun_hf.data.pairs import read_pairs
from ragcun_hf.errors import UserError
from ragcun_hf.model import base_models
from ragcun_hf.model.base_models import (
    check_base_name,
    check_model_path,
    load_base_model,
    load_base_tokenizer,
    load_trained_model,
)


@pytest.mark.parametrize("fields", [{"pooling": "median"}, {"output_dim": 0}, {"dropout": 1.5}, {"max_length": 999}])
def test_a_model_flag_that_does_not_fit_is_a_user_error_that_names_it(tiny_encoder_folder, fields):
    with pytest.raises(UserError, match=next(iter(fields))):
        load_base_model(str(tiny_encoder_folder), **fields)


def test_a_base_model_that_cannot_be_loaded_is_a_user_error_that_names_the_way_out(tmp_path):
    with pytest.raises(UserError, match="--base_model embedded"):
        load_base_model("no-such-owner/no-such-model")
    with pytest.raises(UserError, match="no model can be made with .*: Unrecognized model"):
        load_base_model(str(tmp_path))


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a look-up on the Hub")

    for name in ("socket.socket.connect", "socket.getaddrinfo"):
        monkeypatch.setattr(name, refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["embeded", "Embedded", "embeddded"])
def test_a_misspelled_embedded_is_answered_at_once(name):
    with pytest.raises(UserError, match=f"--base_model expects .*, got '{name}': did you mean embedded"):
        load_base_model(name)
    with pytest.raises(UserError, match="did you mean embedded"):
        train_contrastive.main(["--base_model", name, "--train_data", "nobody/nothing", "--use_cpu"])


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    "path", ["checkpoints/mine", "./mine", "/nowhere/mine", "~/mine", "a/b/c", "checkpoints/mne/"]
)
def test_a_path_of_a_model_that_is_not_there_is_not_looked_for_on_the_hub(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints" / "mined").mkdir(parents=True)
    for refused in (lambda: load_trained_model(path), lambda: eval_beir.main(["--model_path", path])):
        with pytest.raises(
            UserError, match="--model_path expects a folder .*, where nothing is: .*check the path"
        ) as error:
            refused()
        assert ("did you mean checkpoints/mined?" in str(error.value)) == path.startswith("checkpoints")


def test_what_may_be_a_hub_id_is_looked_for_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_model_path("your-name/mine")
    check_base_name("bert-base-uncased")
    (tmp_path / "Embedded").mkdir()
    check_base_name("Embedded")


def test_a_folder_with_another_type_of_model_is_a_user_error(tiny_encoder_folder, tmp_path):
    with pytest.raises(UserError, match="expects a model of type isotropic_gaussian, got bert"):
        load_trained_model(str(tiny_encoder_folder))
    with pytest.raises(UserError, match="--model_path expects a folder"):
        load_trained_model(str(tmp_path / "nothing"))


@pytest.fixture
def closed_hub(monkeypatch):
    """Point to a Hub whose port is closed, and fail if its client waits to try again."""

    def refuse(seconds):
        raise AssertionError(f"a wait of {seconds} seconds")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", refuse)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.usefixtures("closed_hub")
@pytest.mark.parametrize("load", [load_base_model, load_base_tokenizer, load_trained_model, read_pairs])
def test_what_is_absent_while_the_hub_does_not_answer_is_said_at_once(load):
    with pytest.raises(UserError, match="got 'no-such/thing'|dataset 'no-such/thing'"):
        load("no-such/thing")


@pytest.mark.usefixtures("closed_hub")
@pytest.mark.parametrize("file", ["config.json", "adapter_config.json", "modules.json"])
def test_what_the_cache_has_needs_no_answer_of_the_hub(tmp_path, monkeypatch, file):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--known--thing"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    with pytest.raises(ConnectionError):
        base_models._check_connection("known/thing", None)
    (folder / "snapshots" / "abc" / file).write_text("{}")
    base_models._check_connection("known/thing", None)


@pytest.mark.usefixtures("closed_hub")
def test_a_data_set_in_the_cache_needs_no_answer_of_the_hub(tmp_path, monkeypatch):
    rows = [{"query": "q", "positive": "p", "negative": []}]
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    (tmp_path / "known___two_words").mkdir()  # as datasets writes the name
    monkeypatch.setattr(
        "datasets.load_dataset", lambda *args, **kwargs: datasets.Dataset.from_list([{"query": "q", "positive": "p"}])
    )
    assert list(read_pairs("known/TwoWords")) == rows


@pytest.mark.usefixtures("closed_hub")
def test_a_folder_needs_no_hub(tiny_encoder_folder):
    assert load_base_model(str(tiny_encoder_folder)).config.encoder_dim == 16


@pytest.mark.slow
def test_a_command_whose_hub_does_not_answer_ends_without_trying_again(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"query": "a", "positive": "b"}\n{"query": "c", "positive": "d"}\n')
    proxies = ("http_proxy", "https_proxy", "all_proxy", "hf_hub_offline")
    environment = {name: value for name, value in os.environ.items() if name.lower() not in proxies}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache")}
    words = ["train-contrastive", "--base_model", "no-such/encoder", "--train_data", "pairs.jsonl", "--use_cpu"]
    command = [sys.executable, "-m", "ragcun_hf.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2
    assert "'no-such/encoder'" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.fixture
def encoder_with_code(tiny_encoder_folder, tmp_path):
    """An encoder whose family is not in transformers, and whose code lies beside its weights."""
    import json
    import shutil

    folder = shutil.copytree(tiny_encoder_folder, tmp_path / "own")
    code = "from transformers import BertConfig, BertModel\n\n\nclass OwnConfig(BertConfig):\n"
    code += "    model_type = 'own_bert'\n"
    code += "\n\nclass OwnModel(BertModel):\n    config_class = OwnConfig\n"
    (folder / "modeling_own.py").write_text(code, encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    classes = {"AutoConfig": "modeling_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
    config |= {"model_type": "own_bert", "auto_map": classes, "architectures": ["OwnModel"]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


def test_the_code_of_an_encoder_runs_only_on_request_and_is_never_saved(
    encoder_with_code, tiny_encoder_folder, tiny_pairs, tmp_path, capsys
):
    from ragcun_hf import IsotropicGaussianModel, IsotropicGaussianTrainer, IsotropicGaussianTrainingArguments
    from ragcun_hf.cli import mine_negatives
    from ragcun_hf.data.writing import write_json_rows

    write_json_rows(tiny_pairs, tmp_path / "pairs.json")
    flags = ["--train_data", str(tmp_path / "pairs.json"), "--base_model", encoder_with_code]
    refused = "--base_model expects an encoder that transformers knows, got .*/own, .* with --trust_remote_code; for"
    for command, more in ((train_contrastive, "--output_dir"), (mine_negatives, "--output")):
        with pytest.raises(UserError, match=refused):
            command.main([*flags, more, str(tmp_path / "out.jsonl")])
    more = ["--trust_remote_code", "--no_feature_cache", "--output", str(tmp_path / "mined.jsonl")]
    mine_negatives.main([*flags, *more])
    assert "negatives to 8 pairs" in capsys.readouterr().out
    model = IsotropicGaussianModel.from_encoder(encoder_with_code, trust_remote_code=True)
    known = IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder))
    assert model.encode("the sun").tolist() == known.encode("the sun").tolist()
    assert (model.has_foreign_code, known.has_foreign_code) == (True, False)
    with pytest.raises(ValueError, match=r"brings code of its own \(OwnModel\), which a saved model could not load"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    args = IsotropicGaussianTrainingArguments(output_dir=str(tmp_path / "trained"), use_cpu=True, max_steps=1)
    with pytest.raises(UserError, match="expected an encoder that transformers knows, got one with code of its own"):
        IsotropicGaussianTrainer(model, args, train_dataset=tiny_pairs).train()
