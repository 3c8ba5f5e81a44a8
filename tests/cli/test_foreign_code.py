"""No code that lies beside a model, an encoder, a tokenizer or a list of modules runs unasked, in any command."""

import importlib
import json
import shutil
import sys

import pytest

from ragcun_hf.command_line import run_script
from ragcun_hf.commands import COMMANDS
from ragcun_hf.errors import UserError
from ragcun_hf.publishing.hub import check_clean_load, check_code, plan_upload

pytestmark = pytest.mark.usefixtures("quick_garbage_collection")

DOCUMENTS = {f"d{row}": f"{first} is {second} and {first}" for row, (first, second) in enumerate(
    [("bread", "food"), ("fish", "water"), ("the moon", "light"), ("music", "fast"), ("a stone", "blue")]
)}  # fmt: skip
CLASSES = """
from transformers import BertConfig as PlantedConfig, BertModel as PlantedModel, PreTrainedTokenizerFast
import torch
class PlantedTokenizer(PreTrainedTokenizerFast): pass
class Pooling(torch.nn.Module):
    def __init__(self, *args, **kwargs): super().__init__()
    @classmethod
    def load(cls, *args, **kwargs): return cls()
    def forward(self, features): return features
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("foreign")


@pytest.fixture(scope="module")
def model(place, tiny_encoder_folder):
    """A trained model with a card, and the data to use it on."""
    from ragcun_hf import IsotropicGaussianModel
    from ragcun_hf.publishing.card import write_card
    from ragcun_hf.publishing.card_sources import keep_sources, nothing_measured

    (place / "beir" / "mini" / "qrels").mkdir(parents=True)
    rows = {
        "corpus.jsonl": [{"_id": key, "text": text} for key, text in DOCUMENTS.items()],
        "queries.jsonl": [{"_id": f"q{key}", "text": text[:9]} for key, text in DOCUMENTS.items()],
        "../../pairs.jsonl": [{"query": text[:9], "positive": text} for text in DOCUMENTS.values()],
    }
    for name, content in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in content)
        (place / "beir" / "mini" / name).write_text(lines, encoding="utf-8")
    judgements = "".join(f"q{key}\t{key}\t1\n" for key in DOCUMENTS)
    (place / "beir" / "mini" / "qrels" / "test.tsv").write_text(judgements, encoding="utf-8")
    folder = place / "model"
    made = IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder), query_prompt="query: ")
    made.save_pretrained(folder)
    results = nothing_measured("model", json.loads((folder / "config.json").read_text(encoding="utf-8")))
    write_card(folder / "README.md", results=results, training_record=None, repo_id="org/model")
    keep_sources(folder, repo_id="org/model")
    return folder


@pytest.fixture
def ran(place, monkeypatch):
    """The file that planted code writes to; the working folder of the commands is beside it."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    (place / "ran").unlink(missing_ok=True)
    return place / "ran"


def _plant(folder, ran, where):
    """Change one place of a folder so that it names code which writes to `ran`."""
    code = f"\nwith open({str(ran)!r}, 'a') as file: file.write(__name__ + chr(10))\n"
    if where == "own code":
        for path in folder.glob("*_isotropic_gaussian.py"):
            path.write_text(path.read_text(encoding="utf-8") + code, encoding="utf-8")
        return
    (folder / "planted.py").write_text(code + CLASSES, encoding="utf-8")
    classes = {"AutoConfig": "planted.PlantedConfig", "AutoModel": "planted.PlantedModel"}
    tokenizer = ["planted.PlantedTokenizer", "planted.PlantedTokenizer"]
    changes = {
        "config": ("config.json", {"auto_map": classes}),
        "encoder's config": ("config.json", {"encoder_config": {"auto_map": classes}}),
        "type": ("config.json", {"auto_map": classes, "model_type": "planted"}),
        "tokenizer": (
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": tokenizer}, "tokenizer_class": "PlantedTokenizer"},
        ),
    }
    if where == "modules":
        path = folder / "modules.json"
        modules = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        modules = modules or [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
        modules.append({"idx": 1, "name": "1", "path": "", "type": "planted.Pooling"})
        path.write_text(json.dumps(modules), encoding="utf-8")
        return
    name, changed = changes[where]
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    for key, value in changed.items():
        content[key] = {**content[key], **value} if key == "encoder_config" else value
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


EVALUATE = ["--datasets", "mini", "--data_dir", "beir", "--no_bm25", "--run_name", "x"]
TRAIN = ["--base_model", "planted", "--use_cpu", "--max_steps", "1", "--disable_tqdm", "true", "--overwrite"]
OF_MODEL = {
    "eval_beir": ["--model_path", "planted", *EVALUATE],
    "eval_mteb": ["--model_path", "planted", "--beir_folders", "beir/mini", "--run_name", "y"],
    "export": ["--model_path", "planted", "--format", "sentence-transformers", "--check_texts", "beir/mini"],
    "search_demo": ["--model_path", "planted", "--corpus", "beir/mini", "--port", "0"],
    "push_to_hub": ["--model_path", "planted", "--repo_id", "org/model", "--dry_run"],
    "render_card": ["--model_path", "planted", "--results", "results/none.json"],
    "mine_negatives": ["--base_model", "planted", "--train_data", "pairs.jsonl", "--output", "n.jsonl"],
    "train_contrastive": ["--train_data", "pairs.jsonl", *TRAIN],
}
OF_ENCODER = {
    "eval_beir": ["--base_model", "planted", *EVALUATE],
    "eval_mteb": OF_MODEL["eval_mteb"],
    "mine_negatives": ["--base_model", "planted", "--train_data", "pairs.jsonl", "--output", "n.jsonl"],
    "train_contrastive": ["--train_data", "pairs.jsonl", *TRAIN],
    "train_self_supervised": ["--documents", "pairs.jsonl", "--text_column", "positive", *TRAIN],
    "train_xy_masked": ["--documents", "pairs.jsonl", "--text_column", "positive", *TRAIN],
    "sweep": ["--train_data", "pairs.jsonl", "--grid", "{learning_rate: [0.001]}", *TRAIN[:4], "--overwrite"],
    "search_demo": OF_MODEL["search_demo"],
}
WITHOUT_MODEL = {"prepare_data", "feature_cache", "table", "demo", "accelerate_config", "convert_checkpoint"}


def _run(name, flags, monkeypatch):
    """Run a command in this process; the search page is built, and not served."""
    module = importlib.import_module(f"ragcun_hf.cli.{name}")
    if name == "search_demo":
        monkeypatch.setattr(module, "_serve", lambda *args: None)
    monkeypatch.setattr(sys, "argv", [f"training/{name}.py", *flags])
    with pytest.raises(SystemExit) as end:
        run_script(module.main)
    return end.value.code


def test_every_command_that_takes_a_model_is_tried():
    names = {each.module for each in COMMANDS.values()}
    assert names == OF_MODEL.keys() | OF_ENCODER.keys() | WITHOUT_MODEL


PLACES = ["own code", "tokenizer", "modules", "config", "encoder's config", "type"]


def _run_beside(source, place, ran, where, commands, monkeypatch):
    """Run commands on a folder with planted code, none of which may run; return their exit codes."""
    codes = {}
    for name, flags in commands.items():
        shutil.rmtree(place / "planted", ignore_errors=True)
        _plant(shutil.copytree(source, place / "planted"), ran, where)
        codes[name] = _run(name, flags, monkeypatch)
        assert not ran.exists(), (name, ran.read_text(encoding="utf-8"))
    assert set(codes.values()) <= {0, 2}, codes
    return codes


def _is_quick(name, where):
    return name != "eval_mteb" and (name, where) != ("push_to_hub", "encoder's config")


@pytest.mark.parametrize("where", PLACES)
def test_no_command_runs_code_beside_a_model(model, place, ran, monkeypatch, where):
    commands = {name: flags for name, flags in OF_MODEL.items() if _is_quick(name, where)}
    codes = _run_beside(model, place, ran, where, commands, monkeypatch)
    if where in ("own code", "encoder's config"):  # the installed classes run instead
        assert codes["eval_beir"] == codes["export"] == codes["search_demo"] == 0
    assert codes.get("push_to_hub") in (2, None)


@pytest.mark.slow
@pytest.mark.parametrize("where", PLACES)
def test_no_slow_command_runs_code_beside_a_model(model, place, ran, monkeypatch, where):
    commands = {name: flags for name, flags in OF_MODEL.items() if not _is_quick(name, where)}
    codes = _run_beside(model, place, ran, where, commands, monkeypatch)
    if where in ("own code", "encoder's config"):
        assert set(codes.values()) == {0}


@pytest.mark.parametrize("where", ["config", "tokenizer", "modules"])
def test_no_command_runs_code_beside_an_encoder(model, tiny_encoder_folder, place, ran, monkeypatch, where):
    commands = {name: flags for name, flags in OF_ENCODER.items() if name != "eval_mteb"}
    _run_beside(tiny_encoder_folder, place, ran, where, commands, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["config", "tokenizer", "modules"])
def test_mteb_runs_no_code_beside_an_encoder(model, tiny_encoder_folder, place, ran, monkeypatch, where):
    _run_beside(tiny_encoder_folder, place, ran, where, {"eval_mteb": OF_MODEL["eval_mteb"]}, monkeypatch)


@pytest.mark.slow
def test_changed_code_is_pushed_with_the_flag_only_and_sees_no_token(model, place, ran, monkeypatch):
    shutil.rmtree(place / "planted", ignore_errors=True)
    folder = shutil.copytree(model, place / "planted")
    check_code(folder)
    with (folder / "pooling_isotropic_gaussian.py").open("a", encoding="utf-8") as file:
        file.write(f"\nimport os\nwith open({str(ran)!r}, 'w') as file: file.write(str(sorted(os.environ)))\n")
    with pytest.raises(UserError, match="pooling_isotropic_gaussian.py: expected the code of the installed package"):
        check_code(folder)
    assert not ran.exists()
    check_clean_load(folder)
    seen = ran.read_text(encoding="utf-8")
    assert "HF_HUB_OFFLINE" in seen
    assert "TOKEN'" not in seen
    assert "PYTEST" not in seen


def test_only_what_a_model_consists_of_is_sent(model, place, tmp_path):
    folder, outside = shutil.copytree(model, tmp_path / "model"), tmp_path / "secret.json"
    outside.write_text("{}", encoding="utf-8")
    odd = ["pairs.jsonl", "notes.md", "model.PKL", "opt.pkl.gz", ".env", "a/.netrc", "data.parquet", "held_out.jsonl"]
    for name in [*odd, "x.py", "training_documents.txt", "plot.png"]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("secret", encoding="utf-8")
    (folder / "added_tokens.json").symlink_to(outside)
    card = (folder / "README.md").read_text(encoding="utf-8")
    shown = "".join(f"![x]({name})\n" for name in [".env", "pairs.jsonl", "../secret.json", "plot.png"])
    (folder / "README.md").write_text(card + shown, encoding="utf-8")
    plan = plan_upload(folder)
    assert plan.left_out.keys() == {*odd, "x.py", "added_tokens.json"}
    assert {"plot.png", "training_documents.txt", "model.safetensors"} < plan.files.keys()
    assert "training_documents.txt" in plan_upload(folder, training_digests=False).left_out
