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
