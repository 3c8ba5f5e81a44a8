"""Exceptions for mistakes that the user can fix."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_FLAG = re.compile(r"(?<![\w-])--(?!help\b)(no_)?([a-z]\w*)")
# What a person types into a shell stays as it is, up to the next comma, colon or bracket.
_SHELL = re.compile(r"((?:\bragcun |\bpython |\baccelerate launch|\bpip install )[^,:;()]*)")
# Flags whose argument of the Trainer has another name.
_ARGUMENTS = {
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "val_data": "eval_dataset",
    "val_corpus": "corpus",
    "similarity": "similarity_fn_name",
}
_LONGEST = 1_500  # characters of a message; a value that is quoted may be a whole file
_is_command: list[bool] = []


class UserError(ValueError):
    """The user's input, files or flags must change.

    The message is one line with three parts: what was expected, what came (file, row, field), and what to do. A
    command prints it without a traceback and exits with code 2. Any other exception is a defect: exit code 1.
    Where no command runs, the text names arguments instead of flags.

    Example:
        >>> raise UserError("expected a temperature above 0, got -1.0: set --temperature to e.g. 0.05")
        Traceback (most recent call last):
            ...
        ragcun_hf.errors.UserError: expected a temperature above 0, got -1.0: set temperature to e.g. 0.05
    """

    def __str__(self) -> str:
        text = super().__str__()
        return for_reader(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...")


class NotFiniteError(UserError):
    """Vectors or similarities contain NaN or infinity: the model diverged, or its precision is too low."""


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """Return a question with the name that a misspelled word resembles, and a space behind it, or "".

    >>> did_you_mean("adpt", ["general", "adapt"]), did_you_mean("quick", ["general", "adapt"])
    ('did you mean adapt? ', '')
    """
    found = difflib.get_close_matches(word, list(names), n=1, cutoff=0.75)
    return f"did you mean {found[0]}? " if found else ""


def name_flags() -> None:
    """From now on, messages are for somebody at a terminal: they name the flags of a command."""
    _is_command.append(True)


def for_reader(text: str) -> str:
    """Return a message about flags as it stands if a command runs, and else with the names of arguments.

    >>> for_reader("--blend 0.5 needs a frozen encoder: leave --no_freeze_base out, or call ragcun eval-beir --help")
    'blend 0.5 needs a frozen encoder: leave freeze_base=False out, or call ragcun eval-beir --help'
    """
    if _is_command:
        return text
    parts = _SHELL.split(text)
    return "".join(part if index % 2 else _FLAG.sub(_argument, part) for index, part in enumerate(parts))


def _argument(flag: re.Match[str]) -> str:
    name = _ARGUMENTS.get(flag[2], flag[2])
    return f"{name}=False" if flag[1] else name
