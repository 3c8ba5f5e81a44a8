"""ONNX exports: the model's vectors without PyTorch, in a folder that is written whole or not at all."""

import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from ragcun_hf import IsotropicGaussianModel
from ragcun_hf.errors import UserError
from ragcun_hf.publishing import onnx_export
from ragcun_hf.publishing.onnx_export import OnnxEncoder

pytestmark = pytest.mark.usefixtures("quick_garbage_collection")

TRAINING = Path(__file__).resolve().parents[2] / "training"
TEXTS = [
    "bread",
    "the sun is red",
    "how to sort a list and an array in the tree of light",
    "the moon and a star are on the river where fish sleep in blue water and a bird does drink red light to the sun",
]
# Encoder -> settings of the model. The one with relative positions (mpnet) is saved in bfloat16. One has two layers; a
# second layer of the others would have the operators of the first.
MODELS = {
    "encoder": {"pooling": "mean", "use_predictor": True, "output_dim": 10, "query_prompt": "query: "},
    "mpnet": {"pooling": "cls", "similarity_fn_name": "dot", "normalize_features": False, "freeze_documents": True},
    "decoder": {"pooling": "last", "use_predictor": True, "output_dim": 24, "similarity_fn_name": "euclidean"},
}
FAMILIES = ["encoder", "mpnet", pytest.param("decoder", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TRAINING / "benchmarks"))
        yield lambda name: importlib.import_module(name if name == "onnx_speed" else f"ragcun_hf.cli.{name}")


@pytest.fixture(scope="module")
def check_texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    return str(path)


def _with_one_layer(encoder, folder):
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    config = AutoConfig.from_pretrained(encoder)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    AutoModel.from_pretrained(encoder, config=config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(request, tmp_path_factory):
    """Return the folder of a tiny model by its encoder's name; its head is random, as the usual start hides errors."""
    folders = {}

    def save(name):
        if name not in folders:
            encoder = request.getfixturevalue(f"tiny_{name}_folder")
            if name != "encoder":
                encoder = _with_one_layer(encoder, tmp_path_factory.mktemp("encoders") / name)
            model = IsotropicGaussianModel.from_encoder(str(encoder), **MODELS[name])
            if name == "encoder":
                model.fit_lexical(TEXTS, weight=0.4, num_start_texts=0)
            torch.manual_seed(0)
            for head in (model.projection, model.predictor):
                for weight in [] if head is None else head.parameters():
                    torch.nn.init.normal_(weight, std=0.4)
            if name == "decoder":
                # Set as in the files of such encoders: the attribute alone would not be saved.
                model.tokenizer.padding_side = model.tokenizer.init_kwargs["padding_side"] = "left"
            folders[name] = tmp_path_factory.mktemp("models") / name
            (model.bfloat16() if name == "mpnet" else model).save_pretrained(folders[name])
        return folders[name]

    return save


@pytest.fixture(scope="module")
def exported(saved, script, check_texts):
    """Return the folder of a model after the script has run on it."""
    done = set()

    def export(name):
        folder = saved(name)
        if name not in done:
            precision = ["float32", "int8"] if name == "encoder" else ["float32"]
            flags = ["--model_path", str(folder), "--check_texts", check_texts, "--precision", *precision]
            script("export").main(flags)
            done.add(name)
        return folder

    return export


def _load(folder):
    return IsotropicGaussianModel.from_pretrained(folder, dtype=torch.float32).eval()


def _files(folder):
    return {path.name for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_graph_returns_the_vectors_of_the_model_at_every_length_and_batch_size(exported, family):
    folder = exported(family)
    model, encoder = _load(folder), OnnxEncoder(folder / "onnx", threads=1)
    others = {"predictions": model.predictor is not None, "documents": model.config.freeze_documents}
    assert encoder.config["outputs"] == ["embeddings", *(name for name, is_there in others.items() if is_there)]
    # One text and several; shorter and longer than the example of the export; padded, truncated and empty.
    for batch in ([TEXTS[0]], [TEXTS[3] * 3], TEXTS, ["", TEXTS[1], TEXTS[3] * 2]):
        found = encoder.run(*encoder.tokenize(batch))
        embeddings = model.encode_document(batch)
        assert embeddings.std() > 0.1
        np.testing.assert_allclose(
            found.get("documents", found["embeddings"]), embeddings, atol=1e-4 * embeddings.std()
        )
        if model.config.freeze_documents:
            queries = model.encode_query(batch)
            np.testing.assert_allclose(found["embeddings"], queries, atol=1e-4 * queries.std())
            assert np.abs(queries - embeddings).max() > 0.1 * queries.std()
        if model.predictor is not None:
            prompt = encoder.config["prompts"]["query"]
            found = encoder.run(*encoder.tokenize([prompt + text for text in batch]))["predictions"]
            predictions = model.encode_query(batch, use_predictor=True)
            np.testing.assert_allclose(found, predictions, atol=1e-4 * predictions.std())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_configuration_documents_the_model(exported, family):
    folder = exported(family)
    config = json.loads((folder / "onnx" / "onnx_config.json").read_text(encoding="utf-8"))
    model = _load(folder).config
    for name in ("output_dim", "max_length", "similarity_fn_name"):
        assert config[name] == getattr(model, name)
    assert config["prompts"] == {"query": model.query_prompt, "document": model.document_prompt}
    assert config["padding"] == {"side": "right", "id": 1}  # the decoder's tokenizer pads on the left
    assert config["parity"]["float32"]["largest_difference"] < 1e-4
    assert config["opset"] >= 18


_ALONE = """
import json, sys
for name in ("torch", "transformers", "onnx", "ragcun_hf"):
    sys.modules[name] = None
import numpy as np, onnxruntime
from tokenizers import Tokenizer

session = onnxruntime.InferenceSession("model.onnx")
texts = json.loads(sys.argv[1])
batch = Tokenizer.from_file("tokenizer.json").encode_batch(texts)
ids, mask = np.array([row.ids for row in batch]), np.array([row.attention_mask for row in batch])
(embeddings,) = session.run(["embeddings"], {"input_ids": ids, "attention_mask": mask})
print(json.dumps(embeddings.tolist()))
"""


def test_tokenizers_onnxruntime_and_numpy_are_enough(exported):
    folder = exported("encoder")
    texts = [*TEXTS, TEXTS[3] * 3]
    command = [sys.executable, "-c", _ALONE, json.dumps(texts)]
    done = subprocess.run(command, cwd=folder / "onnx", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(json.loads(done.stdout), _load(folder).encode_document(texts), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("texts", [[""], ["", "the sun", " "]])
def test_a_text_without_tokens_is_one_padding_token_that_counts(exported, tmp_path, texts):
    shutil.copytree(exported("encoder") / "onnx", tmp_path / "o")
    model = _load(exported("encoder"))
    model.tokenizer.backend_tokenizer.post_processor = None  # no [CLS], no [SEP]
    onnx_export.write_tokenizer(model, tmp_path / "o")
    ids, mask = OnnxEncoder(tmp_path / "o").tokenize(texts)
    expected = model.tokenize(texts)
    assert ids.tolist() == expected["input_ids"].tolist()
    assert mask.tolist() == expected["attention_mask"].tolist()
    assert mask.sum() == len(texts) + ("the sun" in texts)


def test_no_file_names_a_folder_of_this_machine(exported):
    folder = exported("encoder") / "onnx"
    files = list(folder.iterdir())
    assert {"model.onnx", "model_int8.onnx", "tokenizer.json", "onnx_config.json"} <= {file.name for file in files}
    for file in files:
        content = file.read_bytes()
        for word in (b"site-packages", b".py", str(folder.parent).encode(), str(TRAINING.parent).encode()):
            assert word not in content, f"{word} in {file.name}"


def test_int8_rounds_the_encoder_and_the_token_table_but_not_the_head(exported):
    import onnx

    folder = exported("encoder")
    nodes = onnx.load(folder / "onnx" / "model_int8.onnx").graph.node
    count = Counter(node.op_type for node in nodes)
    assert count["MatMulInteger"] == 2 * 6  # layers of four products of attention and two after it
    exact = [name for node in nodes if node.op_type in ("MatMul", "Gemm") for name in node.input]
    assert sum(name.startswith(("model.projection", "model.predictor")) for name in exact) >= 6
    tables = [node.input[0] for node in nodes if node.op_type == "Gather"]
    assert [name for name in tables if name.endswith("_quantized")] == [
        "model.encoder.embeddings.word_embeddings.weight_quantized"
    ]
    encoder = OnnxEncoder(folder / "onnx", precision="int8", threads=1)
    found = encoder.run(*encoder.tokenize(TEXTS))["embeddings"]
    expected = _load(folder).encode_document(TEXTS)
    cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    assert 0.98 < cosines.mean() < 0.999999  # close, but rounded


@pytest.mark.slow
def test_large_weights_get_a_file_and_a_second_run_leaves_nothing_of_the_first(
    saved, script, check_texts, tmp_path, monkeypatch, capsys
):
    flags = ["--model_path", str(saved("encoder")), "--check_texts", check_texts, "--output_dir", str(tmp_path / "o")]
    capsys.readouterr()  # what the fixture wrote
    monkeypatch.setattr(onnx_export, "LARGEST_FILE_BYTES", 0)
    script("export").main(flags)
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    graphs = {"model.onnx", "model.onnx.data", "model_int8.onnx", "model_int8.onnx.data"}
    assert _files(tmp_path / "o") == {*graphs, *tokenizer, "onnx_config.json"}
    # In a folder that was moved, the graphs still find their weights.
    moved = (tmp_path / "o").rename(tmp_path / "moved")
    for precision in ("float32", "int8"):
        encoder = OnnxEncoder(moved, precision=precision, threads=1)
        assert encoder.run(*encoder.tokenize(TEXTS))["embeddings"].shape == (4, 10)
    moved.rename(tmp_path / "o")
    (tmp_path / "o" / "notes.txt").write_text("mine")
    monkeypatch.undo()
    script("export").main([*flags, "--precision", "int8"])
    assert _files(tmp_path / "o") == {"model_int8.onnx", *tokenizer, "onnx_config.json", "notes.txt"}
    assert OnnxEncoder(tmp_path / "o", precision="int8").config["files"] == {"int8": "model_int8.onnx"}
    with pytest.raises(UserError, match="expected a float32 graph .* got int8"):
        OnnxEncoder(tmp_path / "o")
    said = capsys.readouterr()
    starts = [line.split()[0] for line in said.out.splitlines()]
    assert starts == ["Wrote", "Compared", "int8:", "Next:"] * 2  # and no line of the exporter
    assert said.err == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: setattr(model.config, "feature_scale", model.config.feature_scale * 1.001), "difference of"),
        (lambda model: model.projection.linear.weight.data.fill_(torch.nan), "difference of nan"),
        (lambda model: model.predictor.linear.bias.data.add_(0.01), "difference of"),
        (lambda model: setattr(model.config, "max_length", 8), "others"),
    ],
)
def test_a_graph_of_another_model_is_refused(exported, change, message):
    folder = exported("encoder")
    model = _load(folder)
    compare = onnx_export.compare_with_model
    assert compare(model, folder / "onnx", ["float32"], TEXTS)["float32"]["largest_difference"] < 1e-4
    change(model)
    with pytest.raises(UserError, match=message):
        compare(model, folder / "onnx", ["float32"], TEXTS)


@pytest.mark.parametrize("existing", [False, True])
def test_after_an_error_everything_is_as_before(saved, script, check_texts, tmp_path, monkeypatch, existing):
    def fail(model, folder, texts, **_):
        (folder / "model.onnx").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx_export, "write_onnx", fail)
    folder = tmp_path / "a" / "b"
    if existing:
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_text("earlier")
        (folder / "onnx_config.json").write_text("{}")
    flags = ["--model_path", str(saved("encoder")), "--output_dir", str(folder), "--check_texts", check_texts]
    with pytest.raises(KeyboardInterrupt):
        script("export").main(flags)
    if existing:
        assert _files(folder) == {"model.onnx", "onnx_config.json"}
        assert (folder / "model.onnx").read_text() == "earlier"
    else:
        assert _files(tmp_path) == set()


@pytest.mark.slow
def test_an_encoder_that_torch_cannot_export_is_named(tiny_model, tmp_path, monkeypatch):
    forward = tiny_model.encoder.forward

    def branching(input_ids, attention_mask):
        return forward(input_ids=input_ids if input_ids.sum() > 5 else input_ids * 2, attention_mask=attention_mask)

    monkeypatch.setattr(tiny_model.encoder, "forward", branching)
    with pytest.raises(UserError, match="torch.onnx can export, got the family bert .*data-dependent"):
        onnx_export.write_onnx(tiny_model, tmp_path, TEXTS)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_reported_with_the_command_to_install_it(saved, script, tmp_path, monkeypatch, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(UserError, match=f"{package}, found none: run pip install {package}"):
        script("export").main(["--model_path", str(saved("encoder")), "--output_dir", str(tmp_path / "o")])
    assert _files(tmp_path) == set()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--model_path expects"),
        (["--model_path", "nowhere"], "--model_path expects a folder"),
        (["--model_path", "empty"], "--model_path expects a folder"),
        (["--model_path", "MODEL", "--precision", "int4"], "float32, int8 or both, got int4"),
        (["--model_path", "MODEL", "--output_dir", "MODEL"], "holds a model"),
        (["--model_path", "MODEL", "--output_dir", "others"], "with model.onnx but without onnx_config.json"),
        (["--model_path", "MODEL", "--output_dir", "empty.txt"], "is a file"),
        (["--model_path", "MODEL", "--output_dir", "o", "--check_texts", "empty.txt"], "got an empty file"),
        (["--model_path", "MODEL", "--output_dir", "o", "--check_texts", "nowhere.txt"], "nothing of that name"),
    ],
)
def test_impossible_exports_are_refused_before_anything_is_written(
    saved, script, tmp_path, monkeypatch, flags, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "model.onnx").write_text("somebody's")
    (tmp_path / "empty.txt").write_text("")
    before = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    model = str(saved("encoder"))
    with pytest.raises(UserError, match=message):
        script("export").main([model if flag == "MODEL" else flag for flag in flags])
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*")} == before


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_export_is_reported(exported, tmp_path, damage):
    shutil.copytree(exported("mpnet") / "onnx", tmp_path / "o")
    graph = tmp_path / "o" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:1000]) if damage == "cut" else graph.unlink()
    with pytest.raises(UserError, match="onnxruntime can run, got model.onnx"):
        OnnxEncoder(tmp_path / "o")
    with pytest.raises(UserError, match=r"expected an export with onnx_config.json"):
        OnnxEncoder(tmp_path)


def test_the_benchmark_compares_the_graphs_with_pytorch(exported, script, tmp_path, capsys):
    from ragcun_hf.data.writing import write_beir_folder

    documents = {str(row): ("", text) for row, text in enumerate(TEXTS)}
    queries = {"a": "red sun", "b": "sort a list"}
    folder = write_beir_folder(tmp_path / "tiny", documents, queries, {"test": {"a": {"1": 1}, "b": {"2": 1}}})
    flags = ["--data", str(folder), "--beir_folder", str(folder), "--repeats", "1", "--threads", "1"]
    flags += ["--output_dir", str(tmp_path)]
    benchmark = script("onnx_speed").main
    benchmark(["--model_path", str(exported("encoder")), *flags])
    results = json.loads((tmp_path / "onnx_speed.json").read_text(encoding="utf-8"))
    found = results["details"]["ndcg@10"]["systems"]
    assert set(found) == {"PyTorch float32", "onnxruntime float32", "onnxruntime int8"}
    assert found["PyTorch float32"] == found["onnxruntime float32"] > 0
    assert "| onnxruntime int8 |" in capsys.readouterr().out
    with pytest.raises(UserError, match="with other weights"):
        onnx_dir = str(exported("encoder") / "onnx")
        benchmark(["--model_path", str(exported("mpnet")), *flags, "--onnx_dir", onnx_dir])


@pytest.mark.slow
def test_two_hundred_real_texts_keep_their_vectors(embedded_folder, tmp_path):
    from ragcun_hf.data.python_docs import build_python_docs

    texts = [text for entry in build_python_docs(["numpy"])[:100] for text in (entry.query, entry.document)]
    torch.manual_seed(0)
    model = IsotropicGaussianModel.from_encoder(str(embedded_folder), max_length=32, output_dim=96)
    found = onnx_export.write_onnx(model, tmp_path, texts)["parity"]
    assert found["num_texts"] == 200
    assert found["float32"]["largest_difference"] < 1e-4
    assert found["int8"]["mean_cosine"] > 0.97
