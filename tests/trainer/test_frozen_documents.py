"""Only queries are trained: documents keep the base's vectors, in training, in every library, and after loading."""

import json
import math

import numpy as np
import pytest
import torch

from ragcun_hf import (
    IsotropicGaussianConfig,
    IsotropicGaussianModel,
    IsotropicGaussianTrainer,
    IsotropicGaussianTrainingArguments,
)
from ragcun_hf.errors import UserError
from ragcun_hf.evaluation.validation import RetrievalValidation
from ragcun_hf.features.feature_store import FeatureStore
from ragcun_hf.files import RECORD_FILE
from ragcun_hf.model.sentence_transformers_isotropic_gaussian import sentence_transformers_files
from ragcun_hf.objective.inputs import FeaturePairs
from ragcun_hf.publishing.plain_export import write_plain
from ragcun_hf.trainer.loss_trainer import LossTrainer

pytestmark = pytest.mark.usefixtures("quick_garbage_collection")

TEXTS = ["how to sort a list", "the moon is a slow red sun", "bread"]


@pytest.fixture
def base(tiny_encoder_folder):
    return IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder), document_prompt="the ", query_prompt="what ")


@pytest.fixture
def make_trainer(tiny_encoder_folder, tiny_pairs, tmp_path):
    def make(recipe="adapt", data=None, **fields):
        fields = {
            "lambda_isotropy": 0.0,
            "per_device_train_batch_size": 8,
            "max_steps": 3,
            "learning_rate": 0.01,
        } | fields
        args = IsotropicGaussianTrainingArguments.from_recipe(
            recipe,
            output_dir=str(tmp_path / "out"),
            feature_cache_dir=str(tmp_path / "cache"),
            freeze_documents=True,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            **fields,
        )
        model = IsotropicGaussianModel.from_encoder(
            str(tiny_encoder_folder), document_prompt="the ", query_prompt="what "
        )
        return IsotropicGaussianTrainer(model, args, data or tiny_pairs)

    return make


@pytest.fixture
def trained(make_trainer):
    trainer = make_trainer()
    trainer.train()
    trainer.save_model()
    return trainer.model


def test_the_loss_is_that_of_moved_queries_against_the_base_s_documents(tiny_encoder_folder, tiny_pairs):
    model = IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder), freeze_documents=True, dropout=0.0)
    torch.manual_seed(0)
    for weight in model.projection.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    queries, positives = ([pair[name] for pair in tiny_pairs] for name in ("query", "positive"))
    store = FeatureStore(model, cache_folder=None, dtype="float32", show_progress=False)
    pairs = FeaturePairs(queries, positives, [[] for _ in queries], store=store)
    args = IsotropicGaussianTrainingArguments(output_dir="unused", lambda_isotropy=0.0, use_cpu=True, report_to="none")
    trainer = LossTrainer(model=model, args=args, data_collator=pairs)
    loss = trainer.compute_loss(model, pairs(range(len(queries))))

    def feature(text):
        return model.compute_features(**model.tokenize([text]))[0].double().numpy()

    w = {name: weight.double().detach().numpy() for name, weight in model.projection.named_parameters()}
    losses = []
    for number, query in enumerate(queries):
        x = feature(query) * math.sqrt(model.config.encoder_dim)
        hidden = w["mlp.0.weight"] @ x + w["mlp.0.bias"]
        hidden = hidden * np.array([(1 + math.erf(value / math.sqrt(2))) / 2 for value in hidden])
        moved = w["linear.weight"] @ x + w["linear.bias"] + w["mlp.3.weight"] @ hidden + w["mlp.3.bias"]
        documents = [feature(text) for text in positives]
        cosines = np.array([moved @ d / np.linalg.norm(moved) / np.linalg.norm(d) for d in documents]) / 0.05
        losses.append(np.log(np.exp(cosines).sum()) - cosines[number])
    assert loss.item() == pytest.approx(float(np.mean(losses)), rel=1e-5)


def test_documents_have_exactly_the_vectors_of_the_base_and_queries_others(trained, base, tmp_path):
    assert trained.lexical is None and trained.config.freeze_documents
    loaded = IsotropicGaussianModel.from_pretrained(tmp_path / "out")
    for model in (trained, loaded):
        assert np.array_equal(model.encode_document(TEXTS), base.encode_document(TEXTS))
        assert np.abs(model.encode_query(TEXTS) - base.encode_query(TEXTS)).max() > 0.01
    assert np.array_equal(loaded.encode_query(TEXTS), trained.encode_query(TEXTS))


def test_a_text_of_unknown_side_is_a_document(trained, base):
    assert np.array_equal(trained.encode(TEXTS), base.encode(TEXTS))
    assert np.array_equal(trained.encode(TEXTS, prompt_name="document"), base.encode_document(TEXTS))
    assert np.array_equal(trained.encode(TEXTS, prompt_name="query"), base.encode_query(TEXTS))


def test_sentence_transformers_tells_the_sides_apart(trained, base, tmp_path):
    package = pytest.importorskip("sentence_transformers")
    there = package.SentenceTransformer(str(tmp_path / "out"), trust_remote_code=True, device="cpu")
    there.save(str(tmp_path / "again"))
    again = package.SentenceTransformer(str(tmp_path / "again"), trust_remote_code=True, device="cpu")
    for model in (there, again):
        np.testing.assert_allclose(model.encode_document(TEXTS), base.encode_document(TEXTS), atol=1e-6)
        np.testing.assert_allclose(model.encode_query(TEXTS), trained.encode_query(TEXTS), atol=1e-6)
        np.testing.assert_allclose(model.encode(TEXTS), base.encode(TEXTS), atol=1e-6)
        by_name = model.encode(TEXTS, prompt_name="query")
        np.testing.assert_allclose(by_name, trained.encode(TEXTS, prompt_name="query"), atol=1e-6)


def test_other_models_have_the_files_that_they_had(base):
    module = sentence_transformers_files(base.config)["modules.json"]
    assert "kwargs" not in module[0]


def test_held_out_queries_are_measured_as_they_are_encoded(trained, tiny_pairs):
    texts = [[pair[name] for pair in tiny_pairs] for name in ("query", "positive")]
    store = FeatureStore(trained, cache_folder=None, dtype="float32", show_progress=False)
    figures = [RetrievalValidation(*texts, store=each)(trained)["ndcg@10"] for each in (store, None)]
    queries, documents = trained.encode_query(texts[0]), trained.encode_document(texts[1])
    scores = queries @ documents.T
    places = (scores > np.diag(scores)[:, None]).sum(axis=1)
    assert figures == pytest.approx([np.mean(1 / np.log2(places + 2))] * 2, abs=1e-6)


def test_documents_without_labels_train_queries_alone(make_trainer, base):
    words = ["fish", "bread", "moon", "star", "water", "bird", "music", "stone"]
    texts = [f"the {a} does sleep . what is {b} in the {a} river ." for a in words for b in words]
    trainer = make_trainer("general", [{"text": text} for text in texts])
    trainer.train()
    assert np.array_equal(trainer.model.encode_document(TEXTS), base.encode_document(TEXTS))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"output_dim": 12}, "`output_dim` of the encoder's 16"),
        ({"freeze_base": False}, "frozen encoder without a lexical half"),
        ({"lexical_dim": 4}, "frozen encoder without a lexical half"),
        ({"similarity_fn_name": "euclidean"}, "cosine, got euclidean"),
    ],
)
def test_settings_that_would_change_documents_are_refused(fields, message):
    encoder = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 2}
    with pytest.raises(ValueError, match=message):
        IsotropicGaussianConfig(encoder_config=encoder, freeze_documents=True, **fields)


def test_cut_embeddings_and_plain_folders_are_refused(make_trainer, trained, tmp_path):
    with pytest.raises(UserError, match="--matryoshka_dims .* --freeze_documents"):
        make_trainer(matryoshka_dims=[8])
    with pytest.raises(UserError, match="embeds queries and documents alike"):
        write_plain(trained, tmp_path, TEXTS)


def test_the_setting_is_recorded_and_absent_from_earlier_models(trained, tmp_path):
    record = json.loads((tmp_path / "out" / RECORD_FILE).read_text(encoding="utf-8"))
    assert record["model"]["freeze_documents"] is True
    values = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    del values["freeze_documents"]
    assert IsotropicGaussianConfig.from_dict(values).freeze_documents is False
