"""Shared code of the benchmarks: time contenders in turn, several times, and report medians and ratios.

A benchmark is a script in this folder. It builds its data, names its contenders and calls `compare`. If a run takes
minutes, the script times each contender once instead, and says so. Each script runs alone; `make benchmark` runs most
of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ragcun_hf.command_line import argument, say
from ragcun_hf.errors import UserError
from ragcun_hf.evaluation.environment import environment_facts
from ragcun_hf.evaluation.results import write_json


@dataclass
class BenchmarkArguments:
    """Flags of all benchmarks."""

    threads: int | None = argument(None, "Threads for torch. Default: all cores.")
    output_dir: str = argument("results/benchmarks", "Folder for <benchmark>.json.")


@dataclass(frozen=True)
class Comparison:
    """The seconds of each contender in each round, in the order of the rounds."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Return the median seconds of one contender."""
        return statistics.median(self.seconds[name])

    def ratio(self, slower: str, faster: str) -> float:
        """Return how many times as long `slower` takes: the median over rounds of the ratio within a round.

        Within a round, the two run within seconds of each other, so a slow phase of the machine affects both.
        """
        return statistics.median(
            slow / fast for slow, fast in zip(self.seconds[slower], self.seconds[faster], strict=True)
        )


def compare(contenders: Mapping[str, Callable[[], Any]], *, repeats: int, warm_up: bool = True) -> Comparison:
    """Time the functions in turn for `repeats` rounds; every second round reverses the order.

    With `warm_up`, each function runs once before the first round, untimed.
    """
    if repeats < 1:
        raise UserError(f"--repeats must be at least 1, got {repeats}: set it to e.g. 5")
    if warm_up:
        for run in contenders.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(repeats):
        names = list(contenders) if number % 2 == 0 else list(reversed(contenders))
        for name in names:
            started = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - started)
    return Comparison(seconds)


def set_threads(threads: int | None) -> int:
    """Set and return the number of torch's threads; the default is all usable cores."""
    import torch

    torch.set_num_threads(threads or environment_facts()["machine"]["cores"])
    return torch.get_num_threads()


def report(args: BenchmarkArguments, name: str, claims: list[dict[str, Any]], *, details: dict[str, Any]) -> Path:
    """Print the claims, write `<output_dir>/<name>.json`, and return its path.

    A claim has the keys `claim` (what is compared), `value`, `target` (or None), `unit` (`x` for a ratio) and, with a
    target, `is_met`. The details hold anything else, such as seconds per round, sizes and settings.
    """
    import torch

    content = {
        "benchmark": name,
        "claims": claims,
        "details": details,
        "threads": torch.get_num_threads(),
        "environment": environment_facts(),
    }
    path = Path(args.output_dir) / f"{name}.json"
    write_json(path, content)
    machine = content["environment"]["machine"]
    say(f"{name} on {machine['processor']}, {content['threads']} threads, torch {torch.__version__}")
    for claim in claims:
        say(f"  {describe(claim)}")
    say(f"Wrote {path}")
    return path


def describe(claim: dict[str, Any]) -> str:
    """Format a claim as one line: figure, target, and whether the target is met."""
    line = f"{claim['claim']}: {claim['value']:.4g} {claim['unit']}"
    if claim.get("target") is None:
        return line
    return f"{line} (target {claim['target']}: {'met' if claim['is_met'] else 'MISSED'})"


def at_least(claim: str, value: float, target: float, unit: str = "x") -> dict[str, Any]:
    """Make a claim whose figure should be at least the target."""
    return {"claim": claim, "value": value, "unit": unit, "target": f">= {target:g}", "is_met": value >= target}


def at_most(claim: str, value: float, target: float, unit: str = "x") -> dict[str, Any]:
    """Make a claim whose figure should be at most the target."""
    return {"claim": claim, "value": value, "unit": unit, "target": f"<= {target:g}", "is_met": value <= target}


def figure(claim: str, value: float, unit: str) -> dict[str, Any]:
    """Make a claim without a target."""
    return {"claim": claim, "value": value, "unit": unit, "target": None}
