"""Time the start of a command (`--help`) and the import of the package.

    python training/benchmarks/start_up.py

Every figure comes from a fresh process.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from comparison import BenchmarkArguments, at_most, compare, figure, report

from ragcun_hf.command_line import argument, parse_arguments, run_script

TRAINING = Path(__file__).resolve().parents[1]


@dataclass
class Arguments(BenchmarkArguments):
    """Number of rounds."""

    repeats: int = argument(5, "Timed rounds.")


def main(arguments: list[str] | None = None) -> None:
    """Time fresh processes."""
    (args,) = parse_arguments([Arguments], description=__doc__ or "", arguments=arguments)
    contenders = {
        "eval_beir.py --help": process(str(TRAINING / "eval_beir.py"), "--help"),
        "train_contrastive.py --help": process(str(TRAINING / "train_contrastive.py"), "--help"),
        "import ragcun_hf": process("-c", "import ragcun_hf"),
        "import transformers, torch": process("-c", "import transformers, torch"),
        "python": process("-c", ""),
    }
    seconds = compare(contenders, repeats=args.repeats)
    claims = [
        at_most("seconds for eval_beir.py --help", seconds.median("eval_beir.py --help"), 2.0, "s"),
        figure("seconds for train_contrastive.py --help", seconds.median("train_contrastive.py --help"), "s"),
        figure(
            "import transformers, torch relative to import ragcun_hf",
            seconds.ratio("import transformers, torch", "import ragcun_hf"),
            "x",
        ),
    ]
    report(args, "start_up", claims, details={"seconds": seconds.seconds})


def process(*words: str) -> Callable[[], None]:
    """Make a function that runs Python in a new process and raises if the process fails."""

    def run() -> None:
        subprocess.run([sys.executable, *words], check=True, capture_output=True)

    return run


if __name__ == "__main__":
    run_script(main)
