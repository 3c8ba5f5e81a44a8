"""The command that lists and prunes the feature cache, on a cache that real encoders filled."""

import importlib
import os
import time
from pathlib import Path

import pytest

from ragcun_hf.errors import UserError
from ragcun_hf.features.feature_cache import list_cached_encoders, remove_abandoned_files
from ragcun_hf.features.feature_store import FeatureStore

TRAINING = Path(__file__).resolve().parents[2] / "training"


@pytest.fixture
def script(monkeypatch):
    """The script, imported as it is."""
    return importlib.import_module("ragcun_hf.cli.feature_cache")


@pytest.fixture
def cache(tiny_model, tmp_path):
    """A cache with two keys: three texts without a prompt, two with one, used ten days earlier."""
    store = FeatureStore(tiny_model, cache_folder=tmp_path, dtype="float32", show_progress=False)
    store.features(["sun", "moon", "star"])
    store.features(["fish", "bird"], prompt="query: ")
    _age(next(entry for entry in list_cached_encoders(tmp_path) if entry.num_texts == 2), days=10)
    return tmp_path


def _age(entry, *, days):
    then = time.time() - days * 86_400
    os.utime(entry.folder / "key.json", (then, then))


@pytest.fixture
def run(script, cache):
    """Call the script for the cache."""

    def call(*flags):
        script.main(["--feature_cache_dir", str(cache), *flags])

    return call


def test_the_list_shows_texts_size_and_settings(run, capsys):
    run()
    head, _, first, second, total = capsys.readouterr().out.splitlines()
    assert "last used" in head
    assert head.split()[-2:] == ["texts", "MiB"]
    assert first.split()[-2:] == ["3", "0.0"]
    assert second.split()[-2:] == ["2", "0.0"]
    assert "32 tokens, mean, float32, torch, prompt 'query: '" in second
    assert total.startswith("5 texts, 0.0 MiB in ")


def test_a_missing_cache_holds_nothing(script, tmp_path, capsys):
    script.main(["--feature_cache_dir", str(tmp_path / "missing")])
    assert capsys.readouterr().out.startswith("0 texts, 0.0 MiB")


def test_pruning_by_age_removes_features_not_used_since(run, cache, capsys):
    run("--prune_days", "5", "--dry_run")
    assert "Would remove" in capsys.readouterr().out
    assert len(list_cached_encoders(cache)) == 2
    run("--prune_days", "5")
    assert [entry.num_texts for entry in list_cached_encoders(cache)] == [3]


def test_using_features_protects_them_from_pruning_by_age(run, cache, tiny_model):
    FeatureStore(tiny_model, cache_folder=cache, dtype="float32", show_progress=False).features(
        ["fish"], prompt="query: "
    )
    run("--prune_days", "5")
    assert len(list_cached_encoders(cache)) == 2


def test_pruning_by_key_removes_that_key(run, cache):
    entry = next(entry for entry in list_cached_encoders(cache) if entry.num_texts == 3)
    run("--prune_keys", entry.folder.name[:8])
    assert [left.num_texts for left in list_cached_encoders(cache)] == [2]


def test_nothing_but_the_cache_is_removed(run, cache):
    (cache / "notes").mkdir()
    (cache / ("0" * 24)).mkdir()  # looks like a key, but describes nothing
    (cache / "file.txt").write_text("mine")
    run("--prune_days", "0")
    assert sorted(path.name for path in cache.iterdir()) == ["0" * 24, "file.txt", "notes"]


@pytest.mark.parametrize("flags", [["--prune_keys", "zz"], ["--prune_keys", ""], ["--prune_days", "-1"]])
def test_an_impossible_key_or_age_is_a_user_error(run, cache, flags):
    with pytest.raises(UserError):
        run(*flags)
    assert len(list_cached_encoders(cache)) == 2


def test_only_old_temporary_files_are_removed(cache):
    (folder, *_) = (entry.folder for entry in list_cached_encoders(cache))
    old, new = folder / ".a.tmp", folder / ".b.tmp"
    for path in (old, new):
        path.write_text("half")
    os.utime(old, (0, 0))
    remove_abandoned_files(cache)
    assert new.exists()
    assert not old.exists()


def test_pruning_cleans_up_even_if_no_key_is_old_enough(run, cache):
    (folder, *_) = (entry.folder for entry in list_cached_encoders(cache))
    old, removed = folder / ".a.tmp", cache / f".{folder.name}.1.removed"
    old.write_text("half")
    os.utime(old, (0, 0))
    removed.mkdir()
    run("--prune_days", "1000", "--dry_run")
    assert old.exists()
    run("--prune_days", "1000")
    assert not old.exists()
    assert not removed.exists()
    assert len(list_cached_encoders(cache)) == 2
