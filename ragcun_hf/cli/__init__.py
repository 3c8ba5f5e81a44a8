"""The commands: flags in, calls of the rooms, lines for the person at the terminal out."""

import importlib
import sys
from pathlib import Path
from typing import NoReturn

from ..command_line import run_script, say
from ..commands import COMMANDS, PROGRAM, set_running
from ..errors import UserError, did_you_mean

_WITH_COMMANDS = {command.module: command for command in COMMANDS.values()}


def main() -> NoReturn:
    """Run `ragcun NAME ...`: the command of that name with the words that follow."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        del sys.argv[1]
        run(COMMANDS[name].module)
    run_script(lambda: _answer(name), shares_work=True)


def run(module: str) -> NoReturn:
    """Run the command in a module with `sys.argv`, and exit with the code that its outcome deserves."""
    set_running(module)
    # Imported inside, so that a missing package is reported like any other error.
    run_script(
        lambda: importlib.import_module(f"{__name__}.{module}").main(), shares_work=_WITH_COMMANDS[module].shares_work
    )


def _answer(word: str) -> None:
    """Answer `--help`, `--version` and unknown commands, without importing a command."""
    if word in ("-h", "--help", "help"):
        say(_overview())
    elif word == "--version":
        from importlib.metadata import version

        say(f"{PROGRAM} {version('ragcun_hf')}")
    else:
        hint = did_you_mean(word, COMMANDS)
        raise UserError(f"expected a command, got {word!r}: {hint}choose one of {', '.join(COMMANDS)}")


def _overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name.ljust(width)}{_summary(command.module)}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND [--flag value ...]\n",
            "Improve retrieval with a frozen sentence encoder and a small trained head.\n",
            *lines,
            f"\n{PROGRAM} COMMAND --help lists the flags of a command; {PROGRAM} --version prints the version.",
        ]
    )


def _summary(module: str) -> str:
    """Return the first line of a command's docstring, read from its file: importing it would take seconds."""
    with (Path(__file__).parent / f"{module}.py").open(encoding="utf-8") as file:
        return file.readline().strip().removeprefix("r").strip('"')
