"""Argument parsing, exit codes and terminal output, shared by every command.

Flags come from dataclass fields. `--config file.yaml` or `--recipe name` fills them first; flags override the file.
Nothing heavy is imported until the arguments have been checked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib.util
import json
import os
import re
import sys
import time
from argparse import Action, ArgumentDefaultsHelpFormatter, ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .commands import program_name, with_commands
from .errors import UserError, did_you_mean, name_flags

_SECONDS_BEFORE_EXIT = 5.0
# What oneDNN and torch prepare for a shape of a batch. By default, they keep it for a thousand shapes, which texts of
# many lengths fill with half a gigabyte.
_KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_CONFIG_FLAGS = ("--config", "--recipe")
_SHIPPED = Path(__file__).parent / "cli"  # holds the recipes and launch files


def run_script(main: Callable[[], None], *, shares_work: bool = False) -> NoReturn:
    """Run a command's main function, then exit.

    Exit codes: 0 success; 2 the user must change something (one line on standard error, no traceback);
    130 interrupted; 1 a defect (with a traceback). A command runs in several processes only if it `shares_work`
    among them; otherwise each would do all the work and overwrite the files of the others.
    """
    name_flags()
    for name in _KERNEL_CACHES:
        os.environ.setdefault(name, "32")
    try:
        if not shares_work:
            _refuse_several_processes()
        main()
        _disconnect_processes()
    except UserError as error:
        message = " ".join(str(error).split())
        print(f"{program_name()}: {message}", file=sys.stderr)  # noqa: T201 (output of the command)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or re.search("allocate memory|out of memory", str(error))):
            raise
        what = " ".join(str(error).split())[:200] or "more than this machine has"
        print(  # noqa: T201 (output of the command)
            f"{program_name()}: expected enough memory, got an error ({what}): lower the batch size, the widths or "
            "the number of rows",
            file=sys.stderr,
        )
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
    """Print a line, in the first process only: output of a command, or results of the Trainer.

    The Trainer of transformers prints its figures, too, and a notebook shows no log below a warning. Other library
    code logs instead.
    """
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
    help_all: str | None = None,
) -> tuple[Any, ...]:
    """Parse flags and the optional YAML file into one instance of each dataclass, or raise a UserError.

    Fields become flags by the rules of `transformers.HfArgumentParser`. `description` opens the text of `--help`, and
    `defaults` (field name -> value) replace defaults of the dataclasses. `arguments` default to those of `sys.argv`.
    `help_all` says what a flag `--help_all` shows besides the flags in `--help`.
    """
    parser = _make_parser(dataclass_types, description=description, help_all=help_all)
    parser.set_defaults(**(defaults or {}))
    command_line = list(sys.argv[1:] if arguments is None else arguments)
    given = _given_config(command_line, _config_flags(dataclass_types))
    from_file = _flags_from_yaml(*given, _known_flags(parser)) if given else []
    try:
        # Required flags may be in the file, so both are parsed together; the last value of a flag counts.
        *instances, _, unknown = parser.parse_args_into_dataclasses(
            args=from_file + command_line, look_for_args_file=False, return_remaining_strings=True
        )
    except ValueError as error:  # of the parser or of a dataclass
        raise UserError(str(error)) from error
    if unknown:
        hint = did_you_mean(unknown[0].partition("=")[0], parser._option_string_actions)
        raise UserError(f"expected flags of this command, got {' '.join(unknown)}: {hint}--help lists them")
    return tuple(instances)


def asks_for_help(arguments: Sequence[str] | None = None) -> bool:
    """Return whether the command line has `--help`."""
    return not {"-h", "--help"}.isdisjoint(sys.argv[1:] if arguments is None else arguments)


def _make_parser(dataclass_types: Sequence[type], *, description: str, help_all: str | None = None) -> Any:
    class _Parser(_argument_parser()):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise UserError(f"{message}; --help lists the flags")

        def format_help(self) -> str:
            return _format_help(self, dataclass_types)

    # No abbreviations: `--lambda_iso` must be an error.
    parser = _Parser(
        list(dataclass_types),
        prog=program_name(),
        description=with_commands(description),
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument(*_config_flags(dataclass_types), type=str, default=None)  # `_format_help` explains it
    if help_all:
        parser.add_argument("--help_all", action="help", help=f"Show {help_all} too, and exit.")
    return parser


def _argument_parser() -> Any:
    """Return the parser of transformers, from its file alone unless transformers, which takes a second, is there."""
    package = importlib.util.find_spec("transformers")
    if "transformers" not in sys.modules and package is not None and package.submodule_search_locations:
        file = Path(package.submodule_search_locations[0], "hf_argparser.py")
        spec = importlib.util.spec_from_file_location("_hf_argparser", file)
        if spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            with contextlib.suppress(ImportError, OSError):
                spec.loader.exec_module(module)
                return module.HfArgumentParser
    from transformers import HfArgumentParser

    return HfArgumentParser


def _format_help(parser: Any, dataclass_types: Sequence[type]) -> str:
    """Return the text of `--help`: a group for each dataclass, under the first sentence of its docstring."""
    recipes = ", ".join(_fitting_recipes(_known_flags(parser)))
    or_recipe = f", or the name of a recipe ({recipes})" if recipes else ""
    parser._option_string_actions[
        "--config"
    ].help = f"YAML file with any of these flags{or_recipe}. Flags override it."
    groups: dict[str, list[Any]] = {}
    owners: dict[str, str] = {}
    for each in dataclass_types:
        parts = [part for part in each.__mro__ if "__dataclass_fields__" in part.__dict__]
        groups |= {_group_title(part): [] for part in parts}
        for part in reversed(parts):
            owners |= dict.fromkeys(part.__dict__.get("__annotations__", ()), _group_title(part))
    for action in parser._actions:
        if action.nargs != 0 or action.dest not in owners:  # the entry of a switch also names its --no_ form
            groups.setdefault(owners.get(action.dest, "This command"), []).append(action)
    formatter = parser._get_formatter()
    formatter.add_usage(f"{parser.prog} [--flag value ...]", [], [])
    formatter.add_text(parser.description)
    for title, actions in groups.items():
        formatter.start_section(title)
        formatter.add_arguments(actions)
        formatter.end_section()
    return formatter.format_help()


def _group_title(dataclass_type: type) -> str:
    if dataclass_type.__module__.startswith("transformers."):
        return f"{dataclass_type.__name__} of transformers"
    return (dataclass_type.__doc__ or dataclass_type.__name__).partition(".\n")[0].partition(". ")[0].removesuffix(".")


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Names each flag once, with the kind of its value, and states a default where there is one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)

    def _format_action_invocation(self, action: Action) -> str:
        names = [name for name in action.option_strings if "-" not in name.removeprefix("--")]
        if action.default is True and action.const is True:
            names.append(f"--no_{action.dest}")
        if action.nargs in (0, "?"):
            return ", ".join(names)
        kind = "INT" if action.type is int else "FLOAT" if action.type is float else "TEXT"
        value = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else kind
        return f"{', '.join(names)} {value}{' ...' if action.nargs == '+' else ''}"

    def _get_help_string(self, action: Action) -> str | None:
        has_default = action.default not in (None, []) and action.default is not False
        if not has_default or "Default:" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


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
            converted = self._parser._get_value(action, _flag_word(action, value))
            self._parser._check_value(action, converted)
        except (ArgumentError, ValueError) as error:
            raise UserError(f"{flag}: {error}: change the value") from error
        return action.dest, converted

    def field(self, flag: str) -> str:
        """Return the field that a flag sets."""
        return str(self._action(flag).dest)

    def names(self) -> set[str]:
        """Return the names of all flags."""
        return set(_known_flags(self._parser))

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
    values: dict[str, Any] = {}
    for key, value in _read_config("from_recipe", name_or_file, flags.names()).items():
        items = [flags.convert(str(key), item) for item in (value if isinstance(value, list) else [value])]
        values[items[0][0]] = [item for _, item in items] if isinstance(value, list) else items[0][1]
    return values | {flags.field(name): value for name, value in overrides.items()}


def config_file(arguments: Sequence[str] | None = None) -> str | None:
    """Return the path of the file given by `--config` or `--recipe`, or None."""
    given = _given_config(list(sys.argv[1:] if arguments is None else arguments), _CONFIG_FLAGS)
    return _recipe_path(given[1]) if given else None


def shipped_file(folder: str, name: str) -> Path:
    """Return the path of a YAML file in `recipes`, `sweeps` or `accelerate`; an unknown name is a UserError."""
    path = _SHIPPED / folder / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"expected one of {', '.join(shipped_names(folder))}, got {name!r}: choose one of them")
    return path


def shipped_names(folder: str) -> list[str]:
    """Return the names of the YAML files in `recipes`, `sweeps` or `accelerate`."""
    return sorted(path.stem for path in (_SHIPPED / folder).glob("*.yaml"))


def _shipped_recipes() -> list[Path]:
    return sorted(path for folder in ("recipes", "sweeps") for path in (_SHIPPED / folder).glob("*.yaml"))


def _fitting_recipes(known: Collection[str]) -> list[str]:
    """Return the names of the recipes for a command with these flags; of the arguments in Python, all but sweeps."""
    if "grid" in known:
        return shipped_names("sweeps")
    if "lambda_contrastive" not in known:  # it trains nothing
        return []
    names = shipped_names("recipes")
    if not {"train_data", "documents"} & set(known):
        return names
    # One recipe chooses its settings: that is for documents without pairs, and the others are for pairs.
    chooses = {name: "automatic" in _read_yaml(shipped_file("recipes", name)) for name in names}
    return [name for name in names if chooses[name] != ("train_data" in known)]


def _known_flags(parser: Any) -> dict[str, Any]:
    return {option.lstrip("-"): action for option, action in parser._option_string_actions.items()}


def default_output_folder(script_name: str, arguments: Sequence[str] | None = None) -> str:
    """Return a training command's default output folder, named after its recipe or after the command."""
    recipe = config_file(arguments)
    return f"checkpoints/{Path(recipe).stem if recipe else script_name}"


def _config_flags(dataclass_types: Sequence[type]) -> tuple[str, ...]:
    """Return the flags that name a YAML file; some commands have a flag --recipe of their own."""
    has_recipe = any(field.name == "recipe" for each in dataclass_types for field in dataclasses.fields(each))
    return _CONFIG_FLAGS[:1] if has_recipe else _CONFIG_FLAGS


def _given_config(command_line: list[str], flags: Sequence[str]) -> tuple[str, str] | None:
    """Return the first of these flags on the command line, and its value."""
    for position, word in enumerate(command_line):
        flag, equals, value = word.partition("=")
        if flag not in flags:
            continue
        if not equals:
            if position + 1 == len(command_line):
                raise UserError(f"{flag} expects a YAML file or a recipe's name, got nothing: write it after the flag")
            value = command_line[position + 1]
        return flag, value
    return None


def _recipe_path(name: str) -> str:
    """Return the path of a recipe, given by name or as `recipes/NAME.yaml`; any other path is returned unchanged."""
    shipped = {path.stem: str(path) for path in _shipped_recipes()}
    path = Path(name)
    is_name = name in shipped or (path.suffix == ".yaml" and path.parent.name in ("recipes", "sweeps"))
    return shipped.get(path.stem, name) if is_name and not path.is_file() else name


def _flags_from_yaml(flag: str, name: str, known: dict[str, Any]) -> list[str]:
    """Convert the file that a flag names to flags, so that one parser checks names, types and choices."""
    flags: list[str] = []
    names: dict[str, str] = {}  # of the file, by field
    path = _recipe_path(name)
    for key, value in _read_config(flag, name, known).items():
        if not isinstance(key, str) or key not in known or key == "config":
            raise UserError(f"{path}: unknown key {key!r}: use the names of the command's flags (--help lists them)")
        if (other := names.setdefault(known[key].dest, key)) != key:
            raise UserError(
                f"{path}: expected each flag once, got {other!r} and {key!r}, its other name: leave one out"
            )
        if value is None:
            continue
        if known[key].nargs == 0:
            raise UserError(f"{path}: {key!r} takes no value: write its name without no_, with true or false")
        items = value if isinstance(value, list) else [value]
        words = [_flag_word(known[key], item) for item in items]
        if isinstance(value, list) and any(word.startswith("--") for word in words):
            raise UserError(f"{path}: {key!r} expects values, got a list with a flag: write flags as keys of the file")
        # One word for one value, so that e.g. -1e-3 is not read as a flag.
        flags += [f"--{key}", *words] if isinstance(value, list) else [f"--{key}={words[0]}"]
    return flags


def _flag_word(action: Any, value: Any) -> str:
    """Write a value of a YAML file as it stands on a command line: as in the file, but 0x10 as 16 for a number."""
    if isinstance(value, dict):
        return json.dumps(value)
    return f"{value:d}" if isinstance(value, _WrittenInt) and action.type in (int, float) else str(value)


def _read_config(given_as: str, name: str, known: Collection[str]) -> dict[Any, Any]:
    """Read a recipe or a YAML file; messages say how it was `given_as`, and list the recipes for the `known` flags."""
    path = _recipe_path(name)
    try:
        return _read_yaml(path)
    except OSError as error:
        recipes = _fitting_recipes(known)
        others = f", or name one of the recipes {', '.join(recipes)}" if recipes else ""
        raise UserError(
            f"{given_as} expects {'a recipe or ' if recipes else ''}a readable YAML file, got {path!r} "
            f"({error.strerror}): {did_you_mean(name, recipes)}check the path{others}"
        ) from error


def _read_yaml(path: str | Path) -> dict[Any, Any]:
    try:
        content = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # also of bytes that are no UTF-8
        raise UserError(f"{path}: not valid YAML ({error}): correct the file") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping of flag names to values, got a {type(content).__name__}")
    return content


def parse_yaml(text: str) -> Any:
    """Read YAML by the rules of version 1.2, in which `no` and `2024_10` are texts, `010` is 10 and 1e3 a number.

    Text that is not valid, or has a key twice, is a ValueError. A number keeps how it was written: its `str` gives
    that, for flags that take a text.

    >>> parse_yaml("{answer: no, folder: 2024_10, width: 010}"), str(parse_yaml("010"))
    ({'answer': 'no', 'folder': '2024_10', 'width': 10}, '010')
    """
    import yaml

    try:
        loader = _yaml_loader()(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count_values(node, {})
        return loader.construct_document(node)
    except (yaml.YAMLError, RecursionError, OverflowError) as error:
        raise ValueError(str(error)) from error


_MOST_VALUES, _DEEPEST = 100_000, 50  # in a YAML file; an alias counts with all that it stands for


def _count_values(node: Any, counts: dict[int, int]) -> int:
    """Return how many values a YAML node stands for; refuse too many, and a value that contains itself."""
    if id(node) in counts:
        if counts[id(node)] < 0:
            raise ValueError("expected values that do not contain themselves, got an alias of one that does")
        return counts[id(node)]
    counts[id(node)] = -1
    children = node.value if isinstance(node.value, list) else []
    parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
    total = 1 + sum(_count_values(part, counts) for part in parts)
    if total > _MOST_VALUES:
        raise ValueError(f"expected at most {_MOST_VALUES} values, got more")
    counts[id(node)] = total
    return total


class _WrittenInt(int):
    """A whole number of a YAML file; its `str` is the number as it was written."""

    written: str

    def __str__(self) -> str:
        return self.written


class _WrittenFloat(float):
    """A number with a point or an exponent of a YAML file; its `str` is the number as it was written."""

    written: str

    def __str__(self) -> str:
        return self.written


_YAML_SCALARS = {  # kind -> pattern and first characters, from the core schema of YAML 1.2
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "merge": (r"<<", "<"),  # of version 1.1, and still in wide use
}


@functools.cache
def _yaml_loader() -> Any:
    """Return the safe loader of PyYAML, which knows version 1.1, with the scalars of 1.2 and without repeated keys."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[str, Any] = {}
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.depth == _DEEPEST:
                message = f"expected at most {_DEEPEST} nested values, got more"
                raise yaml.composer.ComposerError(None, None, message, self.peek_event().start_mark)
            self.depth += 1
            try:
                return super().compose_node(parent, index)
            finally:
                self.depth -= 1

        def compose_mapping_node(self, anchor: Any) -> Any:  # before other mappings are merged into it
            node = super().compose_mapping_node(anchor)
            seen: set[str] = set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if key.value in seen:
                    message = f"expected every key once, got {key.value!r} again"
                    raise yaml.composer.ComposerError(None, None, message, key.start_mark)
                seen.add(key.value)
            return node

    for kind, (pattern, first) in _YAML_SCALARS.items():
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(rf"(?:{pattern})\Z"), list(first))
    Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: _whole_number(node.value))
    Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: _number(node.value))
    return Loader


def _whole_number(written: str) -> _WrittenInt:
    value = _WrittenInt(written, 0 if written.startswith(("0o", "0x")) else 10)
    value.written = written
    return value


def _number(written: str) -> float:
    special = written.lower().endswith((".inf", ".nan"))
    value = _WrittenFloat(written.replace(".", "") if special else written)
    value.written = str(float(value)) if special else written  # Python's float reads no .inf
    return value


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
