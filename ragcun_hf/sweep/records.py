"""Results of a sweep on disk, one line per trained head, so that an interrupted sweep can continue."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..evaluation.results import read_json_object
from ..files import write_whole
from .settings import Setting, setting_name

_TRIALS_FILE, _SPEC_FILE = "trials.jsonl", "sweep.json"
_START_OVER = "start over with --overwrite"
_REPORT_FILES = ("table.md", "results.json", "best.yaml", "settings.png")


@dataclass(frozen=True)
class TrialRecord:
    """One trained head."""

    setting: Setting
    seed: int
    round_number: int  # from 0
    steps: int
    figures: dict[str, float]  # of the validation, e.g. ndcg@10; empty if training diverged
    seconds: float  # share of the time of its batch of heads

    @property
    def key(self) -> tuple[str, int, int]:
        """Identifies the record."""
        return setting_name(self.setting), self.seed, self.round_number


@dataclass(frozen=True)
class SettingSummary:
    """One setting over its seeds, in the last round that it took part in."""

    setting: Setting
    round_number: int
    steps: int
    means: dict[str, float]
    spreads: dict[str, float]  # standard deviation over seeds, 0 with one seed
    num_seeds: int


class SweepRecords:
    """The records of one sweep, in its output folder; a folder of a sweep with another `spec` is a UserError."""

    def __init__(self, folder: Path, spec: dict[str, Any]) -> None:
        self._path, spec_path = folder / _TRIALS_FILE, folder / _SPEC_FILE
        spec = json.loads(json.dumps(spec, default=str))
        if not spec_path.exists():
            write_whole(spec_path, json.dumps(spec, indent=1) + "\n")
        elif changed := _differing(spec, read_json_object(spec_path, "a sweep's settings", _START_OVER)):
            raise UserError(
                f"{folder} holds a sweep with another {' and '.join(changed)}: name another --output_dir, or start "
                "over with --overwrite"
            )
        self._records = {record.key: record for record in self._read()}

    def __contains__(self, key: tuple[str, int, int]) -> bool:
        return key in self._records

    def add(self, records: Sequence[TrialRecord]) -> None:
        """Append records; on return they are on disk."""
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(record)) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())
        self._records.update({record.key: record for record in records})

    def summaries(self, select: str, *, round_number: int | None = None) -> list[SettingSummary]:
        """Summarize each setting in one round, by default its last; sort by round and figure `select`, best first."""
        by_setting: dict[str, list[TrialRecord]] = {}
        for record in self._records.values():
            if round_number in (None, record.round_number):
                by_setting.setdefault(setting_name(record.setting), []).append(record)
        found = [_summary(records) for records in by_setting.values()]
        return sorted(
            found,
            key=lambda each: (select not in each.means, -each.round_number, -each.means.get(select, -math.inf)),
        )

    def total_seconds(self) -> float:
        """Return the training time of all heads."""
        return sum(record.seconds for record in self._records.values())

    def _read(self) -> list[TrialRecord]:
        if not self._path.exists():
            return []
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self._path}: expected readable records of a sweep, got {error}: {_START_OVER}"
            ) from error
        if lines and not lines[-1].endswith("\n"):
            # The process was killed while it wrote this line; the head is trained again.
            lines.pop()
            write_whole(self._path, "".join(lines))
        return [self._record(number, line) for number, line in enumerate(lines, start=1)]

    def _record(self, number: int, line: str) -> TrialRecord:
        try:
            record = TrialRecord(**json.loads(line))
            figures = record.figures.values()
            numbers = (record.seed, record.round_number, record.steps, record.seconds, *figures)
            if not isinstance(record.setting, dict) or not all(type(each) in (int, float) for each in numbers):
                raise ValueError("values of other types")
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{self._path}, line {number}: expected the record of a trained head, got another line ({error}): "
                f"{_START_OVER}"
            ) from error
        return record


def remove_sweep(folder: Path) -> None:
    """Remove the records and the report of an earlier sweep."""
    for name in (_TRIALS_FILE, _SPEC_FILE, *_REPORT_FILES):
        (folder / name).unlink(missing_ok=True)


def _differing(spec: dict[str, Any], stored: dict[str, Any]) -> list[str]:
    """Name the parts that differ, those of a mapping as `part.field`."""
    names = []
    for key in sorted({*spec, *stored}):
        new, old = spec.get(key), stored.get(key)
        if isinstance(new, dict) and isinstance(old, dict):
            names += [f"{key}.{name}" for name in _differing(new, old)]
        elif new != old:
            names.append(key)
    return names


def _summary(records: list[TrialRecord]) -> SettingSummary:
    last = max(record.round_number for record in records)
    of_last = [record for record in records if record.round_number == last]
    # A setting that diverges with one seed cannot be recommended for the others.
    names = set.intersection(*(set(record.figures) for record in of_last))
    values = {name: [record.figures[name] for record in of_last] for name in sorted(names)}
    return SettingSummary(
        setting=of_last[0].setting,
        round_number=last,
        steps=of_last[0].steps,
        means={name: statistics.fmean(each) for name, each in values.items()},
        spreads={name: statistics.stdev(each) if len(each) > 1 else 0.0 for name, each in values.items()},
        num_seeds=len(of_last),
    )
