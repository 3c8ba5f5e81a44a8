"""The facts with which a reader repeats a measurement: command, versions, machine and commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..commands import portable_command

_PACKAGES = (
    "ragcun_hf torch transformers sentence-transformers datasets evaluate beir pytrec-eval-terrier bm25s PyStemmer "
    "numpy"
)


def measurement_facts(script: str, arguments: Sequence[str] | None) -> dict[str, Any]:
    """Return when and by which command line something was `created`, and the facts of the environment."""
    return {"created": now(), "command": portable_command(script, arguments), **environment_facts()}


def now() -> str:
    """Return the time as a results file writes it, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def environment_facts() -> dict[str, Any]:
    """Return `versions` of installed packages, facts of the `machine`, and the `commit` of the checkout, or None."""
    import torch

    versions = {}
    for package in _PACKAGES.split():
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    machine = {"processor": _processor_name(), "cores": cores, "python": platform.python_version()}
    if torch.cuda.is_available():
        machine["accelerator"] = torch.cuda.get_device_name()
    return {"versions": versions, "machine": machine, "commit": checkout_commit(Path(__file__).resolve())}


def _processor_name() -> str:
    cpu_facts = Path("/proc/cpuinfo")  # platform.processor() is empty on most Linux systems
    text = cpu_facts.read_text(encoding="utf-8", errors="replace") if cpu_facts.is_file() else ""
    found = re.search(r"^model name[^:\n]*:(.*)", text, flags=re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def checkout_commit(file: Path) -> str | None:
    """Return the commit of a file's checkout, "-dirty" added if tracked files changed; None if it is not tracked."""
    # A package installed inside another project's checkout must not claim that project's commit.
    if not _git(file.parent, "ls-files", "--", file.name):
        return None
    commit = _git(file.parent, "rev-parse", "HEAD")
    changed = _git(file.parent, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if commit and changed else commit


def _git(folder: Path, *arguments: str) -> str | None:
    """Run git in a folder; None if git is missing or the folder is not a checkout."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
