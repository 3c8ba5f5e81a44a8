"""Plain folders of sentence-transformers: the model's vectors without any code of ours, in libraries old and new."""

import importlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional

from ragcun_hf import IsotropicGaussianModel
from ragcun_hf.errors import UserError
from ragcun_hf.publishing.card_package import requirement
from ragcun_hf.publishing.plain_export import dense_layers

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_garbage_collection")]

TEXTS = ["bread", "the sun is red", "how to sort a list and an array in the tree of light", "", "fish " * 60]
# Name -> encoder and settings of a model.
MODELS = {
    "mlp": (
        "encoder",
        {"use_predictor": True, "query_prompt": "the sun ", "document_prompt": "moon ", "max_length": 20},
    ),
    "linear": ("mpnet", {"projection_kind": "linear", "output_dim": 10, "pooling": "cls"}),
    "random": ("encoder", {"projection_init": "random", "similarity_fn_name": "dot", "normalize_features": False}),
    "wide": ("mpnet", {"output_dim": 24, "similarity_fn_name": "euclidean", "default_prompt_name": "query"}),
    "decoder": ("decoder", {"pooling": "last"}),
}
# The libraries of 2024, of the last transformers 4, and of this environment.
ENVIRONMENTS = {
    "transformers 4.41": [
        "transformers==4.41.2",
        "sentence-transformers==3.0.1",
        "huggingface_hub==0.23.4",
        "tokenizers==0.19.1",
        "datasets==2.19.2",
        "pyarrow_hotfix==0.7",
    ],
    "transformers 4.57": [
        "transformers==4.57.3",
        "sentence-transformers==5.1.2",
        "huggingface_hub==0.36.0",
        "tokenizers==0.22.1",
        "datasets==4.0.0",
    ],
    "this one": [],
}
SCRIPT = """
import sys
sys.modules["ragcun_hf"] = None
import json
import torch
torch.set_num_threads(1)
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

texts, folders, whole = json.loads(sys.argv[1])
found = {}
for name, folder in folders.items():
    model = SentenceTransformer(folder, device="cpu")
    found[name] = {
        "query": model.encode(texts, prompt_name="query").tolist(),
        "document": model.encode(texts, prompt_name="document").tolist(),
        "default": model.encode(texts).tolist(),
        "similarity": str(getattr(model.similarity_fn_name, "value", model.similarity_fn_name)),
        "length": model.max_seq_length,
        "prompts": model.prompts,
    }
try:
    found["whole"] = type(AutoModel.from_pretrained(whole, trust_remote_code=True)).__name__
except ImportError as error:
    found["whole"] = str(error)
print(json.dumps(found))
"""


def _export(folder, *flags):
    importlib.import_module("ragcun_hf.cli.export").main(
        ["--model_path", str(folder), "--format", "sentence-transformers", *flags]
    )


def _moved(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.projection.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    return model


@pytest.fixture(scope="module")
def check_texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(filter(None, TEXTS)), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def models(request, tmp_path_factory, check_texts):
    """Return models by name, each saved in a folder `name`, with its plain export in `name-plain`."""
    folder, made = tmp_path_factory.mktemp("models"), {}
    for name, (encoder, fields) in MODELS.items():
        encoder_folder = request.getfixturevalue(f"tiny_{encoder}_folder")
        _moved(IsotropicGaussianModel.from_encoder(str(encoder_folder), **fields)).save_pretrained(folder / name)
        made[name] = IsotropicGaussianModel.from_pretrained(folder / name)
        _export(folder / name, "--check_texts", check_texts)
    return folder, made


@pytest.fixture(scope="module", params=ENVIRONMENTS)
def loaded(request, models, tmp_path_factory):
    """Load all plain folders in an environment; what a fresh process says of each."""
    if request.param == "transformers 4.41" and sys.version_info >= (3, 13):
        pytest.skip("the tokenizers of 2024 have no wheel for Python 3.13")
    packages, target = ENVIRONMENTS[request.param], tmp_path_factory.mktemp("packages")
    if packages:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-compile",
            "--only-binary",
            ":all:",
        ]
        done = subprocess.run([*pip, "--target", str(target), *packages], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2_000:]
    folder, made = models
    # Gemma 3 is younger than transformers 4.41.
    names = [name for name in made if name != "decoder" or request.param != "transformers 4.41"]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            SCRIPT,
            json.dumps([TEXTS, {n: f"{folder / n}-plain" for n in names}, str(folder / "mlp")]),
        ],
        env={**os.environ, "PYTHONPATH": str(target), "HF_MODULES_CACHE": str(target / "modules")},
        cwd=target,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    assert "not initialized" not in done.stderr + done.stdout  # of weights that a folder lacks
    return request.param, json.loads(done.stdout.splitlines()[-1]), made


def test_it_loads_without_remote_code_with_the_model_s_vectors_and_settings(loaded):
    _, found, made = loaded
    for name in found.keys() - {"whole"}:
        model, result = made[name], found[name]
        config = model.config
        expected = {
            "query": model.encode_query(TEXTS),
            "document": model.encode_document(TEXTS),
            "default": model.encode(TEXTS),
        }
        for kind, vectors in expected.items():
            scale = np.linalg.norm(vectors, axis=1).mean()
            np.testing.assert_allclose(result[kind], vectors, atol=1e-5 * scale, rtol=0, err_msg=f"{name} {kind}")
        assert result["similarity"] == config.similarity_fn_name
        assert result["length"] == config.max_length
        assert result["prompts"] == {"query": config.query_prompt, "document": config.document_prompt}


def test_the_model_s_own_folder_loads_or_names_the_versions_that_it_needs(loaded):
    name, found, _ = loaded
    if name == "this one":
        assert found["whole"] == "IsotropicGaussianModel"
    else:
        # The floors that setup.cfg names.
        own, peer = (requirement(each).split(">=")[1] for each in ("transformers", "sentence-transformers"))
        needs = f"needs transformers {own} or newer (and, for SentenceTransformer, sentence-transformers {peer})"
        assert f"{needs}, got {name}" in found["whole"]
        assert "sentence-transformers folder" in found["whole"]


def test_a_linear_head_is_one_layer_and_an_untrained_one_too(models, tiny_encoder_folder):
    _, made = models
    assert [layer.weight.shape for layer in dense_layers(made["linear"])] == [(10, 16)]
    assert [layer.weight.shape for layer in dense_layers(made["mlp"])] == [(2 * 16 + 32, 16), (16, 64)]
    (layer,) = dense_layers(IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder)))
    assert torch.equal(layer.weight, 4.0 * torch.eye(16))  # the scale of 16 features


def _served_by_text_embeddings_inference(model, folder, texts):
    """Return what text-embeddings-inference 1.9 computes of a folder, by its sources.

    It pools by 1_Pooling/config.json, applies all Dense modules whose activation is Identity or Tanh one after the
    other, whatever stands between them, and scales the result to unit length.
    """
    from safetensors.torch import load_file

    assert json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"] == model.config.max_length
    config = json.loads((folder / "config.json").read_text())
    assert {"architectures", "model_type", "max_position_embeddings"} <= config.keys()
    pooling = json.loads((folder / "1_Pooling/config.json").read_text())
    assert pooling["pooling_mode_cls_token"]
    tokens = model.tokenize(texts)
    with torch.no_grad():
        vectors = model.encoder(**tokens).last_hidden_state[:, 0]
        for module in json.loads((folder / "modules.json").read_text()):
            if module["type"].endswith(".Dense"):
                facts = json.loads((folder / module["path"] / "config.json").read_text())
                assert facts["activation_function"] == "torch.nn.modules.linear.Identity"
                weights = load_file(folder / module["path"] / "model.safetensors")
                assert weights["linear.weight"].shape == (facts["out_features"], facts["in_features"])
                vectors = functional.linear(vectors, weights["linear.weight"], weights["linear.bias"])
    return functional.normalize(vectors, dim=1).numpy()


@pytest.mark.parametrize("has_bias", [False, True])
def test_text_embeddings_inference_serves_a_linear_head_without_bias_exactly(
    tiny_mpnet_folder, check_texts, tmp_path, has_bias
):
    model = _moved(
        IsotropicGaussianModel.from_encoder(str(tiny_mpnet_folder), projection_kind="linear", pooling="cls")
    )
    if not has_bias:
        torch.nn.init.zeros_(model.projection.linear.bias)
    model.save_pretrained(tmp_path / "model")
    _export(tmp_path / "model", "--check_texts", check_texts)
    found = _served_by_text_embeddings_inference(model, tmp_path / "model-plain", TEXTS[:3])
    difference = np.abs(found - model.encode(TEXTS[:3])).max()
    assert (difference < 1e-5) == (not has_bias)


def test_what_cannot_be_plain_is_said_in_one_line(models, check_texts, tmp_path, capsys, tiny_encoder_folder):
    folder, _ = models
    _export(folder / "mlp", "--check_texts", check_texts, "--output_dir", str(tmp_path / "out"))
    said = capsys.readouterr().out
    assert "Without the predictor" in said
    assert "text-embeddings-inference has no GELU" in said
    model = IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder))
    model.fit_lexical(TEXTS, dim=3, weight=0.3, num_start_texts=0)
    model.save_pretrained(tmp_path / "words")
    with pytest.raises(UserError, match="without a lexical half, got one of 3 directions.*train with --lexical false"):
        _export(tmp_path / "words", "--check_texts", check_texts)
    assert not (tmp_path / "words-plain").exists()


def test_settings_of_sentence_transformers_are_carried(models, check_texts, tmp_path):
    package = pytest.importorskip("sentence_transformers")
    folder, _ = models
    there = package.SentenceTransformer(str(folder / "mlp"), trust_remote_code=True, device="cpu")
    there.prompts, there.default_prompt_name = {"query": "the sun ", "document": "", "other": "fish "}, "other"
    there.truncate_dim, there.max_seq_length = 8, 12
    there.save(str(tmp_path / "model"))
    _export(tmp_path / "model", "--check_texts", check_texts)
    plain = package.SentenceTransformer(str(tmp_path / "model-plain"), device="cpu")
    assert (plain.prompts, plain.default_prompt_name) == (there.prompts, "other")
    assert (plain.truncate_dim, plain.max_seq_length) == (8, 12)
    np.testing.assert_allclose(plain.encode(TEXTS), there.encode(TEXTS), atol=1e-5)


def test_the_folder_is_written_whole_and_replaces_only_an_earlier_export(models, check_texts, tmp_path, monkeypatch):
    folder, _ = models
    flags = ["--check_texts", check_texts, "--output_dir", str(tmp_path / "out")]
    _export(folder / "mlp", *flags)
    _export(folder / "linear", *flags)  # has one Dense layer, which must not be joined by the old second one
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["1_Pooling", "3_Dense"]
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ragcun_hf.publishing.plain_export._write_dense", fail)
    with pytest.raises(UserError, match="No space left"):
        _export(folder / "mlp", *flags)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()
    # Not ours: an encoder, as an older sentence-transformers writes it.
    (tmp_path / "out" / "modules.json").write_text('[{"type": "sentence_transformers.models.Transformer"}]')
    with pytest.raises(UserError, match="expects a new folder or an earlier export"):
        _export(folder / "mlp", *flags)


def test_the_default_folder_stands_beside_the_model(models, check_texts, monkeypatch, tmp_path):
    shutil.copytree(models[0] / "linear", tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    _export(".", "--check_texts", check_texts)
    assert (tmp_path / "mine-plain" / "modules.json").is_file()


@pytest.mark.parametrize("target", ["mlp", "."])
def test_a_model_s_own_folder_is_never_written_into(models, check_texts, target):
    folder, _ = models
    with pytest.raises(UserError, match="expects a new folder or an earlier export"):
        _export(folder / "mlp", "--check_texts", check_texts, "--output_dir", str(folder / target))
