"""Bad inputs to the scripts: each ends with exit code 2 and one line that says what was expected and what came."""

import errno
import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_in_forks

from ragcun_hf.command_line import _make_parser, run_script
from ragcun_hf.commands import portable_command
from ragcun_hf.objective.arguments import IsotropicGaussianTrainingArguments

pytestmark = pytest.mark.usefixtures("quick_garbage_collection")

ROOT = Path(__file__).resolve().parents[2]
TRAINING = ROOT / "training"
CONTRASTIVE, MASKED, SPLIT, EVALUATE = "train_contrastive", "train_xy_masked", "train_self_supervised", "eval_beir"


def _jsonl(rows):
    return "\n".join(json.dumps(row) for row in rows) + "\n"


GOOD = [{"query": f"what is {word}", "positive": f"{word} is in the tree"} for word in ("bread", "fish", "music")]


@pytest.fixture
def folder(tmp_path, tiny_encoder_folder, monkeypatch):
    """Files that a user might have, good and bad, in the folder where the script runs."""
    monkeypatch.chdir(tmp_path)
    long = [{"query": f"q {row}", "positive": f"d {row}"} for row in range(5200)]
    del long[4999]["positive"]
    texts = {
        "good.jsonl": _jsonl(GOOD),
        "empty.json": "",
        "no_rows.json": "[]",
        "one_row.jsonl": _jsonl(GOOD[:1]),
        "missing_field.jsonl": _jsonl(long),
        "wrong_type.jsonl": _jsonl([*GOOD, {"query": 7, "positive": "seven"}]),
        "blank.jsonl": _jsonl([*GOOD, {"query": "  ", "positive": "blank"}]),
        "bad_negative.jsonl": _jsonl([*GOOD, {"query": "a", "positive": "b", "negative": [1]}]),
        "broken.jsonl": _jsonl(GOOD) + '{"query": "a", "positive": \n',
        "broken_array.json": '[{"query": "a", "positive": "b"},\n {"query": ]',
        "ragged.csv": "query,positive\nwhat is bread,food\nwhat is a star,light,and more\n",
        "header_only.csv": "query,positive\n",
        "picture.png": "not a table",
        "short.txt": "word\nword2\n",
        "unknown_key.yaml": "lambda_isotrpy: 1.5\n",
        "list.yaml": "- lambda_isotropy\n- epochs\n",
        "wrong_value.yaml": "epochs: many\n",
        "broken.yaml": "epochs: [1,\nbatch_size: 4\n",
        "a_file": "mine",
        "beir/torn/corpus.jsonl": _jsonl([{"_id": "d1", "text": "bread"}]),
        "beir/torn/queries.jsonl": _jsonl([{"_id": "q1", "text": "bread"}]),
        "beir/torn/qrels/test.tsv": "query-id\tcorpus-id\tscore\nq1\td1\tmany\n",
        "beir/good/corpus.jsonl": _jsonl([{"_id": "d1", "text": "bread"}, {"_id": "d2", "text": "fish"}]),
        "beir/good/queries.jsonl": _jsonl([{"_id": "q1", "text": "bread"}]),
        "beir/good/qrels/test.tsv": "query-id\tcorpus-id\tscore\nq1\td1\t1\n",
        "no_model/notes.txt": "nothing to load",
        "torn_model/config.json": '{"model_type": ',
        "used/model.safetensors": "weights of an earlier run",
        "half/checkpoint-5/model.safetensors": "half a checkpoint",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "utf16.jsonl").write_bytes(_jsonl(GOOD).encode("utf-16"))
    (tmp_path / "nul.jsonl").write_bytes(_jsonl(GOOD).encode() + b'{"query": "a\x00b", "positive": "c"}\n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but no more")
    (tmp_path / "encoder").symlink_to(tiny_encoder_folder, target_is_directory=True)
    return tmp_path


@pytest.fixture
def end(folder, monkeypatch, capsys):
    """Run a script to its end in this process; gives its exit code and what it wrote to standard error."""

    def run(script, *flags):
        main = importlib.import_module(f"ragcun_hf.cli.{script}").main
        monkeypatch.setattr(sys, "argv", [f"training/{script}.py", *(str(flag) for flag in flags)])
        with pytest.raises(SystemExit) as exit_:
            run_script(main)
        return exit_.value.code, capsys.readouterr().err

    return run


def _check(outcome, *, script, words):
    code, shown = outcome
    assert code == 2, shown
    lines = [line for line in shown.splitlines() if "%|" not in line and line.strip()]  # bars are no messages
    assert len(lines) == 1, shown
    assert lines[0].startswith(f"{script}.py: ")
    assert "Traceback" not in shown
    assert len(lines[0]) < 600
    for word in words:
        assert word in lines[0], lines[0]


def _train(*flags, data="good.jsonl"):
    return ["--train_data", data, "--base_model", "encoder", "--use_cpu", "--disable_tqdm", "true", *flags]


def _evaluate(*flags, data_set="good"):
    return ["--datasets", data_set, "--data_dir", "beir", *flags]


BAD = {
    # Data
    "missing file": (CONTRASTIVE, _train(data="nowhere.jsonl"), ["existing file", "'nowhere.jsonl'"]),
    "empty file": (CONTRASTIVE, _train(data="empty.json"), ["empty.json", "at least one row", "empty"]),
    "no rows": (CONTRASTIVE, _train(data="no_rows.json"), ["no_rows.json", "at least one row"]),
    "header only": (CONTRASTIVE, _train(data="header_only.csv"), ["header_only.csv", "at least one row"]),
    "one row": (CONTRASTIVE, _train(data="one_row.jsonl"), ["at least two training rows", "got 1"]),
    "missing field": (
        CONTRASTIVE,
        _train(data="missing_field.jsonl"),
        ["missing_field.jsonl, line 5000", "'positive'", "no such field"],
    ),
    "wrong type": (CONTRASTIVE, _train(data="wrong_type.jsonl"), ["wrong_type.jsonl, line 4", "'query'", "got 7"]),
    "blank text": (CONTRASTIVE, _train(data="blank.jsonl"), ["blank.jsonl, line 4", "not blank"]),
    "bad negative": (CONTRASTIVE, _train(data="bad_negative.jsonl"), ["line 4", "'negative'", "[1]"]),
    "broken line": (CONTRASTIVE, _train(data="broken.jsonl"), ["broken.jsonl, line 4", "JSON"]),
    "broken array": (CONTRASTIVE, _train(data="broken_array.json"), ["broken_array.json, line 2", "JSON array"]),
    "ragged table": (CONTRASTIVE, _train(data="ragged.csv"), ["ragged.csv, line 3", "2 columns", "got 3"]),
    "wrong encoding": (CONTRASTIVE, _train(data="utf16.jsonl"), ["utf16.jsonl, line 1", "UTF-8", "0xff"]),
    "NUL bytes": (CONTRASTIVE, _train(data="nul.jsonl"), ["nul.jsonl, line 4", "JSON"]),
    "broken Parquet": (CONTRASTIVE, _train(data="broken.parquet"), ["broken.parquet", "Parquet"]),
    "unknown kind of file": (CONTRASTIVE, _train(data="picture.png"), ["'picture.png'", ".jsonl"]),
    "no data": (CONTRASTIVE, _train()[2:], ["--train_data expects", "got nothing"]),
    "a missing column": (
        CONTRASTIVE,
        _train("--query_column", "question"),
        ["good.jsonl, line 1", "'question'", "it has 'query', 'positive'"],
    ),
    "limit of nothing": (CONTRASTIVE, _train("--limit", "0"), ["limit", "got 0"]),
    "too short to split": (
        SPLIT,
        ["--documents", "short.txt", "--base_model", "encoder"],
        ["short.txt", "two documents", "got 0"],
    ),
    "no documents": (SPLIT, ["--base_model", "encoder"], ["--documents expects", "got nothing"]),
    "wrong split method": (
        SPLIT,
        ["--documents", "good.txt", "--split_method", "third", "--base_model", "encoder"],
        ["'half', 'random', 'prefix'", "'third'"],
    ),
    "both sources": (
        MASKED,
        ["--documents", "good.jsonl", "--input_xy_pairs", "good.jsonl"],
        ["either --input_xy_pairs or --documents"],
    ),
    "neither source": (MASKED, [], ["either --input_xy_pairs or --documents", "neither"]),
    "everything masked": (
        MASKED,
        ["--documents", "good.txt", "--mask_probability", "1", "--base_model", "encoder"],
        ["between 0 and 1", "got 1.0"],
    ),
    "validation share": (CONTRASTIVE, _train("--val_fraction", "2"), ["fraction", "got 2.0"]),
    "negative validation share": (CONTRASTIVE, _train("--val_fraction", "-0.1"), ["fraction", "got -0.1"]),
    "missing validation file": (CONTRASTIVE, _train("--val_data", "val.jsonl"), ["'val.jsonl'"]),
    "patience without validation": (
        CONTRASTIVE,
        _train("--early_stopping_patience", "2"),
        ["--early_stopping_patience needs validation", "--val_data"],
    ),
    # Flags and files of flags
    "unknown flag": (CONTRASTIVE, _train("--lambda_isotrpy", "1"), ["--lambda_isotrpy"]),
    "abbreviated flag": (CONTRASTIVE, _train("--lambda_iso", "1"), ["--lambda_iso"]),
    "unknown key": (
        CONTRASTIVE,
        _train("--config", "unknown_key.yaml"),
        ["unknown_key.yaml", "unknown key 'lambda_isotrpy'"],
    ),
    "list of flags": (CONTRASTIVE, _train("--config", "list.yaml"), ["list.yaml", "a mapping", "got a list"]),
    "wrong value in the file": (CONTRASTIVE, _train("--config", "wrong_value.yaml"), ["epochs", "'many'"]),
    "broken file of flags": (CONTRASTIVE, _train("--config", "broken.yaml"), ["broken.yaml", "not valid YAML"]),
    "missing file of flags": (CONTRASTIVE, _train("--config", "recipe.yaml"), ["'recipe.yaml'", "check the path"]),
    "wrong choice": (CONTRASTIVE, _train("--contrastive_kind", "margin"), ["'info_nce', 'triplet'", "'margin'"]),
    "negative weight": (CONTRASTIVE, _train("--lambda_isotropy", "-1"), ["`lambda_isotropy`", "at least 0", "-1.0"]),
    "temperature": (CONTRASTIVE, _train("--temperature", "0"), ["`temperature`", "above 0", "got 0.0"]),
    "learning rate": (CONTRASTIVE, _train("--learning_rate", "nan"), ["`learning_rate`", "finite", "got nan"]),
    "empty batch": (CONTRASTIVE, _train("--batch_size", "0"), ["`batch_size`", "at least 1", "got 0"]),
    "no epoch": (CONTRASTIVE, _train("--epochs", "0"), ["`epochs`", "above 0", "got 0.0"]),
    "nothing to train": (
        CONTRASTIVE,
        _train("--lambda_contrastive", "0", "--lambda_isotropy", "0"),
        ["a term to train", "--lambda_contrastive 0"],
    ),
    "prediction without predictor": (
        CONTRASTIVE,
        _train("--lambda_predictive", "1.2"),
        ["--lambda_predictive 1.2 needs a predictor", "--use_predictor"],
    ),
    "no such logger": (CONTRASTIVE, _train("--report_to", "nonesuch"), ["--report_to", "pip install nonesuch"]),
    # Models
    "dropout": (CONTRASTIVE, _train("--dropout", "1.5"), ["`dropout`", "[0, 1)", "got 1.5"]),
    "no width": (CONTRASTIVE, _train("--output_dim", "0"), ["`output_dim`", "at least 1", "got 0"]),
    "too long": (CONTRASTIVE, _train("--max_length", "33"), ["`max_length`", "32 positions", "got 33"]),
    "wrong pooling": (CONTRASTIVE, _train("--pooling", "median"), ["`pooling`", "mean, cls, last", "'median'"]),
    "wrong similarity": (CONTRASTIVE, _train("--similarity", "l1"), ["`similarity_fn_name`", "cosine, dot", "'l1'"]),
    "too many frozen layers": (
        CONTRASTIVE,
        _train("--no_freeze_base", "--freeze_layers", "3"),
        ["`freeze_layers`", "between 0 and", "got 3"],
    ),
    "wrong arithmetic": (CONTRASTIVE, _train("--encoder_dtype", "float8"), ["auto", "bfloat16", "'float8'"]),
    "unreachable encoder": (
        CONTRASTIVE,
        [*_train(), "--base_model", "nobody/nothing-of-that-name"],
        ["'nobody/nothing-of-that-name'", "--base_model embedded"],
    ),
    "encoder that is none": (CONTRASTIVE, [*_train(), "--base_model", "no_model"], ["no_model", "`model_type`"]),
    "no model": (EVALUATE, _evaluate("--model_path", "no_model"), ["--model_path expects", "'no_model'"]),
    "torn model": (EVALUATE, _evaluate("--model_path", "torn_model"), ["--model_path expects", "'torn_model'"]),
    "no such model": (EVALUATE, _evaluate("--model_path", "nobody/nothing"), ["--model_path", "'nobody/nothing'"]),
    "another type of model": (
        EVALUATE,
        _evaluate("--model_path", "encoder"),
        ["type isotropic_gaussian", "got bert in encoder", "--base_model"],
    ),
    # Evaluation
    "no data set": (EVALUATE, _evaluate("--base_model", "encoder", data_set="a/b"), ["BEIR collection", "'a/b'"]),
    "torn data set": (
        EVALUATE,
        _evaluate("--base_model", "encoder", data_set="torn"),
        ["test.tsv, line 2", "whole score"],
    ),
    "no such split": (
        EVALUATE,
        _evaluate("--base_model", "encoder", "--split", "dev"),
        ["the split 'dev'", "got the splits test"],
    ),
    "short rankings": (EVALUATE, _evaluate("--base_model", "encoder", "--top_k", "5"), ["--top_k", "100", "got 5"]),
    "both models": (
        EVALUATE,
        _evaluate("--base_model", "encoder", "--model_path", "used"),
        ["one of --model_path, --base_model and --compare", "several"],
    ),
    "neither model": (EVALUATE, _evaluate(), ["one of --model_path, --base_model and --compare", "none"]),
    "predictor of an encoder": (
        EVALUATE,
        _evaluate("--base_model", "encoder", "--use_predictor"),
        ["--use_predictor expects a trained model", "--model_path"],
    ),
    # Folders
    "earlier run": (CONTRASTIVE, _train("--output_dir", "used"), ["used holds an earlier run", "--overwrite"]),
    "output is a file": (CONTRASTIVE, _train("--output_dir", "a_file"), ["--output_dir expects a folder", "a_file"]),
    "output below a file": (CONTRASTIVE, _train("--output_dir", "a_file/x"), ["--output_dir expects", "a_file/x"]),
    "results are a file": (
        EVALUATE,
        _evaluate("--base_model", "encoder", "--output_dir", "a_file"),
        ["--output_dir expects a folder", "a_file"],
    ),
    "cache is a file": (
        CONTRASTIVE,
        _train("--feature_cache_dir", "a_file"),
        ["feature cache folder", "a_file", "--no_feature_cache"],
    ),
    "nothing to resume": (
        CONTRASTIVE,
        _train("--output_dir", "fresh", "--resume_from_checkpoint", "last"),
        ["--resume_from_checkpoint last", "fresh", "found none"],
    ),
    "no such checkpoint": (
        CONTRASTIVE,
        _train("--resume_from_checkpoint", "used/checkpoint-7"),
        ["--resume_from_checkpoint", "used/checkpoint-7"],
    ),
    "half a checkpoint": (
        CONTRASTIVE,
        _train("--output_dir", "half", "--resume_from_checkpoint", "last"),
        ["--resume_from_checkpoint last", "a whole checkpoint in half", "checkpoint-5 lacks the state of"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_input_ends_with_two_and_one_line_that_helps(end, folder, name):
    (folder / "good.txt").write_text("bread is food .\nfish are in the river .\n", encoding="utf-8")
    script, flags, words = BAD[name]
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    _check(end(script, *flags), script=script, words=words)
    left = {path.relative_to(folder).parts[0] for path in folder.rglob("*")} - {path.parts[0] for path in before}
    assert left <= {"checkpoints", "results"}
    assert not list(folder.glob("checkpoints/**/*.safetensors"))


def _choices():
    """Return flag -> values of all flags of training that have choices, most of them of transformers."""
    actions = _make_parser([IsotropicGaussianTrainingArguments], description="")._actions
    return {
        action.dest: [getattr(each, "value", each) for each in action.choices] for action in actions if action.choices
    }


CHOICES = _choices()
VALIDATED = ("--val_data", "good.jsonl", "--max_steps", "3", "--batch_size", "2")


def _try_choice(end, flag, value, *flags):
    """Run to the end, or to the one line that refuses the value; return the exit code."""
    code, shown = end(CONTRASTIVE, *_train(f"--{flag}", str(value), *flags))
    if code != 0:
        _check((code, shown), script=CONTRASTIVE, words=[flag, str(value)])
    return code


def test_the_choices_of_the_trainer_are_among_those_that_are_tried():
    assert {"optim", "lr_scheduler_type", "train_sampling_strategy", "save_strategy", "ddp_backend"} < CHOICES.keys()
    assert sum(map(len, CHOICES.values())) > 100


@pytest.mark.parametrize("flag", CHOICES)
def test_every_choice_of_a_flag_is_planned_or_refused_before_anything_is_encoded(end, flag):
    codes = [_try_choice(end, flag, value, *VALIDATED, "--show_plan") for value in CHOICES[flag]]
    assert 0 in codes or flag in ("ddp_backend", "dataloader_multiprocessing_context")
    for value in CHOICES[flag]:
        _try_choice(end, flag, value, "--show_plan")  # without validation


@pytest.mark.slow
@pytest.mark.parametrize("flag", CHOICES)
def test_every_choice_that_is_planned_trains(end, flag):
    # The first run of a value that encodes documents fills the cache for the others.
    for value in CHOICES[flag]:
        if _try_choice(end, flag, value, *VALIDATED, "--show_plan") == 0:
            assert _try_choice(end, flag, value, *VALIDATED, "--output_dir", f"{flag}_{value}", "--overwrite") == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--deepspeed", "x.json"], ["deepspeed"]),
        (["--accelerator_config", "x.json"], ["x.json"]),
        (["--use_liger_kernel"], ["`use_liger_kernel`"]),
        (["--torch_compile_backend", "fast"], ["`torch_compile_backend`", "inductor", "'fast'"]),
        (["--torch_compile_mode", "fast"], ["`torch_compile_mode`", "max-autotune", "'fast'"]),
        (["--optim_args", "fast"], ["`optim`", "`optim_args` fast"]),
        (["--adam_beta1", "2"], ["`optim` adamw", "2.0"]),
        (["--lr_scheduler_kwargs", '{"fast": 1}'], ["`lr_scheduler_type` linear", "'fast'"]),
        (["--lr_scheduler_type", "warmup_stable_decay"], ["`lr_scheduler_kwargs`", "num_decay_steps"]),
        (
            ["--lr_scheduler_type", "polynomial", "--warmup_steps", "3"],
            ["--lr_scheduler_type polynomial", "got 3 steps"],
        ),
        (["--dataloader_num_workers", "-1"], ["`dataloader_num_workers` -1"]),
        (["--dataloader_persistent_workers"], ["`dataloader_persistent_workers` True"]),
        (["--seed", "-1"], ["`seed`", "got -1"]),
        (["--eval_strategy", "epoch"], ["--eval_strategy epoch", "--val_data"]),
        (["--save_strategy", "best"], ["--save_strategy best", "--val_data"]),
        ([*VALIDATED, "--metric_for_best_model", "fast"], ["--metric_for_best_model", "eval_ndcg@10", "'fast'"]),
    ],
    ids=lambda value: value[-2] if len(value) > 1 else value[0],
)
def test_a_setting_of_the_trainer_that_cannot_work(end, flags, words):
    _check(end(CONTRASTIVE, *_train(*flags)), script=CONTRASTIVE, words=words)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--lr_scheduler_type", "reduce_lr_on_plateau", "--eval_strategy", "epoch"],
        ["--lr_scheduler_type", "greedy", "--eval_strategy", "epoch"],
        ["--lr_scheduler_type", "warmup_stable_decay", "--lr_scheduler_kwargs", '{"num_decay_steps": 1}'],
        ["--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr": 0.1}'],
        ["--optim", "sgd", "--optim_args", "momentum=0.5"],
        ["--dataloader_multiprocessing_context", "spawn", "--dataloader_num_workers", "1", "--epochs", "1"],
    ],
    ids=lambda flags: flags[1],
)
def test_a_choice_that_needs_a_setting_trains_with_it(end, flags):
    assert end(CONTRASTIVE, *_train(*VALIDATED, *flags))[0] == 0


def test_a_data_set_that_cannot_be_downloaded(end, monkeypatch):
    import requests

    def refuse(*args, **kwargs):
        raise requests.ConnectionError("no network in this test")

    monkeypatch.setattr(requests, "get", refuse)
    monkeypatch.setattr(requests.Session, "request", refuse)
    outcome = end(EVALUATE, *_evaluate("--base_model", "encoder", data_set="scifact"))
    _check(
        outcome, script=EVALUATE, words=["BEIR collection 'scifact'", "beir/scifact", "unpack the collection there"]
    )


def test_a_predictor_that_the_model_does_not_have(end, folder):
    from ragcun_hf import IsotropicGaussianModel

    IsotropicGaussianModel.from_encoder("encoder").save_pretrained("plain")
    outcome = end(EVALUATE, *_evaluate("--model_path", "plain", "--use_predictor"))
    _check(outcome, script=EVALUATE, words=["--use_predictor expects a model with a predictor"])


def test_a_model_whose_weights_are_cut(end, folder):
    from ragcun_hf import IsotropicGaussianModel

    IsotropicGaussianModel.from_encoder("encoder").save_pretrained("cut")
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    _check(end(EVALUATE, *_evaluate("--model_path", "cut")), script=EVALUATE, words=["--model_path expects", "'cut'"])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (
            lambda weights: [weights.pop(name) for name in list(weights) if name.startswith("encoder")],
            "without encoder.",
        ),
        (lambda weights: weights.pop("projection.linear.weight"), "without projection.linear.weight"),
        (lambda weights: weights.update({"more": torch.zeros(2)}), "with the unknown more"),
        (lambda weights: weights.update({"projection.linear.bias": torch.zeros(3)}), "another shape of projection."),
    ],
    ids=["no encoder", "a matrix is missing", "more", "another shape"],
)
def test_weights_that_do_not_fit_are_never_made_up(end, folder, change, word):
    from safetensors.torch import load_file, save_file

    from ragcun_hf import IsotropicGaussianModel

    IsotropicGaussianModel.from_encoder("encoder").save_pretrained("odd")
    weights = load_file("odd/model.safetensors")
    change(weights)
    save_file(weights, "odd/model.safetensors", {"format": "pt"})
    flags = ["--model_path", "odd", "--format", "sentence-transformers"]
    _check(end("export", *flags), script="export", words=["--model_path expects the weights", "'odd'", word])
    if "without" in word:
        with pytest.raises(ValueError, match="odd lacks .* of its weights"):
            IsotropicGaussianModel.from_pretrained("odd")


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "running_sums.json", "trainer_state.json", "config.json"]
)
def test_a_run_goes_on_from_the_last_whole_checkpoint_only(end, folder, name, caplog):
    flags = ["--output_dir", "out", "--save_strategy", "steps", "--save_steps", "1", "--batch_size", "2"]
    assert end(CONTRASTIVE, *_train(*flags, "--max_steps", "2"))[0] == 0
    content = bytearray((folder / "out" / "checkpoint-2" / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "out" / "checkpoint-2" / name).write_bytes(bytes(content))
    (folder / "out" / "checkpoint-1" / name).unlink()
    resumed = _train(*flags, "--max_steps", "3", "--resume_from_checkpoint", "last")
    _check(
        end(CONTRASTIVE, *resumed),
        script=CONTRASTIVE,
        words=["found 2, none whole", f"checkpoint-2 is damaged ({name})"],
    )
    shutil.copytree(folder / "out" / "checkpoint-2", folder / "out" / "checkpoint-3")  # of another run, and damaged
    assert end(CONTRASTIVE, *_train(*flags, "--max_steps", "1", "--overwrite"))[0] == 0
    shutil.copytree(folder / "out" / "checkpoint-1", folder / "out" / "checkpoint-4")
    (folder / "out" / "checkpoint-4" / name).unlink()
    assert end(CONTRASTIVE, *resumed)[0] == 0
    assert "checkpoint-4 lacks" in caplog.text or "checkpoint-4 is damaged" in caplog.text


def test_a_token_stands_in_no_file(end, folder):
    token = "hf_" + "secret" * 5
    flags = ["--output_dir", "out", "--hub_token", token, "--save_strategy", "steps", "--save_steps", "1"]
    assert end(CONTRASTIVE, *_train(*flags, "--max_steps", "1", "--save_total_limit", "3"))[0] == 0
    saved = torch.load(folder / "out" / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert saved.save_total_limit == 3
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files if token.encode() in path.read_bytes()]
    assert token not in portable_command("sweep", ["--hub_token", token, f"--hub_token={token}", token])


def test_a_model_in_shards_is_not_trained_over(end, folder):
    from ragcun_hf import IsotropicGaussianModel

    IsotropicGaussianModel.from_encoder("encoder").save_pretrained("in_shards", max_shard_size="2KB")
    before = sorted(path.name for path in Path("in_shards").iterdir())
    assert "model.safetensors" not in before
    words = ["in_shards holds an earlier run", "--overwrite"]
    _check(end(CONTRASTIVE, *_train("--output_dir", "in_shards")), script=CONTRASTIVE, words=words)
    assert sorted(path.name for path in Path("in_shards").iterdir()) == before


def test_a_model_without_its_tokenizer(end, folder):
    from ragcun_hf import IsotropicGaussianModel

    IsotropicGaussianModel.from_encoder("encoder").save_pretrained("mute")
    for path in folder.glob("mute/tokenizer*"):
        path.unlink()
    _check(end(EVALUATE, *_evaluate("--model_path", "mute")), script=EVALUATE, words=["tokenizer", "mute"])


def _full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full_when_features_are_written(end, monkeypatch):
    monkeypatch.setattr("ragcun_hf.features.feature_cache.write_shard", _full_disk)
    outcome = end(CONTRASTIVE, *_train("--feature_cache_dir", "features"))
    _check(outcome, script=CONTRASTIVE, words=["features", "No space left", "--no_feature_cache"])


def test_a_disk_that_is_full_when_the_model_is_written(end, folder, monkeypatch):
    from ragcun_hf import IsotropicGaussianModel

    monkeypatch.setattr(IsotropicGaussianModel, "save_pretrained", _full_disk)
    outcome = end(CONTRASTIVE, *_train("--output_dir", "out", "--save_strategy", "no"))
    _check(outcome, script=CONTRASTIVE, words=["out", "No space left"])
    assert not (folder / "out" / "model.safetensors").exists()
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    ],
    ids=["by the system", "by torch"],
)
def test_a_disk_that_is_full_when_a_checkpoint_is_written(end, monkeypatch, error):
    from ragcun_hf.trainer.trainer import IsotropicGaussianTrainer

    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(IsotropicGaussianTrainer, "_save_checkpoint", refuse)
    outcome = end(CONTRASTIVE, *_train("--output_dir", "out", "--save_steps", "1"))
    _check(outcome, script=CONTRASTIVE, words=["out", "free some space"])


def test_a_disk_that_is_full_when_results_are_written(end, monkeypatch):
    monkeypatch.setattr("ragcun_hf.cli.eval_beir.write_results", _full_disk)
    outcome = end(EVALUATE, *_evaluate("--base_model", "encoder"))
    _check(outcome, script=EVALUATE, words=["results", "No space left"])


def test_another_error_while_training_is_not_called_a_full_disk(end, monkeypatch):
    from ragcun_hf.trainer.trainer import IsotropicGaussianTrainer

    def refuse(*args, **kwargs):
        raise RuntimeError("a defect")

    monkeypatch.setattr(IsotropicGaussianTrainer, "training_step", refuse)
    with pytest.raises(RuntimeError, match="a defect"):
        end(CONTRASTIVE, *_train("--output_dir", "out"))


@pytest.mark.parametrize(
    ("flags", "settings", "words"),
    [
        ([], {}, ["FSDP shards an encoder that trains", "--no_freeze_base"]),
        (["--no_freeze_base"], {"FSDP_VERSION": "1"}, ["expected fsdp_version 2, got 1"]),
        (
            ["--no_freeze_base"],
            {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
            ["fsdp_state_dict_type FULL_STATE_DICT", "got SHARDED_STATE_DICT", "fsdp2_trainable_encoder.yaml"],
        ),
    ],
    ids=["frozen encoder", "first version", "checkpoints in shards"],
)
def test_fsdp_of_what_it_cannot_shard_or_save(end, monkeypatch, flags, settings, words):
    right = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    for name, value in {**right, **settings}.items():
        monkeypatch.setenv(name, value)
    _check(end(CONTRASTIVE, *_train(*flags)), script=CONTRASTIVE, words=words)


@pytest.mark.slow
def test_a_real_process_says_it_in_one_line_too(folder):
    names = ("missing field", "unreachable encoder", "no model")
    commands = {name: [TRAINING / f"{BAD[name][0]}.py", *BAD[name][1]] for name in names}
    for name, done in run_in_forks(commands, folder, imports=["ragcun_hf.trainer.trainer"]).items():
        _check((done.returncode, done.stderr), script=BAD[name][0], words=BAD[name][2])
        assert done.stdout == "", name
