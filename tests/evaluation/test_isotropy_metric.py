"""Published measures of isotropy: worked by hand, by slow versions, and as an `evaluate` metric of its own."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ragcun_hf
from ragcun_hf.evaluation.metrics.isotropy.measures import (
    alignment,
    isotropy_report,
    partition_score,
    rank_me,
    sigreg,
    uniformity,
)
from ragcun_hf.objective.isotropy import SIGREG_NULL_FLOOR, random_directions, sigreg_statistic

METRIC_FOLDER = Path(ragcun_hf.__file__).parent / "evaluation" / "metrics" / "isotropy"
VECTORS = np.random.default_rng(0).normal(size=(200, 6)) * [3, 1, 1, 1, 0.5, 0.1] + 0.4
CROSS = [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]


def test_rank_me_of_a_case_worked_by_hand():
    # Singular values 3 and 1: shares 3/4 and 1/4.
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert rank_me([[3.0, 0.0], [0.0, 1.0]]) == pytest.approx(expected)
    assert rank_me([[1.0, 2.0], [2.0, 4.0], [-3.0, -6.0]]) == pytest.approx(1.0)
    assert rank_me(np.ones((5, 3))) == pytest.approx(1.0)  # an offset is a direction


def test_partition_score_of_a_case_worked_by_hand():
    # Directions +-(1, 0), +-(0, 1); Z is 2 cosh(2) + 2 along the first axis, and 2 cosh(1) + 2 along the second.
    points = [[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]]
    assert partition_score(points) == pytest.approx((math.cosh(1) + 1) / (math.cosh(2) + 1))
    assert partition_score(CROSS) == pytest.approx(1.0)
    # One row on an axis: exp(-1) against the opposite direction's exp(1).
    assert partition_score([[1.0, 0.0]]) == pytest.approx(math.exp(-2))
    assert partition_score(100 * VECTORS) < 1e-20  # no overflow


def test_alignment_and_uniformity_of_cases_worked_by_hand():
    assert alignment(CROSS, CROSS) == 0
    assert alignment([[1.0, 0.0], [0.0, 5.0]], [[-2.0, 0.0], [0.0, 1.0]]) == pytest.approx(2.0)  # 4 and 0
    # Six pairs: two opposite (distance^2 4), four at a right angle (2).
    assert uniformity(CROSS) == pytest.approx(math.log((2 * math.exp(-8) + 4 * math.exp(-4)) / 6))
    assert uniformity(np.ones((4, 3))) == pytest.approx(0.0)


def test_uniformity_equals_the_slow_version_over_several_blocks(monkeypatch):
    unit = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)
    pairs = itertools.combinations(unit, 2)
    expected = math.log(np.mean([math.exp(-2 * float(np.sum((x - y) ** 2))) for x, y in pairs]))
    monkeypatch.setattr("ragcun_hf.evaluation.metrics.isotropy.measures.PAIR_BLOCK_ROWS", 33)
    assert uniformity(VECTORS) == pytest.approx(expected, rel=1e-9)


def test_sigreg_is_the_statistic_that_training_minimises():
    directions = random_directions(6, 256, seed=5)
    expected = sigreg_statistic(torch.from_numpy(VECTORS).float(), directions).item()
    assert sigreg(VECTORS, seed=5) == pytest.approx(expected, rel=1e-4)
    gaussian = np.random.default_rng(1).normal(size=(5_000, 8))
    assert sigreg(gaussian) == pytest.approx(SIGREG_NULL_FLOOR, abs=0.3)
    assert sigreg(np.zeros((5_000, 8))) > 1_900


@pytest.mark.parametrize("measure", [rank_me, partition_score, uniformity, sigreg])
@pytest.mark.parametrize(
    ("vectors", "message"), [([1.0, 2.0], "one row per vector"), ([[1.0, math.nan], [1.0, 1.0]], "finite")]
)
def test_anything_but_a_matrix_of_finite_numbers_is_refused(measure, vectors, message):
    with pytest.raises(ValueError, match=message):
        measure(vectors)


def test_vectors_without_pairs_or_without_a_direction_are_refused():
    with pytest.raises(ValueError, match="at least two"):
        uniformity([[1.0, 2.0]])
    with pytest.raises(ValueError, match="zero row"):
        uniformity([[1.0, 2.0], [0.0, 0.0]])
    with pytest.raises(ValueError, match="one partner"):
        alignment(CROSS, CROSS[:3])


_LOAD_METRIC = """
import json, sys
sys.modules["ragcun_hf"] = None  # the copy that evaluate makes must stand alone
import evaluate
metric = evaluate.load(sys.argv[1])
predictions, partners = json.load(sys.stdin)
both = metric.compute(predictions=predictions, partners=partners)
for start in range(0, len(predictions), 64):
    metric.add_batch(predictions=predictions[start:start + 64])
print(json.dumps([both, metric.compute()]))
"""


@pytest.mark.slow
def test_evaluate_loads_the_metric_offline_and_gives_the_same_figures(tmp_path):
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "m")}
    partners = np.roll(VECTORS, 1, axis=0)
    finished = subprocess.run(
        [sys.executable, "-c", _LOAD_METRIC, str(METRIC_FOLDER)],
        input=json.dumps([VECTORS.tolist(), partners.tolist()]),
        env={**os.environ, **offline},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    both, alone = json.loads(finished.stdout.splitlines()[-1])
    single = VECTORS.astype(np.float32)
    expected = {
        **isotropy_report(single),
        "rank_me": rank_me(single),
        "partition_score": partition_score(single),
        "uniformity": uniformity(single),
        "sigreg_statistic": sigreg(single),
    }
    assert alone == pytest.approx(expected)
    assert both == pytest.approx({**expected, "alignment": alignment(single, partners.astype(np.float32))})
