"""Streams: every pass has every row once in another order, and a resumed run sees the rows of an uninterrupted one."""

import importlib
import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from ragcun_hf.data.pairs import read_pairs
from ragcun_hf.data.stream import ShuffledStream, interleave
from ragcun_hf.errors import UserError

TRAINING = Path(__file__).resolve().parents[2] / "training"
NUM_ROWS = 30


@pytest.fixture
def file(tmp_path):
    rows = [{"query": f"query {number}", "positive": f"document {number}"} for number in range(NUM_ROWS)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return tmp_path / "pairs.jsonl"


def _stream(file, buffer_size=8, seed=0):
    return ShuffledStream(read_pairs(file, streaming=True), buffer_size=buffer_size, seed=seed)


def _numbers(stream, epoch=0):
    stream.set_epoch(epoch)
    return [int(row["query"].split()[1]) for row in stream]


def test_every_pass_has_every_row_once_in_its_own_order(file):
    stream = _stream(file)
    passes = [_numbers(stream, epoch) for epoch in (0, 1, 2)]
    assert all(sorted(each) == list(range(NUM_ROWS)) for each in passes)
    assert len({*map(tuple, passes), tuple(range(NUM_ROWS))}) == 4
    assert [_numbers(_stream(file), epoch) for epoch in (0, 1, 2)] == passes
    assert _numbers(_stream(file, seed=1)) != passes[0]


def test_a_buffer_of_one_row_keeps_the_order_and_a_small_buffer_mixes_only_neighbours(file):
    assert _numbers(_stream(file, buffer_size=1), 3) == list(range(NUM_ROWS))
    assert all(number < place + 4 for place, number in enumerate(_numbers(_stream(file, buffer_size=4))))


@pytest.mark.parametrize("num_rows", [0, 1, 17, NUM_ROWS - 4])
def test_a_stream_continues_where_it_stopped_and_then_with_the_next_pass(file, num_rows):
    whole, later = _stream(file), _stream(file)
    later.start_at(2, num_rows)
    for _ in range(2):  # reading does not move the position
        assert _numbers(later) == _numbers(whole, 2)[num_rows:]
    assert (later.number_of_pass, later.num_skipped) == (2, num_rows)
    assert _numbers(later, 1) == _numbers(whole, 3)
    assert (later.number_of_pass, later.num_skipped) == (3, 0)


def test_a_pass_consists_of_whole_batches(file):
    whole, stream = _stream(file), _stream(file)
    stream.rows_at_once = 7
    assert _numbers(stream) == _numbers(whole)[:28]
    stream.rows_at_once = NUM_ROWS + 1
    with pytest.raises(UserError, match=f"expected a stream of at least {NUM_ROWS + 1} rows.*, got {NUM_ROWS}"):
        _numbers(stream)


@pytest.mark.parametrize("num_rows", [NUM_ROWS - 3, NUM_ROWS])
def test_a_pass_ends_when_no_whole_batch_is_left(file, num_rows):
    whole, later = _stream(file), _stream(file)
    whole.rows_at_once = later.rows_at_once = 4
    later.start_at(0, num_rows)
    for _ in range(2):
        assert _numbers(later) == _numbers(whole, 1)
    assert (later.number_of_pass, later.num_skipped) == (1, 0)
    assert _numbers(later, 1) == _numbers(whole, 2)


def test_only_rows_that_are_used_are_read(file):
    with file.open("a") as broken:
        broken.write("\nnot JSON")
    assert len(list(islice(_stream(file, buffer_size=4), 10))) == 10
    with pytest.raises(UserError, match=f"line {NUM_ROWS + 1}: expected one JSON object"):
        list(_stream(file, buffer_size=4))


@pytest.fixture
def train(tiny_encoder_folder, tiny_pairs, tmp_path, monkeypatch):
    """Train on a stream of ten pairs in batches of four; return the model's weights."""
    monkeypatch.chdir(tmp_path)
    rows = [*tiny_pairs, *({"query": pair["positive"], "positive": pair["query"]} for pair in tiny_pairs[:2])]
    (tmp_path / "train.json").write_text(json.dumps(rows), encoding="utf-8")

    def start(output, *flags):
        from safetensors.torch import load_file

        common = "--train_data train.json --streaming --no_feature_cache --batch_size 4 --max_steps 5 --use_predictor"
        common += " --use_cpu --disable_tqdm true --shuffle_buffer_size 6"
        common += " --save_strategy steps --save_steps 1 --save_total_limit 9"
        arguments = [*common.split(), "--base_model", tiny_encoder_folder, "--output_dir", output, *flags]
        importlib.import_module("ragcun_hf.cli.train_contrastive").main([str(argument) for argument in arguments])
        return load_file(tmp_path / output / "model.safetensors")

    return start


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--gradient_accumulation_steps", "2"]])
def test_an_interrupted_run_sees_the_rows_of_an_uninterrupted_one(train, flags):
    whole = train("whole", *flags)
    for step in range(1, 5):  # of two or three batches a pass
        resumed = train("resumed", *flags, "--resume_from_checkpoint", f"whole/checkpoint-{step}", "--overwrite")
        assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items()), step


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--gradient_accumulation_steps", "2"]])
def test_a_pass_ends_before_a_smaller_step_for_both_values_of_drop_last(train, flags):
    weights = [train(value, *flags, "--dataloader_drop_last", value) for value in ("true", "false")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.slow
@pytest.mark.parametrize("steps", ["5", "3"])
def test_a_finished_run_that_is_resumed_trains_no_further_step(train, tmp_path, steps):
    schedule = ("--lr_scheduler_type", "constant", "--warmup_steps", "0")
    whole = train("whole", *schedule)
    last = ("--resume_from_checkpoint", "whole/checkpoint-5", "--max_steps", steps)
    resumed = train("resumed", *schedule, *last)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())
    record = json.loads((tmp_path / "resumed" / "training_record.json").read_text(encoding="utf-8"))
    assert record["steps"] == 5


@pytest.mark.slow
def test_a_finished_run_that_is_resumed_does_not_change_its_checkpoint(train, tmp_path, tiny_pairs):
    (tmp_path / "val.json").write_text(json.dumps(tiny_pairs), encoding="utf-8")
    flags = (
        "--val_data",
        "val.json",
        "--early_stopping_patience",
        "9",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "1",
    )
    train("whole", *flags)
    before = {path.name: path.read_bytes() for path in (tmp_path / "whole" / "checkpoint-5").iterdir()}
    saved = (tmp_path / "whole" / "model.safetensors").read_bytes()
    train("whole", *flags, "--resume_from_checkpoint", "last", "--overwrite")
    assert {path.name: path.read_bytes() for path in (tmp_path / "whole" / "checkpoint-5").iterdir()} == before
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == saved


def test_several_sources_take_turns_and_each_row_comes_once_a_pass(tmp_path, monkeypatch):
    for name, count in (("long", 9), ("short", 2)):
        rows = [{"query": f"{name} {row}", "positive": "a document"} for row in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    sources = [read_pairs(tmp_path / f"{name}.jsonl", streaming=True) for name in ("long", "short")]
    rows = interleave(sources)
    found = [row["query"] for row in ShuffledStream(rows, buffer_size=1, seed=0)]
    assert found[:4] == ["long 0", "short 0", "long 1", "short 1"]
    assert found[4:] == [f"long {row}" for row in range(2, 9)]
    assert sorted(row["query"] for row in ShuffledStream(rows, buffer_size=4, seed=0)) == sorted(found)


@pytest.mark.slow
def test_a_streamed_checkpoint_is_not_resumed_without_streaming(train, tiny_encoder_folder):
    train("whole", "--max_steps", "2")
    flags = "--train_data train.json --no_feature_cache --use_predictor --use_cpu --disable_tqdm true".split()
    flags += ["--resume_from_checkpoint", "whole/checkpoint-1", "--output_dir", "resumed"]
    with pytest.raises(UserError, match="expected a checkpoint of a run without --streaming.*: add --streaming"):
        importlib.import_module("ragcun_hf.cli.train_contrastive").main(
            [*flags, "--base_model", str(tiny_encoder_folder)]
        )


@pytest.mark.slow
def test_a_checkpoint_of_another_order_is_refused(train):
    train("whole", "--max_steps", "2")
    resume = ["--resume_from_checkpoint", "whole/checkpoint-1"]
    with pytest.raises(UserError, match="expected --shuffle_buffer_size 6 as in the run of .*, got 7"):
        train("resumed", *resume, "--shuffle_buffer_size", "7")
    with pytest.raises(UserError, match="expected --seed 42 as in the run of .*, got 7"):
        train("resumed", *resume, "--seed", "7")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shuffle_buffer_size", "0"], "`shuffle_buffer_size` must be at least 1, got 0"),
        (["--dataloader_num_workers", "1"], "leave --dataloader_num_workers out"),
        (["--auto_find_batch_size"], "leave --auto_find_batch_size out"),
        (["--restore_callback_states_from_checkpoint"], "leave --restore_callback_states_from_checkpoint out"),
        (["--max_steps", "-1"], "a stream needs --max_steps"),
    ],
)
def test_flags_that_a_stream_does_not_support_are_user_errors(train, flags, message):
    with pytest.raises(UserError, match=message):
        train("out", *flags)
