"""Argument parsing, exit codes and terminal output, shared by every command.

Flags come from dataclass fields. `--config file.yaml` or `--recipe name` fills them first; flags override the file.
Nothing heavy is imported until the arguments have been checked.
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

_SECONDS_BEFORE_EXIT = 5.0
_CONFIG_FLAGS = ("--config", "--recipe")
_SHIPPED = Path(__file__).parent / "cli"  # holds the recipes and launch files


def run_script(main: Callable[[], None], *, shares_work: bool = False) -> NoReturn:
    """Run a command's main function, then exit.

    Exit codes: 0 success; 2 the user must change something (one line on standard error, no traceback);
    130 interrupted; 1 a defect (with a traceback). A command runs in several processes only if it `shares_work`
    among them; otherwise each would do all the work and overwrite the files of the others.
    """
    try:
        if not shares_work:
            _refuse_several_processes()
        main()
        _disconnect_processes()
    except UserError as error:
        message = " ".join(str(error).split())
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)  # noqa: T201 (output of the command)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: finished checkpoints and cached features are kept", file=sys.stderr)  # noqa: T201
        sys.exit(130)
    sys.exit(0)


def _refuse_several_processes() -> None:
    number, own = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK")
    if number == "1" or own is None:
        return
    if os.environ.get("LOCAL_RANK", own) != "0":
        # The launcher stops all processes when the first one exits: let the one with the message exit first.
        time.sleep(_SECONDS_BEFORE_EXIT)
        sys.exit(2)
    raise UserError(f"expected one process, got {number}: this command cannot share its work, start it with python")


def _disconnect_processes() -> None:
    """Close the connections between processes, whose threads can crash the interpreter while it exits."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        gc.collect()  # a sharded model has connections of its own
        distributed.destroy_process_group()


def say(text: str) -> None:
    """Print a line of a command's output, in the first process only. Library code logs instead."""
    if os.environ.get("RANK", "0") == "0":
        print(text)  # noqa: T201


def format_table(rows: Sequence[Sequence[str]], *, num_names: int) -> str:
    """Align a table, header first, for the terminal: the first `num_names` columns left, the others (numbers) right.

    >>> print(format_table([("set", "NDCG@10"), ("scifact", "0.6457")], num_names=1))
    set      NDCG@10
    ----------------
    scifact   0.6457
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
    """Hide the progress bars that transformers and datasets show while they load and save."""
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
    """Parse flags and the optional YAML file into one instance of each dataclass, or raise a UserError.

    Fields become flags by the rules of `transformers.HfArgumentParser`. `description` opens the text of `--help`, and
    `defaults` (field name -> value) replace defaults of the dataclasses. `arguments` default to those of `sys.argv`.
    """
    parser = _make_parser(dataclass_types, description=description)
    parser.set_defaults(**(defaults or {}))
    command_line = list(sys.argv[1:] if arguments is None else arguments)
    config_path = _config_path(command_line, _config_flags(dataclass_types))
    known = {option.lstrip("-"): action for option, action in parser._option_string_actions.items()}
    from_file = _flags_from_yaml(config_path, known) if config_path else []
    try:
        # Required flags may be in the file, so both are parsed together; the last value of a flag counts.
        *instances, _, unknown = parser.parse_args_into_dataclasses(
            args=from_file + command_line, look_for_args_file=False, return_remaining_strings=True
        )
    except ValueError as error:  # of the parser or of a dataclass
        raise UserError(str(error)) from error
    if unknown:
        raise UserError(f"expected flags of this command, got {' '.join(unknown)}: --help lists them")
    return tuple(instances)


def _make_parser(dataclass_types: Sequence[type], *, description: str) -> Any:
    from transformers import HfArgumentParser

    class _Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(f"{message}; --help lists the flags")

    # No abbreviations: `--lambda_iso` must be an error.
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
        help=f"YAML file with any of these flags, or the name of a recipe ({shipped}). Flags override it.",
    )
    return parser


class FlagValues:
    """Converts the value of one flag as the command line would.

    >>> from ragcun_hf.objective.arguments import ModelArguments
    >>> FlagValues([ModelArguments]).convert("similarity", "dot")
    ('similarity_fn_name', 'dot')
    """

    def __init__(self, dataclass_types: Sequence[type]) -> None:
        self._parser = _make_parser(dataclass_types, description="")

    def convert(self, flag: str, value: Any) -> tuple[str, Any]:
        """Return the field that a flag (named without dashes) sets, and the value in its type, or raise UserError."""
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

    def field(self, flag: str) -> str:
        """Return the field that a flag sets."""
        return str(self._action(flag).dest)

    def takes_integers(self, flag: str) -> bool:
        """Return whether a flag takes integers only."""
        return self._action(flag).type is int

    def _action(self, flag: str) -> Any:
        action = self._parser._option_string_actions.get(f"--{flag}")
        if action is None:
            raise UserError(f"expected the name of a flag, got {flag!r}: --help lists them")
        return action


def recipe_values(name_or_file: str, dataclass_types: Sequence[type], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return field -> value of a recipe, checked as flags are; overrides, named alike, are taken as given."""
    flags = FlagValues(dataclass_types)
    path = _recipe_path(name_or_file)
    values: dict[str, Any] = {}
    for key, value in _read_yaml(path).items():
        items = [flags.convert(str(key), item) for item in (value if isinstance(value, list) else [value])]
        values[items[0][0]] = [item for _, item in items] if isinstance(value, list) else items[0][1]
    return values | {flags.field(name): value for name, value in overrides.items()}


def config_file(arguments: Sequence[str] | None = None) -> str | None:
    """Return the path of the file given by `--config` or `--recipe`, or None."""
    return _config_path(list(sys.argv[1:] if arguments is None else arguments), _CONFIG_FLAGS)


def shipped_file(folder: str, name: str) -> Path:
    """Return the path of a YAML file in `recipes`, `sweeps` or `accelerate`; an unknown name is a UserError."""
    path = _SHIPPED / folder / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(each.stem for each in path.parent.glob("*.yaml")))
        raise UserError(f"expected one of the {folder} {names}, got {name!r}: choose one of them")
    return path


def _shipped_recipes() -> list[Path]:
    return sorted(path for folder in ("recipes", "sweeps") for path in (_SHIPPED / folder).glob("*.yaml"))


def portable_command(script: str, arguments: Sequence[str] | None = None) -> str:
    """Return a command line to record; of a path outside the working folder, only the last two parts are kept."""
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
    """Return a training command's default output folder, named after its recipe or after the command."""
    recipe = config_file(arguments)
    return f"checkpoints/{Path(recipe).stem if recipe else script_name}"


def _config_flags(dataclass_types: Sequence[type]) -> tuple[str, ...]:
    """Return the flags that name a YAML file; some commands have a flag --recipe of their own."""
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
    """Return the path of a recipe, given by name or as `recipes/NAME.yaml`; any other path is returned unchanged."""
    shipped = {path.stem: str(path) for path in _shipped_recipes()}
    path = Path(name)
    is_name = name in shipped or (path.suffix == ".yaml" and path.parent.name in ("recipes", "sweeps"))
    return shipped.get(path.stem, name) if is_name and not path.is_file() else name


def _flags_from_yaml(path: str, known: dict[str, Any]) -> list[str]:
    """Convert the file to flags, so that one parser checks names, types and choices."""
    flags: list[str] = []
    for key, value in _read_yaml(path).items():
        if not isinstance(key, str) or key not in known or key == "config":
            raise UserError(f"{path}: unknown key {key!r}: use the names of the command's flags (--help lists them)")
        if value is None:
            continue
        if known[key].nargs == 0:
            raise UserError(f"{path}: {key!r} takes no value: write its name without no_, with true or false")
        items = value if isinstance(value, list) else [value]
        words = [json.dumps(item) if isinstance(item, dict) else str(item) for item in items]
        # One word for one value, so that e.g. -1e-3 is not read as a flag.
        flags += [f"--{key}", *words] if isinstance(value, list) else [f"--{key}={words[0]}"]
    return flags


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
    """Declare a dataclass field with a help text, aliases of its flag, and facts for `argument_facts`.

    recorded: `always` or `never` written to the training record; by default, if the value is not the default.
    essential: Always recorded; its place among the arguments that a reader of the record looks for first.
    swept: A sweep can change it. Heads that differ in a `number` train together; with another `shape` they do not.
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
