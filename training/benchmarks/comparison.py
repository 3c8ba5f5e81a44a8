"""What the benchmarks here share: run us and the peer in turn, several times, and report medians and ratios.

A benchmark is a script of this folder that builds its data, names its contenders and calls `compare` (or, where a run
takes minutes, times each once and says so); it can be run alone, and `make benchmark` runs all of them.
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
    """What all benchmarks have in common."""

    threads: int | None = argument(None, "Threads that torch may use. Default: all cores.")
    output_dir: str = argument("results/benchmarks", "Where <benchmark>.json goes.")


@dataclass(frozen=True)
class Comparison:
    """Seconds of each contender, round by round.

    Args:
        seconds: Contender -> seconds per round, in the order of the rounds.
    """

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """The median seconds of one contender."""
        return statistics.median(self.seconds[name])

    def ratio(self, slower: str, faster: str) -> float:
        """How many times longer `slower` takes: the median over rounds of the ratio within the round.

        Both of a round ran within seconds of each other, so a slow phase of the machine falls on both.
        """
        return statistics.median(
            slow / fast for slow, fast in zip(self.seconds[slower], self.seconds[faster], strict=True)
        )


def compare(contenders: Mapping[str, Callable[[], Any]], *, repeats: int, warm_up: bool = True) -> Comparison:
    """Time the contenders in turn; every second round goes backwards, so that no one always runs first.

    Args:
        contenders: Name -> function to time.
        repeats: Rounds, >= 1.
        warm_up: Run each once untimed before the first round.

    Returns:
        Seconds per contender and round.

    Raises:
        UserError: On fewer than one round.
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
    """Set and return the number of threads that torch uses; all usable cores by default."""
    import torch

    torch.set_num_threads(threads or environment_facts()["machine"]["cores"])
    return torch.get_num_threads()


def report(args: BenchmarkArguments, name: str, claims: list[dict[str, Any]], *, details: dict[str, Any]) -> Path:
    """Print what was found and write `<output_dir>/<name>.json`.

    Args:
        args: The flags; `output_dir` says where.
        name: The benchmark's name.
        claims: One per ratio or figure: `claim` (what is compared), `value`, `target` (or None), `unit`
            (`x` for a ratio), and `is_met` where there is a target.
        details: Everything else a reader may want: seconds per round, sizes, settings.

    Returns:
        The file.
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
    say(f"Written to {path}")
    return path


def describe(claim: dict[str, Any]) -> str:
    """Put one claim in one line: figure, target, and whether it is met."""
    line = f"{claim['claim']}: {claim['value']:.4g} {claim['unit']}"
    if claim.get("target") is None:
        return line
    return f"{line} (target {claim['target']}: {'met' if claim['is_met'] else 'MISSED'})"


def at_least(claim: str, value: float, target: float, unit: str = "x") -> dict[str, Any]:
    """State that a figure should not be below its target."""
    return {"claim": claim, "value": value, "unit": unit, "target": f">= {target:g}", "is_met": value >= target}


def at_most(claim: str, value: float, target: float, unit: str = "x") -> dict[str, Any]:
    """State that a figure should not be above its target."""
    return {"claim": claim, "value": value, "unit": unit, "target": f"<= {target:g}", "is_met": value <= target}


def figure(claim: str, value: float, unit: str) -> dict[str, Any]:
    """State a figure that has no target."""
    return {"claim": claim, "value": value, "unit": unit, "target": None}
