"""Run the benchmarks, each in a new process, and print one table and the total time.

    python training/benchmarks/run_all.py --data_dir data/beir

Without SciFact in --data_dir, end_to_end.py and quantized_search.py are skipped.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from comparison import describe

from ragcun_hf.command_line import argument, parse_arguments, run_script, say
from ragcun_hf.errors import UserError

HERE = Path(__file__).resolve().parent
ALL = (
    "start_up",
    "encoding",
    "feature_store",
    "head_training",
    "many_heads",
    "exact_search",
    "corpus_memory",
    "end_to_end",
    "quantized_search",
)
_WITH_DATA = ("encoding", "end_to_end", "quantized_search")
_ONLY_WITH_DATA = {"end_to_end": [], "quantized_search": ["--datasets", "scifact"]}  # and their flags


@dataclass
class Arguments:
    """The benchmarks to run, and their folders."""

    data_dir: str = argument("data/beir", "Folder with the BEIR dataset scifact.")
    output_dir: str = argument("results/benchmarks", "Folder for the results and table.md.")
    only: list[str] = argument(list(ALL), "Names of the benchmarks to run.")


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmarks one after the other; stop at the first that fails."""
    (args,) = parse_arguments([Arguments], description=__doc__ or "", arguments=arguments)
    started = time.perf_counter()
    unknown = sorted(set(args.only) - set(ALL))
    if unknown:
        raise UserError(f"--only expects names of {', '.join(ALL)}, got {unknown[0]!r}: use one of these names")
    has_data = (Path(args.data_dir) / "scifact").is_dir()
    names = [name for name in args.only if has_data or name not in _ONLY_WITH_DATA]
    for name in names:
        flags = ["--data_dir", args.data_dir] if name in _WITH_DATA else []
        flags += _ONLY_WITH_DATA.get(name, [])
        command = [sys.executable, str(HERE / f"{name}.py"), "--output_dir", args.output_dir, *flags]
        subprocess.run(command, check=True)
    lines = table(Path(args.output_dir), names)
    (Path(args.output_dir) / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    say("\n" + "\n".join(lines))
    say(f"\n{(time.perf_counter() - started) / 60:.1f} minutes. Wrote {args.output_dir}/table.md")


def table(folder: Path, names: list[str]) -> list[str]:
    """Format the claims of finished benchmarks as a Markdown table."""
    lines = ["| benchmark | claim | figure | target |", "|---|---|--:|---|"]
    for name in names:
        content = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        for claim in content["claims"]:
            value = describe({**claim, "target": None}).removeprefix(f"{claim['claim']}: ")
            met = "" if claim["target"] is None else f"{claim['target']}, {'met' if claim['is_met'] else 'missed'}"
            lines.append(f"| {name}.py | {claim['claim']} | {value.strip()} | {met} |")
    return lines


if __name__ == "__main__":
    run_script(main)
