"""Which head is worth having for a corpus without labels: candidates, and the rule that picks one or none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from ..trainer.outcome import blended
from .head_batch import HeadBatch, PairBatches
from .heads import start_weights, with_head
from .run import steps_of
from .settings import make_trial

if TYPE_CHECKING:
    from ..model.arguments import ModelArguments
    from ..trainer.arguments import IsotropicGaussianTrainingArguments
    from .heads import TrainingPairs
    from .pseudo_validation import PseudoValidation

# Further than half way the pseudo-queries still gain while real queries lose; see EXPERIMENTS.md.
BLENDS = (0.0, 0.25, 0.5)
# Standard errors that the best has to be above the base: 5 % by chance, Bonferroni over the outcomes that are tried.
_LEAST_Z = 3.0


_BASE = {"whitening": 0.0, "projection_kind": "linear"}


@dataclass(frozen=True)
class Candidate:
    """One way to make a head.

    Args:
        whitening: Strength of the start's partial whitening.
        projection_kind: `linear` or `mlp`.
        epochs: Passes over the pseudo-queries.
        projection_hidden_dim: Width inside an mlp; None for the default.
    """

    whitening: float
    projection_kind: str
    epochs: float
    projection_hidden_dim: int | None = None

    @property
    def head(self) -> str:
        """Kind and width, as a table shows them."""
        width = self.projection_hidden_dim
        return self.projection_kind if width is None else f"{self.projection_kind} {width}"


CANDIDATES = (
    Candidate(0.0, "linear", 3.0),
    Candidate(0.2, "linear", 3.0),
    Candidate(0.3, "linear", 3.0),
    Candidate(0.3, "mlp", 3.0),
    Candidate(0.3, "mlp", 8.0, projection_hidden_dim=2048),
)


@dataclass(frozen=True)
class Outcome:
    """One candidate, blended.

    Args:
        candidate: How the head was made.
        blend: How far it lies from its start to the trained weights.
        score: NDCG@10 of pseudo-queries, every kind counting alike.
        gain: Above the frozen base.
        standard_error: Of the gain, over pseudo-queries.
    """

    candidate: Candidate
    blend: float
    score: float
    gain: float
    standard_error: float

    def as_row(self) -> dict[str, Any]:
        """Return everything as one flat mapping."""
        flat = asdict(self)
        return {**flat.pop("candidate"), **{name: round(value, 5) for name, value in flat.items()}}


def try_candidates(
    data: TrainingPairs,
    validation: PseudoValidation,
    model_arguments: ModelArguments,
    training_arguments: IsotropicGaussianTrainingArguments,
    candidates: Sequence[Candidate] = CANDIDATES,
) -> list[Outcome]:
    """Train every candidate on the pseudo-queries of the other documents, and measure it at every blend.

    Args:
        data: Features of the pseudo-queries to train on.
        validation: Measures a head.
        model_arguments: What all heads share.
        training_arguments: Likewise.
        candidates: What to try.

    Returns:
        The outcomes; the first is the frozen base, with gain 0.
    """
    batches = PairBatches(data.pairs, data.num_training_rows, data.base.device)
    trials = [
        make_trial(_setting(each), training_arguments.seed, model_arguments, training_arguments) for each in candidates
    ]
    # Whatever the candidates are, the frozen base is what they have to beat.
    base = make_trial(_BASE, training_arguments.seed, model_arguments, training_arguments)
    base_scores = validation.scores(with_head(data.base, base.model))
    outcomes = [_outcome(Candidate(0.0, "linear", 0.0), 0.0, base_scores, base_scores, validation)]
    starts_measured = {0.0}
    with tqdm(total=sum(steps_of(batches, trial) for trial in trials), desc="Trying candidates", unit="step") as bar:
        for candidate, trial in zip(candidates, trials, strict=True):
            template = with_head(data.base, trial.model)
            start = start_weights(template, trial, data)
            heads = HeadBatch(template, [start], [trial])
            for _ in heads.train(batches, total_steps=steps_of(batches, trial)):
                bar.update()
            for blend in BLENDS:
                if blend == 0.0 and candidate.whitening in starts_measured:
                    continue
                template.load_state_dict(blended(start, heads.heads()[0], blend), strict=False)
                scores = validation.scores(template.eval())
                outcomes.append(_outcome(candidate, blend, scores, base_scores, validation))
            starts_measured.add(candidate.whitening)
    return outcomes


def _setting(candidate: Candidate) -> dict[str, Any]:
    return {
        "whitening": candidate.whitening,
        "projection_kind": candidate.projection_kind,
        "projection_hidden_dim": candidate.projection_hidden_dim,
        "num_train_epochs": candidate.epochs,
    }


def _outcome(
    candidate: Candidate, blend: float, scores: np.ndarray, base_scores: np.ndarray, validation: PseudoValidation
) -> Outcome:
    weights = validation.weights
    differences = scores - base_scores
    gain = float(weights @ differences)
    error = float(np.sqrt(np.sum((weights * (differences - gain)) ** 2)))
    return Outcome(candidate, blend, float(weights @ scores), gain, error)


def choose(outcomes: Sequence[Outcome]) -> Outcome:
    """Pick the outcome with the highest score, or the frozen base where the gain may be chance.

    Args:
        outcomes: As from `try_candidates`.

    Returns:
        One of them.
    """
    best = max(outcomes, key=lambda each: each.score)
    return best if best.gain > _LEAST_Z * best.standard_error else outcomes[0]


def format_outcomes(outcomes: Sequence[Outcome], chosen: Outcome) -> str:
    """Lay outcomes out as a table; the chosen one has a star."""
    return "\n".join(_lines(outcomes, chosen))


def _lines(outcomes: Sequence[Outcome], chosen: Outcome) -> Iterator[str]:
    yield "  whitening  head      epochs  blend  pseudo-NDCG@10     gain  std. error"
    for each in outcomes:
        name = each.candidate
        figures = f"{each.score:>14.4f}  {each.gain:>+7.4f}  {each.standard_error:>10.4f}"
        mark = "*" if each is chosen else " "
        head = f"{name.whitening:>9.2f}  {name.head:8}  {name.epochs:>6.0f}  {each.blend:>5.2f}"
        yield f"{mark} {head}  {figures}"
