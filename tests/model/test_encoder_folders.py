"""Encoders as their makers publish them: a sentence-transformers folder gives the vectors that its library gives."""

import copy
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ragcun_hf import IsotropicGaussianModel
from ragcun_hf.features.feature_store import FeatureStore
from ragcun_hf.model.pooling_isotropic_gaussian import pool
from ragcun_hf.publishing.plain_export import write_plain

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_garbage_collection")]

TEXTS = ["bread", "the sun is red", "how to sort a list and an array in the tree of light", "fish " * 60]
DENSE = {"wide": (16, 24, "GELU", True), "tanh": (24, 10, "Tanh", True), "bare": (16, 12, "Identity", False)}
# Name -> encoder, pooling, and the modules behind it.
FOLDERS = {
    "mean": ("encoder", "mean", ["Normalize"]),
    "cls": ("mpnet", "cls", []),
    "dropout last": ("encoder", "cls", ["Normalize", "Dropout"]),
    "max": ("encoder", "max", ["Normalize"]),
    "mean_sqrt": ("mpnet", "mean_sqrt_len_tokens", []),
    "weighted mean": ("encoder", "weightedmean", ["Normalize"]),
    "weighted mean, left padding": ("decoder", "weightedmean", []),
    "last": ("decoder", "lasttoken", ["Normalize"]),
    "one layer": ("encoder", "mean", ["wide"]),
    "one layer without bias": ("encoder", "cls", ["bare", "Normalize"]),
    "two layers": ("mpnet", "mean", ["wide", "tanh", "Normalize"]),
    "T5 as gtr and sentence-t5": ("t5", "mean", ["bare", "Normalize"]),
    "normalized before": ("encoder", "mean", ["Normalize", "wide", "Normalize"]),
    "normalized between, dropout": ("encoder", "mean", ["Dropout", "wide", "Normalize", "tanh"]),
}


@pytest.fixture(scope="session")
def tiny_t5_folder(tiny_tokenizer, tmp_path_factory):
    """A T5 with a decoder, which no sentence encoder uses."""
    from transformers import T5Config, T5Model

    torch.manual_seed(20_241)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 2}
    config = T5Config(**sizes, vocab_size=len(tiny_tokenizer), pad_token_id=1, decoder_start_token_id=1)
    folder = tmp_path_factory.mktemp("encoders") / "t5"
    T5Model(config).eval().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def _there(request, name):
    """Make an encoder in sentence-transformers."""
    package = pytest.importorskip("sentence_transformers")
    modules = package.sentence_transformer.modules
    encoder, pooling, behind = FOLDERS[name]
    torch.manual_seed(0)
    transformer = modules.Transformer(str(request.getfixturevalue(f"tiny_{encoder}_folder")), max_seq_length=24)
    chain = [transformer, modules.Pooling(16, pooling_mode=pooling)]
    for kind in behind:
        if kind in DENSE:
            width_in, width_out, activation, bias = DENSE[kind]
            layer = modules.Dense(width_in, width_out, bias=bias, activation_function=getattr(torch.nn, activation)())
            torch.nn.init.normal_(layer.linear.weight)
            chain.append(layer)
        else:
            chain.append(modules.Normalize() if kind == "Normalize" else modules.Dropout(0.5))
    return package.SentenceTransformer(modules=chain, device="cpu").eval()


def _features(model):
    with torch.no_grad():
        return model.compute_features(**model.tokenize(TEXTS)).numpy()


@pytest.fixture(params=FOLDERS)
def there(request, tmp_path):
    model = _there(request, request.param)
    model.save(str(tmp_path / "encoder"))
    return model, tmp_path / "encoder"


def test_the_features_are_the_vectors_of_the_library(there):
    expected, ours = there[0].encode(TEXTS), IsotropicGaussianModel.from_encoder(str(there[1]))
    np.testing.assert_allclose(_features(ours), expected, atol=1e-5 * np.linalg.norm(expected, axis=1).mean())
    assert ours.config.feature_dim == ours.config.output_dim == expected.shape[1]
    assert ours.config.max_length == 24
    # The untrained head keeps them, but for the scale.
    cosines = (ours.encode(TEXTS) * expected).sum(1) / np.linalg.norm(expected, axis=1)
    np.testing.assert_allclose(cosines, 1, atol=1e-5)
    assert not any(weight.requires_grad for name, weight in ours.named_parameters() if "pooled_layers" in name)


def test_they_survive_saving_and_the_plain_export(there, tmp_path):
    from sentence_transformers import SentenceTransformer

    ours = IsotropicGaussianModel.from_encoder(str(there[1]))
    torch.nn.init.normal_(ours.projection.mlp[-1].weight, std=0.1)
    ours.save_pretrained(tmp_path / "saved")
    again = IsotropicGaussianModel.from_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(again.encode(TEXTS), ours.encode(TEXTS))
    by_library = SentenceTransformer(str(tmp_path / "saved"), trust_remote_code=True, device="cpu").encode(TEXTS)
    np.testing.assert_allclose(by_library, ours.encode(TEXTS), atol=1e-5)
    (tmp_path / "plain").mkdir()
    write_plain(again, tmp_path / "plain", TEXTS)
    np.testing.assert_allclose(
        SentenceTransformer(str(tmp_path / "plain"), device="cpu").encode(TEXTS), ours.encode(TEXTS), atol=1e-5
    )


def test_a_plain_export_is_an_encoder_again(there, tmp_path):
    ours = IsotropicGaussianModel.from_encoder(str(there[1]), projection_kind="linear")
    (tmp_path / "plain").mkdir()
    write_plain(ours, tmp_path / "plain", TEXTS)
    again = IsotropicGaussianModel.from_encoder(str(tmp_path / "plain"))
    np.testing.assert_allclose(_features(again), ours.encode(TEXTS), atol=1e-5)


def test_cached_features_belong_to_the_layers(request, tmp_path):
    _there(request, "two layers").save(str(tmp_path / "encoder"))
    model = IsotropicGaussianModel.from_encoder(str(tmp_path / "encoder"))
    store = FeatureStore(model, cache_folder=tmp_path / "cache", dtype="float32", show_progress=False)
    np.testing.assert_allclose(store.features(TEXTS).expanded(), _features(model), atol=1e-5)
    with torch.no_grad():
        model.pooled_layers[1].linear.bias += 1.0
    other = FeatureStore(model, cache_folder=tmp_path / "cache", dtype="float32", show_progress=False)
    np.testing.assert_allclose(other.features(TEXTS).expanded(), _features(model), atol=1e-5)


def test_an_encoder_that_trains_trains_its_layers_too(request, tmp_path):
    _there(request, "one layer").save(str(tmp_path / "encoder"))
    model = IsotropicGaussianModel.from_encoder(str(tmp_path / "encoder"), freeze_base=False).train()
    model(**model.tokenize(TEXTS)).embeddings.sum().backward()
    assert model.pooled_layers[0].linear.weight.grad.abs().sum() > 0


def test_the_files_of_2020_are_read(request, tmp_path):
    there = _there(request, "one layer")
    folder = tmp_path / "encoder"
    there.save(str(folder))
    expected = there.encode(TEXTS)
    (dense,) = (path for path in folder.iterdir() if path.name.endswith("Dense"))
    torch.save(there[2].state_dict(), dense / "pytorch_model.bin")
    (dense / "model.safetensors").unlink()
    for path in folder.glob("sentence_*_config.json"):
        path.unlink()
    (folder / "sentence_roberta_config.json").write_text(json.dumps({"max_seq_length": 24, "do_lower_case": False}))
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "0_Transformer").mkdir()
    for path in [path for path in folder.iterdir() if path.is_file() and path.name != "modules.json"]:
        path.rename(folder / "0_Transformer" / path.name)
    model = IsotropicGaussianModel.from_encoder(str(folder))
    assert model.config.max_length == 24
    np.testing.assert_allclose(_features(model), expected, atol=1e-5 * np.linalg.norm(expected, axis=1).mean())


def test_options_for_parts_are_read_if_they_change_nothing_and_refused_otherwise(request, tmp_path):
    folder = tmp_path / "encoder"
    _there(request, "one layer").save(str(folder))
    path = folder / "sentence_bert_config.json"
    harmless = {"tokenizer_args": {"model_max_length": 9, "padding_side": "left"}, "model_kwargs": {"dtype": "auto"}}
    path.write_text(json.dumps({"max_seq_length": None, "do_lower_case": False, **harmless}))
    assert IsotropicGaussianModel.from_encoder(str(folder)).config.max_length == 9
    path.write_text(json.dumps({"config_args": {"position_embedding_type": "relative_key"}}))
    with pytest.raises(ValueError, match="encoder or tokenizer with position_embedding_type, which is not supported"):
        IsotropicGaussianModel.from_encoder(str(folder))


def test_an_encoder_without_the_tokens_of_plain_words_is_refused(tiny_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="its tokenizer has tokens that its encoder lacks"):
        IsotropicGaussianModel.from_encoder(_tiny(tmp_path, tiny_tokenizer, "bert", vocab_size=4))


def test_a_tokenizer_with_more_tokens_than_its_encoder_is_said(tiny_encoder_folder, tmp_path, caplog):
    from transformers import AutoTokenizer

    IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder))
    assert "cannot be encoded" not in caplog.text
    folder = shutil.copytree(tiny_encoder_folder, tmp_path / "encoder")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["[NEW]"])
    tokenizer.save_pretrained(folder)
    IsotropicGaussianModel.from_encoder(str(folder))
    assert f"has {len(tokenizer)} tokens, the encoder {len(tokenizer) - 1}" in caplog.text


def test_a_narrower_layer_fits_sweeps_half_precision_and_the_untrained_base(request, tmp_path):
    from ragcun_hf.model.arguments import ModelArguments
    from ragcun_hf.model.base_models import load_base_tokenizer, load_untrained_base
    from ragcun_hf.sweep.heads import with_head

    _there(request, "two layers").save(str(tmp_path / "encoder"))
    model = IsotropicGaussianModel.from_encoder(str(tmp_path / "encoder"))
    assert with_head(model, ModelArguments()).encode(TEXTS).shape == (4, 10)
    model.save_pretrained(tmp_path / "saved")
    half = IsotropicGaussianModel.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    np.testing.assert_allclose(half.encode(TEXTS), model.encode(TEXTS), atol=0.05)
    # Saved before such layers were known: the head has seen vectors without them.
    without = IsotropicGaussianModel.from_encoder(str(tmp_path / "encoder"), pooled_layers=None, freeze_base=False)
    assert load_untrained_base(without).pooled_layers is None
    assert load_base_tokenizer(str(tmp_path / "encoder"))("the sun")["input_ids"]


def test_a_frozen_encoder_s_folder_is_named_without_its_path(tiny_encoder_folder, tmp_path):
    folder = shutil.copytree(tiny_encoder_folder, tmp_path / "jane" / "encoder")
    IsotropicGaussianModel.from_encoder(str(folder)).save_pretrained(tmp_path / "saved")
    assert "jane" not in (tmp_path / "saved" / "config.json").read_text(encoding="utf-8")


def test_poolings_by_hand():
    states = torch.tensor([[[9.0, 9.0], [1.0, 4.0], [4.0, 1.0]], [[2.0, 2.0], [6.0, 0.0], [9.0, 9.0]]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])  # padding on the left and on the right
    assert pool(states, mask, "max").tolist() == [[4.0, 4.0], [6.0, 2.0]]
    assert pool(states, mask, "mean").tolist() == [[2.5, 2.5], [4.0, 1.0]]
    torch.testing.assert_close(pool(states, mask, "mean_sqrt"), torch.tensor([[5.0, 5.0], [8.0, 2.0]]) / 2**0.5)
    # (1 * 1 + 2 * 4) / 3 = 3, and so on.
    torch.testing.assert_close(pool(states, mask, "weighted_mean"), torch.tensor([[3.0, 2.0], [14 / 3, 2 / 3]]))


def _changed(folder, target, name, **values):
    shutil.copytree(folder, target)
    path = target / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}), encoding="utf-8")
    return str(target)


def test_what_is_not_supported_is_named(request, tmp_path):
    package = pytest.importorskip("sentence_transformers")
    _there(request, "one layer").save(str(tmp_path / "encoder"))
    folder = tmp_path / "encoder"
    dense = next(path.name for path in folder.iterdir() if path.name.endswith("Dense"))
    cases = {
        "Dense module in .*Sigmoid": (f"{dense}/config.json", {"activation_function": "torch.nn.Sigmoid"}),
        "Dense module in .* whose weights do not fit": (f"{dense}/config.json", {"bias": False}),
        "without a residual connection": (f"{dense}/config.json", {"use_residual": True}),
        "the pooling cls and mean": ("1_Pooling/config.json", {"pooling_mode": ["cls", "mean"]}),
    }
    for number, (message, (name, values)) in enumerate(cases.items()):
        with pytest.raises(ValueError, match=message):
            IsotropicGaussianModel.from_encoder(_changed(folder, tmp_path / str(number), name, **values))
    (tmp_path / "prompts").mkdir()
    instructed = Path(_changed(folder, tmp_path / "prompts" / "a", "1_Pooling/config.json", include_prompt=False))
    IsotropicGaussianModel.from_encoder(str(instructed))  # without prompts, nothing is left out
    with pytest.raises(ValueError, match="leaves them out of its pooling"):
        IsotropicGaussianModel.from_encoder(str(instructed), query_prompt="the sun ")
    modules = package.sentence_transformer.modules
    first = modules.Transformer(str(request.getfixturevalue("tiny_encoder_folder")))
    chain = [first, modules.Pooling(16), modules.LayerNorm(16)]
    package.SentenceTransformer(modules=chain, device="cpu").save(str(tmp_path / "norm"))
    with pytest.raises(ValueError, match="has a module LayerNorm, which is not supported"):
        IsotropicGaussianModel.from_encoder(str(tmp_path / "norm"))


def test_an_encoder_decoder_that_cannot_be_separated_is_named(tiny_tokenizer, tmp_path):
    from transformers import BartConfig, BartModel

    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32}
    BartModel(BartConfig(**sizes, **heads, vocab_size=len(tiny_tokenizer))).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="The family bart has an encoder and a decoder.*t5, mt5, umt5 are supported"):
        IsotropicGaussianModel.from_encoder(str(tmp_path))


def test_a_broken_description_of_layers_is_refused(tiny_encoder_folder):
    with pytest.raises(ValueError, match="`pooled_layers` must be dictionaries of out_dim"):
        IsotropicGaussianModel.from_encoder(str(Path(tiny_encoder_folder)), pooled_layers=[{"out_dim": 3}])


def _with_settings(request, folder, **settings):
    """Save the encoder "one layer" with other settings in its config_sentence_transformers.json; name the folder."""
    _there(request, "one layer").save(str(folder))
    path = folder / "config_sentence_transformers.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}), encoding="utf-8")
    return str(folder)


def _cosines(a, b):
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize("name", ["document", "passage", "corpus"])
def test_prompts_of_every_name_in_use_are_taken_over(request, tmp_path, name):
    from sentence_transformers import SentenceTransformer

    prompts = {"query": "search query: ", "document": "", name: "search document: ", "other": "fish "}
    folder = _with_settings(request, tmp_path / "encoder", prompts=prompts, default_prompt_name=name)
    there, ours = SentenceTransformer(folder, device="cpu"), IsotropicGaussianModel.from_encoder(folder)
    assert (ours.config.query_prompt, ours.config.document_prompt) == ("search query: ", "search document: ")
    np.testing.assert_allclose(_cosines(ours.encode_query(TEXTS), there.encode_query(TEXTS)), 1, atol=1e-5)
    # sentence-transformers 6.2 sets an absent `document` to "", and so never finds the other two by itself.
    by_role = there.encode_document(TEXTS, **({} if name == "document" else {"prompt_name": name}))
    np.testing.assert_allclose(_cosines(ours.encode_document(TEXTS), by_role), 1, atol=1e-5)
    np.testing.assert_allclose(_cosines(ours.encode(TEXTS), there.encode(TEXTS)), 1, atol=1e-5)
    assert _cosines(ours.encode_query(TEXTS), ours.encode_document(TEXTS)).max() < 0.9999


def test_prompts_of_other_names_are_named(request, tmp_path, caplog):
    folder = _with_settings(request, tmp_path / "encoder", prompts={"s2p_query": "Instruct: ", "sts": "fish "})
    assert IsotropicGaussianModel.from_encoder(folder).config.query_prompt == ""
    (line,) = [each.getMessage() for each in caplog.records if "prompts" in each.getMessage()]
    assert "encoder has prompts of other names than query and document (s2p_query, sts), and none is used" in line
    caplog.clear()
    assert IsotropicGaussianModel.from_encoder(folder, query_prompt="").config.query_prompt == ""
    assert not caplog.records


def test_published_prompts_of_a_known_encoder_are_named_and_used_on_request(tiny_encoder_folder, tmp_path, caplog):
    from ragcun_hf.model.arguments import ModelArguments

    folder = str(shutil.copytree(tiny_encoder_folder, tmp_path / "e5-small-v2"))
    without = IsotropicGaussianModel.from_encoder(folder)
    assert (without.config.query_prompt, without.config.document_prompt) == ("", "")
    (line,) = [each.getMessage() for each in caplog.records]
    assert line.startswith(
        "The makers of e5-small-v2 put 'query: ' before query texts and 'passage: ' before document"
    )
    assert "set query_prompt (--query_prompt) to auto" in line
    caplog.clear()
    model = ModelArguments(base_model=folder, query_prompt="auto").build()
    assert (model.config.query_prompt, model.config.document_prompt) == ("query: ", "passage: ")
    np.testing.assert_array_equal(model.encode_query(TEXTS), without.encode([f"query: {text}" for text in TEXTS]))
    half = IsotropicGaussianModel.from_encoder(folder, query_prompt="auto", document_prompt="")
    assert (half.config.query_prompt, half.config.document_prompt) == ("query: ", "")
    assert IsotropicGaussianModel.from_encoder(folder, query_prompt="").config.document_prompt == ""
    assert not caplog.records
    model.save_pretrained(tmp_path / "saved")
    assert IsotropicGaussianModel.from_pretrained(tmp_path / "saved").config.query_prompt == "query: "


def test_auto_takes_the_prompts_of_the_files_first_and_refuses_unknown_encoders(request, tmp_path):
    prompts = {"query": "search query: ", "document": "search document: "}
    folder = _with_settings(request, tmp_path / "e5-base", prompts=prompts)
    assert IsotropicGaussianModel.from_encoder(folder, query_prompt="auto").config.query_prompt == "search query: "
    with pytest.raises(ValueError, match="`query_prompt` auto takes the prompts that an encoder's makers publish"):
        IsotropicGaussianModel.from_encoder(str(request.getfixturevalue("tiny_mpnet_folder")), query_prompt="auto")


@pytest.mark.parametrize(
    ("name", "query"),
    [
        ("intfloat/multilingual-e5-large", "query: "),
        ("BAAI/bge-small-en-v1.5", "Represent this sentence for searching relevant passages: "),
        ("nomic-ai/nomic-embed-text-v1.5", "search_query: "),
        ("mixedbread-ai/mxbai-embed-large-v1", "Represent this sentence for searching relevant passages: "),
        ("Snowflake/snowflake-arctic-embed-l-v2.0", "query: "),
        ("cache/models--intfloat--e5-base/snapshots/0123abc", "query: "),
        ("thenlper/gte-base", None),
        ("BAAI/bge-m3", None),
        ("my/e5-base-of-my-own", None),
        ("e5-base/other", None),
    ],
)
def test_known_encoders_go_by_the_last_part_of_their_names(name, query):
    from ragcun_hf.model.sentence_transformers_isotropic_gaussian import published_prompts

    assert (published_prompts(name) or {}).get("query") == query


def _ndcg(scores):
    """NDCG@10 if the document of the same row is the relevant one."""
    ranks = (scores > np.diag(scores)[:, None]).sum(1)
    return np.where(ranks < 10, 1 / np.log2(ranks + 2), 0).mean()


def test_a_base_for_dot_products_is_ranked_so_in_training_on_the_search_page_and_for_negatives(
    base_for_dot_products, tiny_pairs, tmp_path
):
    from datasets import Dataset

    from ragcun_hf.cli import mine_negatives
    from ragcun_hf.data.pairs import read_pairs
    from ragcun_hf.evaluation.validation import RetrievalValidation
    from ragcun_hf.features.arguments import FeatureArguments
    from ragcun_hf.objective.inputs import FeaturePairs
    from ragcun_hf.search_page.index import SearchIndex
    from ragcun_hf.sweep.heads import HeadData

    model = IsotropicGaussianModel.from_encoder(str(base_for_dot_products))
    assert (model.config.encoder_similarity, model.config.similarity_fn_name) == ("dot", "cosine")
    queries, documents = ([row[name] for row in tiny_pairs] for name in ("query", "positive"))
    options = {"normalize_embeddings": False}
    vectors = model.encode_query(queries, **options), model.encode_document(documents, **options)
    dots, cosines = vectors[0] @ vectors[1].T, model.similarity(*vectors).numpy()
    assert _ndcg(dots) != _ndcg(cosines)
    store = FeatureStore(model, cache_folder=None, dtype="float32", show_progress=False)
    validation = RetrievalValidation(queries, documents, store=store)
    assert validation.base_figures(model)["ndcg@10"] == pytest.approx(_ndcg(dots))
    assert validation(model)["ndcg@10"] == pytest.approx(_ndcg(cosines))
    pairs = FeaturePairs(queries, documents, [[] for _ in queries], store=store)
    assert HeadData(model, pairs, len(queries), validation).base_figures()["ndcg@10"] == pytest.approx(_ndcg(dots))

    rows = Dataset.from_list([{"title": "", "text": text} for text in documents])
    index = SearchIndex(model, rows, features=FeatureArguments(feature_cache=False, encoder_dtype="float32"))
    for query, scores in zip(queries, dots, strict=True):
        found = index.search(query, top_k=3).base
        assert [hit.text for hit in found] == [documents[row] for row in np.argsort(-scores)[:3]]
        assert [hit.score for hit in found] == pytest.approx(sorted(scores, reverse=True)[:3], rel=1e-4)

    (tmp_path / "pairs.json").write_text(json.dumps(tiny_pairs[1:]), encoding="utf-8")
    flags = ["--train_data", str(tmp_path / "pairs.json"), "--output", str(tmp_path / "mined.jsonl")]
    flags += ["--range_min", "0", "--range_max", "1", "--relative_margin=-9", "--no_feature_cache"]
    mine_negatives.main([*flags, "--base_model", str(base_for_dot_products), "--encoder_dtype", "float32"])
    best = {query: documents[row] for query, row in zip(queries, dots[:, 1:].argmax(1) + 1, strict=True)}
    mined = {row["query"]: row["negative"] for row in read_pairs(str(tmp_path / "mined.jsonl"))}
    own = dict(zip(queries, documents, strict=True))
    assert mined == {query: [] if best[query] == own[query] else [best[query]] for query in mined}
    assert sum(map(len, mined.values())) > 2


def _tiny(folder, tokenizer, family, **changes):
    """Save a tiny encoder of a family with its tokenizer; name the folder."""
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(20_240)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24, "max_position_embeddings": 40, "initializer_range": 0.4, "pad_token_id": 1}
    if family == "xlnet":
        del sizes["max_position_embeddings"]  # it has no limit
    config = AutoConfig.for_model(family, **{**sizes, **changes})
    AutoModel.from_config(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _one_by_one(model, folder):
    """Return mean vectors of unit length from AutoModel, each text without any padding."""
    from transformers import AutoModel

    encoder, vectors = AutoModel.from_pretrained(folder).eval(), []
    for text in TEXTS:
        options = {"truncation": True, "max_length": model.config.max_length, "return_token_type_ids": False}
        with torch.no_grad():
            states = encoder(**model.tokenizer(text, return_tensors="pt", **options)).last_hidden_state
        vectors.append(torch.nn.functional.normalize(states[0].mean(0), dim=0))
    return torch.stack(vectors).numpy()


GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40, "pad_token_id": None}
LLAMA = {"num_key_value_heads": 1, "head_dim": 8, "pad_token_id": None}


@pytest.mark.parametrize(("family", "changes"), [("gpt2", GPT2), ("llama", LLAMA), ("bert", {}), ("distilbert", {})])
def test_padding_never_changes_a_vector(tiny_tokenizer, tmp_path, family, changes):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    if changes.get("pad_token_id", 1) is None:
        tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    if family == "distilbert":
        changes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
    folder = _tiny(tmp_path / "encoder", tokenizer, family, **changes)
    model = IsotropicGaussianModel.from_encoder(folder)
    assert (model.tokenizer.pad_token, model.tokenizer.padding_side) == (
        "[SEP]" if "pad_token_id" in changes else "[PAD]",
        "right",
    )
    expected = _one_by_one(model, folder)
    np.testing.assert_allclose(model.encode(TEXTS), expected, atol=1e-5)
    store = FeatureStore(model, cache_folder=None, dtype="float32", show_progress=False)
    features = store.features(TEXTS).expanded()
    np.testing.assert_allclose(features / np.linalg.norm(features, axis=1, keepdims=True), expected, atol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    again = IsotropicGaussianModel.from_pretrained(tmp_path / "saved")
    again.tokenizer.padding_side = "left"  # as in a folder of an earlier version
    np.testing.assert_array_equal(again.encode(TEXTS), model.encode(TEXTS))


def test_a_tokenizer_without_any_special_token_is_refused(tiny_tokenizer, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel(tiny_tokenizer.get_vocab(), unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = _tiny(tmp_path, PreTrainedTokenizerFast(tokenizer_object=backend), "gpt2", **GPT2, vocab_size=60)
    with pytest.raises(ValueError, match="The tokenizer of .* has no special token to pad with: give it a pad_token"):
        IsotropicGaussianModel.from_encoder(folder)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("fnet", {}),
        ("convbert", {"embedding_size": 16}),
        ("nystromformer", {"num_landmarks": 4, "segment_means_seq_len": 4}),
    ],
)
def test_an_encoder_whose_vectors_depend_on_the_batch_is_refused(tiny_tokenizer, tmp_path, family, changes):
    folder = _tiny(tmp_path, tiny_tokenizer, family, **changes)
    with pytest.raises(ValueError, match=f"another vector beside a longer text, because the family {family} does not"):
        IsotropicGaussianModel.from_encoder(folder)


SQUEEZED = [f"{name}_groups" for name in ("q", "k", "v", "post_attention", "intermediate", "output")]
ODD = {
    "xlnet": ({"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}, 32),
    "longformer": ({"attention_window": [4, 4]}, 38),
    "ibert": ({}, 38),
    "esm": ({"mask_token_id": 4}, 38),
    "luke": ({"entity_vocab_size": 5, "entity_emb_size": 8}, 38),
    "roberta": ({}, 38),
    "squeezebert": ({"embedding_size": 16, **dict.fromkeys(SQUEEZED, 1)}, 40),
    "big_bird": ({"block_size": 4, "num_random_blocks": 1}, 40),
}


@pytest.mark.parametrize("family", ODD)
def test_families_with_positions_or_poolers_of_their_own_way_load(tiny_tokenizer, tmp_path, family):
    changes, length = ODD[family]
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.model_max_length = 32 if family == "xlnet" else 1000
    folder = _tiny(tmp_path / "encoder", tokenizer, family, **changes)
    model = IsotropicGaussianModel.from_encoder(folder)
    assert model.config.max_length == length
    if family != "big_bird":  # whose own way for a text alone depends on its length
        np.testing.assert_allclose(model.encode(TEXTS), _one_by_one(model, folder), atol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    again = IsotropicGaussianModel.from_pretrained(tmp_path / "saved")
    np.testing.assert_allclose(again.encode(TEXTS), np.stack([model.encode(text) for text in TEXTS]), atol=1e-5)


def test_a_folder_that_an_earlier_version_saved_attends_to_whole_texts_too(tiny_tokenizer, tmp_path):
    model = IsotropicGaussianModel.from_encoder(
        _tiny(tmp_path / "encoder", tiny_tokenizer, "big_bird", **ODD["big_bird"][0])
    )
    model.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["encoder_config"] |= {"attention_type": "block_sparse", "use_cache": True}
    path.write_text(json.dumps(config), encoding="utf-8")
    again = IsotropicGaussianModel.from_pretrained(tmp_path / "saved")
    assert (again.encoder.config.attention_type, again.encoder.config.use_cache) == ("original_full", False)
    np.testing.assert_array_equal(again.encode(TEXTS), model.encode(TEXTS))


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_an_adapter_is_merged_into_its_encoder(tiny_encoder_folder, tiny_tokenizer, tmp_path, has_tokenizer):
    peft = pytest.importorskip("peft")
    from transformers import AutoModel

    torch.manual_seed(0)
    settings = peft.LoraConfig(target_modules=["query", "value"], init_lora_weights=False)
    adapted = peft.get_peft_model(AutoModel.from_pretrained(tiny_encoder_folder), settings).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    if has_tokenizer:
        tiny_tokenizer.save_pretrained(tmp_path / "adapter")
    model = IsotropicGaussianModel.from_encoder(str(tmp_path / "adapter"))
    tokens = model.tokenize(TEXTS)
    with torch.no_grad():
        states = adapted(**tokens).last_hidden_state
    expected = torch.nn.functional.normalize(pool(states, tokens["attention_mask"], "mean"), dim=-1).numpy()
    np.testing.assert_allclose(model.encode(TEXTS), expected, atol=1e-5)
    base = IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder))
    assert _cosines(model.encode(TEXTS), base.encode(TEXTS)).max() < 0.999
    assert model.state_dict().keys() == base.state_dict().keys()
    model.save_pretrained(tmp_path / "saved")
    again = IsotropicGaussianModel.from_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(again.encode(TEXTS), model.encode(TEXTS))


def test_an_adapter_without_peft_says_what_to_install(tiny_encoder_folder, tmp_path):
    from ragcun_hf.errors import UserError
    from ragcun_hf.model.base_models import load_base_model

    if importlib.util.find_spec("peft"):
        pytest.skip("peft is installed")
    settings = {"base_model_name_or_path": str(tiny_encoder_folder), "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(UserError, match="is an adapter for .*, which needs peft: run pip install peft"):
        load_base_model(str(tmp_path))
