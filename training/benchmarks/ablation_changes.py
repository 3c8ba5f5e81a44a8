"""One change at a time around a reference head: what each term, start and width is worth on held-out documents."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ragcun_hf.errors import NotFiniteError
from ragcun_hf.model.arguments import ModelArguments
from ragcun_hf.sweep.head_batch import HeadBatch, PairBatches
from ragcun_hf.sweep.heads import start_weights, with_head
from ragcun_hf.sweep.run import SweepData, steps_of
from ragcun_hf.sweep.settings import make_trial
from ragcun_hf.trainer.objective import resolve_weights
from ragcun_hf.trainer.outcome import blended

if TYPE_CHECKING:
    from ragcun_hf.sweep.settings import Trial
    from ragcun_hf.trainer.arguments import IsotropicGaussianTrainingArguments

REFERENCE: dict[str, Any] = {
    "use_predictor": True,
    "whitening": 0.2,
    "lambda_contrastive": 1.0,
    "lambda_isotropy": 0.1,
    "lambda_predictive": 1.0,
}
PART_OF_THE_WAY = 0.4
"""The blend that is measured beside the trained head, as in the recipe adapt.yaml."""


def _terms(contrastive: float, isotropy: float, predictive: float) -> dict[str, Any]:
    names = ("lambda_contrastive", "lambda_isotropy", "lambda_predictive")
    return dict(zip(names, (contrastive, isotropy, predictive), strict=True))


CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "terms": {
        "all three (the reference)": {},
        "contrastive alone": _terms(1.0, 0.0, 0.0),
        "contrastive + isotropy": _terms(1.0, 0.1, 0.0),
        "contrastive + predictive": _terms(1.0, 0.0, 1.0),
        "isotropy + predictive": _terms(0.0, 0.1, 1.0),
        "isotropy alone": _terms(0.0, 0.1, 0.0),
        "predictive alone": _terms(0.0, 0.0, 1.0),
        "no predictor": {"use_predictor": False, "lambda_predictive": 0.0},
        "isotropy 1": _terms(1.0, 1.0, 1.0),
        "isotropy 10": _terms(1.0, 10.0, 1.0),
        "1 / 1.5 / 1.2, as published": _terms(1.0, 1.5, 1.2),
        "0.1 / 1 / 1, as the original ran": _terms(0.1, 1.0, 1.0),
    },
    "kinds": {
        "triplet margin, Euclidean": {"contrastive_kind": "triplet", "similarity_fn_name": "euclidean"},
        "info_nce, Euclidean": {"similarity_fn_name": "euclidean"},
        "info_nce, dot": {"similarity_fn_name": "dot"},
        "both directions": {"bidirectional": True},
        "covariance instead of sigreg": {"isotropy_kind": "covariance"},
        "covariance, weight 1": {"isotropy_kind": "covariance", "lambda_isotropy": 1.0},
        "predictive by cosine": {"predictive_kind": "cosine"},
        "temperature 0.02": {"temperature": 0.02},
        "temperature 0.1": {"temperature": 0.1},
    },
    "starts": {
        "random": {"projection_init": "random", "whitening": 0.0},
        "random, linear": {"projection_init": "random", "whitening": 0.0, "projection_kind": "linear"},
        "identity": {"whitening": 0.0},
        "identity, linear": {"whitening": 0.0, "projection_kind": "linear"},
        "whitening 0.1": {"whitening": 0.1},
        "whitening 0.3": {"whitening": 0.3},
        "whitening 0.5": {"whitening": 0.5},
        "whitening 0.2, linear": {"projection_kind": "linear"},
    },
    "widths": {
        "64": {"output_dim": 64},
        "128": {"output_dim": 128},
        "256": {"output_dim": 256},
        "512": {"output_dim": 512},
        "768": {"output_dim": 768},
        "2048 inside": {"projection_hidden_dim": 2048},
    },
}


@dataclass(frozen=True)
class Effect:
    """One change on one data set, over seeds.

    Args:
        group: Key of `CHANGES`.
        change: Key of the group.
        figures: `start` (the projection before training), `projection`, `predictor` and `blended` (the projection
            part of the way) -> NDCG@10, one per seed; what does not exist, or diverged, is left out.
    """

    group: str
    change: str
    figures: dict[str, list[float]]

    def mean(self, name: str) -> float | None:
        """Return the mean over seeds, or None where the figure does not exist."""
        return statistics.fmean(self.figures[name]) if self.figures.get(name) else None

    def spread(self, name: str) -> float:
        """Return the standard deviation over seeds; 0 with one seed."""
        return statistics.stdev(self.figures[name]) if len(self.figures.get(name, [])) > 1 else 0.0


def measure_changes(
    data: SweepData,
    changes: Mapping[str, Mapping[str, Mapping[str, Any]]],
    seeds: Sequence[int],
    model: ModelArguments,
    training: IsotropicGaussianTrainingArguments,
) -> Iterator[Effect]:
    """Train every change with every seed and measure it on the held-out documents.

    Args:
        data: Features and validation.
        changes: As `CHANGES`, or a part of it.
        seeds: Of start, order and directions.
        model: What all heads share, beside the reference.
        training: Likewise.

    Yields:
        Effect: One for each change, in order.
    """
    batches = PairBatches(data.pairs, data.num_training_rows, data.base.device)
    for group, of_group in changes.items():
        for change, setting in of_group.items():
            trials = [make_trial({**REFERENCE, **setting}, seed, model, training) for seed in seeds]
            # Hard negatives make batches ragged, and several heads then need the same rows.
            parts = [[trial] for trial in trials] if batches.has_negatives else [trials]
            measured = [figures for part in parts for figures in _measure(data, batches, part)]
            names = {name: None for figures in measured for name in figures}
            figures = {name: [each[name] for each in measured if name in each] for name in names}
            yield Effect(group, change, figures)


def _measure(data: SweepData, batches: PairBatches, trials: list[Trial]) -> Iterator[dict[str, float]]:
    """Train heads of one shape together; yield the figures of each."""
    template = with_head(data.base, trials[0].model)
    starts = [start_weights(template, trial, data) for trial in trials]
    heads = HeadBatch(template, starts, trials)
    for _ in heads.train(batches, total_steps=steps_of(batches, trials[0])):
        pass
    weights = resolve_weights(trials[0].training, use_predictor=trials[0].model.use_predictor)
    for start, head in zip(starts, heads.heads(), strict=True):
        figures = {"start": _figures(data, template, start)["projection"]}
        try:
            figures |= _figures(data, template, head)
            if template.config.projection_init == "identity":
                mixed = blended(start, head, PART_OF_THE_WAY)
                figures["blended"] = _figures(data, template, mixed)["projection"]
        except NotFiniteError:  # this seed diverged: the others still count
            pass
        if weights["predictive"] == 0:
            figures.pop("predictor", None)  # untrained
        yield figures


def _figures(data: SweepData, template: Any, head: Mapping[str, torch.Tensor]) -> dict[str, float]:
    template.load_state_dict(head, strict=False)
    found = data.validation(template.eval())
    names = {"projection": "ndcg@10", "predictor": "ndcg@10_predictor"}
    return {name: found[key] for name, key in names.items() if key in found}
