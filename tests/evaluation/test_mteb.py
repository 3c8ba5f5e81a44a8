"""MTEB on a saved model has the figures of this package's own evaluation."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import run_in_forks

from ragcun_hf import IsotropicGaussianModel
from ragcun_hf.errors import UserError
from ragcun_hf.evaluation import mteb_tasks
from ragcun_hf.evaluation.results import read_results

pytestmark = pytest.mark.usefixtures("quick_garbage_collection")

TRAINING = Path(__file__).resolve().parents[2] / "training"


def _moved(model, *, by=0.1):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += by * torch.randn(parameter.shape)
    return model


@pytest.fixture
def scripts(monkeypatch, tmp_path):
    """The two evaluation scripts, as functions that return the results they wrote."""
    monkeypatch.chdir(tmp_path)
    for name in ("plot_comparison", "plot_isotropy"):  # they take most of the time
        monkeypatch.setattr(f"ragcun_hf.evaluation.plots.{name}", lambda *args, **kwargs: None)

    def by_mteb(*flags):
        importlib.import_module("ragcun_hf.cli.eval_mteb").main([*map(str, flags), "--run_name", "mteb"])
        # MTEB gives NaN in places, and JSON has no NaN.
        return json.loads((tmp_path / "results" / "mteb" / "mteb.json").read_text(), parse_constant=pytest.fail)

    def by_us(*flags):
        cache = ("--feature_cache_dir", str(tmp_path / "features"), "--encoder_dtype", "float32")
        importlib.import_module("ragcun_hf.cli.eval_beir").main([*map(str, flags), *cache, "--run_name", "ours"])
        return read_results(tmp_path / "results" / "ours.json")

    return by_mteb, by_us


def _assert_same_figures(theirs, ours, data_set, tolerance):
    (entry,) = theirs["tasks"]
    assert (entry["task"], entry["main_metric"]) == (data_set, "ndcg_at_10")
    scores, figures = entry["scores"]["test"]["default"], ours["datasets"][data_set]["systems"]["projection"]
    assert entry["main_score"] == scores["ndcg_at_10"]
    for metric in ("ndcg@10", "map@100", "recall@100"):
        assert scores[metric.replace("@", "_at_")] == pytest.approx(figures[metric], abs=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
def test_figures_on_a_beir_folder_equal_those_of_eval_beir(embedded_folder, scripts, small_folder, similarity, capsys):
    pytest.importorskip("mteb")
    model = IsotropicGaussianModel.from_encoder(
        str(embedded_folder), max_length=48, similarity_fn_name=similarity, query_prompt="query: "
    )
    _moved(model).save_pretrained("model")
    by_mteb, by_us = scripts
    theirs = by_mteb("--model_path", "model", "--beir_folders", small_folder)
    assert re.search(r"^small +test +default +ndcg_at_10 +0\.\d{4} ", capsys.readouterr().out, flags=re.M)
    assert theirs["model"]["similarity"] == similarity
    assert theirs["model"]["prompts"]["query"] == "query: "
    ours = by_us("--model_path", "model", "--datasets", "small", "--data_dir", small_folder.parent)
    _assert_same_figures(theirs, ours, "small", 0.001)
    assert 0.2 < theirs["tasks"][0]["main_score"] < 0.95


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    """150 documentation strings of NumPy; a fifth has a query in the test split."""
    from ragcun_hf.data.python_docs import build_python_docs, write_entries

    return write_entries(build_python_docs(["numpy"])[:150], tmp_path_factory.mktemp("beir") / "small")


def _write_beir(folder, qrels):
    texts = {"a": "bread is food", "b": "fish sleep in the water", "c": "the moon and a star", "q": "the sun is red"}
    queries = {"q": "the sun is red", "r": "why do fish sleep", "a": "what is bread"}
    (folder / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", texts), ("queries", queries)):
        lines = [json.dumps({"_id": key, "title": "sort" * (key == "c"), "text": text}) for key, text in rows.items()]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    lines = [f"{query}\t{document}\t1" for query, document in qrels]
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]), encoding="utf-8")
    return folder


@pytest.fixture
def tiny_folder(tiny_encoder_folder, scripts):
    _moved(IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder)), by=0.3).save_pretrained("tiny")
    return Path("tiny")


@pytest.mark.slow
def test_the_query_s_own_document_is_dropped_as_in_eval_beir_unless_kept(scripts, tiny_folder, tmp_path):
    pytest.importorskip("mteb")
    by_mteb, by_us = scripts
    folder = _write_beir(tmp_path / "beir" / "toy", [("q", "c"), ("r", "b")])
    common = ("--model_path", tiny_folder)
    own = ("--datasets", "toy", "--data_dir", folder.parent)
    found = {}
    for flags in ((), ("--keep_identical_ids",)):
        found[flags] = by_mteb(*common, "--beir_folders", folder, *flags)
        _assert_same_figures(found[flags], by_us(*common, *own, *flags), "toy", 1e-4)
    scores = [result["tasks"][0]["main_score"] for result in found.values()]
    assert scores[0] > scores[1]  # the query's own text was the best document
    # If the document with the query's own id is relevant, dropping it is an error.
    _write_beir(tmp_path / "beir" / "numbered", [("a", "a")])
    with pytest.raises(UserError, match="pass --keep_identical_ids"):
        by_mteb(*common, "--beir_folders", tmp_path / "beir" / "numbered")


@pytest.mark.slow
def test_a_task_s_revision_identifies_its_data(tmp_path):
    pytest.importorskip("mteb")
    qrels = [("q", "c"), ("r", "b")]
    tasks = [
        mteb_tasks.task_from_beir_folder(_write_beir(tmp_path / str(number) / "toy", part), language="deu-Latn")
        for number, part in enumerate((qrels, qrels, qrels[:1]))
    ]
    metadata = [task.metadata for task in tasks]
    assert {(one.name, one.type, one.main_score) for one in metadata} == {("toy", "Retrieval", "ndcg_at_10")}
    assert metadata[0].eval_langs == ["deu-Latn"]
    revisions = [one.dataset["revision"] for one in metadata]
    assert revisions[0] == revisions[1] != revisions[2]
    # MTEB unloads data after use, and loads it again.
    tasks[0].unload_data()
    tasks[0].load_data()
    assert tasks[0].dataset["default"]["test"]["corpus"]["text"][2] == "sort the moon and a star"


@pytest.mark.slow
def test_mteb_s_own_tasks_are_found_by_name_and_need_the_network(scripts, tiny_folder):
    pytest.importorskip("mteb")
    by_mteb, _ = scripts
    with pytest.raises(UserError, match="NFCorpu.*Did you mean: 'NFCorpus'"):
        by_mteb("--model_path", tiny_folder, "--tasks", "NFCorpu")
    with pytest.raises(UserError, match="data of the MTEB task NFCorpus, could not fetch it.*check the network"):
        by_mteb("--model_path", tiny_folder, "--tasks", "NFCorpus")  # tests are offline
    assert not Path("results/mteb/mteb.json").exists()


@pytest.mark.slow
def test_folders_that_are_not_models_are_refused(scripts, tiny_folder, tiny_encoder_folder, tmp_path):
    pytest.importorskip("mteb")
    by_mteb, _ = scripts
    folder = _write_beir(tmp_path / "beir" / "toy", [("r", "b")])
    (tmp_path / "empty").mkdir()
    for path in ("nowhere", "empty", tiny_encoder_folder):  # sentence-transformers would add a pooling to the last
        with pytest.raises(UserError, match="--model_path expects a folder written by save_pretrained"):
            by_mteb("--model_path", path, "--beir_folders", folder)
    weights = tiny_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(UserError, match="--model_path expects"):
        by_mteb("--model_path", tiny_folder, "--beir_folders", folder)
    with pytest.raises(UserError, match="one that MTEB knows.*'klingon'"):
        by_mteb("--model_path", tiny_folder, "--beir_folders", folder, "--language", "klingon")
    with pytest.raises(UserError, match="'toy' twice"):
        by_mteb("--model_path", tiny_folder, "--beir_folders", folder, folder.parent / ".." / "beir" / "toy")


PLANTED = """
from pathlib import Path
Path({witness!r}).write_text("ran", encoding="utf-8")
"""


def _plant(folder, place, witness):
    """Add code to a model folder that writes a file if it runs."""
    code = PLANTED.format(witness=str(witness))
    if place == "model code":
        with (folder / "modeling_isotropic_gaussian.py").open("a", encoding="utf-8") as file:
            file.write(code)
        return
    if place == "tokenizer":
        (folder / "planted.py").write_text(
            "from transformers import PreTrainedTokenizerFast\n"
            f"{code}\nclass Planted(PreTrainedTokenizerFast): pass\n",
            encoding="utf-8",
        )
        path, change = folder / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "planted.Planted"]}}
        settings = json.loads(path.read_text(encoding="utf-8")) | change | {"tokenizer_class": "Planted"}
    else:
        (folder / "planted.py").write_text(
            "from sentence_transformers.base.modules.transformer import Transformer\n"
            f"{code}\nclass Planted(Transformer): pass\n",
            encoding="utf-8",
        )
        path = folder / "modules.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings[0]["type"] = "planted.Planted"
    path.write_text(json.dumps(settings), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--trust_remote_code",)], ids=["without the flag", "with it"])
@pytest.mark.parametrize("place", ["tokenizer", "module list"])
def test_code_in_a_folder_of_our_own_type_never_runs(scripts, tiny_folder, tmp_path, place, flags):
    pytest.importorskip("mteb")
    by_mteb, _ = scripts
    _plant(tiny_folder, place, tmp_path / "witness")
    task = ("--beir_folders", _write_beir(tmp_path / "beir" / "toy", [("r", "b")]))
    with pytest.raises(UserError, match="--model_path expects"):
        by_mteb("--model_path", tiny_folder, *task, *flags)
    assert not (tmp_path / "witness").exists()


@pytest.mark.slow
def test_the_installed_classes_replace_changed_model_code(scripts, tiny_folder, tmp_path):
    pytest.importorskip("mteb")
    by_mteb, _ = scripts
    task = ("--beir_folders", _write_beir(tmp_path / "beir" / "toy", [("r", "b")]))
    unchanged = by_mteb("--model_path", tiny_folder, *task)["tasks"][0]["scores"]
    _plant(tiny_folder, "model code", tmp_path / "witness")
    command = [TRAINING / "eval_mteb.py", "--model_path", tiny_folder, *task, "--run_name"]
    # In new processes, as this one has loaded the model's code.
    commands = {"without": [*command, "without"], "with": [*command, "with", "--trust_remote_code"]}
    for name, done in run_in_forks(commands, Path.cwd(), imports=["mteb"]).items():
        assert done.returncode == 0, (name, done.stderr)
        again = json.loads(Path(f"results/mteb/{name}.json").read_text(encoding="utf-8"))
        assert again["tasks"][0]["scores"] == unchanged, name
    assert not (tmp_path / "witness").exists()


@pytest.mark.slow
def test_code_of_another_type_runs_only_with_the_flag(scripts, tiny_encoder_folder, tmp_path):
    pytest.importorskip("mteb")
    by_mteb, _ = scripts
    from sentence_transformers import SentenceTransformer

    SentenceTransformer(str(tiny_encoder_folder), device="cpu").save("foreign")
    witness = tmp_path / "witness"
    task = ("--beir_folders", _write_beir(tmp_path / "beir" / "toy", [("r", "b")]))
    by_mteb("--model_path", "foreign", *task)  # unchanged, it needs no code of its own
    _plant(Path("foreign"), "module list", witness)
    with pytest.raises(UserError, match="--trust_remote_code"):
        by_mteb("--model_path", "foreign", *task)
    assert not witness.exists()
    by_mteb("--model_path", "foreign", *task, "--trust_remote_code")
    assert witness.read_text(encoding="utf-8") == "ran"


def test_wrong_flags_are_refused_at_once(scripts, monkeypatch, tmp_path):
    by_mteb, _ = scripts
    with pytest.raises(UserError, match="neither --beir_folders nor --tasks"):
        by_mteb("--model_path", "tiny")
    with pytest.raises(UserError, match="--model_path expects"):
        by_mteb("--tasks", "NFCorpus")
    with pytest.raises(UserError, match="--batch_size must be at least 1"):
        by_mteb("--model_path", "tiny", "--tasks", "NFCorpus", "--batch_size", "0")
    monkeypatch.setattr(mteb_tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape("run pip install mteb")):
        by_mteb("--model_path", "tiny", "--tasks", "NFCorpus")


def test_the_table_shows_every_split_and_subset():
    entry = {
        "task": "Many",
        "main_metric": "map",
        "scores": {"dev": {"de": {"main_score": 0.5}}, "test": {"en": {"main_score": None, "recall_at_100": 1.0}}},
    }
    lines = mteb_tasks.format_mteb_table([entry]).splitlines()
    assert [line.split() for line in lines[2:]] == [
        ["Many", "dev", "de", "map", "0.5000", "-"],
        ["Many", "test", "en", "map", "-", "1.0000"],
    ]
    assert len(set(map(len, lines))) == 1
