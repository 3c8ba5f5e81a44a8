"""Trackers show the three terms, the signs of a collapse, and plots."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ragcun_hf.errors import UserError
from ragcun_hf.trainer.record import measured_energy

ROOT = Path(__file__).resolve().parents[2]
CURVES = {"train/loss", "train/loss/contrastive", "train/loss/isotropy", "train/loss/predictive"}
SIGNS = {"train/embedding_std", "train/effective_rank", "train/sigreg", "train/sigreg_floor"}
PLOTS = {"plots/loss", "plots/isotropy"}


def _flags(folder, encoder_folder, pairs, *flags):
    (folder / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    common = ["--base_model", str(encoder_folder), "--train_data", "pairs.json", "--use_predictor", "--epochs", "2"]
    common += ["--batch_size", "4", "--logging_steps", "1", "--output_dir", "out", "--encoder_dtype", "float32"]
    return [*common, "--feature_cache_dir", "features", "--use_cpu", *flags]


@pytest.mark.slow
def test_trackio_shows_terms_signs_of_collapse_and_plots(tmp_path, tiny_encoder_folder, tiny_pairs):
    pytest.importorskip("trackio")
    flags = ["--report_to", "trackio", "--project", "heads", "--run_name", "first", "--measure_energy"]
    flags = _flags(tmp_path, tiny_encoder_folder, tiny_pairs, *flags)
    # A process of its own, as trackio reads its folder when imported.
    done = subprocess.run(
        [sys.executable, str(ROOT / "training" / "train_contrastive.py"), *flags],
        cwd=tmp_path,
        env={**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # Read with trackio's command, as a user would without its page.
    command = [shutil.which("trackio", path=Path(sys.executable).parent), "list", "metrics", "--json"]
    listed = subprocess.run(
        [*command, "--project", "heads", "--run", "first"],
        env={**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")},
        capture_output=True,
        text=True,
    )
    assert listed.returncode == 0, listed.stderr
    assert set(json.loads(listed.stdout)["metrics"]) >= CURVES | SIGNS | PLOTS
    assert len(list((tmp_path / "trackio").rglob("*.png"))) == 2
    energy = json.loads((tmp_path / "out" / "training_record.json").read_text(encoding="utf-8"))["energy"]
    assert 0 < energy["kwh"] < 1
    assert energy["by"].startswith("codecarbon ")


@pytest.mark.slow
def test_tensorboard_shows_the_same(tmp_path, tiny_encoder_folder, tiny_pairs, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from ragcun_hf.cli import train_contrastive

    monkeypatch.chdir(tmp_path)
    train_contrastive.main(_flags(tmp_path, tiny_encoder_folder, tiny_pairs, "--report_to", "tensorboard"))
    (file,) = (tmp_path / "out").rglob("events.out.*")
    events = EventAccumulator(str(file.parent))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= CURVES | SIGNS
    assert set(events.Tags()["images"]) == PLOTS
    # The image has the size at which it was drawn.
    image = events.Images("plots/isotropy")[0]
    assert (image.width, image.height) == (1200, 468)


def test_energy_is_measured_only_if_it_is_wanted(monkeypatch):
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with measured_energy(is_wanted=False) as energy:
        pass
    assert energy == {}
    with pytest.raises(UserError, match="pip install codecarbon"), measured_energy(is_wanted=True):
        pass
