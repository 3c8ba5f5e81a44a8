"""Twenty-five families of encoders, tiny and random: each loads, has its peers' vectors, trains, and exports."""

import copy
import os

import numpy as np
import pytest
import torch

from ragcun_hf import IsotropicGaussianModel, IsotropicGaussianTrainer, IsotropicGaussianTrainingArguments
from ragcun_hf.errors import UserError
from ragcun_hf.features.encoder_backends import feature_function, with_cast_weights
from ragcun_hf.model.pooling_isotropic_gaussian import pool
from ragcun_hf.publishing.onnx_export import write_onnx
from ragcun_hf.publishing.plain_export import write_plain

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_garbage_collection")]

TEXTS = ["bread", "the sun is red", "how to sort a list and an array in the tree of light", "fish " * 60]
_SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "initializer_range": 0.4,
}
_EMBEDDED = {**_SIZES, "embedding_size": 16}
_DECODER = {**_SIZES, "num_key_value_heads": 1, "head_dim": 8}
_RELATIVE = {**_SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
_GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40, "initializer_range": 0.4}
_GROUPS = [f"{name}_groups" for name in ("q", "k", "v", "post_attention", "intermediate", "output")]
_TOKENS = {"truncation": True, "max_length": 24, "return_token_type_ids": False}
FAMILIES = {
    "albert": _EMBEDDED,
    "bert": _SIZES,
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.4},
    "camembert": _SIZES,
    "deberta-v2": _RELATIVE,
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 40},
    "electra": _EMBEDDED,
    "ernie": _SIZES,
    "eurobert": _DECODER,
    "gemma3_text": _DECODER,
    "gpt2": _GPT,
    "gpt_neox": _SIZES,
    "llama": _DECODER,
    "longformer": {**_SIZES, "attention_window": 4},
    "mistral": _DECODER,
    "modernbert": {**_SIZES, "local_attention": 8},
    "mpnet": _SIZES,
    "nomic_bert": _SIZES,
    "opt": {**_SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16},
    "qwen3": _DECODER,
    "roberta": _SIZES,
    "roformer": _EMBEDDED,
    "squeezebert": {**_EMBEDDED, **dict.fromkeys(_GROUPS, 1)},
    "xlm-roberta": _SIZES,
    "xlnet": {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, "initializer_range": 0.4},
}
# The converters cannot do these in the pinned versions; each is refused in one line.
WITHOUT_ONNX = ("longformer", "xlnet")
WITHOUT_OPENVINO = ("longformer", "modernbert")
WITHOUT_CHECKPOINTING = ("albert", "mpnet", "squeezebert", "xlnet")  # in transformers
# An export takes five seconds. `make fuzz` tries all; `make test` one of each kind, and one that is refused.
EXPORTED = tuple(FAMILIES) if "FUZZ_INPUTS" in os.environ else ("deberta-v2", "llama", "longformer")


@pytest.fixture(scope="session")
def folders(tiny_tokenizer, tmp_path_factory):
    """Save each family's encoder once with each number of layers."""
    from transformers import AutoConfig, AutoModel

    saved = {}

    def save(family, **changed):
        key = (family, *changed.items())
        if key not in saved:
            tokenizer = copy.deepcopy(tiny_tokenizer)
            special = {"pad_token_id": 1, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
            torch.manual_seed(20_240)
            config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **special, **FAMILIES[family])
            config.update(changed)
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[: config.num_hidden_layers]
            saved[key] = tmp_path_factory.mktemp("families") / family
            AutoModel.from_config(config).eval().save_pretrained(saved[key])
            tokenizer.save_pretrained(saved[key])
        return str(saved[key])

    return save


@pytest.fixture(scope="session")
def loaded(folders):
    """Return a copy of each family's model, loaded once with each setting."""
    models = {}

    def load(family, **fields):
        key = (family, *fields.items())
        if key not in models:
            models[key] = IsotropicGaussianModel.from_encoder(folders(family), max_length=24, **fields)
        return copy.deepcopy(models[key])

    return load


@pytest.mark.parametrize("family", FAMILIES)
def test_the_vectors_are_those_of_automodel_and_of_sentence_transformers(folders, loaded, family):
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel

    model, ours = loaded(family), loaded(family).encode(TEXTS)
    encoder = AutoModel.from_pretrained(folders(family)).eval()
    for text, vector in zip(TEXTS, ours, strict=True):  # each alone, without padding
        tokens = model.tokenizer(
            text, return_tensors="pt", truncation=True, max_length=24, return_token_type_ids=False
        )
        with torch.no_grad():
            mean = pool(encoder(**tokens).last_hidden_state, tokens["attention_mask"], "mean")[0]
        np.testing.assert_allclose(vector, torch.nn.functional.normalize(mean, dim=0), atol=1e-5)
    there = SentenceTransformer(folders(family), device="cpu")
    there.max_seq_length = 24
    np.testing.assert_allclose(ours, there.encode(TEXTS, normalize_embeddings=True), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_encoder_in_half_precision_needs_no_autocast(loaded, family):
    model = loaded(family).eval()
    tokens = model.tokenize(TEXTS)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.inference_mode():
        exact = model.compute_features(**tokens)
        for dtype, most in ((torch.float16, 5e-5), (torch.bfloat16, 2e-3)):
            halved = with_cast_weights(model, dtype, is_whole=True)
            assert {weight.dtype for weight in halved.encoder.parameters()} == {dtype}
            cosines = torch.nn.functional.cosine_similarity(exact, halved.compute_features(**tokens))
            assert 1 - cosines.min() < most
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("freeze_base", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_trains_with_and_without_its_encoder_and_loads_again(loaded, tiny_pairs, tmp_path, family, freeze_base):
    model = loaded(family, freeze_base=freeze_base)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    options = {"max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 0.01, "warmup_steps": 0}
    options |= {"use_cpu": True, "report_to": "none", "feature_cache_dir": str(tmp_path / "cache")}
    args = IsotropicGaussianTrainingArguments(output_dir=str(tmp_path / "out"), **options)
    trainer = IsotropicGaussianTrainer(model, args, train_dataset=tiny_pairs)
    trainer.train()
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight.cpu(), before[name])}
    assert any(name.startswith("projection.") for name in changed)
    assert any(name.startswith("encoder.") for name in changed) != freeze_base
    model.save_pretrained(tmp_path / "saved")
    again = IsotropicGaussianModel.from_pretrained(tmp_path / "saved")
    np.testing.assert_allclose(again.encode(TEXTS), model.eval().encode(TEXTS), atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_activations_leave_the_gradients_as_they_are(loaded, family):
    model = loaded(family, freeze_base=False)
    assert model.supports_gradient_checkpointing is (family not in WITHOUT_CHECKPOINTING)
    if family in WITHOUT_CHECKPOINTING:
        return
    gradients = {}
    for is_checkpointed in (False, True):
        if is_checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(0)  # of dropout
        model.train()(**model.tokenize(TEXTS)).embeddings.square().mean().backward()
        found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        gradients[is_checkpointed] = {name: gradient.clone() for name, gradient in found.items()}
    assert any(name.startswith("encoder.") for name in gradients[True])
    torch.testing.assert_close(gradients[True], gradients[False], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_its_plain_folder_has_the_same_vectors_in_sentence_transformers(loaded, tmp_path, family):
    from sentence_transformers import SentenceTransformer

    model = loaded(family)
    write_plain(model, tmp_path / "plain", TEXTS)
    plain = SentenceTransformer(str(tmp_path / "plain"), device="cpu", trust_remote_code=False)
    np.testing.assert_allclose(plain.encode(TEXTS), model.encode(TEXTS), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_openvino_has_the_features_of_pytorch_or_refuses(loaded, family):
    pytest.importorskip("openvino")
    model = loaded(family)
    if family in WITHOUT_OPENVINO:
        with pytest.raises(UserError, match=f"--encoder_backend openvino .* an? {family} encoder"):
            feature_function(model, dtype=torch.float32, backend="openvino")
        return
    tokens = model.tokenize(TEXTS)
    with torch.no_grad():
        expected = model.compute_features(**tokens)
    found = feature_function(model, dtype=torch.float32, backend="openvino")(*tokens.values())
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("family", EXPORTED)
def test_its_graph_in_onnx_has_the_vectors_of_pytorch_or_is_refused(folders, tmp_path, family):
    pytest.importorskip("onnxruntime")
    # A second layer has the operators of the first; `test_onnx_export.py` has graphs of several layers.
    model = IsotropicGaussianModel.from_encoder(folders(family, num_hidden_layers=1), max_length=24)
    if family in WITHOUT_ONNX:
        with pytest.raises(UserError, match=f"an encoder that torch.onnx can export, got the family {family}"):
            write_onnx(model, tmp_path, TEXTS, precisions=["float32"])
        return
    found = write_onnx(model, tmp_path, TEXTS, precisions=["float32"])
    assert found["parity"]["float32"]["largest_difference"] < 1e-4
