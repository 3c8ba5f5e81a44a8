"""Ablations: every change of the table trains, is measured as in an evaluation, and appears in table and plot."""

import importlib
import itertools
import json
from pathlib import Path

import pytest
from ablation_changes import CHANGES, PART_OF_THE_WAY, REFERENCE, Effect, measure_changes
from ablation_report import format_ablations, plot_ablations

from ragcun_hf import IsotropicGaussianModel, IsotropicGaussianTrainingArguments
from ragcun_hf.data.training_rows import TableRows
from ragcun_hf.errors import UserError
from ragcun_hf.evaluation.validation import RetrievalValidation
from ragcun_hf.features.feature_store import FeatureStore
from ragcun_hf.model.arguments import ModelArguments
from ragcun_hf.sweep.heads import HeadBatch, HeadData, with_head
from ragcun_hf.sweep.settings import make_trial
from ragcun_hf.trainer.record import blend_weights

pytestmark = pytest.mark.usefixtures("quick_garbage_collection")

ROOT = Path(__file__).resolve().parents[2]
WORDS = "sun moon star fish bird tree bread water music stone river light".split()
PAIRS = [
    {"query": f"{first} {second}", "positive": f"the {second} is {first} in the {WORDS[number % 12]}"}
    for number, (first, second) in enumerate(itertools.combinations(WORDS, 2))
]


@pytest.fixture
def data(tiny_encoder_folder):
    model = IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder))
    store = FeatureStore(model, cache_folder=None, dtype="float32", show_progress=False)
    held_out, all_documents = PAIRS[50:], [pair["positive"] for pair in PAIRS]
    texts = [[pair[name] for pair in held_out] for name in ("query", "positive")]
    validation = RetrievalValidation(*texts, distractors=all_documents, store=store)
    return HeadData.of_rows(model, TableRows(PAIRS[:50]), store, validation=validation)


@pytest.fixture
def training(tmp_path):
    return IsotropicGaussianTrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=16, num_train_epochs=2, learning_rate=1e-2, use_cpu=True
    )


@pytest.mark.slow
def test_every_change_of_the_table_trains(data, training):
    effects = list(measure_changes(data, CHANGES, [1, 2], ModelArguments(), training))
    assert [(effect.group, effect.change) for effect in effects] == [
        (group, change) for group, of_group in CHANGES.items() for change in of_group
    ]
    for effect in effects:
        setting = {**REFERENCE, **CHANGES[effect.group][effect.change]}
        expected = {"start", "projection"} | ({"predictor"} if setting["lambda_predictive"] else set())
        expected |= {"blended"} if setting.get("projection_init") != "random" else set()
        assert effect.figures.keys() == expected
        assert all(len(values) == 2 and all(0 < value < 1 for value in values) for values in effect.figures.values())
    assert len({effect.figures["projection"][0] for effect in effects}) > len(effects) / 2


def test_changes_are_all_different():
    settings = [json.dumps({**REFERENCE, **each}) for of_group in CHANGES.values() for each in of_group.values()]
    assert len(set(settings)) == len(settings)


def test_figures_equal_those_of_a_head_that_is_trained_and_blended_by_hand(data, training):
    (effect,) = measure_changes(data, {"terms": {"both": {"whitening": 0.1}}}, [3], ModelArguments(), training)
    trial = make_trial({**REFERENCE, "whitening": 0.1}, 3, ModelArguments(), training)
    template = with_head(data.base, trial.model)
    start = data.initial_weights(template, trial)
    heads = HeadBatch(template, [start], [trial])
    list(heads.train(data, total_steps=data.num_steps(trial.training)))
    for name, head in (
        ("start", start),
        ("projection", heads.heads()[0]),
        ("blended", blend_weights(start, heads.heads()[0], PART_OF_THE_WAY)),
    ):
        template.load_state_dict(head, strict=False)
        assert effect.figures[name] == [data.validation(template)["ndcg@10"]]
    assert len({effect.figures[name][0] for name in ("start", "projection", "blended")}) > 1


def test_a_seed_that_diverges_does_not_affect_the_others(data, training):
    training.learning_rate = 1e30
    changes = {"terms": {"all": {}}, "starts": {"random": {"projection_init": "random", "whitening": 0.0}}}
    effects = list(measure_changes(data, changes, [1, 2], ModelArguments(), training))
    assert [list(effect.figures) for effect in effects] == [["start"], ["start"]]
    assert effects[0].mean("projection") is None
    assert "| terms | all | " in format_ablations({"docs": effects}, {"docs": 0.5})


EFFECTS = [
    Effect(
        "terms",
        "all",
        {"start": [0.5, 0.5], "projection": [0.5, 0.7], "predictor": [0.2, 0.2], "blended": [0.6, 0.6]},
    ),
    Effect("terms", "alone", {"projection": [0.4, 0.4], "blended": [0.5, 0.5]}),
    Effect("starts", "random", {"projection": [0.3, 0.3], "predictor": [0.1, 0.1]}),
]


def test_the_table_shows_mean_and_spread_and_leaves_out_missing_figures():
    lines = format_ablations({"docs": EFFECTS}, {"docs": 0.55}).splitlines()
    assert lines[0] == "|  | change | docs: before | docs: projection | docs: predictor | docs: 0.4 of the way |"
    assert lines[2] == "|  | frozen base | 0.5500 |  |  |  |"
    assert lines[3] == "| terms | all | 0.5000 ± 0.0000 | 0.6000 ± 0.1414 | 0.2000 ± 0.0000 | 0.6000 ± 0.0000 |"
    assert lines[4] == "|  | alone |  | 0.4000 ± 0.0000 |  | 0.5000 ± 0.0000 |"
    assert lines[5] == "| starts | random |  | 0.3000 ± 0.0000 | 0.1000 ± 0.0000 |  |"


def test_the_plot_is_written_for_one_set_and_for_two(tmp_path):
    for count in (1, 2):
        effects = {f"set {number}": EFFECTS for number in range(count)}
        plot_ablations(effects, dict.fromkeys(effects, 0.55), tmp_path / f"{count}.png")
        assert (tmp_path / f"{count}.png").stat().st_size > 10_000


@pytest.fixture
def script(monkeypatch, tmp_path, tiny_encoder_folder):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "training" / "benchmarks"))
    rows = "\n".join(json.dumps(pair) for pair in PAIRS)
    (tmp_path / "pairs.jsonl").write_text(rows, encoding="utf-8")
    two = "\n".join(json.dumps(pair) for pair in (PAIRS[0], PAIRS[-1]))
    (tmp_path / "two.jsonl").write_text(two, encoding="utf-8")
    module = importlib.import_module("ablations")

    def run(*flags):
        fixed = ["--base_model", tiny_encoder_folder, "--feature_cache_dir", tmp_path / "features", "--epochs", "1"]
        module.main([str(part) for part in [*fixed, "--batch_size", "8", "--seeds", "1", "2", *flags]])
        return tmp_path / "results" / "ablations"

    return run


@pytest.mark.slow
def test_the_script_writes_the_same_table_plot_and_figures_twice(script, capsys):
    folder = script("--train_data", "pairs.jsonl", "--groups", "starts")
    table = (folder / "table.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    assert len(table.splitlines()) == 3 + len(CHANGES["starts"])
    content = json.loads((folder / "ablations.json").read_text(encoding="utf-8"))
    assert len(content["effects"]["pairs"]) == len(CHANGES["starts"])
    assert content["command"].startswith("python training/benchmarks/ablations.py")
    assert (folder / "ablations.png").is_file()
    script("--train_data", "pairs.jsonl", "--groups", "starts")
    assert (folder / "table.md").read_text(encoding="utf-8") == table


@pytest.mark.slow
def test_a_stopped_run_leaves_the_finished_data_sets(script, tmp_path, monkeypatch):
    (tmp_path / "more.jsonl").write_text((tmp_path / "pairs.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    calls = []

    def stop_at_the_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure_changes(*args)

    monkeypatch.setattr("ablation_changes.measure_changes", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        script("--train_data", "pairs.jsonl", "more.jsonl", "--groups", "widths")
    content = json.loads(Path("results/ablations/ablations.json").read_text(encoding="utf-8"))
    assert list(content["effects"]) == ["pairs"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--groups", "colours"], "--groups expects names among terms, kinds, starts, widths"),
        (["--train_data", "no/such/file"], "expected an existing file"),
        (["--train_data", "pairs.jsonl", "./pairs.jsonl"], "--train_data expects sources of different names"),
        (["--train_data", "two.jsonl"], "expected at least two training rows"),
    ],
)
def test_the_script_says_what_to_change(script, flags, message):
    with pytest.raises(UserError, match=message):
        script(*flags)
