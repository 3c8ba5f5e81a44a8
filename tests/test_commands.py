"""The commands: one list of them, fast answers, and names in messages that exist where the user is."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ragcun_hf
from ragcun_hf.cli import main
from ragcun_hf.commands import COMMANDS, command, portable_command, with_commands

ROOT = Path(__file__).resolve().parent.parent
CLI = ROOT / "ragcun_hf" / "cli"
SCRIPTS = {path.stem for path in (ROOT / "training").glob("*.py")}
HEAVY = ("torch", "transformers", "datasets", "numpy", "matplotlib")


def _ragcun(*words, program=("-m", "ragcun_hf"), **options):
    return subprocess.run([sys.executable, *program, *words], capture_output=True, text=True, cwd=ROOT, **options)


def test_every_command_has_a_module_and_every_script_is_a_command():
    modules = {each.module for each in COMMANDS.values()}
    assert all((CLI / f"{module}.py").is_file() for module in modules)
    assert SCRIPTS <= modules
    assert all(callable(importlib.import_module(f"ragcun_hf.cli.{module}").main) for module in modules)


@pytest.mark.parametrize("words", [[], ["--help"], ["--version"], ["help"]])
def test_help_and_version_import_nothing_heavy(words):
    script = (
        "import sys\nfrom ragcun_hf.cli import main\n"
        f"try:\n    main()\nexcept SystemExit as end:\n    code = end.code\n"
        f"print('heavy:', [name for name in {HEAVY} if name in sys.modules], code)"
    )
    done = _ragcun(*words, program=("-c", script))
    assert done.stdout.splitlines()[-1] == "heavy: [] 0"
    assert done.stderr == ""


def test_the_overview_lists_every_command_with_the_first_line_of_its_docstring(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ragcun"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for name, each in COMMANDS.items():
        doc = importlib.import_module(f"ragcun_hf.cli.{each.module}").__doc__.splitlines()[0]
        assert any(re.fullmatch(rf"{name} +{re.escape(doc)}", line) for line in lines), name


def test_the_version_is_that_of_the_package(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ragcun", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().out == f"ragcun {ragcun_hf.__version__}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train"], "ragcun: expected a command, got 'train': choose one of train-contrastive, "),
        (["--top_k"], "ragcun: expected a command, got '--top_k'"),
        (["tabel"], "ragcun: expected a command, got 'tabel': did you mean table? choose one of train-contrastive, "),
        (
            ["table", "--result", "x"],
            "ragcun table: expected flags of this command, got --result x: did you mean --re",
        ),
        (["features", "--nonsense"], "ragcun features: expected flags of this command, got --nonsense"),
        (["accelerate-config", "gpus"], "ragcun accelerate-config: expected one of fsdp2_trainable_encoder, "),
    ],
)
def test_a_wrong_command_or_flag_ends_with_two_and_one_line(monkeypatch, capsys, words, said):
    monkeypatch.setattr(sys, "argv", ["/env/bin/ragcun", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(said)
    assert (shown.out, shown.err.count("\n")) == ("", 1)


def test_accelerate_config_prints_the_path_of_a_launch_file(monkeypatch, capsys):
    run = importlib.import_module("ragcun_hf.cli.accelerate_config").main
    run(["one_machine_gpus"])
    assert Path(capsys.readouterr().out.strip()) == CLI / "accelerate" / "one_machine_gpus.yaml"
    run([])
    assert capsys.readouterr().out.split() == sorted(path.stem for path in (CLI / "accelerate").glob("*.yaml"))


# The form of a command


def test_a_script_of_a_checkout_names_scripts_from_where_the_user_is(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    monkeypatch.setattr(sys, "argv", ["training/train_contrastive.py"])
    assert command("eval_beir", "--model_path", "my model") == "python training/eval_beir.py --model_path 'my model'"
    monkeypatch.chdir(ROOT / "training")
    monkeypatch.setattr(sys, "argv", ["train_contrastive.py"])
    assert command("eval_beir") == "python eval_beir.py"


def test_another_script_s_process_names_the_installed_command(monkeypatch, tmp_path):
    (tmp_path / "training").mkdir()  # a folder of the user, with a script of the user
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "training" / "mine.py")])
    assert command("render_card").endswith("ragcun card")


def test_the_module_form_names_the_module_form(monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    monkeypatch.setattr(sys, "argv", [str(ROOT / "ragcun_hf" / "cli" / "__main__.py"), "--train_data", "x"])
    assert command("eval_beir") == "python -m ragcun_hf.cli eval-beir"


def test_a_program_that_the_shell_would_not_find_is_named_by_its_path(monkeypatch, tmp_path):
    for name in ("python", "ragcun"):
        (tmp_path / "bin" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bin" / name).touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "bin" / "ragcun")])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.fspath(tmp_path / "nowhere"))
    assert command("eval_beir") == "bin/ragcun eval-beir"
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert command("eval_beir") == "../bin/ragcun eval-beir"
    monkeypatch.setenv("HOME", os.fspath(tmp_path))
    monkeypatch.chdir("/usr/share")
    assert command("eval_beir") == "~/bin/ragcun eval-beir"
    monkeypatch.setenv("PATH", os.fspath(tmp_path / "bin"))
    assert command("eval_beir") == "ragcun eval-beir"


def test_recorded_commands_hold_the_form_but_no_folder_of_the_machine(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "training" / "demo.py")])
    assert portable_command("eval_beir", ["--data_dir", "/a/b/c"]) == "python training/eval_beir.py --data_dir c"
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/ragcun"])
    assert portable_command("eval_beir", ["--data_dir", "/a/b/c"]) == "ragcun eval-beir --data_dir c"
    assert portable_command("training/benchmarks/x.py", []) == "python training/benchmarks/x.py"


def test_descriptions_name_the_command_that_the_user_can_start(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ragcun"])
    text = with_commands("python training/eval_beir.py --a, see training/render_card.py and training/other.py")
    assert re.sub(r"\S*ragcun", "ragcun", text) == "ragcun eval-beir --a, see ragcun card and training/other.py"


def test_no_message_of_the_package_names_a_script_of_a_checkout():
    """Docstrings of commands may: `--help` shows them in the right form."""
    for path in sorted((ROOT / "ragcun_hf").rglob("*.*")):
        if path.suffix not in (".py", ".md", ".yaml", ".json"):
            continue
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".py":
            text = re.sub(r'"""(?:.|\n)*?"""', "", text)
            text = re.sub(r"#.*", "", text)
        if path.name != "commands.py":
            assert not re.search(r"training/\w+\.py|ragcun_hf\[", text), path
