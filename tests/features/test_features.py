"""Features: encoded once, cached, never read from damaged files, and kept after an interruption."""

import contextlib
import copy
import dataclasses
import errno
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from ragcun_hf import IsotropicGaussianModel
from ragcun_hf.errors import UserError
from ragcun_hf.features import encoder_loop, feature_cache, feature_store, text_vectors
from ragcun_hf.features.encoder_backends import attention_of, choose_dtype, feature_function
from ragcun_hf.features.encoder_loop import (
    BatchLimits,
    WorkShare,
    batches_by_tokens,
    blocks_by_size,
    encode_in_batches,
)
from ragcun_hf.features.feature_cache import (
    FeatureCache,
    check_cache,
    list_cached_encoders,
    remove_abandoned_files,
    remove_cached_encoder,
)
from ragcun_hf.features.feature_store import FeatureStore
from ragcun_hf.features.shard_file import DamagedShardError, ShardFile, write_shard
from ragcun_hf.features.tokenizing import TokenBlock
from ragcun_hf.model.base_models import load_base_model, load_trained_model
from ragcun_hf.model.encoding_isotropic_gaussian import token_ids

TEXTS = [
    "sort an array",
    "the sun",
    "why do fish sleep in the water of the river",
    "bread is food and water is drink",
    "moon",
    "a bird and a fish are in the tree",
]

WORDS = "sort list sum mean tree bird fish river stone music piano water light sun moon star sleep drink food".split()


def _store(model, folder, **options):
    return FeatureStore(model, cache_folder=folder, **{"dtype": "float32", "show_progress": False, **options})


def _without_encoder(model):
    """Copy a model, and make every run of the copy's encoder an error."""

    def refuse(*args, **kwargs):
        raise AssertionError("the encoder ran")

    model = copy.deepcopy(model)
    model.encoder.forward = refuse
    return model


@pytest.fixture
def encoded(monkeypatch):
    """A list of the texts that the encoder is asked for, in order; tests empty it as they go."""
    texts_so_far, run = [], text_vectors.encode_in_batches

    def record(model, texts, **options):
        texts_so_far.extend(texts)
        return run(model, texts, **options)

    monkeypatch.setattr(text_vectors, "encode_in_batches", record)
    return texts_so_far


def _shards(folder):
    return sorted(folder.glob("*/*.features"))


# What comes out


@pytest.mark.parametrize("cached", [True, False])
def test_features_equal_those_of_the_forward_pass_in_order(tiny_model, tmp_path, cached):
    table = _store(tiny_model, tmp_path if cached else None).features(TEXTS)
    expected = np.concatenate([tiny_model(**tiny_model.tokenize([text])).features.numpy() for text in TEXTS])
    assert (table.vectors.dtype, table.rows.dtype) == (np.float32, np.int64)
    np.testing.assert_allclose(table.expanded(), expected, atol=1e-6)
    assert np.abs(np.diff(expected, axis=0)).max(axis=1).min() > 0.01  # the rows can be told apart


def test_the_prompt_is_prepended_to_every_text(tiny_model, tmp_path):
    table = _store(tiny_model, tmp_path).features(TEXTS, prompt="query: ")
    plain = _store(tiny_model, None).features(["query: " + text for text in TEXTS])
    np.testing.assert_allclose(table.expanded(), plain.expanded(), atol=1e-6)


@pytest.mark.parametrize("cached", [True, False])
def test_equal_texts_share_a_row_and_are_encoded_once(tiny_model, tmp_path, encoded, cached):
    table = _store(tiny_model, tmp_path if cached else None).features(["moon", "the sun", "moon", "moon", "the sun"])
    assert table.rows.tolist() == [0, 1, 0, 0, 1]
    assert table.vectors.shape == (2, 16)
    assert encoded == ["moon", "the sun"]


@pytest.mark.parametrize("cached", [True, False])
def test_an_empty_list_of_texts_has_no_rows(tiny_model, tmp_path, cached):
    table = _store(tiny_model, tmp_path if cached else None).features([])
    assert (table.vectors.shape, table.rows.shape) == ((0, 16), (0,))


def test_a_model_in_training_gives_the_same_features_and_stays_in_training(tiny_encoder_folder):
    model = IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder), freeze_base=False)
    expected = _store(model, None).features(TEXTS).vectors
    model.train()
    np.testing.assert_array_equal(_store(model, None).features(TEXTS).vectors, expected)
    assert model.training
    assert model.encoder.training


@pytest.mark.parametrize(("dtype", "least_cosine"), [("bfloat16", 0.999), ("float16", 0.99999)])
def test_half_precision_features_are_close_and_come_out_in_float32(tiny_model, tmp_path, dtype, least_cosine):
    exact = _store(tiny_model, tmp_path).features(TEXTS).vectors
    rounded = _store(tiny_model, tmp_path, dtype=dtype).features(TEXTS).vectors
    assert rounded.dtype == np.float32
    assert (exact * rounded).sum(1).min() > least_cosine
    assert not np.array_equal(exact, rounded)


def test_a_dtype_is_chosen_by_name_and_auto_is_one_that_loses_little():
    device = torch.device("cpu")
    assert choose_dtype("float32", device) is torch.float32
    assert choose_dtype("bfloat16", device) is torch.bfloat16
    assert choose_dtype("float16", device) is torch.float16
    assert choose_dtype("auto", device) in (torch.float32, torch.bfloat16)
    with pytest.raises(UserError, match="expected an encoder dtype of auto, .* or float16, got 'float8'"):
        choose_dtype("float8", device)


@pytest.mark.parametrize(
    ("family", "capability", "has_bfloat16", "expected"),
    [
        ("bert", (7, 5), False, torch.float16),  # a T4
        ("bert", (9, 0), True, torch.float16),
        ("bert", (6, 1), False, torch.float32),
        ("t5", (7, 5), False, torch.float32),
        ("qwen3", (9, 0), True, torch.bfloat16),
    ],
)
def test_auto_on_a_card_is_float16_for_encoders_that_it_holds(monkeypatch, family, capability, has_bfloat16, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    assert choose_dtype("auto", torch.device("cuda"), family=family) is expected


# The encoder loop


def test_batches_hold_every_position_once_within_the_token_budget(monkeypatch):
    monkeypatch.setattr(encoder_loop, "TOKEN_BUDGET", 40)
    monkeypatch.setattr(encoder_loop, "PADDING_SHARE", 1.0)
    lengths = [3, 17, 5, 40, 8, 8, 2, 11, 60, 1, 9]  # one is longer than the budget: it goes alone
    batches = list(batches_by_tokens(lengths))
    assert sorted(position for batch in batches for position in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) * max(lengths[position] for position in batch) <= 40 or len(batch) == 1
    longest = [max(lengths[position] for position in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    assert len(batches) < len(lengths)


def test_no_batch_is_more_than_a_few_percent_padding():
    lengths = np.random.default_rng(0).integers(3, 256, size=500).tolist()
    batches = list(batches_by_tokens(lengths))
    for batch in batches:
        padded = len(batch) * max(lengths[position] for position in batch)
        assert sum(lengths[position] for position in batch) >= 0.95 * padded
    assert len(batches) < len(lengths) / 5


@pytest.mark.parametrize(("size", "budget"), [(1, 8_192), (40, 12), (10_000, 1)])
def test_blocks_and_batches_of_any_size_give_the_same_features(monkeypatch, tiny_model, size, budget):
    expected = _store(tiny_model, None).features(TEXTS).vectors
    monkeypatch.setattr(encoder_loop, "BLOCK_SIZE", size)
    monkeypatch.setattr(encoder_loop, "TOKEN_BUDGET", budget)
    compute = feature_function(tiny_model, dtype=torch.float32)
    seen = [position for rows, _ in encode_in_batches(tiny_model, TEXTS, compute=compute) for position in rows]
    assert sorted(seen) == list(range(len(TEXTS)))
    np.testing.assert_allclose(_store(tiny_model, None).features(TEXTS).vectors, expected, atol=1e-6)


def _encoded(model, limits, compute=None, texts=TEXTS):
    """Encode with given limits: (N, H) in the order of the texts."""
    features = torch.full((len(texts), model.config.encoder_dim), torch.nan)
    compute = compute or feature_function(model, dtype=torch.float32)
    for rows, found in encode_in_batches(model, texts, compute=compute, limits=limits):
        features[rows] = found
    return features.numpy()


def _limits_of_a_card(**changes):
    return dataclasses.replace(BatchLimits.of(torch.device("cuda")), **changes)


def _recording(compute, seen):
    def record(input_ids, attention_mask):
        seen.append(tuple(input_ids.shape))
        return compute(input_ids, attention_mask)

    return record


@pytest.mark.parametrize("budget", [16, 48, 65_536])
@pytest.mark.parametrize("folder", ["tiny_encoder_folder", "tiny_mpnet_folder", "tiny_decoder_folder"])
def test_the_few_shapes_of_a_card_give_the_same_features(request, folder, budget):
    model = IsotropicGaussianModel.from_encoder(str(request.getfixturevalue(folder)))
    texts = [*TEXTS, "sort a list of the " * 9, "fish " * 14, "fish " * 15, *WORDS[:5]]
    seen = []
    compute = _recording(feature_function(model, dtype=torch.float32), seen)
    features = _encoded(model, _limits_of_a_card(token_budget=budget), compute, texts)
    np.testing.assert_allclose(features, _store(model, None).features(texts).vectors, atol=1e-6)
    assert {length for _, length in seen} == {16, 32}
    if budget == 65_536:
        assert sorted(seen) == [(2, 32), (12, 16)]  # 11 texts are filled up to 12


def test_a_card_starts_on_a_batch_of_the_largest_shape_while_texts_are_tokenized(tiny_model):
    texts, seen = [f"bread {number} " + "fish " * 30 for number in range(12)], []
    compute = _recording(feature_function(tiny_model, dtype=torch.float32), seen)
    limits = _limits_of_a_card(token_budget=96, block_size=400, last_block_size=400)
    features = _encoded(tiny_model, limits, compute, texts)
    np.testing.assert_allclose(features, _store(tiny_model, None).features(texts).vectors, atol=1e-6)
    rows, length = seen[0]
    assert rows * length <= 96 < 2 * rows * length
    assert sum(rows for rows, _ in seen[1:]) >= len(texts)
    seen.clear()
    _encoded(tiny_model, _limits_of_a_card(token_budget=96), compute, texts[:2])  # one block: nothing to wait for
    assert sum(rows for rows, _ in seen) == 2


def test_lengths_and_rows_on_a_card_come_from_few_values_and_add_little_padding():
    limits = BatchLimits.of(torch.device("cuda"))
    lengths = [limits.padded_length(length, max_length=500) for length in range(1, 501)]
    assert len(set(lengths)) <= 24
    assert all(length <= padded <= max(length + 15, 1.125 * length) for length, padded in enumerate(lengths, 1))
    assert max(lengths) == 500  # the encoder may have no position for more
    rows = [limits.padded_rows(num_rows, 128) for num_rows in range(1, 513)]
    assert len(set(rows)) <= 32
    assert all(num_rows <= padded <= 1.25 * num_rows for num_rows, padded in enumerate(rows, 1))
    assert limits.padded_rows(273, 240) == 273  # no more than the budget


def test_limits_of_a_processor_pad_to_the_longest_text_only():
    limits = BatchLimits.of(torch.device("cpu"))
    assert (limits.padded_length(17, max_length=32), limits.padded_rows(17, 17)) == (17, 17)
    assert limits.batches_ahead == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_padded_on_the_right_as_the_model_pads_it(tiny_model, side):
    tokenizer = tiny_model.tokenizer = copy.deepcopy(tiny_model.tokenizer)
    tokenizer.padding_side = side
    token_ids = tokenizer(TEXTS)["input_ids"]
    rows = [4, 0, 2]
    ids, mask = TokenBlock.of(tokenizer, list(range(len(TEXTS))), token_ids).batch(rows, len(token_ids[2]))
    expected = tiny_model.pad([token_ids[row] for row in rows])
    assert torch.equal(ids, expected["input_ids"])
    assert torch.equal(mask, expected["attention_mask"])


def test_a_few_rows_of_a_checked_shard_are_read_alone_and_a_changed_file_is_checked_again(tmp_path):
    rng = np.random.default_rng(0)
    features = rng.standard_normal((400, 6), dtype=np.float32)
    digests = [bytes([0, row // 256, row % 256]) + bytes(13) for row in range(400)]
    shard = ShardFile(
        tmp_path / write_shard(tmp_path, digests, features, key="k" * 24), 6, np.dtype(np.float32), key="k" * 24
    )
    few, many = np.array([399, 0, 7, 7]), rng.integers(0, 400, 300)
    for _ in range(2):  # not checked yet, and then
        for rows in (few, many):
            np.testing.assert_array_equal(shard.rows(rows), features[rows])
    content = bytearray(shard.path.read_bytes())
    content[-1] ^= 1
    shard.path.write_bytes(content)
    with pytest.raises(DamagedShardError, match="expected features with their checksum"):
        shard.rows(few)


def _trained_tokenizer(kind):
    """Train a small tokenizer on words, with the splits of BERT, GPT-2 or XLM-RoBERTa."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    special = ["[PAD]", "[UNK]"]
    if kind == "wordpiece":
        backend, trainer = Tokenizer(models.WordPiece(unk_token="[UNK]")), trainers.WordPieceTrainer
        backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    elif kind == "bpe":
        backend, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        backend, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer
        backend.normalizer, backend.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    options = {"unk_token": "[UNK]"} if kind == "unigram" else {}
    trained = trainer(vocab_size=600, special_tokens=special, show_progress=False, **options)
    backend.train_from_iterator([words], trained)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_token_ids_are_those_of_the_tokenizer_for_texts_of_any_length(kind, side):
    tokenizer = _trained_tokenizer(kind)
    tokenizer.truncation_side = side
    rng = random.Random(0)
    pieces = [
        "expected",
        "a row",
        "  ",
        "\n",
        "\u00e9t\u00e9",
        "\u4e2d\u6587",
        "\ufb01",
        "x" * 150,
        "",
        "\t",
        "[PAD]",
        "\U0001f600",
        "e\u0301",
    ]
    counts = [0, 1, 3, 20, 200, 2_000] * 4
    texts = [rng.choice([" ", "", "\n "]).join(rng.choices(pieces, k=count)) for count in counts]
    texts += ["w" * 5_000, " " * 5_000, "\u4e2d" * 5_000, "a " * 5_000]
    texts += [start * 2_000 + "expected a row " * 400 for start in (" ", "\n", "\t", "w", "\u0301")]
    texts += [f" {mark}x" * 2_000 for mark in ("\u0308", "\u200d\U0001f525", "\u3000", "\u00a0")]
    for max_length in (1, 7, 64):
        expected = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        assert token_ids(tokenizer, texts, max_length=max_length) == expected


def test_a_long_text_is_read_only_as_far_as_it_counts(tiny_tokenizer):
    read = []

    class Recording:
        is_fast, truncation_side = False, "right"

        def __call__(self, texts, **options):
            read.extend(map(len, texts))
            return tiny_tokenizer(texts, **options)

    for start in ("", " " * 1_000, "x" * 1_000 + " "):
        texts = [start + "bread is food " * 100_000, "short"]
        found = token_ids(Recording(), texts, max_length=8)
        assert found == tiny_tokenizer(texts, truncation=True, max_length=8)["input_ids"]
        assert max(read) < 100 + 2 * len(start)


def test_a_tokenizer_that_changes_texts_itself_is_asked_for_all_of_them(tiny_tokenizer):
    class Lowering(type(tiny_tokenizer)):
        def _encode_plus(self, text, *args, **options):
            return super()._encode_plus([each.lower() for each in text], *args, **options)

    tokenizer = Lowering(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    texts = ["BREAD IS FOOD", *["Fish eat"] * 20]
    assert token_ids(tokenizer, texts, max_length=8) == tokenizer(texts, truncation=True, max_length=8)["input_ids"]
    assert token_ids(tokenizer, texts, max_length=8)[0] == tiny_tokenizer("bread is food")["input_ids"]


def test_a_tokenizer_without_a_padding_token_is_a_user_error(tiny_model):
    tiny_model.tokenizer = copy.deepcopy(tiny_model.tokenizer)
    tiny_model.tokenizer.pad_token = None
    with pytest.raises(UserError, match="expected a tokenizer with a padding token"):
        _store(tiny_model, None).features(TEXTS)


def _with_memory_for(num_tokens, compute):
    def compute_or_run_out(input_ids, attention_mask):
        if input_ids.numel() > num_tokens:
            raise torch.OutOfMemoryError("out of memory")
        return compute(input_ids, attention_mask)

    return compute_or_run_out


@pytest.mark.parametrize("make_limits", [_limits_of_a_card, lambda: BatchLimits.of(torch.device("cpu"))])
@pytest.mark.parametrize("memory", [16, 40])
def test_batches_are_halved_until_they_fit_into_memory(tiny_model, make_limits, memory):
    texts = [f"{first} {second}" for first in WORDS for second in WORDS]
    seen, limits = [], make_limits()
    compute = _recording(_with_memory_for(memory, feature_function(tiny_model, dtype=torch.float32)), seen)
    features = _encoded(tiny_model, limits, compute, texts)
    np.testing.assert_allclose(features, _store(tiny_model, None).features(texts).vectors, atol=1e-6)
    assert memory / 2.5 <= limits.token_budget < 2 * memory
    sizes = [rows * length for rows, length in seen]
    num_failed = sum(size > memory for size in sizes)
    assert num_failed > 1
    assert min(sizes[:num_failed]) > memory  # all at first, as later batches are small from the start


def test_one_text_that_does_not_fit_into_memory_is_a_user_error(tiny_model):
    compute = _with_memory_for(4, feature_function(tiny_model, dtype=torch.float32))
    with pytest.raises(UserError, match="expected memory for one text of 12 tokens"):
        _encoded(tiny_model, None, compute)


def test_a_store_remembers_how_much_fits_into_memory(tiny_model, monkeypatch):
    monkeypatch.setattr(text_vectors, "TEXTS_AT_ONCE", 2)
    seen = []
    compute = _recording(_with_memory_for(10, feature_function(tiny_model, dtype=torch.float32)), seen)
    monkeypatch.setattr(feature_store, "feature_function", lambda *_, **__: compute)
    store = _store(tiny_model, None)
    for _ in range(2):
        store.features(["sort an array", "sort an list"])
    assert seen == [(2, 5), (2, 5)]
    seen.clear()
    for _ in range(2):
        store.features(["sort an array of food", "sort an list of food"])
    assert seen == [(2, 7), (1, 7), (1, 7), (1, 7), (1, 7)]


def test_batches_are_started_before_earlier_ones_are_read_and_come_in_their_order(tiny_model):
    seen = []
    compute = _recording(feature_function(tiny_model, dtype=torch.float32), seen)
    limits = dataclasses.replace(BatchLimits.of(torch.device("cpu")), token_budget=1, batches_ahead=2)
    order, started = [], []
    for rows, _ in encode_in_batches(tiny_model, TEXTS, compute=compute, limits=limits):
        order += rows
        started.append(len(seen))
    assert started == [3, 4, 5, 6, 6, 6]
    assert order == [2, 5, 3, 0, 1, 4]


def test_features_that_are_not_finite_are_refused_when_batches_are_read_late(tiny_model):
    with torch.no_grad():
        tiny_model.encoder.embeddings.word_embeddings.weight[tiny_model.tokenizer.vocab["moon"]] = torch.nan
    with pytest.raises(UserError, match="expected finite features"):
        _encoded(tiny_model, _limits_of_a_card(token_budget=1))


def _by_autocast(model, dtype):
    @torch.inference_mode()
    def compute(input_ids, attention_mask):
        with torch.autocast("cpu", dtype=dtype):
            return model.compute_features(input_ids, attention_mask).float()

    return compute


@pytest.mark.parametrize("folder", ["tiny_encoder_folder", "tiny_mpnet_folder", "tiny_decoder_folder"])
def test_weights_that_are_cast_once_give_what_autocast_gives_to_the_last_bit(request, folder):
    model = IsotropicGaussianModel.from_encoder(str(request.getfixturevalue(folder)))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    features = _encoded(model, None, feature_function(model, dtype=torch.bfloat16))
    np.testing.assert_array_equal(features, _encoded(model, None, _by_autocast(model, torch.bfloat16)))
    assert not np.array_equal(features, _encoded(model, None))
    after = model.state_dict()
    assert all(
        torch.equal(weight, after[name]) and weight.dtype == after[name].dtype for name, weight in before.items()
    )


def test_threads_that_compute_features_of_one_model_leave_its_weights_alone(tiny_model):
    def work(dtype):
        return [_encoded(tiny_model, None, feature_function(tiny_model, dtype=dtype)) for _ in range(8)]

    dtypes = [torch.bfloat16, torch.float32] * 2
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, dtypes))
    assert {weight.dtype for weight in tiny_model.parameters()} == {torch.float32}
    for dtype, vectors in zip(dtypes, found, strict=True):
        alone = _encoded(tiny_model, None, feature_function(tiny_model, dtype=dtype))
        assert all(np.array_equal(each, alone) for each in vectors)


def _linear_layers(model):
    return [each for each in model.encoder.modules() if isinstance(each, torch.nn.Linear)]


def _dtypes_in_use(model):
    """Return the dtypes that the encoder's matrices have while it encodes in bfloat16."""
    seen = set()
    for each in _linear_layers(model):
        each.register_forward_pre_hook(lambda layer, _: seen.add(layer.weight.dtype))
    _encoded(model, None, feature_function(model, dtype=torch.bfloat16))
    return seen


def test_an_encoder_that_trains_keeps_its_own_weights(tiny_encoder_folder):
    frozen, trained = (
        IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder), freeze_base=is_frozen)
        for is_frozen in (True, False)
    )
    assert _dtypes_in_use(frozen) == {torch.bfloat16}
    assert _dtypes_in_use(trained) == {torch.float32}
    compute = feature_function(trained, dtype=torch.bfloat16)
    before = _encoded(trained, None, compute)
    with torch.no_grad():
        _linear_layers(trained)[0].weight.zero_()
    assert not np.array_equal(_encoded(trained, None, compute), before)  # the next step's weights count


def test_the_copy_of_the_weights_is_gone_when_a_store_has_encoded(tiny_model, tmp_path):
    copies = []
    layer = _linear_layers(tiny_model)[0]
    layer.register_forward_pre_hook(lambda layer, _: copies.append(weakref.ref(layer.weight)))
    store = _store(tiny_model, tmp_path, dtype="bfloat16")
    store.features(TEXTS)
    assert copies
    assert all(copied() is None for copied in copies)


def test_attention_on_a_card_leaves_out_the_kernels_that_plan_each_shape_anew():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with attention_of(torch.device("cuda")):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
    with attention_of(torch.device("cpu")):
        assert torch.backends.cuda.cudnn_sdp_enabled() == before
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_card_computes_the_features_of_the_processor(tiny_model, tmp_path, dtype):
    texts = [" ".join(WORDS[start : start + length]) for length in range(1, 19) for start in range(3)]
    expected = _store(tiny_model, None).features(texts).vectors
    features = _store(tiny_model.to("cuda"), tmp_path, dtype=dtype).features(texts).vectors
    assert (expected * features).sum(1).min() > 0.999


def test_the_progress_bar_shows_texts_tokens_and_time_left(tiny_model, tmp_path, capsys):
    _store(tiny_model, tmp_path, show_progress=True).features(TEXTS)
    shown = capsys.readouterr().err
    assert all(part in shown for part in ("Encoding", f"{len(TEXTS)}/{len(TEXTS)}", "texts/s", "tokens/s", "left"))


def test_many_texts_are_encoded_in_rounds_with_one_bar(tiny_model, tmp_path, encoded, monkeypatch, capsys):
    expected = _store(tiny_model, None).features(TEXTS)
    monkeypatch.setattr(text_vectors, "TEXTS_AT_ONCE", 2)
    store = _store(tiny_model, tmp_path, show_progress=True)
    store.encode(TEXTS)
    bars = capsys.readouterr().err
    assert bars.count(f"{len(TEXTS)}/{len(TEXTS)}") == bars.count("100%") == 1
    assert encoded[-len(TEXTS) :] == TEXTS
    encoded.clear()
    np.testing.assert_allclose(store.read(TEXTS).expanded(), expected.expanded(), atol=1e-6)
    np.testing.assert_array_equal(store.read(TEXTS[1:3]).expanded(), store.features(TEXTS).expanded()[1:3])
    assert encoded == []
    assert f"{len(TEXTS)} texts encoded, {len(TEXTS)} known before" in store.summary()


def test_the_bar_ends_full_if_later_rounds_have_nothing_to_encode(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(text_vectors, "TEXTS_PER_ROUND", 2)
    _store(tiny_model, tmp_path).encode(TEXTS[2:])
    _store(tiny_model, tmp_path, show_progress=True).encode(TEXTS)
    assert "2/2" in capsys.readouterr().err.split("\r")[-1]


def test_an_unknown_backend_is_a_user_error_that_names_the_known_ones(tiny_model):
    with pytest.raises(UserError, match="torch or openvino, got 'onnx'"):
        feature_function(tiny_model, dtype=torch.float32, backend="onnx")


def test_a_missing_openvino_is_a_user_error_that_says_how_to_install_it(tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match="pip install openvino"):
        feature_function(tiny_model, dtype=torch.float32, backend="openvino")


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["tiny_encoder_folder", "tiny_mpnet_folder"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_openvino_computes_the_features_that_torch_computes(request, tmp_path, folder, pooling):
    pytest.importorskip("openvino")
    model = load_base_model(str(request.getfixturevalue(folder)), pooling=pooling)
    expected = _store(model, None).features(TEXTS).vectors
    store = _store(model, tmp_path, backend="openvino")
    np.testing.assert_allclose(store.features(TEXTS).vectors, expected, atol=1e-5)
    # A cache of its own: the two differ in their last bits.
    _store(model, tmp_path).features(TEXTS)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_an_encoder_that_openvino_does_not_know_is_a_user_error(tiny_tokenizer, tmp_path):
    pytest.importorskip("openvino")
    from transformers import XLMConfig, XLMModel

    sizes = {"emb_dim": 16, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 32, "pad_index": 1}
    XLMModel(XLMConfig(vocab_size=len(tiny_tokenizer), **sizes)).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    model = load_base_model(str(tmp_path))
    with pytest.raises(UserError, match="--encoder_backend openvino cannot convert a xlm encoder"):
        _store(model, None, backend="openvino").features(TEXTS)


# The cache is used


def test_a_second_call_and_a_fresh_store_encode_nothing(tiny_model, tmp_path, encoded):
    store = _store(tiny_model, tmp_path)
    expected = store.features(TEXTS).expanded()
    encoded.clear()
    fresh = _store(copy.deepcopy(tiny_model), tmp_path)
    np.testing.assert_array_equal(store.features(TEXTS).expanded(), expected)
    np.testing.assert_array_equal(fresh.features(TEXTS[::-1]).expanded(), expected[::-1])
    assert encoded == []


def test_only_texts_that_the_cache_lacks_are_encoded(tiny_model, tmp_path, encoded):
    _store(tiny_model, tmp_path).features(TEXTS[:3])
    encoded.clear()
    table = _store(tiny_model, tmp_path).features(TEXTS)
    assert encoded == TEXTS[3:]
    np.testing.assert_allclose(table.expanded(), _store(tiny_model, None).features(TEXTS).expanded(), atol=1e-6)


def test_without_a_cache_folder_nothing_is_written(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    default = tmp_path / "default"
    monkeypatch.setattr(feature_store, "default_cache_folder", lambda: default)
    _store(tiny_model, None).features(TEXTS)
    assert not list(tmp_path.iterdir())


def test_a_saved_and_loaded_model_finds_the_features_of_the_original(tiny_model, tmp_path):
    _store(tiny_model, tmp_path / "cache").features(TEXTS)
    tiny_model.encode_query(TEXTS)  # which sets padding and truncation in the tokenizer
    with torch.no_grad():
        tiny_model.projection.linear.weight += 1  # the head changes no feature
    tiny_model.save_pretrained(tmp_path / "model")
    for loaded in (load_trained_model(str(tmp_path / "model")), load_trained_model(str(tmp_path / "model"))):
        loaded.save_pretrained(tmp_path / "model")
        _store(_without_encoder(loaded), tmp_path / "cache").features(TEXTS)


def test_a_model_started_again_with_another_head_finds_the_features(tiny_encoder_folder, tiny_model, tmp_path):
    _store(tiny_model, tmp_path).features(TEXTS)
    other = load_base_model(str(tiny_encoder_folder), output_dim=8, projection_init="random", dropout=0.3)
    _store(_without_encoder(other), tmp_path).features(TEXTS)


KEY_PARTS = ["weights", "max_length", "pooling", "normalize_features", "tokenizer", "truncation", "prompt", "dtype"]


@pytest.mark.parametrize("part", [*KEY_PARTS, "activation"])
def test_whatever_changes_a_feature_changes_the_key(tiny_encoder_folder, tiny_model, tmp_path, encoded, part):
    _store(tiny_model, tmp_path).features(TEXTS)
    encoded.clear()
    fields = {"max_length": 5, "pooling": "cls", "normalize_features": False}
    model = load_base_model(str(tiny_encoder_folder), **({part: fields[part]} if part in fields else {}))
    if part == "weights":
        with torch.no_grad():
            model.encoder.encoder.layer[1].output.dense.bias[3] += 1e-3
    elif part == "tokenizer":
        model.tokenizer = copy.deepcopy(model.tokenizer)
        model.tokenizer.backend_tokenizer.normalizer = None
    elif part == "truncation":
        model.tokenizer.truncation_side = "left"
    elif part == "activation":
        model.encoder.config.hidden_act = "relu"
    store = _store(model, tmp_path, dtype="bfloat16" if part == "dtype" else "float32")
    store.features(TEXTS, prompt="query: " if part == "prompt" else "")
    assert encoded == TEXTS
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_beside_the_shards_explains_the_key(tiny_model, tmp_path):
    _store(tiny_model, tmp_path).features(TEXTS, prompt="query: ")
    (folder,) = tmp_path.iterdir()
    key = json.loads((folder / "key.json").read_text())
    assert (key["prompt"], key["pooling"], key["dtype"], key["max_length"]) == ("query: ", "mean", "float32", 32)
    assert str(tmp_path) not in (folder / "key.json").read_text()


# What is damaged is never read


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def _cut_in_half(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _empty(path):
    path.write_bytes(b"")


def _flip_a_bit_of_a_feature(path):
    content = bytearray(path.read_bytes())
    feature = _flip_a_bit_of_a_feature.feature.tobytes()
    place = content.find(feature)
    assert place > 0
    content[place + 5] ^= 1
    path.write_bytes(bytes(content))


def _flip_a_bit_of_a_text(path):
    from ragcun_hf.data.documents import text_digest

    content = bytearray(path.read_bytes())
    place = content.find(text_digest(TEXTS[2]))
    assert place > 0
    content[place + 3] ^= 1
    path.write_bytes(bytes(content))


def _garbage(path):
    path.write_bytes(b"\x00\xff" * 500)


def _rename(path):
    path.rename(path.with_name("6-0123456789abcdef.features"))


def _leave_half_written(path):
    path.rename(path.with_name(f".{path.name}.123.tmp"))


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        _cut_in_half,
        _empty,
        _flip_a_bit_of_a_feature,
        _flip_a_bit_of_a_text,
        _garbage,
        _rename,
        _leave_half_written,
    ],
)
def test_a_damaged_or_unfinished_shard_is_never_read_and_its_texts_are_encoded_again(
    tiny_model, tmp_path, encoded, damage
):
    expected = _store(tiny_model, tmp_path).features(TEXTS).expanded()
    (shard,) = _shards(tmp_path)
    _flip_a_bit_of_a_feature.feature = expected[2]
    before = shard.read_bytes()
    damage(shard)
    assert not shard.exists() or shard.read_bytes() != before
    encoded.clear()
    for _ in range(2):  # features that are encoded again are kept: the second run encodes nothing
        np.testing.assert_array_equal(_store(tiny_model, tmp_path).features(TEXTS).expanded(), expected)
        assert encoded == TEXTS


def test_a_damaged_shard_costs_only_its_own_texts_and_is_named(tiny_model, tmp_path, encoded, caplog):
    store = _store(tiny_model, tmp_path)
    store.features(TEXTS[:4])
    (first,) = _shards(tmp_path)
    store.features(TEXTS)
    _truncate(first)
    encoded.clear()
    _store(tiny_model, tmp_path).features(TEXTS)
    assert encoded == TEXTS[:4]
    assert str(first) in caplog.text


def test_a_shard_of_another_width_is_not_read(tmp_path):
    FeatureCache(tmp_path, {"a": 1}, feature_dim=4).write([b"x" * 16, b"y" * 16], np.ones((2, 4), np.float32))
    assert len(FeatureCache(tmp_path, {"a": 1}, feature_dim=4)) == 2
    assert len(FeatureCache(tmp_path, {"a": 1}, feature_dim=8)) == 0
    assert len(FeatureCache(tmp_path, {"a": 1}, feature_dim=3)) == 0


def _filled_cache(folder, key="a", num_rows=40):
    rng = np.random.default_rng(0)
    digests = [f"{row:016d}".encode() for row in range(num_rows)]
    features = rng.standard_normal((num_rows, 16)).astype(np.float32)
    FeatureCache(folder, {"key": key}, feature_dim=16).write(digests, features)
    return digests, features


def test_a_shard_that_is_copied_to_another_encoder_is_set_aside_in_one_line(tmp_path, caplog):
    digests, _ = _filled_cache(tmp_path, "a")
    (own,) = _shards(tmp_path)
    other = FeatureCache(tmp_path, {"key": "b"}, feature_dim=16)
    shutil.copy(own, other.folder)
    assert len(FeatureCache(tmp_path, {"key": "b"}, feature_dim=16)) == 0
    assert caplog.text.count("set aside") == 1
    assert [path.suffix for path in other.folder.glob("*.damaged")] == [".damaged"]
    assert len(FeatureCache(tmp_path, {"key": "a"}, feature_dim=16)) == len(digests)


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to nothing"])
def test_what_is_no_file_is_no_shard(tmp_path, kind):
    digests, features = _filled_cache(tmp_path)
    odd = _shards(tmp_path)[0].with_name("7-0123456789abcdef.features")
    {"pipe": os.mkfifo, "folder": os.mkdir, "link to nothing": lambda path: path.symlink_to("nowhere")}[kind](odd)
    np.testing.assert_array_equal(FeatureCache(tmp_path, {"key": "a"}, feature_dim=16).read(digests), features)


def test_a_cache_that_may_only_be_read_is_read(tmp_path, monkeypatch):
    digests, features = _filled_cache(tmp_path)

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("os.utime", refuse)
    cache = FeatureCache(tmp_path, {"key": "a"}, feature_dim=16)
    np.testing.assert_array_equal(cache.read(digests), features)
    with pytest.raises(UserError, match="--feature_cache_dir"):
        cache.write([b"n" * 16], features[:1])


@pytest.mark.parametrize("content", ["[]", "{", "7", "[" * 100_000, "\xff"])
def test_a_damaged_key_file_stops_neither_listing_nor_pruning(tmp_path, content):
    _filled_cache(tmp_path, "a")
    _filled_cache(tmp_path, "b")
    damaged, _ = sorted(tmp_path.glob("*/key.json"))
    damaged.write_text(content, encoding="latin-1")
    entries = list_cached_encoders(tmp_path)
    assert len(entries) == 2
    for entry in entries:
        remove_cached_encoder(entry)
    assert not list_cached_encoders(tmp_path)


# What is kept


def test_half_precision_features_take_half_the_space_and_are_close(tiny_encoder_folder, tmp_path):
    texts = [f"{first} {second}" for first in WORDS for second in WORDS]
    model = load_base_model(str(tiny_encoder_folder))
    sizes = {}
    for dtype in ("float32", "float16"):
        store = _store(model, tmp_path / dtype, feature_dtype=dtype)
        vectors = store.features(texts).vectors
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, _store(model, None).features(texts).vectors, atol=1e-3)
        again = _store(_without_encoder(model), tmp_path / dtype, feature_dtype=dtype)
        np.testing.assert_array_equal(again.features(texts).vectors, vectors)
        sizes[dtype] = sum(path.stat().st_size for path in _shards(tmp_path / dtype))
    assert sizes["float32"] - sizes["float16"] == pytest.approx(len(texts) * 16 * 2, rel=0.02)


def test_features_that_half_precision_cannot_hold_are_refused(tmp_path):
    cache = FeatureCache(tmp_path, {}, feature_dim=2, dtype="float16")
    with pytest.raises(UserError, match="--feature_dtype float16 expects features below 65504, got 70000"):
        cache.write([b"a" * 16], np.array([[1.0, 7e4]], dtype=np.float32))
    assert not _shards(tmp_path)


def test_the_summary_reports_texts_and_size(tiny_model, tmp_path):
    store = _store(tiny_model, tmp_path)
    store.features(TEXTS[:4])
    assert "4 texts encoded, 0 known before" in store.summary()
    store.features(TEXTS)
    assert "6 texts encoded, 4 known before" in store.summary()
    assert "holds 6 of this encoder (0.0 MiB)" in store.summary()
    assert "none kept" in _store(tiny_model, None).summary()


# Writers, interruptions, a full disk


def test_features_that_another_process_wrote_meanwhile_are_not_encoded_again(tiny_model, tmp_path, encoded):
    store = _store(tiny_model, tmp_path)
    store.features(TEXTS[:1])
    _store(copy.deepcopy(tiny_model), tmp_path).features(TEXTS)
    encoded.clear()
    store.features(TEXTS)
    assert encoded == []


def test_a_shard_that_is_removed_meanwhile_is_encoded_again(tiny_model, tmp_path):
    expected = _store(tiny_model, tmp_path).features(TEXTS).vectors
    fresh = _store(copy.deepcopy(tiny_model), tmp_path)
    fresh.features(TEXTS[:1])  # opens the shard
    for path in _shards(tmp_path):
        path.unlink()
    np.testing.assert_array_equal(fresh.features(TEXTS).vectors, expected)


def test_a_cache_that_is_pruned_while_it_is_used_is_filled_again(tiny_model, tmp_path):
    store = _store(tiny_model, tmp_path)
    expected = store.features(TEXTS).vectors
    for entry in list_cached_encoders(tmp_path):
        remove_cached_encoder(entry)
    assert not list(tmp_path.iterdir())
    np.testing.assert_array_equal(store.features(TEXTS).vectors, expected)
    assert len(list_cached_encoders(tmp_path)) == 1
    _store(_without_encoder(tiny_model), tmp_path).features(TEXTS)


def test_features_removed_just_before_they_are_read_are_encoded_again(tiny_model, tmp_path, monkeypatch):
    store = _store(tiny_model, tmp_path)
    expected = store.features(TEXTS).vectors
    read, calls = FeatureCache.read, []

    def prune_first(cache, digests):
        calls.append(len(digests))
        if len(calls) == 1:
            shutil.rmtree(cache.folder)
        return read(cache, digests)

    monkeypatch.setattr(FeatureCache, "read", prune_first)
    np.testing.assert_array_equal(store.features(TEXTS).vectors, expected)
    assert len(calls) == 2


def test_features_that_are_always_removed_are_computed_without_the_cache(tiny_model, tmp_path, monkeypatch):
    expected = _store(tiny_model, tmp_path / "other").features(TEXTS).vectors

    def gone(cache, digests):
        raise KeyError

    monkeypatch.setattr(FeatureCache, "read", gone)
    np.testing.assert_allclose(_store(tiny_model, tmp_path).features(TEXTS).vectors, expected, atol=1e-6)


@pytest.mark.parametrize("cached", [False, True])
def test_features_that_are_not_finite_are_refused_and_not_kept(tiny_model, tmp_path, cached):
    with torch.no_grad():
        tiny_model.encoder.embeddings.word_embeddings.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="expected finite features"):
        _store(tiny_model, tmp_path if cached else None).features(TEXTS)
    assert not _shards(tmp_path)


@pytest.mark.parametrize("texts", [[""], ["", "sort an array"], ["sort an array", " ", "the sun"]])
def test_a_blank_text_has_a_feature_even_without_special_tokens(tiny_model, texts):
    tiny_model.tokenizer.backend_tokenizer.post_processor = None
    assert tiny_model.tokenizer("")["input_ids"] == []
    features = _store(tiny_model, None).features(texts).vectors
    assert np.isfinite(features).all()
    with torch.no_grad():
        expected = tiny_model(**tiny_model.tokenize(texts)).features.numpy()
    np.testing.assert_allclose(features, expected, atol=1e-6)


def test_shards_are_written_during_encoding_not_only_at_the_end(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(encoder_loop, "TOKEN_BUDGET", 1)  # one text per batch
    monkeypatch.setattr(feature_cache, "SECONDS_PER_SHARD", 0.0)
    _store(tiny_model, tmp_path).features(TEXTS)
    assert len(_shards(tmp_path)) == len(TEXTS)


def test_threads_that_write_the_same_shards_at_once_leave_a_readable_cache(tmp_path):
    start, failures = threading.Barrier(4, timeout=600), []
    digests = [f"{row:016d}".encode() for row in range(200)]

    def write():
        try:
            cache = FeatureCache(tmp_path, {"a": 1}, feature_dim=256)
            for turn in range(8):
                start.wait()
                cache.write(digests, np.full((200, 256), turn, np.float32))
        except (UserError, OSError, threading.BrokenBarrierError) as error:
            failures.append(error)
            start.abort()

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    assert not failures
    assert len(_shards(tmp_path)) == 8
    assert len(FeatureCache(tmp_path, {"a": 1}, feature_dim=256)) == 200
    assert not list(tmp_path.glob("*/.*.tmp"))


def test_writers_and_prunings_at_once_neither_fail_nor_read_a_wrong_feature(tmp_path):
    done = threading.Event()

    def write(number):
        generator, is_right = random.Random(number), []
        for _ in range(25):
            values = generator.sample(range(500), 20)
            digests = [f"{value:016d}".encode() for value in values]
            cache = FeatureCache(tmp_path, {"a": 1}, feature_dim=4)
            if missing := [values[row] for row in cache.missing(digests)]:
                features = np.tile(np.array(missing, np.float32)[:, None], 4)
                cache.write([f"{value:016d}".encode() for value in missing], features)
            with contextlib.suppress(KeyError):  # pruned
                is_right.append(cache.read(digests)[:, 0].tolist() == values)
        return is_right

    def prune():
        while not done.is_set():
            for entry in list_cached_encoders(tmp_path):
                remove_cached_encoder(entry)
            remove_abandoned_files(tmp_path)

    with ThreadPoolExecutor(5) as pool:
        pruner, writers = pool.submit(prune), [pool.submit(write, number) for number in range(4)]
        try:
            is_right = [each for writer in writers for each in writer.result(600)]
        finally:
            done.set()
        pruner.result(600)
    assert is_right
    assert all(is_right)
    assert check_cache(tmp_path)[1] == []
    assert not list(tmp_path.glob("*/.*"))


def test_pruned_features_are_encoded_again_when_needed(tiny_model, tmp_path):
    store = _store(tiny_model, tmp_path)
    store.encode(TEXTS)
    for path in _shards(tmp_path):
        path.unlink()
    store.encode(TEXTS)
    fresh = _store(_without_encoder(tiny_model), tmp_path)
    np.testing.assert_array_equal(fresh.features(TEXTS).vectors, store.features(TEXTS).vectors)


def test_a_shard_that_another_process_wrote_again_under_the_same_name_is_read(tmp_path):
    digests, features = [b"a" * 16, b"b" * 16], np.ones((2, 4), np.float32)
    mine, other = (FeatureCache(tmp_path, {"a": 1}, feature_dim=4) for _ in range(2))
    other.write(digests, features)
    assert mine.read(digests).tolist() == features.tolist()
    (shard,) = _shards(tmp_path)
    shard.unlink()
    assert mine.missing(digests) == [0, 1]
    other.write(digests, features)
    assert mine.missing(digests) == []
    assert mine.read(digests).tolist() == features.tolist()
    assert mine.num_bytes == shard.stat().st_size


def test_a_damaged_shard_that_another_process_repairs_is_read_again(tmp_path):
    digests, features = [b"a" * 16, b"b" * 16], np.ones((2, 4), np.float32)
    mine, other = (FeatureCache(tmp_path, {"a": 1}, feature_dim=4) for _ in range(2))
    other.write(digests, features)
    (shard,) = _shards(tmp_path)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-40] + bytes(40))
    os.utime(shard, ns=(1, 1))
    assert mine.missing(digests) == other.missing(digests) == [0, 1]
    other.write(digests, features)
    assert mine.missing(digests) == []
    assert mine.read(digests).tolist() == features.tolist()


def test_a_cache_that_is_pruned_while_a_shard_is_written_is_made_again(tmp_path, monkeypatch):
    cache, digests = FeatureCache(tmp_path, {"a": 1}, feature_dim=4), [b"a" * 16]
    write_shard = feature_cache.write_shard

    def prune_first(folder, *content, key):
        monkeypatch.setattr(feature_cache, "write_shard", write_shard)
        shutil.rmtree(folder)
        return write_shard(folder, *content, key=key)

    monkeypatch.setattr(feature_cache, "write_shard", prune_first)
    cache.write(digests, np.ones((1, 4), np.float32))
    assert cache.read(digests).tolist() == [[1.0] * 4]
    assert (cache.folder / "key.json").exists()


def test_every_process_reads_the_same_copy_of_a_text_encoded_twice(tmp_path):
    digests = [b"a" * 16]
    first, second = (FeatureCache(tmp_path, {"a": 1}, feature_dim=4) for _ in range(2))
    for number, cache in enumerate((first, second)):
        cache.write(digests, np.full((1, 4), number, np.float32))
    for cache in (first, second):
        cache.missing([b"x" * 16])  # looks for what the other wrote
    read = first.read(digests).tolist()
    first.write([bytes([number]) * 16 for number in range(60)], np.zeros((60, 4), np.float32))
    assert read == first.read(digests).tolist() == second.read(digests).tolist()
    assert read == FeatureCache(tmp_path, {"a": 1}, feature_dim=4).read(digests).tolist()


def test_two_stores_at_once_leave_a_readable_cache(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "TEXTS_PER_SHARD", 2)
    monkeypatch.setattr(encoder_loop, "TOKEN_BUDGET", 12)
    stores = [_store(copy.deepcopy(tiny_model), tmp_path) for _ in range(2)]
    start, results = threading.Barrier(2, timeout=600), {}

    def write(number):
        start.wait()
        results[number] = stores[number].features(TEXTS).expanded()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    expected = _store(tiny_model, None).features(TEXTS).expanded()
    assert len(results) == 2
    for vectors in results.values():
        np.testing.assert_allclose(vectors, expected, atol=1e-6)
    fresh = _store(_without_encoder(tiny_model), tmp_path)
    np.testing.assert_allclose(fresh.features(TEXTS).expanded(), expected, atol=1e-6)


WRITE_SHARDS = """
import sys
import numpy as np
from ragcun_hf.features.feature_cache import FeatureCache

cache, number = FeatureCache(sys.argv[1], {"a": 1}, feature_dim=4), int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for turn in range(10):
    # Odd turns write what the other process writes too, under the same name.
    value = turn if turn % 2 else 100 * number + turn
    cache.write([f"{value:016d}".encode()], np.full((1, 4), value, np.float32))
"""


def test_two_processes_at_once_leave_a_readable_cache(tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    line = [sys.executable, "-c", WRITE_SHARDS, str(tmp_path)]
    processes = [subprocess.Popen([*line, str(number)], **pipes) for number in (1, 2)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=600)
    assert [process.returncode for process in processes] == [0, 0]
    cache = FeatureCache(tmp_path, {"a": 1}, feature_dim=4)
    values = sorted({*range(1, 10, 2), *(100 * number + turn for number in (1, 2) for turn in range(0, 10, 2))})
    assert len(cache) == len(values)
    assert cache.read([f"{value:016d}".encode() for value in values])[:, 0].tolist() == values
    assert not list(tmp_path.glob("*/.*.tmp"))


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_continues_where_it_stopped(tiny_model, tmp_path, encoded, monkeypatch, interruption):
    monkeypatch.setattr(feature_cache, "TEXTS_PER_SHARD", 2)
    monkeypatch.setattr(encoder_loop, "TOKEN_BUDGET", 1)  # one text per batch
    expected = _store(tiny_model, None).features(TEXTS).expanded()
    model = copy.deepcopy(tiny_model)
    encode, calls = model.compute_features, []

    def stop_at_the_fourth(*args):
        calls.append(1)
        if len(calls) == 4:
            raise interruption
        return encode(*args)

    model.compute_features = stop_at_the_fourth
    with pytest.raises(interruption):
        _store(model, tmp_path).features(TEXTS)
    assert len(_shards(tmp_path)) == 2
    encoded.clear()
    np.testing.assert_allclose(_store(tiny_model, tmp_path).features(TEXTS).expanded(), expected, atol=1e-6)
    assert len(encoded) == len(TEXTS) - 3


def _no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", ["write", "replace"])
def test_a_full_disk_is_a_user_error_and_leaves_no_half_written_file(tiny_model, tmp_path, monkeypatch, step):
    store = _store(tiny_model, tmp_path)
    store.features(TEXTS[:2])
    if step == "replace":
        monkeypatch.setattr("pathlib.Path.replace", _no_space)
    else:
        full = contextlib.nullcontext(Path("/dev/full"))
        monkeypatch.setattr("ragcun_hf.features.shard_file.replaced_file", lambda *_, **__: full)
    with pytest.raises(UserError, match="expected room for .* No space left on device.*--no_feature_cache"):
        store.features(TEXTS)
    assert {path.suffix for path in tmp_path.glob("*/*")} == {".json", ".features"}
    assert len(_shards(tmp_path)) == 1
    monkeypatch.undo()
    fresh = _store(tiny_model, tmp_path)
    np.testing.assert_allclose(
        fresh.features(TEXTS).expanded(), _store(tiny_model, None).features(TEXTS).expanded(), atol=1e-6
    )


def test_a_cache_folder_that_cannot_be_made_is_a_user_error(tiny_model, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="expected a feature cache folder that can be written"):
        _store(tiny_model, tmp_path / "file" / "cache").features(TEXTS)


def test_a_failed_run_restores_the_mode_of_the_model(tiny_encoder_folder, tmp_path):
    model = load_base_model(str(tiny_encoder_folder), freeze_base=False).train()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError):
        _store(model, tmp_path / "file" / "cache").features(TEXTS)
    assert model.training


@pytest.mark.slow
def test_features_of_the_real_encoder_in_bfloat16_are_close_to_its_forward_pass(embedded_folder, tmp_path):
    model = IsotropicGaussianModel.from_encoder(str(embedded_folder))
    texts = ["Which bird sleeps in water?", "Sort an array.", "A tree. " * 300, ""]
    expected = model.encode_document(texts, normalize_embeddings=True)
    exact = _store(model, tmp_path).features(texts).expanded()
    np.testing.assert_allclose(exact, expected, atol=1e-6)
    rounded = _store(model, tmp_path, dtype="bfloat16").features(texts).expanded()
    assert (rounded * expected).sum(1).min() > 0.999


@pytest.mark.parametrize("num_processes", [2, 3, 7])
def test_processes_share_texts_evenly_and_compute_the_features_of_one_process_to_the_last_bit(
    tiny_model, num_processes, monkeypatch
):
    monkeypatch.setattr(encoder_loop, "BLOCK_SIZE", 1_000)
    monkeypatch.setattr(encoder_loop, "LAST_BLOCK_SIZE", 200)
    generator = np.random.default_rng(0)
    words = np.array("bread is food and music on the river of stone".split())
    texts = [" ".join(generator.choice(words, size=length)) for length in generator.integers(1, 28, size=300)]
    compute = feature_function(tiny_model, dtype=torch.float32)

    def encode(share):
        batches = list(encode_in_batches(tiny_model, texts, compute=compute, share=share))
        return [row for rows, _ in batches for row in rows], torch.cat([features for _, features in batches])

    order, expected = encode(None)
    parts = [encode(WorkShare(number, num_processes)) for number in range(num_processes)]
    positions = [row for rows, _ in parts for row in rows]
    assert sorted(positions) == sorted(order) == list(range(len(texts)))
    together = torch.cat([features for _, features in parts])
    assert torch.equal(together[np.argsort(positions)], expected[np.argsort(order)])
    loads = [sum(len(texts[row]) for row in rows) for rows, _ in parts]
    assert max(loads) < 1.35 * min(loads)


def test_hundreds_of_processes_share_a_round_evenly():
    # Lengths of a round like those of real passages; what the busiest has to do decides how long all take.
    lengths = np.exp(np.random.default_rng(0).normal(5.7, 0.5, size=text_vectors.TEXTS_PER_ROUND)).astype(int)
    texts = ["x" * length for length in range(lengths.max() + 1)]
    sizes = []
    for start in range(0, len(lengths), text_vectors.TEXTS_AT_ONCE):
        window = [texts[length] for length in lengths[start : start + text_vectors.TEXTS_AT_ONCE]]
        sizes += [size for _, size in blocks_by_size(window, [len(text) for text in window])]
    assert sum(sizes) == lengths.sum()
    for num_processes in (2, 5, 24, 48, 100, 200, 237, 250, 263, 275):
        share, loads = WorkShare(0, num_processes), [0] * num_processes
        for size in sizes:
            loads[share.deal(size)] += size
        assert max(loads) < 1.1 * np.mean(loads), num_processes


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has this layout of the stack")
def test_openvino_leaves_the_stack_of_signals_so_that_an_interruption_is_no_crash(tiny_encoder_folder):
    pytest.importorskip("openvino")
    code = f"""
import faulthandler, os, signal, threading, torch
faulthandler.enable()
from ragcun_hf import IsotropicGaussianModel
from ragcun_hf.features.encoder_backends import feature_function
model = IsotropicGaussianModel.from_encoder({str(tiny_encoder_folder)!r})
held = [feature_function(model, dtype=torch.float32, backend="openvino")]
thread = threading.Thread(target=held.clear)
thread.start(), thread.join()
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        ("longformer", {"attention_window": [4, 4]}, "other features than PyTorch for a longformer encoder"),
        ("mamba", {"state_size": 4}, "other features than PyTorch for a mamba encoder"),
        ("roberta", {}, None),
    ],
)
def test_a_graph_that_holds_for_one_length_only_is_refused(tiny_tokenizer, tmp_path, family, sizes, message):
    pytest.importorskip("openvino")
    from transformers import AutoConfig, AutoModel

    of_all = {"vocab_size": len(tiny_tokenizer), "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 1}
    if family != "mamba":
        of_all |= {"num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 40}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **of_all, **sizes, initializer_range=0.4)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    model = IsotropicGaussianModel.from_encoder(str(tmp_path))
    texts = ["the sun", "fish " * 30, "how to sort a list and an array in the tree of light"]
    stores = [
        FeatureStore(model, cache_folder=None, dtype="float32", backend=backend, show_progress=False)
        for backend in ("torch", "openvino")
    ]
    expected = stores[0].features(texts).expanded()
    if message is None:
        np.testing.assert_allclose(stores[1].features(texts).expanded(), expected, atol=1e-4)
        return
    with pytest.raises(UserError, match=message):
        stores[1].features(texts)
