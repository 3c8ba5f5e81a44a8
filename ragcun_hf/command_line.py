"""One way to read arguments and to end, shared by every command.

Flags come from dataclass fields; `--config recipe.yaml` fills them first and flags win over the
file. Nothing heavy is imported until the arguments are known to be right.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import shlex
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .errors import UserError

_SECONDS_TO_SPEAK = 5.0
_CONFIG_FLAGS = ("--config", "--recipe")
_SHIPPED = Path(__file__).parent / "cli"  # recipes and launch files are package data of the commands


def run_script(main: Callable[[], None], *, shares_work: bool = False) -> NoReturn:
    """Run a script's main function and exit with the code its outcome deserves.

    Exit codes: 0 done; 2 the user must change something (one line on standard error, no traceback);
    130 interrupted; 1 a defect (with its traceback).

    Args:
        main: The function.
        shares_work: Several processes under `accelerate launch` do the work together; other scripts refuse them,
            since each would do all of it and write over the others' files.
    """
    try:
        if not shares_work:
            _refuse_several_processes()
        main()
        _leave_other_processes()
    except UserError as error:
        message = " ".join(str(error).split())
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)  # noqa: T201 (the script's own voice)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: whole checkpoints and features were kept", file=sys.stderr)  # noqa: T201
        sys.exit(130)
    sys.exit(0)


def _refuse_several_processes() -> None:
    number, own = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK")
    if number == "1" or own is None:
        return
    if os.environ.get("LOCAL_RANK", own) != "0":
        time.sleep(_SECONDS_TO_SPEAK)  # for whoever ends first is seen to have failed, and the others are stopped
        sys.exit(2)  # one message a machine is enough
    raise UserError(f"expected one process, got {number}: this script shares no work, start it with python")


def _leave_other_processes() -> None:
    """Close what connects processes: its threads, left to the end of the interpreter, can end it by a signal.

    A sharded model holds connections of its own, and goes with the cycles that hold it.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        gc.collect()
        distributed.destroy_process_group()


def say(text: str) -> None:
    """Print to the person at the terminal, of several processes in the first; elsewhere the package logs."""
    if os.environ.get("RANK", "0") == "0":
        print(text)  # noqa: T201


def format_table(rows: Sequence[Sequence[str]], *, num_names: int) -> str:
    """Align the cells of a table for the terminal: names to the left, numbers to the right, a line below the head.

    Args:
        rows: The head first, all of one length.
        num_names: How many columns, from the left, are names.

    Returns:
        Lines, none of which ends in spaces.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        names = [cell.ljust(width) for cell, width in zip(row[:num_names], widths[:num_names], strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(row[num_names:], widths[num_names:], strict=True)]
        lines.append("  ".join(names + numbers).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def quiet_libraries() -> None:
    """Keep the libraries' own loading and saving bars off a script's screen; its training bar stays."""
    import datasets
    from transformers.utils import logging

    logging.disable_progress_bar()
    datasets.disable_progress_bars()


def parse_arguments(
    dataclass_types: Sequence[type],
    *,
    description: str,
    arguments: Sequence[str] | None = None,
    defaults: dict[str, Any] | None = None,
) -> tuple[Any, ...]:
    """Read flags and the optional YAML file into one instance per dataclass.

    Args:
        dataclass_types: Dataclasses whose fields become flags (`transformers.HfArgumentParser` rules).
        description: First lines of `--help`; usually the script's docstring.
        arguments: The command line without the program's name; `sys.argv` if None.
        defaults: The script's own defaults, by field name, where they differ from the dataclasses'.

    Returns:
        One instance per dataclass, in order.

    Raises:
        UserError: On an unknown flag or YAML key, a wrong value, or an unreadable YAML file.
    """
    parser = _make_parser(dataclass_types, description=description)
    parser.set_defaults(**(defaults or {}))
    command_line = list(sys.argv[1:] if arguments is None else arguments)
    config_path = _config_path(command_line, _config_flags(dataclass_types))
    known = {option.lstrip("-"): action for option, action in parser._option_string_actions.items()}
    from_file = _flags_from_yaml(config_path, known) if config_path else []
    try:
        # Required flags may come from the file, so both are parsed in one go; the last one wins.
        *instances, _, unknown = parser.parse_args_into_dataclasses(
            args=from_file + command_line, look_for_args_file=False, return_remaining_strings=True
        )
    except UserError:
        raise
    except ValueError as error:  # a dataclass refused a value
        raise UserError(str(error)) from error
    if unknown:
        raise UserError(f"expected flags of this script, got {' '.join(unknown)}: --help lists them")
    return tuple(instances)


def _make_parser(dataclass_types: Sequence[type], *, description: str) -> Any:
    from transformers import HfArgumentParser

    class _Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(f"{message}; run with --help for the list of flags")

    # Abbreviations off: `--lambda_iso` must be an error, not a guess.
    parser = _Parser(
        list(dataclass_types),  # type: ignore[arg-type]
        description=description,
        allow_abbrev=False,
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    shipped = ", ".join(path.stem for path in _shipped_recipes())
    parser.add_argument(
        *_config_flags(dataclass_types),
        type=str,
        default=None,
        help=f"YAML file with any of these flags, or the name of a shipped recipe ({shipped}); flags win over it.",
    )
    return parser


class FlagValues:
    """Converts values of flags as the command line does, one at a time.

    Args:
        dataclass_types: Dataclasses whose fields are flags.

    Example:
        >>> from ragcun_hf.trainer.arguments import ModelArguments
        >>> FlagValues([ModelArguments]).convert("similarity", "dot")
        ('similarity_fn_name', 'dot')
    """

    def __init__(self, dataclass_types: Sequence[type]) -> None:
        self._parser = _make_parser(dataclass_types, description="")

    def convert(self, flag: str, value: Any) -> tuple[str, Any]:
        """Convert one value.

        Args:
            flag: Name or alias, without dashes.
            value: A value, or the word for it.

        Returns:
            The field that the flag stands for, and the value as that field has it.

        Raises:
            UserError: If there is no such flag, or it cannot have that value.
        """
        action = self._action(flag)
        if value is None:
            if action.default is not None:
                raise UserError(f"{flag}: expected a value, got none: name one")
            return action.dest, None
        try:
            converted = self._parser._get_value(action, str(value))
            self._parser._check_value(action, converted)
        except (ArgumentError, ValueError) as error:
            raise UserError(f"{flag}: {error}: change the value") from error
        return action.dest, converted

    def is_whole(self, flag: str) -> bool:
        """Tell whether a flag takes whole numbers only; raises as `convert` does."""
        return self._action(flag).type is int

    def _action(self, flag: str) -> Any:
        action = self._parser._option_string_actions.get(f"--{flag}")
        if action is None:
            raise UserError(f"expected the name of a flag, got {flag!r}: --help lists them")
        return action


def config_file(arguments: Sequence[str] | None = None) -> str | None:
    """Return the path of the file that `--config` or `--recipe` names, or None."""
    return _config_path(list(sys.argv[1:] if arguments is None else arguments), _CONFIG_FLAGS)


def shipped_file(folder: str, name: str) -> Path:
    """Return the path of a file that the package brings.

    Args:
        folder: `recipes`, `sweeps` or `accelerate`.
        name: Without `.yaml`.

    Returns:
        Where it lies.

    Raises:
        UserError: If there is none of that name; the message lists those there are.
    """
    path = _SHIPPED / folder / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(each.stem for each in path.parent.glob("*.yaml")))
        raise UserError(f"expected one of the {folder} {names}, got {name!r}: change the name")
    return path


def _shipped_recipes() -> list[Path]:
    return sorted(path for folder in ("recipes", "sweeps") for path in (_SHIPPED / folder).glob("*.yaml"))


def portable_command(script: str, arguments: Sequence[str] | None = None) -> str:
    """Write down a command line without the folders of this machine: of outside paths the last two parts stay."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return shlex.join(["python", script, *(_portable_word(word) for word in words)])


def _portable_word(word: str) -> str:
    flag, equals, value = word.partition("=")
    if equals and flag.startswith("--"):
        return f"{flag}={_portable_word(value)}"
    path = Path(word)
    is_outside = path.is_absolute() or word.startswith("..")
    return "/".join(part for part in path.parts[-2:] if part not in ("..", path.anchor)) if is_outside else word


def default_output_folder(script_name: str, arguments: Sequence[str] | None = None) -> str:
    """Name where a training script writes by default: after its recipe, or after itself."""
    recipe = config_file(arguments)
    return f"checkpoints/{Path(recipe).stem if recipe else script_name}"


def _config_flags(dataclass_types: Sequence[type]) -> tuple[str, ...]:
    """Return the flags that name a file of flags; some commands have a flag --recipe of their own."""
    has_recipe = any(field.name == "recipe" for each in dataclass_types for field in dataclasses.fields(each))
    return _CONFIG_FLAGS[:1] if has_recipe else _CONFIG_FLAGS


def _config_path(command_line: list[str], flags: Sequence[str]) -> str | None:
    for position, word in enumerate(command_line):
        flag, equals, value = word.partition("=")
        if flag not in flags:
            continue
        if not equals:
            if position + 1 == len(command_line):
                raise UserError(f"{flag} expects a YAML file or a recipe's name, got nothing: write it after the flag")
            value = command_line[position + 1]
        return _recipe_path(value)
    return None


def _recipe_path(name: str) -> str:
    """Take a file that is there, or else the shipped recipe of that name or of the place where it lay before."""
    shipped = {path.stem: str(path) for path in _shipped_recipes()}
    path = Path(name)
    is_name = name in shipped or (path.suffix == ".yaml" and path.parent.name in ("recipes", "sweeps"))
    return shipped.get(path.stem, name) if is_name and not path.is_file() else name


def _flags_from_yaml(path: str, known: dict[str, Any]) -> list[str]:
    """Turn the file into flags, so that one parser checks names, types and choices."""
    flags: list[str] = []
    for key, value in _read_yaml(path).items():
        if not isinstance(key, str) or key not in known or key == "config":
            raise UserError(f"{path}: unknown key {key!r}: use the names of the script's flags (--help lists them)")
        if value is None:
            continue
        if known[key].nargs == 0:
            raise UserError(f"{path}: key {key!r} is a switch without a value: write its positive form, true or false")
        if isinstance(value, list):
            flags.extend([f"--{key}", *(_as_word(item) for item in value)])
        else:
            # One word, so that a value such as -1e-3 is not taken for a flag.
            flags.append(f"--{key}={_as_word(value)}")
    return flags


def _as_word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _read_yaml(path: str) -> dict[Any, Any]:
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"--config expects a readable YAML file, got {path!r} ({error.strerror}): check the path, or name one of "
            f"the recipes {', '.join(each.stem for each in _shipped_recipes())}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({error}): correct the file") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping of flag names to values, got a {type(content).__name__}")
    return content


class _Metadata(dict[str, Any]):
    """Metadata of a field, with facts that iteration skips: HfArgumentParser passes the rest on to argparse."""

    def __init__(self, for_parser: dict[str, Any], facts: dict[str, Any]) -> None:
        super().__init__(for_parser)
        self._facts = facts

    def __missing__(self, name: str) -> Any:
        return self._facts[name]


def argument(default: Any, help_text: str, *aliases: str, **facts: Any) -> Any:
    """Declare a dataclass field with its help text and aliases of its flag.

    Facts are read with `argument_facts`. In use are `recorded` (`always` or `never` written to the training record;
    by default, if the value differs from the default), `essential` (always recorded, and its place among the
    arguments that a reader of the record looks for first) and `swept` (a sweep can change it; heads that differ only
    in a `number` train together, heads that differ in a `shape` do not).
    """
    metadata = _Metadata({"help": help_text, **({"aliases": list(aliases)} if aliases else {})}, facts)
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def argument_facts(dataclass_type: type, fact: str) -> dict[str, Any]:
    """Return name -> value of a fact for the fields that have it, in the order of the fields."""
    found = {}
    for field in dataclasses.fields(dataclass_type):
        with contextlib.suppress(KeyError):
            found[field.name] = field.metadata[fact]
    return found
