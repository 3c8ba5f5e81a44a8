"""Change one setting of a reference head at a time, and measure the effect on held-out documents."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ragcun_hf.errors import NotFiniteError
from ragcun_hf.evaluation.results import MAIN_METRIC
from ragcun_hf.model.arguments import ModelArguments
from ragcun_hf.objective.head_weights import blend_weights
from ragcun_hf.objective.terms import resolve_weights
from ragcun_hf.sweep.heads import HeadBatch, HeadData, with_head
from ragcun_hf.sweep.settings import make_trial

if TYPE_CHECKING:
    from ragcun_hf.objective.arguments import IsotropicGaussianTrainingArguments
    from ragcun_hf.sweep.settings import Trial

REFERENCE: dict[str, Any] = {
    "use_predictor": True,
    "whitening": 0.2,
    "lambda_contrastive": 1.0,
    "lambda_isotropy": 0.1,
    "lambda_predictive": 1.0,
}
PART_OF_THE_WAY = 0.4
"""The blend that is measured too, that of the recipe adapt.yaml."""


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
WORDS: dict[str, dict[str, Any]] = {
    "exact words": {},
    "exact words, half the weight": {"times": 0.5},
    "exact words, twice the weight": {"times": 2.0},
    "exact words, 128 directions": {"dim": 128},
    "exact words, 768 directions": {"dim": 768},
}
"""Lexical halves of the encoder: their width, and their share of the similarity in units of the one that is chosen."""


@dataclass(frozen=True)
class Effect:
    """Effect of one change on one data set, over seeds.

    Args:
        group: Key of `CHANGES`.
        change: Key of the group.
        figures: `start` (the projection before training), `projection`, `predictor` and `blended` (the projection at
            `PART_OF_THE_WAY`) -> NDCG@10, one per seed. Figures that do not exist or diverged are left out.
    """

    group: str
    change: str
    figures: dict[str, list[float]]

    def mean(self, name: str) -> float | None:
        """Return the mean over seeds, or None if the figure does not exist."""
        return statistics.fmean(self.figures[name]) if self.figures.get(name) else None

    def spread(self, name: str) -> float:
        """Return the standard deviation over seeds; 0 with one seed."""
        return statistics.stdev(self.figures[name]) if len(self.figures.get(name, [])) > 1 else 0.0


def measure_changes(
    data: HeadData,
    changes: Mapping[str, Mapping[str, Mapping[str, Any]]],
    seeds: Sequence[int],
    model: ModelArguments,
    training: IsotropicGaussianTrainingArguments,
) -> Iterator[Effect]:
    """Train every change with every seed and measure it on the held-out documents.

    Args:
        data: Training pairs, with their validation.
        changes: As `CHANGES`, or a part of it.
        seeds: Of initialization, order of rows and directions.
        model: Shared by all heads, beside the reference.
        training: Shared by all heads, beside the reference.

    Yields:
        Effect: One for each change, in order.
    """
    for group, of_group in changes.items():
        for change, setting in of_group.items():
            trials = [make_trial({**REFERENCE, **setting}, seed, model, training) for seed in seeds]
            # With hard negatives, batches differ in size unless all heads see the same rows.
            parts = [[trial] for trial in trials] if data.has_negatives else [trials]
            measured = [figures for part in parts for figures in _measure(data, part)]
            names = {name: None for figures in measured for name in figures}
            figures = {name: [each[name] for each in measured if name in each] for name in names}
            yield Effect(group, change, figures)


def _measure(data: HeadData, trials: list[Trial]) -> Iterator[dict[str, float]]:
    """Train heads of one shape together, and yield the figures of each."""
    template = with_head(data.base, trials[0].model)
    starts = [data.initial_weights(template, trial) for trial in trials]
    heads = HeadBatch(template, starts, trials)
    for _ in heads.train(data, total_steps=data.num_steps(trials[0].training)):
        pass
    weights = resolve_weights(trials[0].training, use_predictor=trials[0].model.use_predictor)
    for start, head in zip(starts, heads.heads(), strict=True):
        figures = {"start": _figures(data, template, start)["projection"]}
        try:
            figures |= _figures(data, template, head)
            if template.config.projection_init == "identity":
                mixed = blend_weights(start, head, PART_OF_THE_WAY)
                figures["blended"] = _figures(data, template, mixed)["projection"]
        except NotFiniteError:  # this seed diverged; the others still count
            pass
        if weights["predictive"] == 0:
            figures.pop("predictor", None)  # untrained
        yield figures


def _figures(data: HeadData, template: Any, head: Mapping[str, torch.Tensor]) -> dict[str, float]:
    template.load_state_dict(head, strict=False)
    found = {} if data.validation is None else data.validation(template.eval())
    names = {"projection": MAIN_METRIC, "predictor": f"{MAIN_METRIC}_predictor"}
    return {name: found[key] for name, key in names.items() if key in found}
