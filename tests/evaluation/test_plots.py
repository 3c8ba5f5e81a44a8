"""Plots are written completely, for any sensible input, without pyplot's global state."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from ragcun_hf.evaluation import plots
from ragcun_hf.evaluation.plots import plot_comparison, plot_isotropy, plot_learning_curves


@pytest.fixture
def drawn(monkeypatch):
    """Collect the figures that are saved."""
    figures = []
    save = plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: (figures.append(figure), save(figure, path))[1])
    return figures


def _is_plot(path):
    picture = imread(path)
    assert picture.shape[1] == 1200
    assert picture[..., :3].std() > 0.01, "not an empty page"
    assert [other.name for other in path.parent.iterdir()] == [path.name], "no temporary file left"
    return True


def _history(num_steps):
    terms = {"loss": 2.0, "loss/contrastive": 1.5, "loss/isotropy": 0.1, "loss/predictive": 0.4, "epoch": 1.0}
    history = [{"step": step, **{key: value / step for key, value in terms.items()}} for step in range(1, num_steps)]
    return [*history, {"step": num_steps, "train_loss": 1.0, "train_runtime": 2.0}]


@pytest.mark.slow
def test_learning_curves_have_one_panel_per_logged_term(tmp_path, drawn):
    history = [*_history(100), {"step": 50, "eval_loss": 0.1, "eval_scifact_ndcg@10": 0.6}]
    plot_learning_curves(history, tmp_path / "curves.png")
    assert _is_plot(tmp_path / "curves.png")
    labels = [axes.get_ylabel().split(" (")[0] for axes in drawn[0].axes]
    assert labels == ["total loss", "contrastive loss", "isotropy loss", "predictive loss", "NDCG@10"]
    assert list(drawn[0].axes[1].lines[0].get_ydata()) == [1.5 / step for step in range(1, 100)]


def test_the_predictors_ndcg_is_drawn_beside_the_projections(tmp_path, drawn):
    figures = {"eval_ndcg@10": 0.6, "eval_ndcg@10_predictor": 0.7, "eval_scifact_ndcg@10_predictor": 0.5}
    plot_learning_curves([*_history(3), {"step": 2, **figures, "eval_ndcg@100": 0.9}], tmp_path / "curves.png")
    drawn_values = {line.get_label(): list(line.get_ydata()) for line in drawn[0].axes[-1].lines}
    assert drawn_values == {"held out": [0.6], "held out, predictor": [0.7], "scifact, predictor": [0.5]}


def test_terms_that_were_not_logged_have_no_panel(tmp_path, drawn):
    plot_learning_curves([{"step": 1, "loss": 1.0, "loss/contrastive": 1.0}], tmp_path / "curves.png")
    assert _is_plot(tmp_path / "curves.png")
    assert len(drawn[0].axes) == 2


def test_a_history_without_losses_is_refused(tmp_path):
    with pytest.raises(ValueError, match="log history"):
        plot_learning_curves([{"step": 1, "train_runtime": 1.0}], tmp_path / "curves.png")
    assert list(tmp_path.iterdir()) == []


def test_isotropy_of_arrays_and_tensors_of_other_widths_is_drawn(tmp_path, drawn):
    before = np.random.default_rng(0).standard_normal((200, 12)).astype(np.float32) * np.arange(1, 13)
    after = torch.randn(150, 6, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16, requires_grad=True)
    plot_isotropy(before, after, tmp_path / "isotropy.png")
    assert _is_plot(tmp_path / "isotropy.png")
    spectrum = drawn[0].axes[0].lines[0].get_ydata()
    assert len(spectrum) == 12
    assert spectrum.mean() == pytest.approx(1.0)


def test_collapsed_and_duplicate_vectors_are_drawn(tmp_path):
    plot_isotropy(np.zeros((20, 4)), np.ones((20, 4)), tmp_path / "isotropy.png")
    assert _is_plot(tmp_path / "isotropy.png")


def _entry(base, projection, compared=True):
    comparison = {"metric": "ndcg@10", "difference": projection - base, "low": -0.02, "high": 0.1}
    return {
        "num_queries": 7,
        "systems": {"projection": {"ndcg@10": projection}, "base": {"ndcg@10": base}},
        "comparisons": {"projection": comparison} if compared else {},
    }


def test_comparison_draws_every_bar_at_its_value_with_the_base_first(tmp_path, drawn):
    results = {"datasets": {"scifact": _entry(0.6, 0.65), "ünïcode": _entry(0.3, 0.25, compared=False)}}
    plot_comparison(results, tmp_path / "comparison.png")
    assert _is_plot(tmp_path / "comparison.png")
    bars = sorted((bar.get_x(), bar.get_height()) for bar in drawn[0].axes[0].patches)
    assert [height for _, height in bars] == [0.6, 0.65, 0.3, 0.25]


def test_comparison_without_data_sets_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one data set"):
        plot_comparison({"datasets": {}}, tmp_path / "comparison.png")


def test_an_interrupted_save_keeps_the_old_plot(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        plot_learning_curves(_history(3), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_plotting_needs_no_pyplot():
    code = "import sys, ragcun_hf.evaluation.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
