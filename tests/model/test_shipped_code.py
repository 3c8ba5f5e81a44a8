"""The saved folder works where this package is not installed: AutoModel with remote code, sentence-transformers."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ragcun_hf
from ragcun_hf import IsotropicGaussianModel

PACKAGE = Path(ragcun_hf.__file__).parent / "model"
SHIPPED = sorted(path.stem for path in PACKAGE.glob("*_isotropic_gaussian.py"))
REGISTERED = ["configuration_isotropic_gaussian", "modeling_isotropic_gaussian"]
ALLOWED = {"torch", "transformers", "huggingface_hub", "numpy", "tqdm", "safetensors"}
TEXTS = ["sort an array", "the sun is red", "why do fish sleep in the water of the river", "moon"]


def _tree(name):
    return ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_file_imports_nothing_that_its_users_may_lack(name):
    for node in ast.walk(_tree(name)):
        if isinstance(node, ast.Import):
            tops = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                # `from . import x` is not followed by transformers' scanner, and `from .a.b` breaks saving.
                assert node.level == 1, ast.unparse(node)
                assert node.module in SHIPPED, ast.unparse(node)
                continue
            tops = [node.module.split(".")[0]]
        else:
            continue
        wrong = [top for top in tops if top not in ALLOWED and top not in sys.stdlib_module_names]
        assert not wrong, ast.unparse(node)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_file_imports_nothing_dynamically(name):
    calls = [ast.unparse(node.func) for node in ast.walk(_tree(name)) if isinstance(node, ast.Call)]
    assert not [call for call in calls if call.split(".")[-1] in ("__import__", "import_module", "exec")]


@pytest.mark.parametrize("name", SHIPPED)
def test_no_line_of_a_string_in_a_shipped_file_looks_like_an_import(name):
    strings = [node.value for node in ast.walk(_tree(name)) if isinstance(node, ast.Constant)]
    lines = [line.strip() for text in strings if isinstance(text, str) for line in text.splitlines()]
    assert not [line for line in lines if line.startswith(("from .", "import ."))]


@pytest.mark.parametrize("name", REGISTERED)
def test_shipped_file_registers_itself_and_names_its_licence(name):
    source = (PACKAGE / f"{name}.py").read_text(encoding="utf-8")
    assert source.startswith("# Licensed under the Apache License")
    assert ".register_for_auto_class(" in source


def _model(folder, **fields):
    """A model whose head is far from its start: a fallback to the bare encoder cannot go unseen."""
    torch.manual_seed(0)
    model = IsotropicGaussianModel.from_encoder(
        str(folder), output_dim=10, use_predictor=True, query_prompt="query: ", document_prompt="document: ", **fields
    )
    with torch.no_grad():
        for parameter in [*model.projection.parameters(), *model.predictor.parameters()]:
            parameter += 0.3 * torch.randn(parameter.shape)
    return model


def _run_without_the_package(script, *arguments, tmp_path):
    """Run a script in a process in which `ragcun_hf` cannot be imported and no code was cached before."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    prelude = "import sys\nsys.modules['ragcun_hf'] = None\nimport torch\ntorch.set_num_threads(1)\n"
    done = subprocess.run(
        [sys.executable, "-c", prelude + script, *map(str, arguments)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1_800,
    )
    assert done.returncode == 0, done.stderr
    return done


AUTO_MODEL_SCRIPT = """
import json
import numpy as np
from transformers import AutoModel

results, texts = {}, json.loads(sys.argv[1])
for folder in sys.argv[2:]:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    model.save_pretrained(folder + "_again")
    again = AutoModel.from_pretrained(folder + "_again", trust_remote_code=True)
    for name, one in ((folder, model), (folder + "_again", again)):
        frozen = [p for n, p in one.named_parameters() if n.startswith("encoder.")]
        one.train()
        results[name] = {
            "module": type(one).__module__,
            "trainable_in_encoder": sum(p.requires_grad for p in frozen),
            "encoder_in_training": one.encoder.training,
            "head_trainable": all(p.requires_grad for p in one.projection.parameters()),
            "query": one.encode_query(texts).tolist(),
            "predicted": one.encode_query(texts, use_predictor=True).tolist(),
            "document": one.encode_document(texts).tolist(),
        }
try:
    import ragcun_hf
    results["package"] = True
except ImportError:
    results["package"] = False
print(json.dumps(results))
"""


@pytest.mark.slow
def test_auto_model_gives_the_same_vectors_without_the_package(
    tiny_encoder_folder, tiny_mpnet_folder, tiny_decoder_folder, tmp_path
):
    folders = {"bert": tiny_encoder_folder, "mpnet": tiny_mpnet_folder, "decoder": tiny_decoder_folder}
    models = {name: _model(folder) for name, folder in folders.items()}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    paths = [tmp_path / name for name in models]
    done = _run_without_the_package(AUTO_MODEL_SCRIPT, json.dumps(TEXTS), *paths, tmp_path=tmp_path)
    results = json.loads(done.stdout.splitlines()[-1])
    assert results["package"] is False
    for name, model in models.items():
        for folder in (str(tmp_path / name), str(tmp_path / name) + "_again"):
            result = results[folder]
            assert result["module"].startswith("transformers_modules.")
            assert (result["trainable_in_encoder"], result["encoder_in_training"]) == (0, False)
            assert result["head_trainable"]
            np.testing.assert_allclose(result["query"], model.encode_query(TEXTS), atol=1e-6)
            np.testing.assert_allclose(result["document"], model.encode_document(TEXTS), atol=1e-6)
            np.testing.assert_allclose(
                result["predicted"], model.encode_query(TEXTS, use_predictor=True), rtol=1e-6, atol=1e-5
            )
    # What was saved without the package loads with it.
    again = IsotropicGaussianModel.from_pretrained(tmp_path / "bert_again")
    np.testing.assert_allclose(again.encode_query(TEXTS), models["bert"].encode_query(TEXTS), atol=1e-6)


SENTENCE_TRANSFORMERS_SCRIPT = """
import json
import os
from sentence_transformers import SentenceTransformer

results, texts = {}, json.loads(sys.argv[1])
model = SentenceTransformer(sys.argv[2], trust_remote_code=True, device="cpu")
model.save_pretrained(sys.argv[3])
again = SentenceTransformer(sys.argv[3], trust_remote_code=True, device="cpu")
# Without modules.json, the annotations of the model's methods alone must lead to the projection.
os.remove(sys.argv[3] + "/modules.json")
results["bare"] = SentenceTransformer(sys.argv[3], trust_remote_code=True, device="cpu").encode(texts).tolist()
for name, one in (("first", model), ("again", again)):
    results[name] = {
        "query": one.encode_query(texts).tolist(),
        "document": one.encode_document(texts).tolist(),
        "plain": one.encode(texts).tolist(),
        "similarity": one.similarity_fn_name,
        "length": one.max_seq_length,
        "dim": one.get_embedding_dimension(),
        "score": one.similarity(one.encode_query(texts), one.encode_document(texts)).tolist(),
    }
print(json.dumps(results))
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "decoder"])
def test_sentence_transformers_gives_the_projection_s_vectors(
    family, tiny_encoder_folder, tiny_decoder_folder, tmp_path
):
    pytest.importorskip("sentence_transformers")
    folder = tiny_encoder_folder if family == "bert" else tiny_decoder_folder
    model = _model(folder, similarity_fn_name="dot", max_length=8)
    model.save_pretrained(tmp_path / "model")
    done = _run_without_the_package(
        SENTENCE_TRANSFORMERS_SCRIPT, json.dumps(TEXTS), tmp_path / "model", tmp_path / "again", tmp_path=tmp_path
    )
    results = json.loads(done.stdout.splitlines()[-1])
    queries, documents = model.encode_query(TEXTS), model.encode_document(TEXTS)
    model.config.query_prompt = ""
    plain = model.encode_query(TEXTS)
    assert np.abs(plain - queries).max() > 0.1
    np.testing.assert_allclose(results.pop("bare"), plain, atol=1e-5)
    assert set(results) == {"first", "again"}
    for result in results.values():
        assert (result["similarity"], result["length"], result["dim"]) == ("dot", 8, 10)
        np.testing.assert_allclose(result["query"], queries, atol=1e-5)
        np.testing.assert_allclose(result["document"], documents, atol=1e-5)
        np.testing.assert_allclose(result["plain"], plain, atol=1e-5)
        np.testing.assert_allclose(result["score"], queries @ documents.T, rtol=1e-4, atol=1e-3)
