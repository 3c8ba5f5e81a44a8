"""The log of a run that was interrupted after any step, and resumed, is that of a run without interruption."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
import torch

from ragcun_hf import IsotropicGaussianModel, IsotropicGaussianTrainer, IsotropicGaussianTrainingArguments

pytestmark = pytest.mark.usefixtures("quick_garbage_collection")

QUIET = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "logging_steps": 3}
SAVING = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 9, "per_device_train_batch_size": 4}
STREAM = {"is_stream": True, "shuffle_buffer_size": 3}
HALVED = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
EPOCHS = {"logging_strategy": "epoch"}
CASES = {
    "features": {},
    "tokens, an encoder that trains, accumulated": {
        "freeze_base": False,
        "include_num_input_tokens_seen": True,
        **HALVED,
    },
    "a stream": STREAM,
    "evaluated and stopped early": {
        "eval_steps": 2,
        "early_stopping_patience": 2,
        "learning_rate": 1e-9,
        "max_steps": 9,
    },
}
SLOW_CASES = {"a line per epoch": EPOCHS, "a stream, accumulated, a line per epoch": {**STREAM, **HALVED, **EPOCHS}}


@pytest.fixture
def train(tiny_encoder_folder, tiny_pairs, tmp_path, monkeypatch):
    """Train in the folder out; return the Trainer's output and state."""
    monkeypatch.chdir(tmp_path)
    pairs = [{**pair, "negative": pair.get("negative", [])} for pair in tiny_pairs]

    def start(*, freeze_base=True, is_stream=False, checkpoint=None, **options):
        model = IsotropicGaussianModel.from_encoder(
            str(tiny_encoder_folder), use_predictor=True, freeze_base=freeze_base, dropout=0.3
        )
        args = IsotropicGaussianTrainingArguments(
            "out", feature_cache_dir="cache", **{**QUIET, **SAVING, "max_steps": 4, **options}
        )
        rows = datasets.Dataset.from_list(pairs)
        rows = rows.to_iterable_dataset() if is_stream else rows
        held_out = pairs if "eval_steps" in options else None
        trainer = IsotropicGaussianTrainer(model, args, train_dataset=rows, eval_dataset=held_out)
        return trainer.train(resume_from_checkpoint=checkpoint), trainer.state

    return start


def _without_times(entry):
    return {name: value for name, value in entry.items() if not name.endswith(("runtime", "per_second"))}


def _state(checkpoint):
    """Return what a run goes on with: the log so far, the epoch, and the sums for the next line."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    sums = json.loads((checkpoint / "running_sums.json").read_text(encoding="utf-8"))
    return [_without_times(entry) for entry in state["log_history"]], state["epoch"], state["best_metric"], sums


@pytest.mark.parametrize(
    "options",
    [
        *(pytest.param(options, id=name) for name, options in CASES.items()),
        *(pytest.param(options, id=name, marks=pytest.mark.slow) for name, options in SLOW_CASES.items()),
    ],
)
def test_a_run_that_is_interrupted_after_any_step_has_the_log_of_an_uninterrupted_one(train, options):
    output, state = train(**options)
    expected = [_without_times(entry) for entry in state.log_history]
    assert any("loss" in entry for entry in expected)
    whole = Path("out").rename("whole")
    saved = {int(path.name.split("-")[1]): path for path in whole.glob("checkpoint-*")}
    assert len(saved) >= 3
    for step in saved:
        for earlier in filter(step.__ge__, saved):
            shutil.copytree(saved[earlier], Path("out") / saved[earlier].name)
        resumed, state = train(**options, checkpoint=True)
        assert [_without_times(entry) for entry in state.log_history] == expected, step
        assert (resumed.training_loss, _without_times(resumed.metrics)) == (
            output.training_loss,
            _without_times(output.metrics),
        )
        for later in saved.values():
            assert _state(Path("out") / later.name) == _state(later), (step, later.name)
        shutil.rmtree("out")


def test_a_second_run_of_a_trainer_has_the_log_of_the_first(tiny_model, tiny_pairs, tmp_path):
    args = IsotropicGaussianTrainingArguments(
        str(tmp_path / "out"), learning_rate=1e-30, max_steps=5, feature_cache=False, **QUIET
    )
    trainer = IsotropicGaussianTrainer(tiny_model, args, train_dataset=tiny_pairs)
    logs = []
    for _ in range(2):
        torch.manual_seed(0)
        trainer.train()
        logs.append([_without_times(entry) for entry in trainer.state.log_history])
    assert logs[0] == logs[1]  # steps 4 and 5 of the first have no line, and are in none of the second
