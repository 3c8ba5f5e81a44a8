"""Code on a card gives the results of the processor, mixes no devices, and does not wait where it need not.

There is no card here: see `pretend_card.py` for what that can show.
"""

import contextlib
import copy
import pickle
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import pytest
import torch
from pretend_card import CARD, CardTensor, pretend_card
from transformers import TrainerCallback

from ragcun_hf import IsotropicGaussianTrainer, IsotropicGaussianTrainingArguments
from ragcun_hf.evaluation.metrics.isotropy.measures import isotropy_report, sigreg
from ragcun_hf.evaluation.validation import RetrievalValidation
from ragcun_hf.features.encoder_backends import feature_function, with_cast_weights
from ragcun_hf.features.encoder_loop import BatchLimits, encode_in_batches
from ragcun_hf.features.feature_store import FeatureStore
from ragcun_hf.model.arguments import ModelArguments
from ragcun_hf.objective import isotropy
from ragcun_hf.objective.inputs import FeaturePairs, TextPairCollator
from ragcun_hf.search.exact import exact_search
from ragcun_hf.sweep.heads import HeadBatch, HeadData, with_head
from ragcun_hf.sweep.settings import make_trial
from ragcun_hf.trainer.loss_trainer import LossTrainer

WORDS = "tree bird fish river stone music piano water light sun moon star sleep drink food bread".split()
TEXTS = [f"{first} {'is ' * (place % 5)}{second}" for first in WORDS for place, second in enumerate(WORDS[:5])]
QUERIES, DOCUMENTS = [f"what is {text}" for text in TEXTS[:24]], TEXTS[:24]
KINDS = {  # arguments of training that together use every term of every kind
    "the default": {},
    "other kinds": {"contrastive_kind": "triplet", "isotropy_kind": "covariance", "predictive_kind": "cosine"},
    "both directions and several widths": {"bidirectional": True, "matryoshka_dims": [4, 8]},
    "bfloat16, SGD and accumulated batches": {"bf16": True, "optim": "sgd", "gradient_accumulation_steps": 2},
}


@pytest.fixture
def card():
    with pretend_card() as card:
        yield card


def test_a_pretend_card_refuses_what_a_card_refuses(card):
    numbers = torch.arange(4.0).to("cuda")
    with pytest.raises(RuntimeError, match="same device"):
        numbers + torch.ones(4)
    with pytest.raises(TypeError, match="numpy"):
        numbers.numpy()
    with pytest.raises(TypeError, match="numpy"):
        np.asarray(numbers)
    assert (numbers + torch.tensor(1.0)).tolist() == [1, 2, 3, 4]
    assert numbers[torch.tensor([3, 0])].cpu().tolist() == [3, 0]


def test_a_pretend_card_shows_a_read_that_comes_too_early(card):
    copied = torch.ones(2).to("cuda").to("cpu", non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    assert copied.isnan().all()
    event.synchronize()
    assert copied.tolist() == [1, 1]


@pytest.mark.parametrize(
    "wait",
    [
        lambda numbers: numbers.sum().item(),
        lambda numbers: bool(numbers.any()),
        lambda numbers: numbers.nonzero(),
        lambda numbers: numbers[numbers > 1],
        lambda numbers: numbers[[0, 1]],
        lambda numbers: numbers.unique(),
        lambda numbers: numbers.tolist(),
        lambda numbers: numbers.cpu(),
        lambda numbers: torch.ones(3).to(numbers.device),
        lambda numbers: torch.ones(3).to(numbers.device, non_blocking=True),  # not from pinned memory
        lambda numbers: torch.tensor([1.0], device=numbers.device),
    ],
)
def test_a_pretend_card_counts_a_wait(card, wait):
    numbers = torch.arange(3.0, device="cuda")
    assert not card.waits
    wait(numbers)
    assert card.waits


def test_a_pretend_card_counts_no_wait_where_there_is_none(card):
    numbers = torch.ones(3).pin_memory().to("cuda", non_blocking=True).requires_grad_()
    (numbers * torch.arange(3, device="cuda")).square().sum().backward()
    torch.nn.utils.clip_grad_norm_([numbers], 1.0)
    torch.optim.AdamW([numbers], fused=True).step()
    assert numbers.grad.device == CARD and not card.waits and sum(card.copies.values()) == 1


@dataclass
class _Steps(TrainerCallback):
    """The waits and copies between the end of one step and that of the next."""

    card: object
    seen: list = field(default_factory=list)

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append((dict(self.card.waits), dict(self.card.copies)))
        self.card.clear()


def as_on_a_card():
    """Let a processor sum waves up as a card does, so that both round alike."""
    return mock.patch.object(isotropy, "wave_sums", isotropy.wave_sums_by_definition)


def _pairs(model):
    store = FeatureStore(model, cache_folder=None, dtype="float32", show_progress=False)
    return FeaturePairs(QUERIES, DOCUMENTS, [[] for _ in QUERIES], store=store)


def _train(model, pairs, folder, callbacks=(), **options):
    """Train on features, or on texts if there are no pairs, and return the weights of the head."""
    options = {"optim": "adamw_torch_fused", **options}
    arguments = IsotropicGaussianTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        max_steps=3,
        warmup_steps=0,
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
        **options,
    )
    texts = [{"query": query, "positive": document} for query, document in zip(QUERIES, DOCUMENTS, strict=True)]
    trainer = LossTrainer(
        model=model,
        args=arguments,
        data_collator=pairs or TextPairCollator(model.tokenizer, max_length=model.config.max_length),
        train_dataset=range(len(QUERIES)) if pairs else texts,
        callbacks=list(callbacks),
    )
    trainer.train()
    return _weights(model)


def _weights(model):
    weights = {name: weight.detach() for name, weight in model.state_dict().items() if "encoder" not in name}
    return {name: weight.values_ if isinstance(weight, CardTensor) else weight for name, weight in weights.items()}


SLOW = [pytest.param(kinds, id=name, marks=pytest.mark.slow) for name, kinds in list(KINDS.items())[1:]]


@pytest.mark.parametrize("kinds", [pytest.param({}, id="the default"), *SLOW])
def test_a_head_on_a_card_gets_the_weights_of_the_processor_without_a_wait_in_a_step(tiny_model, tmp_path, kinds):
    start = copy.deepcopy(_weights(tiny_model))
    with as_on_a_card():
        expected = _train(copy.deepcopy(tiny_model), _pairs(tiny_model), tmp_path, use_cpu=True, **kinds)
    pairs = _pairs(tiny_model)
    with pretend_card() as card:
        steps = _Steps(card)
        found = _train(tiny_model, pairs, tmp_path, [steps], logging_steps=100, **kinds)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert any(not torch.equal(start[name], weight) for name, weight in expected.items())
    assert len(steps.seen) == 3
    batches = kinds.get("gradient_accumulation_steps", 1)
    for waits, copies in steps.seen[1:]:  # the first step also takes the features of all texts to the card
        assert waits == {}
        assert sum(copies.values()) <= 3 * batches  # two kinds of ids, and the directions of SIGReg


def test_a_card_too_small_for_all_features_gets_those_of_a_batch(tiny_model):
    pairs = _pairs(tiny_model)
    ids = pairs([3, 0, 5]).values()
    expected = pairs.features(*ids)
    with pretend_card() as card:
        on_card = [each.to("cuda") for each in ids]
        free = 2 * pairs.query_vectors.nbytes  # half of it is not enough for the documents, too
        with mock.patch.object(torch.cuda, "mem_get_info", lambda device: (free, 2**36)):
            found = pairs.features(*on_card)
        assert found.device == CARD and not card.launches
        assert torch.equal(found.cpu(), expected)


def test_features_on_a_card_do_not_travel_to_the_processes_of_a_loader(tiny_model):
    pairs = _pairs(tiny_model)
    with pretend_card():
        pairs.features(*(each.to("cuda") for each in pairs([0, 1]).values()))
        sent = pickle.dumps(pairs)
    assert len(sent) < len(pickle.dumps(_pairs(tiny_model))) + 100
    assert torch.equal(pickle.loads(sent)([1])["query_ids"], pairs([1])["query_ids"])


@pytest.mark.slow
def test_an_encoder_that_trains_on_a_card_gets_the_weights_of_the_processor(tiny_encoder_folder, tmp_path):
    from ragcun_hf import IsotropicGaussianModel

    model = IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder), freeze_base=False)
    with as_on_a_card():
        expected = _train(copy.deepcopy(model), None, tmp_path, use_cpu=True)
    with pretend_card() as card:
        steps = _Steps(card)
        found = _train(model, None, tmp_path, [steps], logging_steps=100)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    # transformers itself looks whether a batch has padding.
    assert [waits for waits, _ in steps.seen[1:] if any("masking_utils" not in each for each in waits)] == []


@pytest.mark.slow
def test_a_whole_run_on_a_card_saves_the_model_of_the_processor(tiny_encoder_folder, tmp_path):
    from ragcun_hf import IsotropicGaussianModel

    rows = [{"query": query, "positive": document} for query, document in zip(QUERIES, DOCUMENTS, strict=True)]

    def run(name):
        model = IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder), use_predictor=True, output_dim=8)
        options = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
        options |= {"save_steps": 1, "logging_steps": 1, "lexical": True, "whitening": 0.5, "blend": 0.5}
        arguments = IsotropicGaussianTrainingArguments(
            output_dir=str(tmp_path / name),
            per_device_train_batch_size=8,
            encoder_dtype="float32",
            feature_cache_dir=str(tmp_path / f"{name} features"),
            disable_tqdm=True,
            report_to="none",
            **options,
        )
        held_out = {"eval_dataset": rows[16:], "corpus": TEXTS}
        trainer = IsotropicGaussianTrainer(model, arguments, train_dataset=rows[:16], **held_out)
        trainer.train()
        trainer.save_model()
        assert str(model.device) == ("cpu" if name == "cpu" else "cuda:0")
        return trainer.evaluate()["eval_ndcg@10"]

    expected = run("cpu")
    with pretend_card():
        found = run("card")
    assert found == expected
    saved = [IsotropicGaussianModel.from_pretrained(tmp_path / name).state_dict() for name in ("cpu", "card")]
    assert saved[0].keys() == saved[1].keys()
    torch.testing.assert_close(*saved, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kinds", [pytest.param({}, id="the default"), *SLOW[:2]])
def test_a_sweep_on_a_card_gets_the_heads_of_the_processor_without_a_wait_in_a_step(tiny_model, tmp_path, kinds):
    shared = IsotropicGaussianTrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=8, report_to="none", **kinds
    )
    arguments = ModelArguments(use_predictor=True)
    trials = [make_trial({"learning_rate": rate}, 1, arguments, shared) for rate in (1e-3, 1e-2)]
    pairs = _pairs(tiny_model)

    def run(base, card=None):
        data, template = HeadData(base, pairs, len(QUERIES)), with_head(base, arguments)
        heads = HeadBatch(template, [data.initial_weights(template, trial) for trial in trials], trials)
        for step in heads.train(data, total_steps=3):
            assert card is None or step == 0 or not card.waits
            if card is not None:
                card.clear()
        return [{name: getattr(weight, "values_", weight) for name, weight in head.items()} for head in heads.heads()]

    with as_on_a_card():
        expected = run(copy.deepcopy(tiny_model))
    with pretend_card() as card:
        found = run(tiny_model.to("cuda"), card)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def _few_at_once():
    limits = BatchLimits.of(CARD)
    limits.token_budget, limits.block_size, limits.last_block_size = 48, 600, 300
    return limits


def _encoded(model, compute, limits):
    found = torch.zeros(len(TEXTS), model.config.encoder_dim)
    for rows, features in encode_in_batches(model, TEXTS, compute=compute, limits=limits):
        found[rows] = features
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loop_on_a_card_gives_the_features_of_the_processor_and_reads_them_late(tiny_model, dtype):
    tiny_model.eval()
    halved = with_cast_weights(tiny_model, dtype, is_whole=True)
    expected = _encoded(tiny_model, torch.inference_mode()(halved.compute_features), _few_at_once())
    tiny_model_on_card = copy.deepcopy(tiny_model)
    with pretend_card() as card:
        compute = feature_function(tiny_model_on_card.to("cuda"), dtype=dtype)
        card.clear()
        started = []

        def noted(input_ids, attention_mask):
            started.append(sum(count for why, count in card.waits.items() if why.startswith("event")))
            return compute(input_ids, attention_mask)

        found = _encoded(tiny_model_on_card, noted, limits := _few_at_once())
        reads = sum(count for why, count in card.waits.items() if why.startswith("event"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert reads == len(started) - 1 > limits.batches_ahead  # the first batch starts the device, and is not read
    late = [max(0, place - 1 - limits.batches_ahead) for place in range(len(started))]
    assert started == late
    # transformers itself looks whether a batch has padding; it waits for the batches before, but for nothing of ours.
    assert {why for why in card.waits if not why.startswith("event") and "masking_utils" not in why} == set()


def test_an_encoder_with_numbers_in_float32_of_its_own_computes_on_a_card_all_the_same(tiny_model):
    expected = (
        FeatureStore(tiny_model, cache_folder=None, dtype="float32", show_progress=False).features(TEXTS).vectors
    )

    def add_float32(module, args):
        return (args[0] + torch.zeros(1, device=args[0].device), *args[1:])

    tiny_model.encoder.encoder.layer[0].register_forward_pre_hook(add_float32)
    with pretend_card():
        store = FeatureStore(tiny_model.to("cuda"), cache_folder=None, dtype="bfloat16", show_progress=False)
        found = store.features(TEXTS).vectors
    cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosines.min() > 0.99


@pytest.mark.parametrize("asked", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loaded", [torch.bfloat16, torch.float16])
def test_an_encoder_loaded_in_half_precision_computes_on_a_card_as_it_is_asked_to(tiny_model, loaded, asked):
    found = []
    with pretend_card():
        tiny_model.to("cuda", dtype=loaded).encoder.register_forward_hook(
            lambda module, args, output: found.append(output.last_hidden_state.dtype)
        )
        feature_function(tiny_model, dtype=asked)(
            torch.ones(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.long)
        )
    assert found == [asked]


@pytest.mark.parametrize("is_interactive", [False, True])
def test_a_store_on_a_card_gives_the_features_of_the_processor(tiny_model, tmp_path, is_interactive):
    tiny_model.fit_lexical(TEXTS, dim=4)
    on_card = copy.deepcopy(tiny_model)
    options = {"dtype": "float32", "show_progress": False, "is_interactive": is_interactive}
    expected = FeatureStore(tiny_model, cache_folder=None, **options).features(TEXTS).vectors
    with pretend_card():
        store = FeatureStore(on_card.to("cuda"), cache_folder=tmp_path, **options)
        assert on_card.lexical.is_fitted
        found = [store.features(TEXTS).vectors, store.features(TEXTS).vectors]
    for vectors in found:
        np.testing.assert_allclose(vectors, expected, atol=1e-5)


@contextlib.contextmanager
def _little_memory(model, most):
    """Let the encoder run out of memory for more than some tokens at once."""

    def check(module, args, kwargs):
        if kwargs["input_ids"].numel() > most:
            raise torch.OutOfMemoryError("pretended")

    handle = model.encoder.register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("method", ["encode", "encode_query", "encode_document"])
def test_embeddings_of_a_card_are_those_of_the_processor_also_with_little_memory(tiny_model, method):
    expected = getattr(tiny_model, method)(TEXTS)
    with pretend_card() as card:
        found = getattr(tiny_model, method)(TEXTS, device="cuda")
        assert tiny_model.device == CARD and not card.num_emptied
        with _little_memory(tiny_model, 200):
            halved = getattr(tiny_model, method)(TEXTS)
        assert card.num_emptied
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(halved, expected, atol=1e-5)


def test_the_loop_on_a_card_halves_batches_that_do_not_fit(tiny_model):
    tiny_model.eval()
    expected = _encoded(tiny_model, feature_function(tiny_model, dtype=torch.float32), _few_at_once())
    with pretend_card() as card:
        compute, limits = feature_function(tiny_model.to("cuda"), dtype=torch.float32), _few_at_once()
        with _little_memory(tiny_model, 40):
            found = _encoded(tiny_model, compute, limits)
    assert card.num_emptied and limits.token_budget <= 40
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("are_repeated", [False, True])
def test_a_search_on_a_card_finds_what_the_processor_finds(monkeypatch, similarity, are_repeated):
    from ragcun_hf.search import first_pass

    monkeypatch.setattr(first_pass, "SPARE_CANDIDATES", 2)
    random = np.random.default_rng(0)
    queries, documents = (random.standard_normal((count, 8), dtype=np.float32) for count in (12, 300))
    if are_repeated:  # so that candidates are scored again before the end
        documents[:] = documents[:20].repeat(15, axis=0)
    options = {"k": 5, "similarity": similarity, "document_block": 64, "query_block": 5}
    expected = exact_search(queries, documents, **options)
    with pretend_card():
        found = exact_search(queries, documents, device="cuda", **options)
        of_tensors = exact_search(*(torch.from_numpy(each).to("cuda") for each in (queries, documents)), **options)
    for result in (found, of_tensors):
        np.testing.assert_array_equal(result.indices, expected.indices)
        np.testing.assert_array_equal(result.scores, expected.scores)


def test_held_out_pairs_and_isotropy_are_measured_on_a_card_as_on_the_processor(tiny_model):
    store = FeatureStore(tiny_model, cache_folder=None, dtype="float32", show_progress=False)
    rows = torch.randn(50, 6)
    with_store, without = (RetrievalValidation(QUERIES, DOCUMENTS, store=each) for each in (store, None))
    measure = [with_store, without, with_store.base_figures]
    expected = [each(tiny_model) for each in measure], isotropy_report(rows), sigreg(rows)
    calibrated = with_store.first_two(tiny_model)
    with pretend_card():
        tiny_model.to("cuda")
        found = [each(tiny_model) for each in measure], isotropy_report(rows.to("cuda")), sigreg(rows.to("cuda"))
        assert all(map(np.array_equal, with_store.first_two(tiny_model), calibrated))
    assert found[0] == expected[0]
    assert found[1] == pytest.approx(expected[1]) and found[2] == pytest.approx(expected[2])
