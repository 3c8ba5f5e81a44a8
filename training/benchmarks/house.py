"""Measure the structure of the package: rooms, floors, imports between rooms, lines, and the files of a training run.

    python training/benchmarks/house.py
    python training/benchmarks/house.py --root ANOTHER_CHECKOUT

A room is a folder or a loose file at the root of `ragcun_hf`; `training/` counts as one room. A room's floor is 1 more
than the highest floor it imports from. Imports inside functions and for type checkers count too. The files of a
training run are those in which code of the package runs while `train_contrastive` trains on a few pairs.
"""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ragcun_hf.command_line import argument, format_table, parse_arguments, run_script, say

# Runs in a process of its own, in the checkout that is measured.
_TRACE = """
import os, sys, threading
root, data, output, encoder = sys.argv[1:]
sys.path[:0] = [root, root + "/training"]
files = set()
def note(frame, event, argument):
    name = frame.f_code.co_filename
    if event == "call" and name.startswith(root + "/ragcun_hf/") and frame.f_code.co_name != "<module>":
        files.add(name)
if os.path.isdir(root + "/ragcun_hf/cli"):
    from ragcun_hf.cli.train_contrastive import main
else:  # a checkout in which the scripts hold the commands
    from train_contrastive import main
threading.setprofile(note)
sys.setprofile(note)
main(["--base_model", encoder, "--train_data", data, "--output_dir", output, "--epochs", "1", "--batch_size", "4",
      "--val_fraction", "0.2", "--no_feature_cache", "--disable_tqdm", "true"])
sys.setprofile(None)
threading.setprofile(None)
print(len(files))
"""


@dataclass
class HouseArguments:
    """What to measure."""

    root: str = argument(str(Path(__file__).resolve().parents[2]), "Root of the checkout to measure.")


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    (args,) = parse_arguments([HouseArguments], description=__doc__ or "", arguments=arguments)
    root = Path(args.root).resolve()
    files = {_module(root, path): path for path in sorted((root / "ragcun_hf").rglob("*.py"))}
    edges = {(module, found) for module in files for found in _imported(files, module) if found != module}
    for path in sorted((root / "training").rglob("*.py")):
        edges |= {(f"training.{path.stem}", found) for found in _imported(files, None, path)}
    crossing = {(start, end) for start, end in edges if _room(start) != _room(end)}
    rooms = {_room(module) for module in files} | {"training"}
    code, docstrings, total = (sum(column) for column in zip(*map(_lines, files.values()), strict=True))
    rows = [
        ("rooms, training/ included", len(rooms)),
        ("loose files at the root", len(list((root / "ragcun_hf").glob("*.py")))),
        ("floors", _floors(rooms, {(_room(start), _room(end)) for start, end in crossing})),
        ("imports between files of different rooms", len(crossing)),
        ("pairs of rooms that import", len({(_room(start), _room(end)) for start, end in crossing})),
        ("files", len(files)),
        ("lines", total),
        ("lines of code", code),
        ("lines of docstrings", docstrings),
        ("files in which a training run executes code", _files_of_a_run(root)),
    ]
    say(format_table([("", "count"), *((name, f"{count:,}") for name, count in rows)], num_names=1))


def _module(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def _room(module: str) -> str:
    parts = module.split(".")
    return parts[0] if parts[0] != "ragcun_hf" or len(parts) == 1 else parts[1]


def _imported(files: dict[str, Path], module: str | None, path: Path | None = None) -> Iterator[str]:
    """Yield the modules of the package that a file imports."""
    path = path or files[module or ""]
    package = (module or "").split(".") if path.name == "__init__.py" else (module or "").split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{start}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            starts = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
            found = next((start for start in starts if start in files), None)
            if found is not None:
                yield found


def _floors(rooms: set[str], edges: set[tuple[str, str]]) -> int:
    @functools.cache
    def floor(room: str, above: tuple[str, ...] = ()) -> int:
        below = {end for start, end in edges if start == room and end not in above and end != "ragcun_hf"}
        return 1 + max((floor(end, (*above, room)) for end in below), default=0)

    return max(floor(room) for room in rooms)


def _lines(path: Path) -> tuple[int, int, int]:
    """Count lines of code, of docstrings, and all lines."""
    text = path.read_text(encoding="utf-8")
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if (
            isinstance(first, ast.Expr)
            and isinstance(first.value, ast.Constant)
            and isinstance(first.value.value, str)
        ):
            docstrings.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines = text.splitlines()
    code = sum(
        1
        for number, line in enumerate(lines, start=1)
        if number not in docstrings and line.strip() and not line.strip().startswith("#")
    )
    return code, len(docstrings), len(lines)


def _files_of_a_run(root: Path) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "pairs.jsonl"
        rows = [
            {"query": f"what is number {row}", "positive": f"number {row} is {row * row} squared"} for row in range(40)
        ]
        data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        command = [sys.executable, "-c", _TRACE, str(root), str(data), f"{scratch}/model", "embedded"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


if __name__ == "__main__":
    run_script(main)
