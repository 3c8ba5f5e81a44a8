"""Sweeps: settings, rounds, heads trained at once, records of interrupted sweeps, and the command end to end."""

import copy
import importlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ragcun_hf import IsotropicGaussianModel, IsotropicGaussianTrainingArguments
from ragcun_hf.errors import UserError
from ragcun_hf.evaluation.validation import RetrievalValidation
from ragcun_hf.features.feature_store import FeatureStore
from ragcun_hf.model.arguments import ModelArguments
from ragcun_hf.objective.inputs import FeaturePairs
from ragcun_hf.sweep.heads import HeadBatch, HeadData, measure_head, with_head
from ragcun_hf.sweep.records import SweepRecords, TrialRecord
from ragcun_hf.sweep.report import format_settings, varied_names
from ragcun_hf.sweep.run import plan_rounds
from ragcun_hf.sweep.settings import grid_settings, make_trial, random_settings
from ragcun_hf.trainer.loss_trainer import LossTrainer

pytestmark = pytest.mark.usefixtures("quick_garbage_collection")

ROOT = Path(__file__).resolve().parents[2]
EIGHT_SETTINGS = "{learning_rate: [1.0e-3, 1.0e-2], temperature: [0.05, 0.2], use_predictor: [true, false]}"
QUERIES = "sun moon star fish bird tree bread water music stone river light".split()


@pytest.fixture(scope="module")
def pairs_of_words():
    """Sixty-six pairs: a query of two words and a document with these and other words."""
    pairs = []
    for number, (first, second) in enumerate(itertools.combinations(QUERIES, 2)):
        others = f"{QUERIES[number % 12]} and {QUERIES[(number * 5) % 12]}"
        pairs.append({"query": f"{first} {second}", "positive": f"the {second} is {first} in the {others}"})
    return pairs


@pytest.fixture
def training_arguments(tmp_path):
    def make(**options):
        fixed = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
        sizes = {"per_device_train_batch_size": 8, "max_steps": 11, "num_directions": 16}
        return IsotropicGaussianTrainingArguments(**{**fixed, **sizes, **options})

    return make


# Settings


def test_a_grid_is_every_combination_by_field_name():
    settings = grid_settings({"batch_size": [16, 32], "similarity": ["dot", "cosine"], "lambda_isotropy": ["1e-1"]})
    assert settings == [
        {"per_device_train_batch_size": size, "similarity_fn_name": similarity, "lambda_isotropy": 0.1}
        for size in (16, 32)
        for similarity in ("dot", "cosine")
    ]


def test_an_empty_grid_is_one_setting():
    assert grid_settings({}) == [{}]


def test_a_repeated_value_counts_once():
    assert len(grid_settings({"temperature": [0.05, "0.05", 0.1]})) == 2


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"lambda_isotopy": [1]}, "'lambda_isotopy'"),
        ({"base_model": ["a"]}, "'base_model', which must be the same"),
        ({"temperature": 0.05}, "expected a list"),
        ({"temperature": []}, "expected a list"),
        ({"temperature": ["warm"]}, "temperature.*'warm'"),
        ({"isotropy_kind": ["sigrec"]}, "isotropy_kind.*sigrec"),
        ({"learning_rate": [None]}, "learning_rate: expected a value, got none"),
        ({"batch_size": [16], "per_device_train_batch_size": [32]}, "two names of per_device_train_batch_size"),
        ({"temperature": list(range(200)), "margin": list(range(200))}, "at most 10,000 settings, got 40,000"),
    ],
)
def test_an_impossible_grid_is_a_user_error(grid, message):
    with pytest.raises(UserError, match=message):
        grid_settings(grid)


def test_random_draws_are_in_their_ranges_and_follow_from_the_seed():
    space = {"learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}, "temperature": {"low": 0.02, "high": 0.1},
             "use_predictor": [True, False]}  # fmt: skip
    settings = random_settings(space, 200, seed=1)
    assert settings == random_settings(space, 200, seed=1) != random_settings(space, 200, seed=2)
    rates = [setting["learning_rate"] for setting in settings]
    assert 1e-5 <= min(rates) < 1e-4 < 1e-3 < max(rates) <= 1e-2
    assert 0.3 < sum(rate < 10**-3.5 for rate in rates) / 200 < 0.7  # even in the logarithm
    assert all(0.02 <= setting["temperature"] <= 0.1 for setting in settings)


def test_random_draws_of_whole_numbers_are_whole():
    space = {"output_dim": {"low": 64, "high": 512, "log": True}, "batch_size": {"low": 16, "high": 64}}
    settings = random_settings(space, 50, seed=0)
    assert all(isinstance(value, int) for setting in settings for value in setting.values())
    assert all(64 <= setting["output_dim"] <= 512 for setting in settings)


def test_a_grid_can_leave_an_optional_flag_unset():
    assert grid_settings({"output_dim": [None, 512]}) == [{"output_dim": None}, {"output_dim": 512}]


def test_a_small_space_gives_fewer_settings():
    assert len(random_settings({"use_predictor": [True, False]}, 10, seed=0)) == 2


@pytest.mark.parametrize(
    "values", [{"low": 1}, {"low": 2, "high": 1}, {"low": 0, "high": 1, "log": True}, {"low": 0, "high": 1, "l": 1}, 3]
)
def test_an_impossible_range_is_a_user_error(values):
    with pytest.raises(UserError, match="temperature: expected a list of values or a range"):
        random_settings({"temperature": values}, 3, seed=0)


def test_a_trial_applies_its_setting_to_the_shared_arguments(training_arguments):
    shared = training_arguments(lambda_predictive=1.2, temperature=0.1)
    model = ModelArguments(dropout=0.3)
    trial = make_trial({"use_predictor": True, "temperature": 0.02}, 7, model, shared)
    assert (trial.model.use_predictor, trial.model.dropout) == (True, 0.3)
    assert (trial.training.temperature, trial.training.seed, trial.training.lambda_predictive) == (0.02, 7, 1.2)
    assert (shared.temperature, shared.seed, model.use_predictor) == (0.1, 42, False)
    # A weight that all share is meant for the heads with a predictor.
    assert make_trial({"use_predictor": False}, 7, model, shared).training.lambda_predictive is None


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": 0.0},
        {"lambda_predictive": 1.0},
        {"num_directions": 0},
        {"lambda_contrastive": 0.0, "lambda_isotropy": 0.0},
        {"lambda_contrastive": 0.0, "lambda_isotropy": 0.0, "lambda_predictive": 0.0},
        {"projection_kind": "lineer"},
        {"output_dim": 0},
        {"dropout": 1.0},
        {"whitening": 3.0},
        {"whitening": 0.3, "projection_init": "random"},
    ],
)
def test_an_impossible_setting_is_a_user_error_that_shows_it(training_arguments, setting):
    with pytest.raises(UserError, match=r"setting \{"):
        make_trial(setting, 1, ModelArguments(), training_arguments())


# Rounds


@pytest.mark.parametrize("factor", [2, 3, 4, 7])
@pytest.mark.parametrize("count", [1, 2, 3, 24, 100])
def test_rounds_shrink_and_budgets_grow_to_the_whole(count, factor):
    rounds = plan_rounds(count, factor=factor)
    assert rounds[0].num_settings == count
    assert rounds[-1].share == 1.0
    assert rounds[-1].num_settings >= min(2, count)
    for earlier, later in itertools.pairwise(rounds):
        assert later.num_settings < earlier.num_settings
        assert later.share == pytest.approx(factor * earlier.share)


def test_without_halving_all_settings_are_trained_in_full():
    assert [(each.num_settings, each.share) for each in plan_rounds(50, factor=1)] == [(50, 1.0)]


def test_rounds_below_the_least_share_are_left_out():
    rounds = [(each.num_settings, each.share) for each in plan_rounds(24, factor=4, least_share=0.1)]
    assert rounds == [(24, 0.25), (6, 1.0)]
    assert plan_rounds(24, factor=4, least_share=2.0) == plan_rounds(24, factor=1)


def test_twenty_four_settings_cost_five_whole_budgets():
    assert sum(each.num_settings * each.share for each in plan_rounds(24, factor=4)) == 5.0


# Many heads train as one by one


def _feature_pairs(model, rows):
    store = FeatureStore(model, cache_folder=None, dtype="float32", show_progress=False)
    texts = [[row["query"] for row in rows], [row["positive"] for row in rows]]
    return FeaturePairs(*texts, [row.get("negative") or [] for row in rows], store=store)


def _trained_alone(model, start, trial, pairs):
    model = copy.deepcopy(model)
    model.load_state_dict(start, strict=False)
    torch.manual_seed(trial.seed)  # as set_seed does before a training run
    LossTrainer(
        model=model,
        args=trial.training,
        data_collator=pairs,
        train_dataset=range(len(pairs)),
        pair_ids=pairs.pair_ids(slice(None)),
    ).train()
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


KINDS = {
    "info_nce": {},
    "both_directions": {"bidirectional": True, "similarity": "dot"},
    "triplet": {"contrastive_kind": "triplet", "similarity": "euclidean"},
    "covariance": {"isotropy_kind": "covariance", "predictive_kind": "cosine"},
    "predictive_only": {"lambda_contrastive": 0.0, "lambda_isotropy": 0.0},
    "frozen_documents": {"freeze_documents": True},
}
NUMBERS = [
    {"learning_rate": 1e-3, "temperature": 0.05, "lambda_isotropy": 0.1},
    {"learning_rate": 1e-2, "temperature": 0.2, "weight_decay": 0.3, "lambda_isotropy": 2.0, "margin": 1.0},
    {"learning_rate": 3e-3, "lambda_predictive": 0.2, "lambda_isotropy": 0.5},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", ["", "negatives", "documents per query"])
def test_heads_trained_at_once_equal_those_of_the_trainer(
    tiny_encoder_folder, pairs_of_words, training_arguments, kind, more
):
    model = IsotropicGaussianModel.from_encoder(
        str(tiny_encoder_folder),
        use_predictor=True,
        dropout=0.0,
        similarity_fn_name=KINDS[kind].get("similarity", "cosine"),
        freeze_documents=KINDS[kind].get("freeze_documents", False),
    )
    rows = list(pairs_of_words)
    if more == "negatives":
        rows = [{**row, "negative": [QUERIES[number % 12]] * (number % 3)} for number, row in enumerate(rows)]
    if more == "documents per query":
        rows += [{**row, "query": other["query"]} for row, other in zip(rows, rows[1:], strict=False)]
    pairs = _feature_pairs(model, rows)
    shared = ModelArguments(use_predictor=True, dropout=0.0, similarity_fn_name=model.config.similarity_fn_name)
    trials, of_training = [], KINDS[kind].keys() - {"similarity", "freeze_documents"}
    for number, numbers in enumerate(NUMBERS):
        setting = {**numbers, **{name: value for name, value in KINDS[kind].items() if name in of_training}}
        seed = 5 if more == "negatives" or number == 2 else 5 + number
        trials.append(make_trial(setting, seed, shared, training_arguments(lr_scheduler_type="cosine")))
    starts = []
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        starts.append(
            {n: w.detach() + 0.05 * torch.randn_like(w) for n, w in model.named_parameters() if w.requires_grad}
        )
    heads = HeadBatch(copy.deepcopy(model), starts, trials)
    steps = list(heads.train(HeadData(model, pairs, len(pairs)), total_steps=11))
    assert steps == list(range(11))
    for start, trial, together in zip(starts, trials, heads.heads(), strict=True):
        alone = _trained_alone(model, start, trial, pairs)
        assert alone.keys() == together.keys()
        moved = 0.0
        for name, weight in alone.items():
            torch.testing.assert_close(
                together[name], weight, atol=2e-5, rtol=1e-4, msg=lambda text, n=name: f"{n} {text}"
            )
            moved = max(moved, float((weight - start[name]).abs().max()))
        assert moved > 1e-3, "training moved nothing"


def test_a_head_that_diverges_does_not_affect_the_others(tiny_model, pairs_of_words, training_arguments):
    pairs = _feature_pairs(tiny_model, pairs_of_words)
    model_args = ModelArguments(use_predictor=True)
    trials = [make_trial({"learning_rate": rate}, 1, model_args, training_arguments()) for rate in (1e-3, 1e30)]
    start = {n: w.detach().clone() for n, w in tiny_model.named_parameters() if w.requires_grad}
    heads = HeadBatch(tiny_model, [start, start], trials)
    list(heads.train(HeadData(tiny_model, pairs, len(pairs)), total_steps=8))
    healthy, broken = heads.heads()
    assert all(bool(weight.isfinite().all()) for weight in healthy.values())
    assert not all(bool(weight.isfinite().all()) for weight in broken.values())
    words = [[row[name] for row in pairs_of_words] for name in ("query", "positive")]
    store = FeatureStore(tiny_model, cache_folder=None, dtype="float32", show_progress=False)
    validation = RetrievalValidation(*words, store=store)
    assert measure_head(tiny_model, broken, validation) == {}
    # Finite weights whose similarities overflow float32 have no figures either.
    huge = {name: torch.full_like(weight, 1e30) for name, weight in healthy.items()}
    assert measure_head(tiny_model, huge, validation) == {}
    assert measure_head(tiny_model, healthy, validation)["ndcg@10"] > 0


# Records


def _record(setting, seed=1, number=0, **figures):
    return TrialRecord(setting, seed, number, 5, figures or {"ndcg@10": 0.5}, 0.1)


def test_records_are_read_back_without_a_line_that_was_cut(tmp_path):
    records = SweepRecords(tmp_path, {"seeds": [1]})
    records.add([_record({"a": 1}), _record({"a": 2})])
    with (tmp_path / "trials.jsonl").open("a") as file:
        file.write('{"setting": {"a": 3}, "se')
    again = SweepRecords(tmp_path, {"seeds": [1]})
    assert _record({"a": 1}).key in again
    assert _record({"a": 3}).key not in again
    again.add([_record({"a": 3})])
    assert len(SweepRecords(tmp_path, {"seeds": [1]}).summaries("ndcg@10")) == 3


def test_another_sweep_in_the_folder_is_refused_with_the_names_of_what_differs(tmp_path):
    SweepRecords(tmp_path, {"seeds": [1], "data": "a"})
    with pytest.raises(UserError, match="another seeds: name another --output_dir"):
        SweepRecords(tmp_path, {"seeds": [2], "data": "a"})
    with pytest.raises(UserError, match="another data: "):
        SweepRecords(tmp_path, {"seeds": [1], "data": {"held_out": "c"}})


def test_summaries_are_ordered_by_round_then_by_mean_and_include_the_spread(tmp_path):
    records = SweepRecords(tmp_path, {})
    for setting, number, values in (({"a": 1}, 0, (0.9, 0.9)), ({"a": 2}, 0, (0.4, 0.6)), ({"a": 2}, 1, (0.1, 0.3))):
        for seed, value in enumerate(values):
            records.add([_record(setting, seed, number, **{"ndcg@10": value})])
    first, second = records.summaries("ndcg@10")
    assert (first.setting, first.round_number, first.num_seeds) == ({"a": 2}, 1, 2)
    assert first.means["ndcg@10"] == pytest.approx(0.2)
    assert first.spreads["ndcg@10"] == pytest.approx(0.1414, abs=1e-4)
    assert second.setting == {"a": 1}
    assert [each.setting["a"] for each in records.summaries("ndcg@10", round_number=0)] == [1, 2]


def test_a_setting_that_diverged_with_one_seed_comes_last(tmp_path):
    records = SweepRecords(tmp_path, {})
    records.add([_record({"a": 1}, 1), TrialRecord({"a": 1}, 2, 0, 5, {}, 0.1), _record({"a": 2}, 1)])
    assert [each.setting["a"] for each in records.summaries("ndcg@10")] == [2, 1]
    table = format_settings(records.summaries("ndcg@10"), {"ndcg@10": 0.4}, "ndcg@10")
    assert "diverged" in table.splitlines()[-1]
    assert "0.4000" in table.splitlines()[2]


def test_a_finalist_that_diverged_comes_below_every_setting_with_a_figure(tmp_path):
    records = SweepRecords(tmp_path, {})
    records.add([_record({"a": 1}), _record({"a": 2}), TrialRecord({"a": 2}, 1, 1, 5, {}, 0.1)])
    assert [each.setting["a"] for each in records.summaries("ndcg@10")] == [1, 2]


def test_only_fields_that_differ_have_a_column():
    assert varied_names([{"a": 1, "b": 2}, {"a": 1, "b": 3}]) == ["b"]


# The command


@pytest.fixture
def sweep(tiny_encoder_folder, pairs_of_words, tmp_path, monkeypatch):
    """Run a sweep in an empty folder; return its output folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.json").write_text(json.dumps(pairs_of_words))
    script = importlib.import_module("ragcun_hf.cli.sweep")

    def start(*flags, grid=EIGHT_SETTINGS):
        common = ["--base_model", str(tiny_encoder_folder), "--train_data", "pairs.json", "--output_dir", "out"]
        sizes = ["--batch_size", "8", "--epochs", "16", "--use_cpu", "--grid", grid]
        script.main([*common, *sizes, *(str(flag) for flag in flags)])
        return tmp_path / "out"

    return start


def _no_training(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a head was trained")

    monkeypatch.setattr(HeadBatch, "train", refuse)


@pytest.mark.slow
def test_a_sweep_writes_table_plot_results_and_best_flags(sweep, capsys):
    folder = sweep("--seeds", 1, 2)
    printed = capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == [
        "best.yaml", "results.json", "settings.png", "sweep.json", "table.md", "trials.jsonl",
    ]  # fmt: skip
    results = json.loads((folder / "results.json").read_text())
    assert len(results["settings"]) == 8
    assert {each["num_seeds"] for each in results["settings"]} == {2}
    assert results["settings"][0]["round_number"] == 1
    assert results["settings"][0]["steps"] > results["settings"][-1]["steps"]
    assert 0 < results["base"]["ndcg@10"] <= 1
    assert (folder / "table.md").read_text().strip() in printed
    assert "Next: ragcun train-contrastive --config out/best.yaml" in printed
    assert str(ROOT) not in (folder / "results.json").read_text()


@pytest.mark.slow
def test_the_best_flags_train_the_best_head(sweep, monkeypatch):
    folder = sweep()
    best = yaml.safe_load((folder / "best.yaml").read_text())
    setting = json.loads((folder / "results.json").read_text())["settings"][0]["setting"]
    assert {name: best.get(name, False) for name in setting} == setting  # what is left out has its default
    importlib.import_module("ragcun_hf.cli.train_contrastive").main(
        ["--config", str(folder / "best.yaml"), "--output_dir", "final", "--use_cpu", "--disable_tqdm", "true"]
    )
    record = json.loads(Path("final/training_record.json").read_text())
    assert record["training_arguments"]["learning_rate"] == setting["learning_rate"]
    assert record["model"]["use_predictor"] == setting["use_predictor"]


@pytest.mark.slow
def test_the_best_flags_leave_out_shared_flags_that_do_not_fit_the_best_setting(sweep):
    grid = "{use_predictor: [false], output_dim: [null], batch_size: [16]}"
    folder = sweep("--lambda_predictive", 1.2, "--output_dim", 8, grid=grid)
    best = yaml.safe_load((folder / "best.yaml").read_text())
    absent = {"lambda_predictive", "output_dim", "per_device_eval_batch_size"}
    assert not absent & set(best)
    assert best["per_device_train_batch_size"] == 16
    importlib.import_module("ragcun_hf.cli.train_contrastive").main(
        ["--config", str(folder / "best.yaml"), "--use_cpu"]
    )
    assert Path("checkpoints/out/model.safetensors").is_file()


def test_heads_that_all_diverge_leave_a_table_and_no_best_flags(sweep):
    with pytest.raises(UserError, match="expected heads with finite figures"):
        sweep(grid="{learning_rate: [1.0e+30, 1.0e+31]}")
    assert "diverged" in Path("out/table.md").read_text()
    assert not Path("out/best.yaml").exists()


@pytest.mark.slow
def test_other_held_out_pairs_are_another_sweep(sweep, pairs_of_words):
    for name, rows in (("a", pairs_of_words[:20]), ("b", pairs_of_words[20:40])):
        Path(f"{name}.json").write_text(json.dumps(rows))
    grid = "{temperature: [0.1]}"
    sweep("--val_data", "a.json", grid=grid)
    with pytest.raises(UserError, match=r"data\.held_out"):
        sweep("--val_data", "b.json", grid=grid)
    with pytest.raises(UserError, match=r"features\.feature_dtype"):
        sweep("--val_data", "a.json", "--feature_dtype", "float16", grid=grid)


@pytest.mark.slow
def test_a_small_held_out_part_causes_a_warning(sweep, pairs_of_words, caplog):
    Path("few.json").write_text(json.dumps(pairs_of_words[:3]))
    sweep("--val_data", "few.json", grid="{temperature: [0.1]}")
    assert "Only 3 documents are held out" in caplog.text


def test_a_warm_up_in_steps_shrinks_with_its_round(tiny_model, pairs_of_words, training_arguments):
    model_args = ModelArguments(use_predictor=True)
    trial = make_trial({"warmup_steps": 10, "weight_decay": 0.0}, 1, model_args, training_arguments())
    pairs = _feature_pairs(tiny_model, pairs_of_words)
    start = {n: w.detach().clone() for n, w in tiny_model.named_parameters() if w.requires_grad}
    moves = []
    for share in (1.0, 0.2):
        heads = HeadBatch(tiny_model, [start], [trial])
        steps = heads.train(HeadData(tiny_model, pairs, len(pairs)), total_steps=20, share=share)
        list(itertools.islice(steps, 2))
        moves.append(heads.heads()[0]["projection.linear.weight"] - start["projection.linear.weight"])
    # The first step has rate 0, the second a tenth of the peak, or half of it where two steps are the warm-up.
    torch.testing.assert_close(moves[1], 5 * moves[0], atol=1e-6, rtol=1e-3)
    assert float(moves[0].abs().max()) > 1e-5


@pytest.mark.slow
def test_a_finished_sweep_trains_nothing_again(sweep, monkeypatch):
    folder = sweep()
    table = (folder / "table.md").read_text()
    _no_training(monkeypatch)
    assert (sweep() / "table.md").read_text() == table


@pytest.mark.slow
def test_an_interrupted_sweep_continues_where_it_stopped(sweep, monkeypatch):
    whole = json.loads((sweep("--output_dir", "whole").parent / "whole" / "results.json").read_text())
    real, calls = RetrievalValidation.__call__, []

    def stop_at_the_sixth(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(RetrievalValidation, "__call__", stop_at_the_sixth)
        with pytest.raises(KeyboardInterrupt):
            sweep()
    lines = Path("out/trials.jsonl").read_text().splitlines()
    assert 0 < len(lines) < 8
    results = json.loads((sweep() / "results.json").read_text())
    assert Path("out/trials.jsonl").read_text().splitlines()[: len(lines)] == lines
    assert results["settings"] == whole["settings"]


@pytest.mark.slow
def test_another_sweep_over_the_first_is_refused_unless_told(sweep):
    sweep()
    with pytest.raises(UserError, match="holds a sweep with another settings"):
        sweep(grid="{temperature: [0.1]}")
    sweep("--overwrite", grid="{temperature: [0.1]}")
    assert len(Path("out/trials.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_widths_and_starts_are_swept_too(sweep):
    grid = "{output_dim: [8, 16, 24], projection_init: [identity, random], whitening: [0.0]}"
    folder = sweep("--halving", 1, grid=grid)
    settings = json.loads((folder / "results.json").read_text())["settings"]
    assert len({json.dumps(each["setting"]) for each in settings}) == 6
    figures = [each["means"]["ndcg@10"] for each in settings]
    assert len(set(figures)) > 3


def test_a_whitened_start_equals_that_of_the_training_command(tiny_model, pairs_of_words, training_arguments):
    pairs = _feature_pairs(tiny_model, pairs_of_words)
    data = HeadData(tiny_model, pairs, 40)
    trial = make_trial({"whitening": 0.3}, 1, ModelArguments(use_predictor=True), training_arguments())
    template = with_head(tiny_model, trial.model)
    head = data.initial_weights(template, trial)
    expected = copy.deepcopy(tiny_model)
    rows = [sorted({int(row) for row in rows[:40]}) for rows in (pairs.query_rows, pairs.positive_rows)]
    sample = np.concatenate([pairs.query_vectors[rows[0]], pairs.document_vectors[rows[1]]])
    expected.start_from_features(torch.from_numpy(sample), whitening=0.3)
    torch.testing.assert_close(head["projection.linear.weight"], expected.projection.linear.weight)
    assert not torch.allclose(head["projection.linear.weight"], torch.eye(16))
    again = data.initial_weights(template, trial)
    torch.testing.assert_close(again["projection.linear.weight"], head["projection.linear.weight"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--val_fraction", "0"], "needs held-out pairs"),
        (["--seeds", "1", "1"], "--seeds expects"),
        (["--halving", "0"], "--halving must be"),
        (["--no_freeze_base"], "frozen encoder"),
        (["--gradient_accumulation_steps", "2"], "--gradient_accumulation_steps"),
        (["--search", "random", "--num_settings", "0"], "--num_settings must be"),
        (["--optim", "sgd"], "--optim"),
        (["--data_seed", "3"], "--data_seed"),
        (["--blend", "0.5"], "--blend"),
        (["--lr_scheduler_type", "reduce_lr_on_plateau", "--eval_strategy", "epoch"], "--lr_scheduler_type"),
    ],
)
def test_a_sweep_refuses_unsupported_flags_before_it_encodes_anything(sweep, monkeypatch, flags, message):
    monkeypatch.setattr(FeatureStore, "features", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(UserError, match=message):
        sweep(*flags)


def test_settings_cannot_be_selected_by_a_figure_that_no_head_has(sweep):
    with pytest.raises(UserError, match="needs heads with a predictor"):
        sweep("--select", "ndcg@10_predictor", grid="{temperature: [0.1]}")


@pytest.mark.parametrize("grid", ["[", "[1]", "3", "{dropout: [0.1], dropout: [0.2]}"])
def test_a_grid_that_is_not_a_mapping_is_a_user_error(sweep, grid):
    with pytest.raises(UserError, match="--grid expects"):
        sweep(grid=grid)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "ragcun_hf" / "cli" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_command_accepts_every_sweep_file(path, tmp_path):
    script = importlib.import_module("ragcun_hf.cli.sweep")
    settings, trials = script.make_trials(
        *script.parse(["--config", str(path), "--output_dir", str(tmp_path), "--use_cpu"])
    )
    assert len(settings) == 24
    assert len(trials) % 24 == 0
