"""Arguments and endings of every script: flags, YAML files, exit codes."""

import importlib
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import pytest

from ragcun_hf.command_line import (
    argument,
    config_file,
    default_output_folder,
    parse_arguments,
    parse_yaml,
    run_script,
    say,
)
from ragcun_hf.commands import portable_command
from ragcun_hf.errors import UserError


@dataclass
class DataArguments:
    train_data: str | None = argument(None, "Training pairs.", "--data")
    split_method: Literal["half", "random"] = argument("half", "How to split; 50 %% each.")
    datasets: list[str] = argument(["scifact"], "Sets to evaluate on.")


@dataclass
class FitArguments:
    learning_rate: float = argument(5e-4, "Step size.")
    num_epochs: int = argument(3, "Passes over the data.", "--epochs")
    use_predictor: bool = argument(False, "Train a predictor.")
    freeze_base: bool = argument(True, "Keep the encoder fixed.")
    lambda_isotropy: float = argument(1.0, "Weight.")

    def __post_init__(self):
        if self.num_epochs < 1:
            raise ValueError(f"`num_epochs` must be at least 1, got {self.num_epochs}.")


def _parse(*arguments, **options):
    return parse_arguments([DataArguments, FitArguments], description="A script.", arguments=arguments, **options)


def _yaml(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_flags_fill_one_instance_per_dataclass():
    data, fit = _parse("--train_data", "a.json", "--num_epochs", "5", "--use_predictor", "--datasets", "x", "y")
    assert data == DataArguments(train_data="a.json", datasets=["x", "y"])
    assert fit == FitArguments(num_epochs=5, use_predictor=True)


def test_nothing_given_means_the_defaults():
    assert _parse() == (DataArguments(), FitArguments())


def test_a_script_s_own_defaults_stand_between_the_dataclass_and_the_flags(tmp_path):
    assert _parse(defaults={"num_epochs": 7})[1].num_epochs == 7
    assert _parse("--config", _yaml(tmp_path, "num_epochs: 8"), defaults={"num_epochs": 7})[1].num_epochs == 8
    assert _parse("--num_epochs", "9", defaults={"num_epochs": 7})[1].num_epochs == 9


def test_aliases_set_the_same_field_on_the_command_line_and_in_the_file(tmp_path):
    assert _parse("--epochs", "4", "--data", "b.json") == (
        DataArguments(train_data="b.json"),
        FitArguments(num_epochs=4),
    )
    assert _parse("--config", _yaml(tmp_path, "epochs: 4\n"))[1].num_epochs == 4


def test_a_switch_takes_a_value_or_none_and_can_be_turned_off():
    assert _parse("--freeze_base", "false")[1].freeze_base is False
    assert _parse("--no_freeze_base")[1].freeze_base is False
    assert _parse("--freeze_base")[1].freeze_base is True
    assert _parse("--use_predictor", "true")[1].use_predictor is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rat", "1"], "--learning_rat"),
        (["--lambda_iso", "1"], "--lambda_iso"),
        (["--unknown"], "--unknown"),
        (["stray"], "stray"),
        (["--epochs", "many"], "invalid int value: 'many'"),
        (["--learning_rate", "fast"], "invalid float value: 'fast'"),
        (["--split_method", "third"], "invalid choice: 'third'"),
        (["--use_predictor", "perhaps"], "perhaps"),
        (["--train_data"], "expected one argument"),
        (["--epochs", "0"], "`num_epochs` must be at least 1, got 0"),
        (["--config"], "--config expects a YAML file or a recipe's name, got nothing"),
    ],
)
def test_a_wrong_command_line_is_a_user_error_that_names_what_is_wrong(arguments, message):
    with pytest.raises(UserError) as error:
        _parse(*arguments)
    assert message in str(error.value)


def test_a_yaml_file_fills_in_and_flags_win_over_it(tmp_path):
    path = _yaml(
        tmp_path,
        "learning_rate: 0.01\nnum_epochs: 6\nuse_predictor: true\nfreeze_base: false\n"
        "datasets: [nfcorpus, arguana]\nsplit_method: random\ntrain_data: null\n",
    )
    data, fit = _parse("--config", path)
    assert data == DataArguments(split_method="random", datasets=["nfcorpus", "arguana"])
    assert fit == FitArguments(learning_rate=0.01, num_epochs=6, use_predictor=True, freeze_base=False)
    for arguments in (["--epochs", "2", "--config", path], [f"--config={path}", "--num_epochs", "2"]):
        data, fit = _parse(*arguments, "--datasets", "scifact", "--use_predictor", "false")
        assert (fit.num_epochs, fit.learning_rate, fit.use_predictor) == (2, 0.01, False)
        assert data.datasets == ["scifact"]


@pytest.mark.parametrize("number", ["1e-4", "1.0e-4", "0.0001", "'1e-4'"])
def test_every_way_to_write_a_number_in_yaml_works(tmp_path, number):
    assert _parse("--config", _yaml(tmp_path, f"learning_rate: {number}"))[1].learning_rate == 1e-4


def test_a_negative_number_in_yaml_is_a_value_and_no_flag(tmp_path):
    assert _parse("--config", _yaml(tmp_path, "lambda_isotropy: -0.5"))[1].lambda_isotropy == -0.5
    assert _parse("--config", _yaml(tmp_path, "lambda_isotropy: -1e-3"))[1].lambda_isotropy == -1e-3


def test_a_text_in_yaml_that_begins_like_a_flag_is_still_a_value(tmp_path):
    assert _parse("--config", _yaml(tmp_path, "train_data: '--odd name.json'"))[0].train_data == "--odd name.json"


def test_an_empty_text_and_a_list_of_one_in_yaml_are_values(tmp_path):
    data, _ = _parse("--config", _yaml(tmp_path, "train_data: ''\ndatasets: [arguana]\n"))
    assert data == DataArguments(train_data="", datasets=["arguana"])
    assert _parse("--config", _yaml(tmp_path, "datasets: arguana"))[0].datasets == ["arguana"]


@pytest.mark.parametrize(
    "written",
    "no yes on off y n 2024_10 2024-10-01 12:30:45 1_000 010 0o17 0x1F 1e3 1.10 +7 1234e56 .inf_3 0b1 =".split(),
)
def test_a_flag_of_text_takes_a_yaml_value_as_it_is_written(tmp_path, written):
    assert _parse("--config", _yaml(tmp_path, f"train_data: {written}"))[0].train_data == written
    assert _parse("--config", _yaml(tmp_path, f"datasets: [a, {written}]"))[0].datasets == ["a", written]


@pytest.mark.parametrize(
    ("written", "value"),
    [("010", 10), ("+3", 3), ("-0", 0), ("0o17", 15), ("0x1F", 31), ("1e3", 1000.0), ("1.", 1.0), (".5", 0.5)]
    + [("-.inf", float("-inf")), ("True", True), ("FALSE", False), ("~", None), ("", None), ("Null", None)]
    + [("1_0", "1_0"), ("1:30", "1:30"), ("2024-10-01", "2024-10-01"), ("NO", "NO"), ("'010'", "010")],
)
def test_yaml_values_have_the_types_of_version_1_2(written, value):
    read = parse_yaml(f"key: {written}")["key"]
    assert read == value
    assert isinstance(read, type(value))
    assert json.loads(json.dumps([read])) == [value]


def test_a_number_of_yaml_is_right_for_flags_of_numbers_or_refused(tmp_path):
    for written, number in {"010": 10, "0o17": 15, "0x10": 16}.items():
        assert _parse("--config", _yaml(tmp_path, f"num_epochs: {written}"))[1].num_epochs == number
    assert _parse("--config", _yaml(tmp_path, "learning_rate: .inf"))[1].learning_rate == float("inf")
    assert math.isnan(parse_yaml(".nan"))
    for written in ("1e3", "12:30", "no"):
        with pytest.raises(UserError, match=f"invalid int value: '{written}'"):
            _parse("--config", _yaml(tmp_path, f"num_epochs: {written}"))


def test_merged_keys_of_yaml_may_be_replaced():
    assert parse_yaml("base: &base {a: 1, b: 2}\nother: {<<: *base, b: 3}")["other"] == {"a": 1, "b": 3}
    nested = parse_yaml("a: &a {x: 0}\nb: {c: &c {<<: *a, x: 1}}\nd: {<<: *c, y: 2}")
    assert nested["d"] == {"x": 1, "y": 2}


def test_an_empty_yaml_file_changes_nothing(tmp_path):
    assert _parse("--config", _yaml(tmp_path, "# only a comment\n")) == (DataArguments(), FitArguments())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown key 'learning_rat'"),
        ("lambda_iso: 1", "unknown key 'lambda_iso'"),
        ("config: other.yaml", "unknown key 'config'"),
        ("1: 2", "unknown key 1"),
        ("help: true", "'help'"),
        ("no_freeze_base: true", "'no_freeze_base' takes no value"),
        ("num_epochs: 1\nnum_epochs: 2", "expected every key once, got 'num_epochs' again"),
        ("learning_rate: {a: 1, a: 1}", "expected every key once, got 'a' again"),
        ("num_epochs: 1\nepochs: 2", "expected each flag once, got 'num_epochs' and 'epochs'"),
        ("- a\n- b", "expected a mapping of flag names to values, got a list"),
        ("just words", "expected a mapping of flag names to values, got a str"),
        ("a: [1, 2", "not valid YAML"),
        ("split_method: third", "invalid choice: 'third'"),
        ("num_epochs: many", "invalid int value: 'many'"),
        ("num_epochs: 0", "`num_epochs` must be at least 1"),
        ("learning_rate: {a: 1}", "learning_rate"),
    ],
)
def test_a_wrong_yaml_file_is_a_user_error_that_names_what_is_wrong(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        _parse("--config", _yaml(tmp_path, text))
    assert message in str(error.value)


def test_a_yaml_file_that_cannot_be_read_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="expects a readable YAML file, got .*missing.yaml"):
        _parse("--config", str(tmp_path / "missing.yaml"))
    with pytest.raises(UserError, match="expects a readable YAML file"):
        _parse("--config", str(tmp_path))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00broken")
    with pytest.raises(UserError, match="not valid YAML"):
        _parse("--config", str(tmp_path / "bytes.yaml"))


@pytest.mark.parametrize(
    ("command", "word", "said"),
    [
        (
            "train_contrastive",
            "adpt",
            "did you mean adapt? check the path, or name one of the recipes 512dim_10k, adapt, ",
        ),
        (
            "train_self_supervised",
            "unlabeled",
            "did you mean unlabelled? check the path, or name one of the recipes unl",
        ),
        (
            "sweep",
            "quik",
            "did you mean quick? check the path, or name one of the recipes published_comparison, quick",
        ),
    ],
)
def test_a_misspelled_recipe_is_answered_with_those_of_the_command(command, word, said, monkeypatch):
    main = importlib.import_module(f"ragcun_hf.cli.{command}").main
    for flags in (["--recipe", word], [f"--recipe={word}"], ["--config", word]):
        with pytest.raises(UserError) as error:
            main(flags)
        flag = flags[0].partition("=")[0]
        message = f"{flag} expects a recipe or a readable YAML file, got '{word}' (No such file or directory): {said}"
        assert str(error.value).startswith(message)
        assert ("quick" in str(error.value)) == (command == "sweep")
        assert ("unlabelled" in str(error.value)) == (command == "train_self_supervised")


def test_help_lists_the_recipes_of_the_command(capsys):
    for command, recipe, other in (("train_contrastive", "general", "quick"), ("table", "with any", "adapt")):
        with pytest.raises(SystemExit):
            importlib.import_module(f"ragcun_hf.cli.{command}").main(["--help"])
        section = capsys.readouterr().out.partition("--config")[2]
        assert recipe in section
        assert other not in section


def test_help_shows_flags_aliases_defaults_and_the_description(capsys):
    with pytest.raises(SystemExit) as end:
        _parse("--help")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for text in ("A script.", "--num_epochs", "--epochs", "Passes over the data.", "0.0005", "--config", "50 % each"):
        assert text in shown


def test_output_folder_is_named_after_the_recipe_or_the_script():
    assert default_output_folder("train_contrastive", ["--config", "training/recipes/jepa_10k.yaml"]) == (
        "checkpoints/jepa_10k"
    )
    assert default_output_folder("train_contrastive", ["--epochs", "1"]) == "checkpoints/train_contrastive"
    assert config_file(["--config=a.yaml"]) == "a.yaml"
    assert config_file([]) is None


# How scripts end


def _end(main, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["somewhere/train_contrastive.py"])
    with pytest.raises(SystemExit) as end:
        run_script(main)
    return end.value.code


def test_a_finished_script_ends_with_zero(monkeypatch, capsys):
    assert _end(lambda: say("written"), monkeypatch) == 0
    assert capsys.readouterr() == ("written\n", "")


def test_a_user_error_ends_with_two_and_one_line_without_traceback(monkeypatch, capsys):
    def main():
        raise UserError("expected a,\n   got b:\tdo c")

    assert _end(main, monkeypatch) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "train_contrastive.py: expected a, got b: do c\n"


def test_a_wrong_flag_ends_a_script_with_two_and_one_line(monkeypatch, capsys):
    assert _end(lambda: _parse("--unknown", "1"), monkeypatch) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "--unknown" in shown
    assert "Traceback" not in shown


def test_an_interruption_ends_with_130(monkeypatch, capsys):
    def main():
        raise KeyboardInterrupt

    assert _end(main, monkeypatch) == 130
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("defect", [ValueError("not for users"), RuntimeError("broken"), KeyError("x")])
def test_a_defect_is_not_hidden(monkeypatch, defect):
    def main():
        raise defect

    # Python itself ends with 1 and the traceback when nothing catches it.
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(type(defect)) as error:
        run_script(main)
    assert error.value is defect


def test_a_defect_ends_the_process_with_one_and_a_traceback():
    script = "from ragcun_hf.command_line import run_script\nrun_script(lambda: 1 / 0)\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=1_800)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError" in done.stderr


def test_reading_a_command_line_begins_without_importing_anything_heavy():
    script = (
        "import sys\nfrom ragcun_hf.command_line import run_script\n"
        "heavy = [name for name in ('torch', 'transformers', 'datasets') if name in sys.modules]\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=1_800)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "written"),
    [
        (["--data_dir", "/a/b/c/beir"], "--data_dir beir"),
        (["--data_dir=/a/b/c/beir"], "--data_dir=beir"),
        (["--data_dir", "../shared/beir"], "--data_dir beir"),
        (["--data_dir", "data/beir", "--top_k", "100"], "--data_dir data/beir --top_k 100"),
        (["--run_name", "two words"], "--run_name 'two words'"),
        (["--run_name", "hf_checkpoints1", "--top_k", "hf_" + "a" * 34], "--run_name hf_checkpoints1 --top_k HIDDEN"),
    ],
)
def test_a_recorded_command_can_be_repeated_and_names_no_folder_of_the_machine(words, written):
    assert portable_command("training/eval_beir.py", words) == f"python training/eval_beir.py {written}"
