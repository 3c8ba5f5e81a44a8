"""A saved model in sentence-transformers: the same vectors, further training there, no silent fallback."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from ragcun_hf import IsotropicGaussianModel
from ragcun_hf.search.exact import exact_search

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_garbage_collection")]

QUERIES = [
    "how do vaccines work?",
    "sort a list of numbers without changing it",
    "why is the sky blue",
    "capital of France",
    "what does argsort return?",
    "symptoms of iron deficiency",
    "recipe for sourdough bread",
    "who wrote Faust?",
]
DOCUMENTS = [
    "Vaccines train the immune system to recognise a germ before it meets the real one.",
    "Return a new sorted list from the items of an iterable, and leave the iterable as it is.",
    "Sunlight is scattered by the molecules of the air, and blue light more than red light.",
    "Paris lies on the Seine and has been the seat of government for most of the last thousand years.",
    "The indices that would sort an array along an axis.",
    "Tiredness, pale skin and shortness of breath are common where the body lacks iron. " * 5,
    "Flour, water and salt are mixed, left to ferment overnight with a starter, and baked in a hot oven.",
    "Goethe worked on the tragedy for sixty years; its second part came out after his death.",
    "An unrelated sentence about railways.",
    "Ein Satz auf Deutsch, mit Umlauten: äöü.",
]


def _moved(model):
    """Move the head far from its start: a fallback to the bare encoder cannot go unseen."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape)
    return model


def _load(folder):
    package = pytest.importorskip("sentence_transformers")
    return package.SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")


def _assert_same(found, expected):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.fixture(scope="module")
def make_model(embedded_folder):
    def make(**fields):
        prompts = {"query_prompt": "query: ", "document_prompt": "passage: "}
        model = IsotropicGaussianModel.from_encoder(
            str(embedded_folder), max_length=48, use_predictor=True, **{**prompts, **fields}
        )
        return _moved(model)

    return make


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
def test_vectors_prompts_and_similarity_are_those_of_the_model(make_model, similarity, tmp_path):
    model = make_model(similarity_fn_name=similarity)
    model.save_pretrained(tmp_path / "model")
    loaded = _load(tmp_path / "model")
    assert loaded.prompts == {"query": "query: ", "document": "passage: "}
    assert (loaded.similarity_fn_name, loaded.max_seq_length) == (similarity, 48)
    queries, documents = loaded.encode_query(QUERIES), loaded.encode_document(DOCUMENTS)
    _assert_same(queries, model.encode_query(QUERIES))
    _assert_same(documents, model.encode_document(DOCUMENTS))
    assert np.abs(queries - loaded.encode(QUERIES)).max() > 0.01 * np.abs(queries).max()  # the prompt counts
    scores = loaded.similarity(queries, documents).numpy()
    found = exact_search(queries, documents, k=len(DOCUMENTS), similarity=similarity)
    assert np.argsort(-scores, axis=1).tolist() == found.indices.tolist()
    np.testing.assert_allclose(np.sort(-scores, axis=1), -found.scores, rtol=1e-4, atol=1e-4)


OUTSIDE_SCRIPT = """
import sys
sys.modules["ragcun_hf"] = None
import json
import torch
torch.set_num_threads(1)
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

texts, folders = json.loads(sys.argv[1])
results = {}
for name, folder in folders.items():
    try:
        vectors = SentenceTransformer(folder, trust_remote_code=True, device="cpu").encode(texts).tolist()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        vectors = f"{type(error).__name__}: {error}"
    results[name] = vectors
model = AutoModel.from_pretrained(folders["trained"], trust_remote_code=True)
results["auto_model"] = model.encode_query(texts).tolist()
results["module"] = type(model).__module__
print(json.dumps(results))
"""

# What a change of the shipped code or of the folder could do to the way on which sentence-transformers finds the
# projection: (changes of the modelling code, files that are left out).
_FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
_FORWARD, _TEXT_FEATURES = ") -> IsotropicGaussianOutput | tuple:", ") -> BaseModelOutputWithPooling | tuple:"
ALTERATIONS = {
    "settings gone": ({}, _FILES),
    "modules.json gone": ({}, _FILES[:1]),
    "forward not annotated": ({_FORWARD: "):"}, ()),
    "forward not annotated, settings gone": ({_FORWARD: "):"}, _FILES),
    "text features not annotated": ({_TEXT_FEATURES: "):"}, ()),
    "text features not annotated, settings gone": ({_TEXT_FEATURES: "):"}, _FILES),
    "text features renamed": ({"def get_text_features(": "def get_other_features("}, ()),
    "text features renamed, settings gone": ({"def get_text_features(": "def get_other_features("}, _FILES),
}
# The one that does lead to the mean of the encoder's states, without a word: the output shows them.
SILENT = (
    {
        "    features: Tensor | None = None\n": "    features: Tensor | None = None\n"
        "    last_hidden_state: Tensor | None = None\n",
        "output = IsotropicGaussianOutput(": "output = IsotropicGaussianOutput(last_hidden_state=self.encoder("
        "input_ids=input_ids, attention_mask=attention_mask).last_hidden_state, ",
    },
    _FILES,
)


def _altered(folder, target, alteration):
    changes, left_out = alteration
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(*left_out))
    code = target / "modeling_isotropic_gaussian.py"
    text = code.read_text(encoding="utf-8")
    for before, after in changes.items():
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    code.write_text(text, encoding="utf-8")
    return str(target)


@pytest.fixture(scope="module")
def tiny_folder(tiny_encoder_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    _moved(IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(make_model, tmp_path_factory):
    """Train a saved model a few steps with the trainer of sentence-transformers; its weights before and after."""
    package = pytest.importorskip("sentence_transformers")
    from datasets import Dataset
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    folder = tmp_path_factory.mktemp("trained")
    make_model(query_prompt="", document_prompt="").save_pretrained(folder / "before")
    model = _load(folder / "before")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    args = package.SentenceTransformerTrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=3,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        weight_decay=0.1,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = package.SentenceTransformerTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({"anchor": QUERIES, "positive": DOCUMENTS[: len(QUERIES)]}),
        loss=MultipleNegativesRankingLoss(model),
    )
    trainer.train()
    model.save_pretrained(str(folder / "after"))
    return model, before, folder / "after"


@pytest.fixture(scope="module")
def outside(trained, tiny_folder, tmp_path_factory):
    """Load the trained model and all altered folders in a process that does not have this package."""
    target = tmp_path_factory.mktemp("altered")
    folders = {"trained": str(trained[2]), "whole": str(tiny_folder)}
    for number, (name, alteration) in enumerate({**ALTERATIONS, "silent": SILENT}.items()):
        folders[name] = _altered(tiny_folder, target / str(number), alteration)
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDE_SCRIPT, json.dumps([QUERIES, folders])],
        env={**os.environ, "HF_MODULES_CACHE": str(target / "modules")},
        cwd=target,
        capture_output=True,
        text=True,
        timeout=1_800,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_training_there_changes_the_head_and_nothing_else(trained):
    model, before, _ = trained
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(changed) == 6
    # The predictor takes no part there, and stays.
    assert changed == {name for name in trainable if ".predictor." not in name}
    assert any(".encoder." in name for name in before)
    assert not any(".encoder." in name for name in trainable)


def test_what_was_trained_there_loads_everywhere_with_the_same_vectors(trained, outside):
    model, _, folder = trained
    expected = model.encode_query(QUERIES)
    _assert_same(_load(folder).encode_query(QUERIES), expected)
    _assert_same(IsotropicGaussianModel.from_pretrained(folder).encode_query(QUERIES), expected)
    assert outside["module"].startswith("transformers_modules.")
    _assert_same(np.array(outside["auto_model"], dtype=np.float32), expected)
    _assert_same(np.array(outside["trained"], dtype=np.float32), expected)


def _projected_and_mean(tiny_folder):
    model = IsotropicGaussianModel.from_pretrained(tiny_folder)
    with torch.no_grad():
        mean = model.compute_features(**model.tokenize(QUERIES)).numpy()
    return model.encode_query(QUERIES), mean


def _cosines(found, expected):
    found = np.array(found)
    return (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)


@pytest.mark.parametrize("name", ["whole", *ALTERATIONS])
def test_no_alteration_leads_to_the_bare_encoder_without_a_word(outside, tiny_folder, name):
    projected, mean = _projected_and_mean(tiny_folder)
    assert _cosines(projected, mean).max() < 0.99
    code_is_whole = name == "whole" or not ALTERATIONS[name][0]
    if code_is_whole or isinstance(outside[name], list):  # else an error's message
        np.testing.assert_allclose(outside[name], projected, atol=1e-5)


def test_the_test_above_would_see_the_mean_of_the_encoder_s_states(outside, tiny_folder):
    _, mean = _projected_and_mean(tiny_folder)
    assert _cosines(outside["silent"], mean).min() > 0.9999


# Settings that are changed there


def _saved_there(tiny_encoder_folder, tmp_path, **changes):
    """Save a model, change it in sentence-transformers, save it there; the object there, and the new folder."""
    first = _moved(
        IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder), query_prompt="query: ", max_length=30)
    )
    first.save_pretrained(tmp_path / "first")
    loaded = _load(tmp_path / "first")
    for name, value in changes.items():
        setattr(loaded, name, value)
    loaded.save(str(tmp_path / "second"))
    return loaded, tmp_path / "second"


WORDS = [
    "sort an array",
    "the sun",
    "why do fish sleep in the water of the river and the moon is a stone " * 2,
    "moon",
]


def test_saving_there_keeps_prompts_default_prompt_and_similarity(tiny_encoder_folder, tmp_path, caplog):
    prompts = {"query": "search: ", "document": "result ", "other": "the fish "}
    changes = {"prompts": prompts, "default_prompt_name": "query", "similarity_fn_name": "dot"}
    there, folder = _saved_there(tiny_encoder_folder, tmp_path, **changes)
    again = _load(folder)
    assert (again.prompts, again.default_prompt_name, again.similarity_fn_name) == (prompts, "query", "dot")
    ours = IsotropicGaussianModel.from_pretrained(folder)
    for encode in ("encode", "encode_query", "encode_document"):
        expected = getattr(there, encode)(WORDS)
        _assert_same(getattr(again, encode)(WORDS), expected)
        _assert_same(getattr(ours, encode)(WORDS), expected)
    assert np.abs(there.encode(WORDS) - there.encode(WORDS, prompt="")).max() > 0.01
    scores = there.similarity(there.encode_query(WORDS), there.encode_document(WORDS)).numpy()
    _assert_same(ours.similarity(ours.encode_query(WORDS), ours.encode_document(WORDS)).numpy(), scores)
    assert "Only sentence-transformers" not in caplog.text
    ours.save_pretrained(tmp_path / "third")
    _assert_same(_load(tmp_path / "third").encode(WORDS), there.encode(WORDS))


def test_settings_that_only_sentence_transformers_has_are_kept_and_warned_about(tiny_encoder_folder, tmp_path, caplog):
    changes = {"prompts": {"other": "the fish "}, "default_prompt_name": "other", "similarity_fn_name": "manhattan"}
    there, folder = _saved_there(tiny_encoder_folder, tmp_path, **changes, truncate_dim=8)
    assert "similarity_fn_name = manhattan, default_prompt_name = other, truncate_dim = 8" in caplog.text
    again = _load(folder)
    assert (again.default_prompt_name, again.similarity_fn_name, again.truncate_dim) == ("other", "manhattan", 8)
    _assert_same(again.encode(WORDS), there.encode(WORDS))
    ours = IsotropicGaussianModel.from_pretrained(folder)
    # There, a vector is not scaled again after it was cut.
    expected = there.encode(WORDS, normalize_embeddings=True)
    _assert_same(ours.encode(WORDS, prompt="the fish ", truncate_dim=8), expected)


@pytest.mark.parametrize("length", [8, 31])
def test_a_length_set_there_is_where_all_libraries_cut(tiny_encoder_folder, tmp_path, length):
    there, folder = _saved_there(tiny_encoder_folder, tmp_path, max_seq_length=length)
    expected = there.encode_query(WORDS)
    ours = IsotropicGaussianModel.from_pretrained(folder)
    assert _load(folder).max_seq_length == ours.config.max_length == length
    _assert_same(_load(folder).encode_query(WORDS), expected)
    _assert_same(ours.encode_query(WORDS), expected)
    before = IsotropicGaussianModel.from_pretrained(tmp_path / "first").encode_query(WORDS)
    assert np.abs(before - expected).max() > 0.01


def test_settings_written_there_before_are_replaced_by_those_of_a_model_saved_here(tiny_encoder_folder, tmp_path):
    _, folder = _saved_there(tiny_encoder_folder, tmp_path, similarity_fn_name="dot")
    ours = IsotropicGaussianModel.from_pretrained(folder)
    ours.config.similarity_fn_name = "euclidean"
    ours.save_pretrained(folder)
    assert _load(folder).similarity_fn_name == "euclidean"


def test_a_model_whose_first_folder_is_gone_can_be_saved_there(tiny_encoder_folder, tmp_path):
    there, _ = _saved_there(tiny_encoder_folder, tmp_path)
    shutil.rmtree(tmp_path / "first")
    there.save(str(tmp_path / "third"))
    _assert_same(_load(tmp_path / "third").encode(WORDS), there.encode(WORDS))
