"""The plan of a run: every setting is decided once, from arguments and facts, and can be printed before the run."""

import ast
import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import HfArgumentParser, get_scheduler

from ragcun_hf import IsotropicGaussianTrainingArguments
from ragcun_hf.cli import train_contrastive, train_self_supervised
from ragcun_hf.command_line import argument_facts
from ragcun_hf.errors import UserError
from ragcun_hf.features.feature_store import FeatureStore
from ragcun_hf.model.arguments import ModelArguments
from ragcun_hf.objective.arguments import with_values
from ragcun_hf.sweep.automatic import ChosenSettings
from ragcun_hf.trainer.plan import RunFacts, check_run, format_plan, plan_run
from ragcun_hf.trainer.record import Checkpoint, essential_arguments

PACKAGE = Path(__file__).resolve().parents[2] / "ragcun_hf"
CHECKPOINT = Checkpoint("out/checkpoint-7")
VALIDATED = {"num_rows": 100, "has_validation": True}


@pytest.fixture
def make_args(tmp_path):
    """Make the arguments of a run."""

    def make(**fields):
        return IsotropicGaussianTrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, **fields)

    return make


def _facts(*, model=None, **facts):
    return RunFacts(ModelArguments(**(model or {})), **facts)


def _decided(plan, expected):
    return {name: getattr(plan.arguments, name) for name in expected}


BEST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_ndcg@10", "greater_is_better": True}
EACH_EPOCH = {"eval_strategy": "epoch", "save_strategy": "epoch", "eval_on_start": True, **BEST}
EVERY_5 = {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 5, **BEST}


@pytest.mark.parametrize(
    ("training", "facts", "expected"),
    [
        ({}, {"num_rows": 100}, {"eval_strategy": "no", "eval_on_start": False, "load_best_model_at_end": False}),
        ({}, VALIDATED, EACH_EPOCH),
        ({"eval_steps": 5}, VALIDATED, EVERY_5),
        ({"eval_strategy": "steps", "eval_steps": 5}, VALIDATED, EVERY_5),
        ({"save_strategy": "no"}, VALIDATED, {"save_strategy": "no", "load_best_model_at_end": False}),
        ({"save_strategy": "best"}, VALIDATED, {"save_strategy": "best", "load_best_model_at_end": True}),
        (
            {"metric_for_best_model": "eval_loss"},
            VALIDATED,
            {"metric_for_best_model": "eval_loss", "greater_is_better": False},
        ),
        ({}, {**VALIDATED, "checkpoint": CHECKPOINT}, {"eval_on_start": False}),
        ({}, {"num_rows": 100, "checkpoint": CHECKPOINT}, {"resume_from_checkpoint": "out/checkpoint-7"}),
        ({}, {"num_rows": 32}, {"dataloader_drop_last": True}),
        ({}, {"num_rows": 31}, {"dataloader_drop_last": False}),
        ({}, {"num_rows": 63, "num_processes": 2}, {"dataloader_drop_last": False}),
        ({"balance_queries": True}, {"num_rows": 99, "num_queries": 31}, {"dataloader_drop_last": False}),
        ({"balance_queries": False}, {"num_rows": 99, "num_queries": 31}, {"dataloader_drop_last": True}),
        ({"dataloader_drop_last": False}, {"num_rows": None}, {"dataloader_drop_last": True}),
        ({}, {"num_rows": None}, {"ignore_data_skip": False}),
        ({}, {"num_rows": None, "checkpoint": CHECKPOINT}, {"ignore_data_skip": True}),
        ({}, {"num_rows": 100, "checkpoint": CHECKPOINT}, {"ignore_data_skip": False}),
        ({"push_to_hub": True}, {"num_rows": 100}, {"push_to_hub": False}),
    ],
)
def test_a_plan_decides_settings_from_arguments_and_facts(make_args, training, facts, expected):
    plan = plan_run(make_args(**training), _facts(**facts))
    assert _decided(plan, expected) == expected


def test_a_blend_keeps_the_last_weights_instead_of_the_best(make_args):
    plan = plan_run(make_args(blend=0.5), _facts(**VALIDATED))
    assert plan.arguments.load_best_model_at_end is False
    assert plan.arguments.eval_strategy == "epoch"


@pytest.mark.parametrize(("blend", "epochs"), [(0.25, 8.0), (0.0, 3.0)])
def test_chosen_settings_replace_those_of_the_arguments(make_args, blend, epochs):
    chosen = ChosenSettings({"projection_kind": "linear"}, 0.3, 8.0, blend)
    arguments = plan_run(make_args(), _facts(num_rows=100, chosen=chosen)).arguments
    assert (arguments.whitening, arguments.blend, arguments.num_train_epochs) == (0.3, blend, epochs)


def test_an_automatic_plan_says_that_settings_are_chosen_until_they_are(make_args):
    (warning,) = plan_run(make_args(), _facts(num_rows=100, is_automatic=True)).warnings
    assert "are chosen after encoding" in warning
    chosen = ChosenSettings({}, 0.0, 8.0, 0.5)
    assert not plan_run(make_args(), _facts(num_rows=100, is_automatic=True, chosen=chosen)).warnings


def test_planning_changes_neither_the_arguments_nor_what_accelerate_knows(make_args):
    from accelerate.state import PartialState

    args = make_args(push_to_hub=True, eval_steps=5)
    chosen = ChosenSettings({}, 0.3, 8.0, 0.5)
    facts = _facts(num_rows=None, has_validation=True, checkpoint=CHECKPOINT, chosen=chosen)
    before = dict(vars(args)), dict(PartialState()._shared_state)
    first, second = plan_run(args, facts), plan_run(args, facts)
    assert (dict(vars(args)), dict(PartialState()._shared_state)) == before
    assert vars(first.arguments) == vars(second.arguments) != vars(args)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.warnings = ()


def test_a_plan_warns_of_rows_that_do_not_fill_a_batch(make_args):
    (warning,) = plan_run(make_args(), _facts(num_rows=31)).warnings
    assert warning == "The 31 rows of an epoch do not fill a batch of 32; it is kept smaller."
    assert plan_run(make_args(), _facts(num_rows=32)).warnings == ()


@pytest.mark.parametrize(
    ("training", "facts", "message"),
    [
        ({}, {"num_rows": 1}, "at least two training rows, got 1"),
        ({"early_stopping_patience": 2}, {"num_rows": 9}, "--early_stopping_patience needs validation pairs"),
        ({"lambda_predictive": 1.0}, {"num_rows": 9}, "--lambda_predictive 1.0 needs a predictor"),
        ({"balance_queries": True}, {"num_rows": 9}, "--balance_queries needs pairs that are known"),
        ({"balance_queries": True}, {"num_rows": 9, "num_queries": 1}, "at least two different queries"),
        ({"report_to": ["no_such_tracker"]}, {"num_rows": 9}, "no_such_tracker, which is not installed: run pip"),
        ({}, {"num_rows": None, "stream_order": {"seed": 1}, "checkpoint": CHECKPOINT}, "leave --streaming out"),
    ],
)
def test_checks_refuse_arguments_that_do_not_fit_together(make_args, training, facts, message):
    with pytest.raises(UserError, match=message):
        check_run(make_args(**training), _facts(**facts))


# A plan that is printed


SCHEDULES = {
    "linear": [{}],
    "cosine": [{}, {"num_cycles": 0}],
    "cosine_with_restarts": [{}, {"num_cycles": 0}, {"num_cycles": 3}],
    "polynomial": [{}, {"power": -1}, {"power": 0.5}, {"lr_end": 0}],
    "constant": [{}],
    "constant_with_warmup": [{}],
    "inverse_sqrt": [{}, {"timescale": 0}, {"timescale": -5}, {"timescale": 1}],
    "cosine_with_min_lr": [{"min_lr": 1e-5}, {"min_lr_rate": 0.1}],
    "cosine_warmup_with_min_lr": [{"min_lr_rate": 0.1}, {"min_lr_rate": 0.1, "warmup_lr_rate": -1}],
    "warmup_stable_decay": [{"num_decay_steps": 0}, {"num_decay_steps": 3}, {"num_decay_steps": 9}],
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_refused_before_the_run_if_and_only_if_one_of_its_steps_fails(make_args, name):
    for settings, num_steps in itertools.product(SCHEDULES[name], (1, 2, 7)):
        for warmup in (0, 1, num_steps - 1, num_steps, num_steps + 1, 100):
            args = make_args()
            fields = {"lr_scheduler_type": name, "lr_scheduler_kwargs": settings}
            args = with_values(args, max_steps=num_steps, warmup_steps=warmup, **fields)
            works = _works(name, settings, num_steps, warmup)
            try:
                check_run(args, _facts(num_rows=100))
            except UserError as error:
                assert not works
                assert f"got {warmup} steps of warm-up in {num_steps} steps of training" in str(error)
            else:
                assert works, (settings, num_steps, warmup)


def _works(name, settings, num_steps, warmup):
    """Take all steps; return whether every rate is a number of at least 0."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    try:
        schedule = get_scheduler(name, optimizer, warmup, num_steps, scheduler_specific_kwargs=settings)
        rates = []
        for _ in range(num_steps):
            rates += schedule.get_last_lr()
            optimizer.step()
            schedule.step()
    except (ValueError, ZeroDivisionError):
        return False
    return all(math.isfinite(rate) and rate >= 0 for rate in rates)


@pytest.mark.parametrize("warmup_steps", [-1, float("nan"), float("inf")])
def test_a_warm_up_is_a_finite_number_of_at_least_0(make_args, warmup_steps):
    with pytest.raises(ValueError, match="`warmup_steps` must be a finite number of at least 0"):
        make_args(warmup_steps=warmup_steps)


def test_a_run_whose_only_step_has_a_rate_of_0_is_warned_of(make_args):
    plans = [plan_run(make_args(max_steps=1, warmup_steps=steps), _facts(num_rows=100)) for steps in (0.1, 0)]
    assert ["set --warmup_steps 0" in "".join(plan.warnings) for plan in plans] == [True, False]


def test_a_printed_plan_shows_the_settings_of_the_run(make_args):
    args = make_args(whitening=0.2, eval_steps=5, max_steps=20, isotropy_kind="covariance")
    facts = _facts(model={"use_predictor": True}, num_rows=1_000, has_validation=True, num_processes=2)
    text = format_plan(plan_run(args, facts))
    shown = {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in text.splitlines()[2:]}
    assert shown["rows"] == "1,000 an epoch, as features, computed once"
    assert shown["loss"] == "1 contrastive (info_nce) + 0.1 isotropy (covariance) + 1 predictive (mse)"
    assert shown["length"] == "20 steps"
    assert shown["validation"] == "eval_ndcg@10 every 5 steps"
    assert shown["projection"] == "mlp, identity start, whitening 0.2"
    assert "32 rows on each of 2 processes" in shown["batch"]
    small = format_plan(plan_run(make_args(blend=0.0), _facts(num_rows=31, checkpoint=CHECKPOINT)))
    assert "do not fill a batch of 32" in small.splitlines()[-1]
    assert "out/checkpoint-7" in small
    assert "none (--blend 0)" in small


@pytest.mark.parametrize("flags", [[], ["--streaming", "--no_feature_cache", "--max_steps", "2"]])
def test_the_command_prints_its_plan_and_does_nothing_else(
    tiny_pairs, tmp_path, monkeypatch, capsys, tiny_encoder_folder, flags
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FeatureStore, "features", lambda *args, **kwargs: 1 / 0)
    monkeypatch.setattr(ModelArguments, "build", lambda self: 1 / 0)
    Path("pairs.json").write_text(json.dumps(tiny_pairs), encoding="utf-8")
    common = ["--base_model", str(tiny_encoder_folder), "--output_dir", "out", "--use_cpu", "--show_plan"]
    train_contrastive.main(["--train_data", "pairs.json", "--val_data", "pairs.json", *common, *flags])
    shown = capsys.readouterr().out
    assert ("a stream, as texts" if flags else "8 an epoch, as features") in shown
    assert "eval_ndcg@10 every epoch" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.json"]


def test_an_automatic_run_prints_its_plan_before_it_chooses(tmp_path, monkeypatch, capsys, tiny_encoder_folder):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ModelArguments, "build", lambda self: 1 / 0)
    texts = [f"The sun number {number} is far away. The moon number {number} is near." for number in range(300)]
    Path("documents.json").write_text(json.dumps(texts), encoding="utf-8")
    flags = ["--base_model", str(tiny_encoder_folder), "--output_dir", "out", "--use_cpu", "--show_plan"]
    train_self_supervised.main(["--documents", "documents.json", "--automatic", *flags])
    assert "are chosen after encoding, by pseudo-queries" in capsys.readouterr().out


# Arguments are set nowhere else

_ARGUMENTS = {"args", "arguments", "parsed", "training", "training_args", "training_arguments", "own_training"}
_ARGUMENTS |= {"model_args", "model_arguments", "own_model", "run_args", "validation_args", "data_args"}


def _name(node):
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _root(node):
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return _name(node)


def _assignments(tree):
    """Yield the lines in which a field of an arguments object is set, with the names of the functions around."""
    homes = {}
    for outer in ast.walk(tree):
        if isinstance(outer, ast.FunctionDef | ast.ClassDef):
            for inner in ast.walk(outer):
                homes.setdefault(inner, []).append(outer)
    for node in ast.walk(tree):
        functions = [home.name for home in homes.get(node, []) if isinstance(home, ast.FunctionDef)]
        classes = [home.name for home in homes.get(node, []) if isinstance(home, ast.ClassDef)]
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, ast.Call) and _name(node.func) in ("setattr", "__setattr__"):
            yield functions, node.lineno
        for target in (part for each in targets if each is not None for part in ast.walk(each)):
            if not isinstance(target, ast.Attribute) or not isinstance(target.ctx, ast.Store):
                continue
            is_own = _root(target) == "self" and any(name.endswith("Arguments") for name in classes)
            if is_own or _name(target.value) in _ARGUMENTS or _root(target) in _ARGUMENTS:
                yield functions, node.lineno


def test_the_walk_sees_every_way_to_set_an_argument():
    source = """
args.seed = 1
parsed.run.blend = 0.5
trainer.args.seed += 1
self.args.seed, other = 1, 2
with open("x") as training.file: pass
setattr(anything, "seed", 1)
class SomeArguments:
    def change(self):
        self.seed: int = 1
model.config.seed = 1
self.seed = 1
"""
    lines = sorted({line for _, line in _assignments(ast.parse(source))})
    assert lines == [2, 3, 4, 5, 7, 10]


def test_arguments_are_set_where_they_are_made_and_nowhere_else():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for functions, line in _assignments(ast.parse(path.read_text(encoding="utf-8"))):
            if not {"__post_init__", "with_values"} & set(functions):
                found.append(f"{path.relative_to(PACKAGE)}:{line}")
    assert not found, f"use with_values in the plan instead of setting arguments in {found}"


# Facts of arguments


def test_facts_of_arguments_do_not_disturb_other_parsers():
    parser = HfArgumentParser((ModelArguments, IsotropicGaussianTrainingArguments))
    flags = ["--epochs", "2", "--lambda_isotropy", "0.3", "--output_dir", "out", "--use_cpu", "--similarity", "dot"]
    model, training = parser.parse_args_into_dataclasses(flags)
    assert (training.num_train_epochs, training.lambda_isotropy, model.similarity_fn_name) == (2.0, 0.3, "dot")


def test_facts_are_found_by_name_for_the_fields_that_have_them():
    swept = argument_facts(IsotropicGaussianTrainingArguments, "swept")
    assert (swept["temperature"], swept["warmup_steps"]) == ("number", "shape")
    assert "output_dir" not in swept
    assert "optim" not in swept  # a field of the parent, without facts
    assert argument_facts(ModelArguments, "recorded") == {}


def test_the_essential_arguments_come_in_the_order_in_which_a_reader_looks_for_them(make_args):
    assert essential_arguments(make_args()) == [
        "lambda_contrastive",
        "lambda_isotropy",
        "lambda_predictive",
        "contrastive_kind",
        "isotropy_kind",
        "num_train_epochs",
        "per_device_train_batch_size",
        "learning_rate",
    ]


def test_changed_arguments_are_a_copy(make_args):
    training = make_args()
    changed = with_values(training, seed=7, eval_strategy="steps")
    assert (changed.seed, changed.eval_strategy, training.seed, training.eval_strategy) == (7, "steps", 42, "no")
    assert changed.device == training.device
