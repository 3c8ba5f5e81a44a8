"""The Trainer on a tiny model: weights that move or stay, logs, and settings that give the same weights."""

import copy

import numpy as np
import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer

from ragcun_hf import IsotropicGaussianModel, IsotropicGaussianTrainingArguments
from ragcun_hf.errors import UserError
from ragcun_hf.evaluation.validation import RetrievalValidation
from ragcun_hf.features.feature_store import FeatureStore, FeatureTable
from ragcun_hf.objective.inputs import FeaturePairs, TextPairCollator, text_ids
from ragcun_hf.objective.isotropy import SIGREG_NULL_FLOOR
from ragcun_hf.objective.known_pairs import PairIds
from ragcun_hf.objective.terms import Objective
from ragcun_hf.trainer.loss_trainer import LossTrainer
from ragcun_hf.trainer.record import check_and_blend

pytestmark = pytest.mark.usefixtures("quick_garbage_collection")

PREDICTIVE_ONLY = {"lambda_contrastive": 0.0, "lambda_isotropy": 0.0, "lambda_predictive": 1.0}
CONTRASTIVE_ONLY = {"lambda_contrastive": 1.0, "lambda_isotropy": 0.0, "lambda_predictive": 0.0}


def _model(folder, seed=0, **fields):
    torch.manual_seed(seed)
    return IsotropicGaussianModel.from_encoder(str(folder), **{"use_predictor": True, **fields})


@pytest.fixture
def make_model(tiny_encoder_folder):
    return lambda **fields: _model(tiny_encoder_folder, **fields)


@pytest.fixture
def make_trainer(tiny_pairs, tmp_path):
    def make(model, *, rows=None, from_features=False, **options):
        rows = tiny_pairs if rows is None else rows
        trainer_options = {
            name: options.pop(name)
            for name in ("eval_dataset", "evaluators", "callbacks", "pair_ids", "eval_pair_ids")
            if name in options
        }
        arguments = {
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "disable_tqdm": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "per_device_train_batch_size": 4,
            "max_steps": 2,
            **options,
        }
        collator, dataset = _features(model, rows) if from_features else (_text_collator(model), rows)
        return LossTrainer(
            model=model,
            args=IsotropicGaussianTrainingArguments(**arguments),
            data_collator=collator,
            train_dataset=dataset,
            **trainer_options,
        )

    return make


def _text_collator(model):
    return TextPairCollator(model.tokenizer, max_length=model.config.max_length)


def _features(model, rows):
    store = FeatureStore(model, cache_folder=None, dtype="float32", show_progress=False)
    texts = [[row["query"] for row in rows], [row["positive"] for row in rows]]
    pairs = FeaturePairs(*texts, [row.get("negative") or [] for row in rows], store=store)
    return pairs, range(len(pairs))


def _weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _difference(left, right):
    left, right = (part if isinstance(part, dict) else part.state_dict() for part in (left, right))
    assert left.keys() == right.keys()
    return max(float((left[name].float() - right[name].float()).abs().max()) for name in left)


def _logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


# Weights that move or stay


def test_two_steps_move_every_parameter_of_the_head(make_model, make_trainer):
    model = make_model(projection_init="random")
    before = _weights(model)
    trainer = make_trainer(model)
    trainer.train()
    assert trainer.state.global_step == 2
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if name.startswith(("projection.", "predictor."))}


def test_an_identity_start_moves_too(tiny_model, make_trainer):
    before = _weights(tiny_model)
    make_trainer(tiny_model).train()
    moved = {name for name, tensor in tiny_model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {"projection.linear.weight", "projection.mlp.3.weight", "projection.mlp.0.weight"} <= moved
    assert {"predictor.linear.weight", "predictor.mlp.3.weight", "predictor.mlp.0.weight"} <= moved


def test_a_frozen_encoder_stays_bit_for_bit_without_gradient_and_without_optimizer_state(tiny_model, make_trainer):
    before = _weights(tiny_model.encoder)
    trainer = make_trainer(tiny_model)
    gradients = []
    step = trainer.training_step
    trainer.training_step = lambda *args, **kwargs: (
        step(*args, **kwargs),
        gradients.append([p.grad for p in tiny_model.encoder.parameters() if p.grad is not None]),
    )[0]
    trainer.train()
    assert gradients == [[], []]
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_model.encoder.state_dict().items())
    encoder = set(tiny_model.encoder.parameters())
    optimizer = trainer.optimizer.optimizer if hasattr(trainer.optimizer, "optimizer") else trainer.optimizer
    in_groups = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert not encoder & set(in_groups)
    assert not encoder & set(optimizer.state)
    assert len(optimizer.state) == len(in_groups) == len(list(tiny_model.parameters())) - len(encoder)


@pytest.mark.parametrize("freeze_base", [True, False])
def test_gradients_are_clipped_and_dropped_as_by_transformers(make_model, make_trainer, monkeypatch, freeze_base):
    found = []
    for is_own in (True, False):
        model = make_model(freeze_base=freeze_base, dropout=0.3)
        if not is_own:
            monkeypatch.setattr(LossTrainer, "_clip_grad_norm", Trainer._clip_grad_norm)
            monkeypatch.setattr(IsotropicGaussianModel, "zero_grad", torch.nn.Module.zero_grad)
        trainer = make_trainer(model, max_steps=3, max_grad_norm=1e-3)
        trainer.train()
        assert all(parameter.grad is None for parameter in model.parameters())
        found.append((_weights(model), _logged(trainer, "grad_norm"), _logged(trainer, "loss")))
    assert _difference(found[0][0], found[1][0]) == 0
    assert found[0][1:] == found[1][1:]


def test_dropout_is_off_in_the_frozen_encoder_and_on_in_the_head_while_training(make_model, make_trainer):
    model = make_model(dropout=0.5)
    assert any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.encoder.modules())
    seen = []
    model.encoder.register_forward_hook(
        lambda *_: seen.append((any(m.training for m in model.encoder.modules()), model.projection.training))
    )
    make_trainer(model).train()
    assert seen == [(False, True)] * 2


def test_a_free_encoder_trains_with_its_own_learning_rate(make_model, make_trainer):
    model = make_model(freeze_base=False)
    before = _weights(model)
    options = {"learning_rate": 1e-3, "encoder_learning_rate": 1e-5, "weight_decay": 0.1, "warmup_steps": 0}
    trainer = make_trainer(model, **options)
    trainer.create_optimizer()
    rate_of, decay_of = {}, {}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            assert names[parameter] not in rate_of  # nothing in two groups
            rate_of[names[parameter]], decay_of[names[parameter]] = group["lr"], group["weight_decay"]
    assert rate_of == {name: 1e-5 if name.startswith("encoder.") else 1e-3 for name in names.values()}
    assert {decay_of[name] for name in rate_of if name.endswith(".bias")} == {0.0}
    assert decay_of["encoder.encoder.layer.0.attention.self.query.weight"] == 0.1
    trainer.train()
    moved = {
        part: max(
            float((tensor - before[name]).abs().max())
            for name, tensor in model.state_dict().items()
            if name.startswith(part)
        )
        for part in ("encoder.", "projection.")
    }
    assert 0 < moved["encoder."] < 5e-5  # two steps of Adam at 1e-5
    assert moved["projection."] > 5e-4


def test_frozen_layers_stay_while_the_others_train(make_model, make_trainer):
    model = make_model(freeze_base=False, freeze_layers=1)
    before = _weights(model.encoder)
    make_trainer(model, encoder_learning_rate=1e-3).train()
    moved = {name for name, tensor in model.encoder.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any(name.startswith("encoder.layer.1.") for name in moved)
    assert not any(name.startswith(("encoder.layer.0.", "embeddings.word_embeddings.")) for name in moved)


# Logs


def test_terms_are_logged_unweighted_and_their_weighted_sum_is_the_loss(tiny_model, make_trainer):
    weights = {"contrastive": 0.5, "isotropy": 3.0, "predictive": 2.0}
    trainer = make_trainer(tiny_model, max_steps=3, **{f"lambda_{name}": value for name, value in weights.items()})
    trainer.train()
    losses = _logged(trainer, "loss")
    assert len(losses) == 3
    terms = {name: _logged(trainer, f"loss/{name}") for name in weights}
    for step, loss in enumerate(losses):
        assert loss == pytest.approx(sum(weights[name] * terms[name][step] for name in weights), abs=2e-4)
        assert all(terms[name][step] > 0 for name in weights)


def test_a_log_line_averages_the_terms_since_the_last_one(tiny_model, make_trainer):
    each = make_trainer(copy.deepcopy(tiny_model), max_steps=4)
    each.train()
    pairwise = make_trainer(tiny_model, max_steps=4, logging_steps=2)
    pairwise.train()
    for name in ("contrastive", "isotropy", "predictive"):
        values = _logged(each, f"loss/{name}")
        assert _logged(pairwise, f"loss/{name}") == pytest.approx([sum(values[:2]) / 2, sum(values[2:]) / 2])


def test_collapse_measures_are_logged_with_the_loss(tiny_model, make_trainer):
    trainer = make_trainer(tiny_model)
    trainer.train()
    for entry in trainer.state.log_history[:2]:
        assert entry["embedding_std"] > 0
        assert 1 <= entry["effective_rank"] <= 16
        assert entry["sigreg"] > 0
        assert entry["sigreg_floor"] == SIGREG_NULL_FLOOR


@pytest.mark.parametrize("skipped", ["contrastive", "isotropy", "predictive"])
def test_a_weight_of_zero_skips_its_term_and_its_log_line(tiny_model, make_trainer, monkeypatch, skipped):
    function = {"contrastive": "info_nce_loss", "isotropy": "sigreg_loss", "predictive": "predictive_loss"}[skipped]

    def refuse(*args, **kwargs):
        raise AssertionError("computed all the same")

    monkeypatch.setattr(f"ragcun_hf.objective.terms.{function}", refuse)
    trainer = make_trainer(tiny_model, **{f"lambda_{skipped}": 0.0})
    trainer.train()
    shown = {key.removeprefix("loss/") for entry in trainer.state.log_history for key in entry if "loss/" in key}
    assert shown == {"contrastive", "isotropy", "predictive"} - {skipped}


def test_a_predictive_weight_without_a_predictor_is_refused(make_model, make_trainer):
    with pytest.raises(UserError, match=r"--lambda_predictive 1.2 needs a predictor, got a model without one"):
        make_trainer(make_model(use_predictor=False), lambda_predictive=1.2)


@pytest.mark.parametrize("use_predictor", [True, False])
def test_the_predictive_weight_is_one_with_a_predictor_and_zero_without(make_model, make_trainer, use_predictor):
    trainer = make_trainer(make_model(use_predictor=use_predictor), lambda_contrastive=0.0, lambda_isotropy=1.0)
    trainer.train()
    for entry in trainer.state.log_history[:2]:
        assert entry["loss"] == pytest.approx(entry["loss/isotropy"] + entry.get("loss/predictive", 0.0), abs=2e-4)
        assert ("loss/predictive" in entry) == use_predictor


def test_nothing_to_train_is_refused_before_the_first_step(make_model, make_trainer):
    with pytest.raises(UserError, match="nothing to train"):
        make_trainer(make_model(use_predictor=False), lambda_contrastive=0.0, lambda_isotropy=0.0)


@pytest.mark.parametrize(
    "options",
    [
        {"contrastive_kind": "triplet", "margin": 1.0},
        {"isotropy_kind": "covariance"},
        {"predictive_kind": "cosine"},
        {"bidirectional": True},
        {"num_directions": 3, "temperature": 1.0},
    ],
    ids=str,
)
def test_every_kind_of_term_trains_and_changes_the_loss(tiny_model, make_trainer, options):
    usual = make_trainer(copy.deepcopy(tiny_model), max_steps=1)
    usual.train()
    other = make_trainer(tiny_model, max_steps=1, **options)
    other.train()
    assert np.isfinite(_logged(other, "loss")[0])
    assert _logged(other, "loss")[0] != pytest.approx(_logged(usual, "loss")[0], abs=1e-3)


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
def test_the_contrastive_term_uses_the_similarity_of_the_search(make_model, make_trainer, monkeypatch, similarity):
    used = []
    from ragcun_hf.objective import terms as module

    real = module.info_nce_loss
    monkeypatch.setattr(
        module, "info_nce_loss", lambda *args, **kwargs: used.append(kwargs["similarity"]) or real(*args, **kwargs)
    )
    make_trainer(make_model(similarity_fn_name=similarity), max_steps=1).train()
    assert used == [similarity]


def test_embeddings_that_are_not_finite_are_logged_without_collapse_measures(tiny_model, make_trainer):
    with torch.no_grad():
        tiny_model.projection.linear.bias.fill_(float("nan"))
    trainer = make_trainer(tiny_model, max_steps=1)
    trainer.train()
    assert "loss/contrastive" in trainer.state.log_history[0]
    assert "effective_rank" not in trainer.state.log_history[0]


# The same weights


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_from_features_equals_training_from_tokens(make_model, make_trainer, dropout):
    trained = []
    for from_features in (True, False):
        model = make_model(dropout=dropout)
        start = _weights(model)
        make_trainer(model, from_features=from_features, max_steps=6).train()
        assert _difference(start, model) > 1e-4
        trained.append(model)
    assert _difference(*trained) < 1e-5


def test_accumulated_batches_of_means_over_rows_equal_one_large_batch(make_model, make_trainer):
    trained = []
    for batch_size, accumulation in ((8, 1), (4, 2)):
        model = make_model(dropout=0.0)
        start = _weights(model)
        # Plain gradient descent: Adam would enlarge rounding errors of gradients near 0.
        options = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 3, **PREDICTIVE_ONLY}
        trainer = make_trainer(
            model, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, **options
        )
        trainer.train()
        assert trainer.state.global_step == 3
        assert _difference(start, model) > 1e-3
        trained.append((model, _logged(trainer, "loss/predictive"), _logged(trainer, "loss")))
    assert _difference(trained[0][0], trained[1][0]) < 1e-6
    assert trained[0][1] == pytest.approx(trained[1][1], abs=1e-6)
    assert trained[0][2] == pytest.approx(trained[1][2], abs=1e-4)


@pytest.mark.parametrize("from_features", [True, False])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    make_model, make_trainer, tmp_path, from_features
):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "from_features": from_features}
    whole = make_model(dropout=0.3, projection_init="random")
    make_trainer(whole, **options, output_dir=str(tmp_path / "whole")).train()
    resumed = make_model(dropout=0.3, projection_init="random", seed=5)
    assert _difference(whole, resumed) > 1e-2
    torch.manual_seed(99)
    # The checkpoint is in the middle of the second epoch, so half an epoch has to be skipped.
    trainer = make_trainer(resumed, **options, output_dir=str(tmp_path / "resumed"))
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert trainer.state.global_step == 6
    assert _difference(whole, resumed) == 0
    assert not any(module.training for module in resumed.encoder.modules())
    assert not any(parameter.requires_grad for parameter in resumed.encoder.parameters())


def test_the_seed_decides_the_weights(make_model, make_trainer):
    def train(seed):
        model = make_model(dropout=0.3)
        make_trainer(model, seed=seed, max_steps=3).train()
        return model

    first, again, other = train(1), train(1), train(2)
    assert _difference(first, again) == 0
    assert _difference(first, other) > 1e-5


def test_bfloat16_autocast_keeps_losses_in_float32_and_close_to_float32(make_model, make_trainer, monkeypatch):
    losses, dtypes = [], set()
    terms = Objective.terms

    def record(*args, **kwargs):
        found = terms(*args, **kwargs)
        dtypes.update(term.dtype for term in found.values())
        return found

    monkeypatch.setattr(Objective, "terms", record)
    for bf16 in (False, True):
        trainer = make_trainer(make_model(dropout=0.0), bf16=bf16, max_steps=3)
        hidden = []
        trainer.model.projection.mlp[0].register_forward_hook(lambda *args, seen=hidden: seen.append(args[2].dtype))
        trainer.train()
        assert set(hidden) == {torch.bfloat16 if bf16 else torch.float32}
        assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
        losses.append(_logged(trainer, "loss"))
    assert dtypes == {torch.float32}
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1] != losses[0]


# Evaluation


class _Scripted:
    """A validation that returns given figures."""

    def __init__(self, *figures):
        self.figures = list(figures)
        self.weights = []

    def __call__(self, model):
        self.weights.append(_weights(model))
        return {"ndcg@10": self.figures[len(self.weights) - 1]}


def _evaluating(**options):
    return {
        "max_steps": -1,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_ndcg@10",
        "greater_is_better": True,
        **options,
    }


@pytest.mark.parametrize("from_features", [True, False])
def test_evaluation_returns_the_loss_its_terms_and_the_retrieval_figures(
    tiny_model, tiny_pairs, make_trainer, from_features
):
    texts = [[pair["query"] for pair in tiny_pairs], [pair["positive"] for pair in tiny_pairs]]
    store = FeatureStore(tiny_model, cache_folder=None, dtype="float32", show_progress=False)
    validation = RetrievalValidation(*texts, store=store if from_features else None)
    rows = _features(tiny_model, tiny_pairs)[1] if from_features else tiny_pairs
    weights = {"lambda_contrastive": 0.5, "lambda_isotropy": 3.0, "lambda_predictive": 2.0}
    # Three rows per batch: the last has two, and all eight rows count.
    options = {"per_device_eval_batch_size": 3, "eval_dataset": rows, "evaluators": [validation], **weights}
    trainer = make_trainer(tiny_model, from_features=from_features, **options)
    figures = trainer.evaluate()
    parts = [0.5 * figures["eval_loss/contrastive"], 3 * figures["eval_loss/isotropy"]]
    assert figures["eval_loss"] == pytest.approx(sum(parts) + 2 * figures["eval_loss/predictive"], rel=1e-5)
    assert 0 < figures["eval_ndcg@10"] < 1
    assert 0 < figures["eval_ndcg@10_predictor"] < 1
    assert trainer.state.log_history[-1]["eval_ndcg@10"] == figures["eval_ndcg@10"]
    assert not tiny_model.training
    fewer = trainer.evaluate(rows[:6])
    assert fewer["eval_loss"] != pytest.approx(figures["eval_loss"], abs=1e-4)


def test_a_validation_set_smaller_than_a_batch_still_has_a_loss(tiny_model, tiny_pairs, make_trainer):
    trainer = make_trainer(tiny_model, eval_dataset=tiny_pairs[:3], per_device_eval_batch_size=8)
    assert trainer.args.dataloader_drop_last
    figures = trainer.evaluate()
    assert figures["eval_loss"] > 0
    assert figures["eval_loss/contrastive"] > 0
    assert trainer.args.dataloader_drop_last  # training still drops the last batch


def test_evaluation_leaves_the_training_terms_alone(make_model, tiny_pairs, make_trainer):
    options = {"max_steps": 4, "logging_steps": 4}
    plain = make_trainer(make_model(dropout=0.0), **options)
    plain.train()
    options.update(eval_strategy="steps", eval_steps=1, eval_dataset=tiny_pairs)
    evaluated = make_trainer(make_model(dropout=0.0), **options)
    evaluated.train()
    for name in ("loss", "loss/contrastive", "loss/isotropy", "loss/predictive"):
        assert _logged(evaluated, name) == _logged(plain, name)
    assert len(_logged(evaluated, "eval_loss")) == 4


def test_the_checkpoint_with_the_best_ndcg_is_the_one_at_the_end(tiny_model, tiny_pairs, make_trainer):
    validation = _Scripted(0.1, 0.9, 0.5)
    options = _evaluating(num_train_epochs=3, eval_dataset=tiny_pairs, evaluators=[validation])
    trainer = make_trainer(tiny_model, **options)
    trainer.train()
    assert len(validation.weights) == 3
    assert _difference(validation.weights[1], tiny_model) == 0
    assert _difference(validation.weights[2], tiny_model) > 0
    assert trainer.state.best_metric == 0.9
    assert not any(parameter.requires_grad for parameter in tiny_model.encoder.parameters())


def test_training_stops_early_when_ndcg_no_longer_rises(tiny_model, tiny_pairs, make_trainer):
    validation = _Scripted(0.3, 0.8, 0.7, 0.6, 0.9)
    options = _evaluating(num_train_epochs=5, eval_dataset=tiny_pairs, evaluators=[validation])
    trainer = make_trainer(tiny_model, callbacks=[EarlyStoppingCallback(2)], **options)
    trainer.train()
    assert trainer.state.epoch == 4
    assert _difference(validation.weights[1], tiny_model) == 0


def test_validation_searches_on_the_device_of_the_model(tiny_model, tiny_pairs, searched_on):
    texts = ([pair[name] for pair in tiny_pairs] for name in ("query", "positive"))
    store = FeatureStore(tiny_model, cache_folder=None, dtype="float32", show_progress=False)
    validation = RetrievalValidation(*texts, store=store)
    validation(tiny_model)
    validation.base_figures(tiny_model)
    validation.first_two(tiny_model)
    assert searched_on == ["cpu:0"] * 4  # the projection and the predictor, the base, the projection


def test_validation_from_features_equals_validation_from_tokens(tiny_model, tiny_pairs):
    texts = [[pair["query"] for pair in tiny_pairs], [pair["positive"] for pair in tiny_pairs]]
    store = FeatureStore(tiny_model, cache_folder=None, dtype="float32", show_progress=False)
    tiny_model.train()
    figures = [
        RetrievalValidation(*texts, distractors=["the sun"], store=found)(tiny_model) for found in (store, None)
    ]
    assert figures[0] == pytest.approx(figures[1])
    assert figures[0].keys() == {"ndcg@10", "ndcg@10_predictor"}
    assert tiny_model.training


def test_validation_restores_the_training_mode_after_an_error(tiny_model, tiny_pairs, monkeypatch):
    texts = [[pair["query"] for pair in tiny_pairs], [pair["positive"] for pair in tiny_pairs]]
    store = FeatureStore(tiny_model, cache_folder=None, dtype="float32", show_progress=False)
    tiny_model.train()
    monkeypatch.setattr(store, "features", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        RetrievalValidation(*texts, store=store)(tiny_model)
    assert tiny_model.training


# Epochs whose rows change


class _ChangingRows:
    """Eight rows that record the epoch of every access."""

    def __init__(self, rows):
        self.rows, self.epoch, self.asked = rows, 0, []

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.asked.append(self.epoch)
        return self.rows[index]


def test_the_training_rows_are_told_each_epoch(tiny_model, tiny_pairs, make_trainer):
    rows = _ChangingRows(tiny_pairs)
    make_trainer(tiny_model, rows=rows, max_steps=-1, num_train_epochs=3).train()
    assert rows.asked == [0] * 8 + [1] * 8 + [2] * 8


@pytest.mark.parametrize(("step", "asked"), [(2, [1] * 8 + [2] * 8), (3, [1] * 4 + [2] * 8)])
def test_a_resumed_run_continues_in_the_epoch_of_its_checkpoint(
    tiny_model, tiny_pairs, make_trainer, tmp_path, step, asked
):
    options = {
        "max_steps": -1,
        "num_train_epochs": 3,
        "save_strategy": "steps",
        "save_steps": step,
        "save_total_limit": 9,
    }
    make_trainer(copy.deepcopy(tiny_model), rows=_ChangingRows(tiny_pairs), **options).train()
    rows = _ChangingRows(tiny_pairs)
    trainer = make_trainer(tiny_model, rows=rows, **options, output_dir=str(tmp_path / "resumed"))
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
    assert rows.asked == asked


# Collators


def test_the_text_collator_puts_queries_before_positives_before_all_negatives(tiny_tokenizer):
    rows = [
        {"query": "a", "positive": "an the", "negative": []},
        {"query": "of", "positive": "in", "negative": ["on", "an the"]},
        {"query": "a", "positive": "is"},
    ]
    batch = TextPairCollator(tiny_tokenizer, max_length=8)(rows)
    assert batch["input_ids"].tolist() == [
        [2, 5, 3, 1],  # a
        [2, 8, 3, 1],  # of
        [2, 5, 3, 1],  # a
        [2, 6, 7, 3],  # an the
        [2, 9, 3, 1],  # in
        [2, 11, 3, 1],  # is
        [2, 10, 3, 1],  # on
        [2, 6, 7, 3],  # an the
    ]
    assert batch["attention_mask"].tolist() == [
        [1, 1, 1, int(row in ("an the",))] for row in ("a", "of", "a", "an the", "in", "is", "on", "an the")
    ]
    assert _pattern(batch["query_ids"]) == [0, 1, 0]
    assert _pattern(batch["document_ids"]) == [0, 1, 2, 3, 0]


def test_the_text_collator_gives_a_text_of_any_length_the_tokens_of_the_model(tiny_model):
    texts = ["bread is food " * 1_000, " " * 500 + "fish sleep", "x" * 500 + " star", "", "the moon"]
    rows = [{"query": text, "positive": text} for text in texts]
    tokenizer, read = tiny_model.tokenizer, []

    class Recording:
        is_fast, truncation_side, pad_token_id, pad = False, "right", tokenizer.pad_token_id, tokenizer.pad

        def __call__(self, texts, **options):
            read.extend(map(len, texts))
            return tokenizer(texts, **options)

    batch = TextPairCollator(Recording(), max_length=8, query_prompt="query: ")(rows)
    whole = tokenizer([*(f"query: {text}" for text in texts), *texts], truncation=True, max_length=8, padding=True)
    assert batch["input_ids"].tolist() == whole["input_ids"]
    assert batch["attention_mask"].tolist() == whole["attention_mask"]
    assert max(read) < 2_000 < len(texts[0])


def _pattern(ids):
    """Number ids in the order of their first occurrence."""
    known = list(dict.fromkeys(ids.tolist()))
    return [known.index(value) for value in ids.tolist()]


class _NumbersStore:
    """A feature store whose texts are written-out vectors."""

    def features(self, texts, *, prompt=""):
        distinct = list(dict.fromkeys(texts))
        vectors = np.array([[float(number) for number in text.split()] for text in distinct], np.float32)
        return FeatureTable(vectors=vectors, rows=np.array([distinct.index(text) for text in texts]))


def test_feature_pairs_point_at_the_features_of_their_texts(tiny_model, tiny_pairs):
    queries, positives = [row["query"] for row in tiny_pairs], [row["positive"] for row in tiny_pairs]
    negatives = [row.get("negative", []) for row in tiny_pairs]
    store = FeatureStore(tiny_model, cache_folder=None, dtype="float32", show_progress=False)
    pairs = FeaturePairs(
        queries, positives, negatives, store=store, query_prompt="query: ", document_prompt="document: "
    )
    assert len(pairs) == 8
    for row in range(8):
        query = store.features([queries[row]], prompt="query: ").vectors
        documents = store.features([positives[row], *negatives[row]], prompt="document: ").expanded()
        expected = np.concatenate([query, documents])
        np.testing.assert_allclose(pairs.features(**pairs([row])).numpy(), expected, atol=1e-6)


def test_feature_pairs_are_collated_in_the_same_layout():
    negatives = [["6 7", "4 5"], []]
    pairs = FeaturePairs(["0 1", "2 3"], ["8 9", "4 5"], negatives, store=_NumbersStore())
    batch = pairs([1, 0])
    features = pairs.features(**batch)
    assert features.tolist() == [[2, 3], [0, 1], [4, 5], [8, 9], [6, 7], [4, 5]]
    assert features.dtype == torch.float32
    assert batch["query_ids"].tolist() == [1, 0]
    assert batch["document_ids"].tolist() == [1, 0, 2, 1]


def test_prompts_are_prepended_to_queries_and_documents(tiny_tokenizer):
    collator = TextPairCollator(tiny_tokenizer, max_length=8, query_prompt="query: ", document_prompt="document: ")
    batch = collator([{"query": "a", "positive": "an", "negative": ["the"]}])
    query, document = tiny_tokenizer.convert_tokens_to_ids(["query:", "document:"])
    assert batch["input_ids"].tolist() == [[2, query, 5, 3], [2, document, 6, 3], [2, document, 7, 3]]
    # Ids do not depend on prompts.
    plain = TextPairCollator(tiny_tokenizer, max_length=8)([{"query": "a", "positive": "an", "negative": ["the"]}])
    assert torch.equal(batch["document_ids"], plain["document_ids"])


def test_long_texts_are_cut(tiny_tokenizer):
    batch = TextPairCollator(tiny_tokenizer, max_length=4)([{"query": "a an the of in", "positive": "on"}])
    assert batch["input_ids"].shape == (2, 4)


def test_both_collators_give_the_model_the_same_batch(make_model, tiny_pairs):
    model = make_model(dropout=0.0)
    collator, pairs = _features(model, tiny_pairs)
    rows = [*tiny_pairs[:3], tiny_pairs[0]]
    by_text = _text_collator(model)(rows)
    by_feature = collator([pairs[index] for index in (0, 1, 2, 0)])
    features = collator.features(**by_feature)
    for name in ("query_ids", "document_ids"):
        assert _pattern(by_text.pop(name)) == _pattern(by_feature.pop(name))
    with torch.no_grad():
        torch.testing.assert_close(
            model(**by_text).embeddings, model(features=features).embeddings, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("from_features", [True, False])
def test_duplicates_in_a_batch_are_no_negatives(make_model, make_trainer, from_features):
    model = make_model(dropout=0.0)
    rows = [
        {"query": "what is bread", "positive": "bread is food"},
        {"query": "what do fish eat", "positive": "bread is food"},  # the document of the first
        {"query": "what is bread", "positive": "red bread"},  # the query of the first
        {"query": "is music fast", "positive": "piano music", "negative": ["bread is food", "the sun"]},
    ]
    trainer = make_trainer(model, rows=rows, from_features=from_features, **CONTRASTIVE_ONLY)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    model.eval()
    with torch.no_grad():
        loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    vectors = torch.nn.functional.normalize(outputs.embeddings, dim=-1)
    scores = vectors[:4] @ vectors[4:].T / trainer.args.temperature
    # Columns: three positives ("bread is food" twice), "piano music", then the two negatives.
    candidates = [[0, 3, 5], [1, 2, 3, 5], [1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    expected = [torch.logsumexp(scores[row, columns], 0) - scores[row, row] for row, columns in enumerate(candidates)]
    assert float(loss) == pytest.approx(float(torch.stack(expected).mean()), abs=1e-4)


def _pair_ids(rows):
    return PairIds(text_ids([row["query"] for row in rows]), text_ids([row["positive"] for row in rows]))


@pytest.mark.parametrize("mode", ["pair_ids", "eval_pair_ids"])
def test_a_document_that_answers_the_query_in_another_row_is_no_negative(make_model, make_trainer, mode):
    model = make_model(dropout=0.0)
    rows = [
        {"query": "what is bread", "positive": "bread is food"},
        {"query": "what do fish eat", "positive": "red bread"},
        {"query": "is music fast", "positive": "piano music"},
        {"query": "what is bread", "positive": "red bread"},  # not in the batch below, but known
    ]
    losses = {}
    for name, ids in (("known", {mode: _pair_ids(rows)}), ("unknown", {})):
        trainer = make_trainer(model, rows=rows, **ids, **CONTRASTIVE_ONLY)
        batch = trainer.data_collator(rows[:3])
        model.train(mode == "pair_ids")  # without dropout, so that only the known pairs differ
        with torch.no_grad():
            loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
        losses[name] = float(loss)
        vectors = torch.nn.functional.normalize(outputs.embeddings, dim=-1)
        scores = vectors[:3] @ vectors[3:].T / trainer.args.temperature
    candidates = {"known": [[0, 2], [0, 1, 2], [0, 1, 2]], "unknown": [[0, 1, 2]] * 3}
    for name, columns in candidates.items():
        rows_of = enumerate(columns)
        expected = [torch.logsumexp(scores[row, chosen], 0) - scores[row, row] for row, chosen in rows_of]
        assert losses[name] == pytest.approx(float(torch.stack(expected).mean()), abs=1e-4)
    assert losses["known"] < losses["unknown"] - 1e-3


class _Recorder:
    """Rows that record every access."""

    def __init__(self, rows):
        self.rows, self.asked = rows, []

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.asked.append(index)
        return self.rows[index]


def _many_documents(tiny_pairs):
    return [*tiny_pairs, *({**tiny_pairs[0], "positive": row["positive"]} for row in tiny_pairs[1:])]


def test_balanced_epochs_use_every_query_once_with_a_document_drawn_anew(tiny_model, tiny_pairs, make_trainer):
    rows = _many_documents(tiny_pairs)
    recorder = _Recorder(rows)
    options = {"max_steps": -1, "num_train_epochs": 12, "per_device_train_batch_size": 4, "balance_queries": True}
    trainer = make_trainer(tiny_model, rows=recorder, pair_ids=_pair_ids(rows), **options)
    trainer.train()
    assert trainer.state.global_step == 12 * 2  # eight queries an epoch, not fifteen rows
    epochs = [recorder.asked[start : start + 8] for start in range(0, 96, 8)]
    queries = sorted(row["query"] for row in tiny_pairs)
    assert all(sorted(rows[index]["query"] for index in epoch) == queries for epoch in epochs)
    of_first = [index for epoch in epochs for index in epoch if rows[index]["query"] == tiny_pairs[0]["query"]]
    assert len(set(of_first)) > 3


def test_a_resumed_balanced_run_draws_the_rows_of_an_uninterrupted_one(tiny_model, tiny_pairs, make_trainer, tmp_path):
    rows = _many_documents(tiny_pairs)
    options = {"max_steps": -1, "num_train_epochs": 3, "balance_queries": True, "save_strategy": "steps"}
    options |= {"save_steps": 3, "save_total_limit": 9, "pair_ids": _pair_ids(rows)}
    of_whole, of_resumed = _Recorder(rows), _Recorder(rows)
    whole = make_trainer(copy.deepcopy(tiny_model), rows=of_whole, **options)
    whole.train()
    resumed = make_trainer(tiny_model, rows=of_resumed, **options, output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert of_resumed.asked[-12:] == of_whole.asked[-12:]
    assert _difference(whole.model, resumed.model) < 1e-6


def test_balanced_queries_need_known_rows(tiny_model, make_trainer):
    with pytest.raises(ValueError, match="`balance_queries` needs rows that are known"):
        make_trainer(tiny_model, balance_queries=True)


# The saved weights


class _Measured:
    """A validation with given figures."""

    num_documents = 500

    def __init__(self, figure):
        self.figure = figure

    def base_figures(self, model):
        return {"ndcg@10": 0.3}

    def __call__(self, model):
        return {"ndcg@10": self.figure}


@pytest.mark.parametrize("blend", [0.5, 1.0])
@pytest.mark.parametrize(("measured", "warned"), [(0.4, True), (0.6, False)])
def test_the_recorded_figure_is_that_of_the_saved_weights(
    make_model, tiny_pairs, make_trainer, caplog, blend, measured, warned
):
    model = make_model(dropout=0.0)
    options = {"eval_dataset": tiny_pairs, "eval_strategy": "epoch", "metric_for_best_model": "eval_ndcg@10"}
    validation = _Measured(measured)
    trainer = make_trainer(model, evaluators=[validation], **options)
    trainer.state.log_history = [{"eval_ndcg@10": 0.5, "step": 0}, {"eval_ndcg@10": 0.45, "step": 2}]
    trainer.state.best_metric = 0.45
    start = {name: torch.zeros_like(weight) for name, weight in model.named_parameters() if weight.requires_grad}
    trained = _weights(model)
    figures = check_and_blend(trainer, start, blend, validation)
    assert figures == {"base": 0.3, "start": 0.5, "saved": measured}  # not 0.45, which is of other weights
    assert ("the untrained start is the better choice" in caplog.text) == warned
    name = "projection.linear.weight"
    torch.testing.assert_close(model.state_dict()[name], blend * trained[name])


# Arguments


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lambda_contrastive", -1.0),
        ("lambda_isotropy", float("nan")),
        ("lambda_predictive", float("inf")),
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("margin", -0.1),
        ("margin", float("nan")),
        ("num_directions", 0),
        ("learning_rate", float("nan")),
        ("learning_rate", 0.0),
        ("encoder_learning_rate", -1.0),
        ("contrastive_kind", "other"),
        ("isotropy_kind", "other"),
        ("predictive_kind", "other"),
        ("weight_decay", -1.0),
        ("weight_decay", float("nan")),
        ("early_stopping_patience", 0),
        ("per_device_eval_batch_size", 0),
        ("gradient_accumulation_steps", 0),
    ],
)
def test_a_wrong_value_is_refused_by_name(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        IsotropicGaussianTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{name: value})


@pytest.mark.parametrize(
    ("name", "alias"), [("per_device_train_batch_size", "batch_size"), ("num_train_epochs", "epochs")]
)
def test_an_empty_batch_and_no_epoch_are_refused_by_the_name_of_the_flag(tmp_path, name, alias):
    with pytest.raises(ValueError, match=f"`{alias}` must be"):
        IsotropicGaussianTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{name: 0})


def test_three_weights_of_zero_are_refused(tmp_path):
    weights = {f"lambda_{name}": 0.0 for name in ("contrastive", "isotropy", "predictive")}
    with pytest.raises(ValueError, match="nothing to train"):
        IsotropicGaussianTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **weights)


def test_use_cpu_follows_from_the_machine_and_is_not_recorded(tmp_path):
    from ragcun_hf.trainer.record import recorded_arguments

    arguments = IsotropicGaussianTrainingArguments(output_dir=str(tmp_path))
    assert arguments.use_cpu == (not torch.accelerator.is_available())
    assert not {"use_cpu", "output_dir", "hub_token"} & recorded_arguments(arguments).keys()


def test_the_record_holds_changed_and_essential_arguments(tmp_path):
    from ragcun_hf.trainer.record import recorded_arguments

    plain = recorded_arguments(IsotropicGaussianTrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    changed = recorded_arguments(
        IsotropicGaussianTrainingArguments(output_dir=str(tmp_path), use_cpu=True, margin=0.5, learning_rate=1e-5)
    )
    assert plain["learning_rate"] == 3e-4
    assert "margin" not in plain
    assert {key: value for key, value in changed.items() if value != plain.get(key)} == {
        "margin": 0.5,
        "learning_rate": 1e-5,
    }


def test_the_record_does_not_change_the_state_of_the_processes(tmp_path):
    from accelerate.state import PartialState

    from ragcun_hf.trainer.record import recorded_arguments

    arguments = IsotropicGaussianTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    state = dict(PartialState._shared_state)
    recorded_arguments(arguments)
    assert PartialState._shared_state == state
    assert state["_cpu"] is True
