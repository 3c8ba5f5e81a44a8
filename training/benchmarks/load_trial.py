"""Shared code of the trials under load: what a trial notes, and what Linux says about a process."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from comparison import figure

MARKS = (0.1, 0.5, 1.0)  # parts of a trial after which memory is measured


@dataclass
class Trial:
    """Collects what a trial measured, and what went wrong in it."""

    claims: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def note(self, what: str, value: float, unit: str = "") -> None:
        """Note a figure."""
        self.claims.append(figure(what, value, unit))

    def count(self, what: str, number: int, *, of: int) -> None:
        """Note how many of some cases went wrong."""
        self.claims.append(figure(f"{what}, of {of:,}", number, "wrong"))
        if number:
            self.wrong.append(f"{what}: {number:,} of {of:,}")

    def note_process(self, when: str, process: int | str = "self") -> None:
        """Note the memory, threads and open files of a process; nothing where there is no /proc."""
        folder = Path("/proc") / str(process)
        if not (folder / "status").is_file():
            return
        status = (folder / "status").read_text(encoding="utf-8")
        facts = dict(line.split(":", 1) for line in status.splitlines())
        self.note(f"resident memory {when}", int(facts["VmRSS"].split()[0]) / 2**10, "MiB")
        self.note(f"threads {when}", int(facts["Threads"]))
        self.note(f"open files {when}", len(list((folder / "fd").iterdir())))


def num_unlike(found: np.ndarray, expected: np.ndarray, *, tolerance: float = 0.02) -> int:
    """Return how many features, (N, H), differ by more than rounding to bfloat16, which depends on the batch."""
    distances = np.linalg.norm(found - expected, axis=1)
    return int((~(distances <= tolerance * np.linalg.norm(expected, axis=1))).sum())


def documents_of(data_dir: str) -> Any:
    """Return the documents of SciFact with columns title and text."""
    from ragcun_hf.data.documents import read_documents

    return read_documents(str(Path(data_dir) / "scifact"))
