"""The feature cache under load: writers and prunings at once, and a writer that is killed."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import random
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from feature_store import one_layer_model
from load_trial import Trial, num_unlike

_TEXTS = 3_000
_TEXTS_PER_ROUND = 300  # random ones, so that writers share some of them
_PAUSE = 0.1  # seconds between prunings, on average


def cache_trial(args: Any, trial: Trial) -> None:
    """Let processes write and prune one cache, kill a writer in the middle, then read every text."""
    from ragcun_hf.features.feature_store import FeatureStore

    with tempfile.TemporaryDirectory() as name:
        folder, cache = Path(name), Path(name) / "cache"
        model = one_layer_model(48, max_length=16)
        model.save_pretrained(folder / "model")
        expected = FeatureStore(model, cache_folder=None, show_progress=False).features(_texts()).vectors
        np.save(folder / "expected.npy", expected)
        exit_codes, was_killed = _run_processes(folder, args)
        notes = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
        read, wrong, prunings = (sum(note[key] for note in notes) for key in ("read", "wrong", "prunings"))
        trial.note("prunings that removed features", prunings)
        trial.count("features read while others write and prune", wrong, of=read)
        trial.count("processes that failed", sum(map(bool, exit_codes)), of=len(exit_codes))
        trial.count("writers that ended before they could be killed", int(not was_killed), of=1)
        found = FeatureStore(model, cache_folder=cache, show_progress=False).features(_texts()).vectors
        trial.count("features in the end", num_unlike(found, expected), of=len(expected))
        whole, damaged = map(int, re.findall(r"(\d+) (?:whole|damaged)", _command(cache, "--check").replace(",", "")))
        trial.count("files that --check finds damaged", damaged, of=whole + damaged)
        _command(cache, "--prune_days", "30")  # removes what the killed writer left, and no feature
        names = [path.name for path in cache.rglob("*")]
        trial.count("temporary files left", sum(each.startswith(".") for each in names), of=len(names))


def _run_processes(folder: Path, args: Any) -> tuple[list[int | None], bool]:
    """Return the exit codes of the processes that were left alone, and whether one was killed while it wrote."""
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks
    writers = [context.Process(target=_write, args=(folder, number, args.rounds)) for number in range(args.writers)]
    pruners = [context.Process(target=_prune, args=(folder, number)) for number in range(args.pruners)]
    victim = context.Process(target=_write, args=(folder, args.writers, 1_000_000))
    for process in (*writers, victim, *pruners):
        process.start()
    started = folder / f"started-{args.writers}"
    while not started.exists() and victim.is_alive():
        time.sleep(0.05)
    time.sleep(2)
    was_killed = victim.is_alive()
    victim.kill()
    for process in writers:
        process.join()
    (folder / "done").touch()
    for process in (victim, *pruners):
        process.join()
    return [process.exitcode for process in (*writers, *pruners)], was_killed


def _write(folder: Path, number: int, rounds: int) -> None:
    """Ask for the features of random texts again and again, as a training would, and compare them."""
    from ragcun_hf.features.feature_store import FeatureStore
    from ragcun_hf.model.base_models import load_trained_model

    model, expected, texts = load_trained_model(str(folder / "model")), np.load(folder / "expected.npy"), _texts()
    generator, read, wrong = random.Random(number), 0, 0
    (folder / f"started-{number}").touch()
    for _ in range(rounds):
        rows = generator.sample(range(len(texts)), _TEXTS_PER_ROUND)
        store = FeatureStore(model, cache_folder=folder / "cache", show_progress=False)
        found = store.features([texts[row] for row in rows]).expanded()
        read, wrong = read + len(rows), wrong + num_unlike(found, expected[rows])
    _note(folder / f"writer-{number}.json", read=read, wrong=wrong, prunings=0)


def _prune(folder: Path, number: int) -> None:
    """Remove all features again and again with the command, until the writers are done."""
    generator, prunings = random.Random(number), 0
    while not (folder / "done").exists():
        prunings += "Freed" in _command(folder / "cache", "--prune_days", "0")
        time.sleep(generator.uniform(0, 2 * _PAUSE))
    _note(folder / f"pruner-{number}.json", read=0, wrong=0, prunings=prunings)


def _command(cache: Path, *flags: str) -> str:
    """Run `ragcun features` on a cache, and return what it prints."""
    from ragcun_hf.cli import feature_cache

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        feature_cache.main(["--feature_cache_dir", str(cache), *flags])
    return printed.getvalue()


def _texts() -> list[str]:
    return [f"w{row % 997} w{row // 997} w{7 * row % 997}" for row in range(_TEXTS)]


def _note(path: Path, **counts: int) -> None:
    path.write_text(json.dumps(counts), encoding="utf-8")
