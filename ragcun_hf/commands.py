"""The commands by name, and how the person at the terminal starts them: the one home of both.

A command is a module of `cli/`. An installed package has it as `ragcun NAME`; a checkout also has the published
scripts, `python training/SCRIPT.py`. Messages name the form that exists where the user is.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .files import path_below

PROGRAM = "ragcun"
_SCRIPT = re.compile(r"(?:python )?training/(\w+)\.py")


class Command(NamedTuple):
    """The module of `cli/` that runs a command, and whether several processes share its work."""

    module: str
    shares_work: bool = False


COMMANDS = {
    "train-contrastive": Command("train_contrastive", shares_work=True),
    "train-self-supervised": Command("train_self_supervised", shares_work=True),
    "train-xy-masked": Command("train_xy_masked", shares_work=True),
    "sweep": Command("sweep"),
    "eval-beir": Command("eval_beir", shares_work=True),
    "eval-mteb": Command("eval_mteb"),
    "table": Command("table"),
    "search": Command("search_demo"),
    "card": Command("render_card"),
    "push": Command("push_to_hub"),
    "export": Command("export"),
    "prepare-data": Command("prepare_data"),
    "mine-negatives": Command("mine_negatives"),
    "convert": Command("convert_checkpoint"),
    "features": Command("feature_cache"),
    "demo": Command("demo"),
    "accelerate-config": Command("accelerate_config"),
}
_NAMES = {command.module: name for name, command in COMMANDS.items()}


def command(module: str, *words: str | os.PathLike[str]) -> str:
    """Return the command line that runs a module of `cli/` with some words, in the form that this user can start.

    >>> command("eval_beir", "--model_path", "my model", "--use_predictor")
    "ragcun eval-beir --model_path 'my model' --use_predictor"
    """
    return " ".join([_start(module), *(shlex.quote(os.fspath(word)) for word in words)])


def with_commands(text: str) -> str:
    """Return a text with every `training/SCRIPT.py` in the form that this user can start."""
    return _SCRIPT.sub(lambda found: _start(found[1]) if found[1] in _NAMES else found[0], text)


def program_name() -> str:
    """Return what this process calls itself in usage and messages: a script's file, or `ragcun NAME`."""
    script = Path(sys.argv[0])
    return script.name if script.stem not in (PROGRAM, "__main__") or not _running else f"{PROGRAM} {_running[-1]}"


def set_running(module: str) -> None:
    """Remember which command this process runs, for `program_name`."""
    _running.append(_NAMES.get(module, module))


def portable_command(module_or_script: str, arguments: Sequence[str] | None = None) -> str:
    """Return a command line to record, of a module of `cli/` or a script of a checkout.

    Of a path outside the working folder, only the last part is kept: the folder above it may be a user's name. A token
    is left out.
    """
    words = _without_secrets(list(sys.argv[1:] if arguments is None else arguments))
    start = ["python", module_or_script]
    if module_or_script in _NAMES:
        is_script = _scripts_folder(module_or_script) is not None
        start = ["python", f"training/{module_or_script}.py"] if is_script else [PROGRAM, _NAMES[module_or_script]]
    return shlex.join([*start, *map(_portable_word, words)])


_running: list[str] = []
_HIDDEN = "HIDDEN"
_SECRET_FLAG = re.compile(r"--\w*(token|password|secret|api_key)")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")  # the Hub's have 34 after the underscore


def _start(module: str) -> str:
    folder = _scripts_folder(module)
    if folder is not None:
        return f"{_installed('python')} {_shown(folder / f'{module}.py')}"
    if Path(sys.argv[0]).absolute() == Path(__file__).parent / "cli" / "__main__.py":
        return f"{_installed('python')} -m ragcun_hf.cli {_NAMES[module]}"
    return f"{_installed(PROGRAM)} {_NAMES[module]}"


def _scripts_folder(module: str) -> Path | None:
    """Return the folder `training` of the checkout whose script this process was started with, or None."""
    for folder in Path(sys.argv[0]).absolute().parents:
        if folder.name == "training" and (folder / f"{module}.py").is_file():
            return folder
    return None


def _installed(program: str) -> str:
    """Return the name of a program, or its path if the name finds nothing, or that of another environment."""
    own = Path(sys.executable).parent / program
    found = shutil.which(program)
    # The interpreter of another environment may be a link to the same file, so its folder counts.
    is_own = found and (
        Path(found).parent.resolve() == own.parent.resolve()
        or (program == PROGRAM and Path(found).resolve() == own.resolve())
    )
    return program if is_own or not own.exists() else _shown(own)


def _shown(path: Path) -> str:
    """Return the shortest form of a path that a shell in the working folder understands."""
    forms = [shlex.quote(os.path.relpath(path)), shlex.quote(str(path))]
    if path.is_relative_to(Path.home()):
        forms.append(f"~/{shlex.quote(str(path.relative_to(Path.home())))}")
    return min(forms, key=len)


def _without_secrets(words: Sequence[str]) -> list[str]:
    """Replace the values of flags for tokens, and whatever looks like a token of the Hub."""
    hidden, is_secret = [], False
    for word in words:
        flag, equals, _ = word.partition("=")
        if is_secret:
            word = _HIDDEN
        elif equals and _SECRET_FLAG.fullmatch(flag):
            word = f"{flag}={_HIDDEN}"
        hidden.append(_TOKEN.sub(_HIDDEN, word))
        is_secret = not equals and _SECRET_FLAG.fullmatch(word) is not None
    return hidden


def _portable_word(word: str) -> str:
    flag, equals, value = word.partition("=")
    if equals and flag.startswith("--"):
        return f"{flag}={_portable_word(value)}"
    path = Path(word)
    return path_below(path).as_posix() if path.is_absolute() or word.startswith("..") else word
