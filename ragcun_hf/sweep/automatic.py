"""Choose settings for documents without labels, by how well pseudo-queries of held-out documents find them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from tqdm.auto import tqdm

from ..command_line import format_table, say
from ..data.pseudo_queries import PseudoQuery, PseudoQueryKind, PseudoQueryViews, draw_pseudo_queries
from ..errors import UserError
from ..model.arguments import ModelArguments
from ..objective.head_weights import blend_weights
from .heads import HeadBatch, HeadData, with_head
from .pseudo_validation import PseudoValidation
from .settings import make_trial

if TYPE_CHECKING:
    from ..features.feature_store import FeatureStore
    from ..model.modeling_isotropic_gaussian import IsotropicGaussianModel
    from ..objective.arguments import IsotropicGaussianTrainingArguments

# Above 0.5 the pseudo-queries still gain while real queries lose; see EXPERIMENTS.md.
BLENDS = (0.0, 0.25, 0.5)
LEAST_HELD_OUT = 100  # documents; with fewer, every gain looks like chance
REQUIRED_Z = 3.0  # gain in standard errors: 5 % false positives, Bonferroni-corrected for the candidates tried

_HELD_OUT_SHARE = 0.2
_VALIDATION_COUNTS: dict[PseudoQueryKind, int] = {"sentence": 1, "span": 1}
_BASE = {"whitening": 0.0, "projection_kind": "linear"}


@dataclass(frozen=True)
class Candidate:
    """Settings of a head, and passes over the pseudo-queries."""

    whitening: float
    projection_kind: str
    epochs: float
    projection_hidden_dim: int | None = None

    @property
    def model_settings(self) -> dict[str, Any]:
        """The fields of `ModelArguments`."""
        return {"projection_kind": self.projection_kind, "projection_hidden_dim": self.projection_hidden_dim}

    def as_setting(self) -> dict[str, Any]:
        """Return all fields by the names of arguments."""
        return {**self.model_settings, "whitening": self.whitening, "num_train_epochs": self.epochs}


CANDIDATES = (
    Candidate(0.0, "linear", 3.0),
    Candidate(0.2, "linear", 3.0),
    Candidate(0.3, "linear", 3.0),
    Candidate(0.3, "mlp", 3.0),
    Candidate(0.3, "mlp", 8.0, projection_hidden_dim=2048),
)
# Exact words do what whitening does, and more: on top of them it loses, but pseudo-queries always ask for it.
WITH_EXACT_WORDS = (
    Candidate(0.0, "linear", 3.0),
    Candidate(0.0, "mlp", 3.0),
    Candidate(0.0, "mlp", 8.0, projection_hidden_dim=2048),
)

CHOSEN_FIELDS = tuple(Candidate(0.0, "linear", 0.0).model_settings)  # of the model's configuration


@dataclass(frozen=True)
class CandidateScore:
    """A candidate at one blend, and how well it retrieves."""

    candidate: Candidate
    blend: float
    score: float  # NDCG@10 of pseudo-queries; all kinds have the same weight
    gain: float  # above the untrained start: the frozen base, with exact words if it has a lexical half
    standard_error: float  # of the gain, over pseudo-queries

    def as_row(self) -> dict[str, Any]:
        """Return everything as one flat mapping."""
        flat = asdict(self)
        return {**flat.pop("candidate"), **{name: round(value, 5) for name, value in flat.items()}}


@dataclass(frozen=True)
class ChosenSettings:
    """The settings that were chosen: fields of the model's configuration, whitening, epochs and blend."""

    model: Mapping[str, Any]
    whitening: float
    num_train_epochs: float
    blend: float


@dataclass(frozen=True)
class AutomaticData:
    """Documents, and the pseudo-queries that train heads and that choose among them."""

    documents: Sequence[str]
    rows: PseudoQueryViews  # of all documents, for the run itself
    trial_rows: PseudoQueryViews  # without the held-out documents
    held_out_queries: Sequence[PseudoQuery]
    facts: dict[str, Any]  # what the record says of the pseudo-queries

    @classmethod
    def draw(cls, documents: Sequence[str], counts: Mapping[PseudoQueryKind, int], *, seed: int) -> Self:
        """Draw `counts` pseudo-queries of each document, and other ones of held-out documents.

        A UserError says if there are too few documents.
        """
        queries = draw_pseudo_queries(documents, counts, seed=seed)
        num_held_out = max(round(_HELD_OUT_SHARE * len(documents)), min(LEAST_HELD_OUT * 3, len(documents) // 2))
        held_out = set(random.Random(seed).sample(range(len(documents)), num_held_out))
        drawn = draw_pseudo_queries(documents, _VALIDATION_COUNTS, seed=seed + 1)
        held_out_queries = [query for query in drawn if query.document in held_out and query.rest]
        num_documents = len({query.document for query in held_out_queries})
        if num_documents < LEAST_HELD_OUT:
            raise UserError(
                f"--automatic expects at least {LEAST_HELD_OUT} held-out documents of several sentences or words, got "
                f"{num_documents} of {len(documents)} documents: add documents, or choose settings yourself"
            )
        trial_rows = PseudoQueryViews(documents, [query for query in queries if query.document not in held_out])
        if len(trial_rows) < 2:
            raise UserError(
                f"--automatic expects pseudo-queries of {', '.join(counts)}, got {len(trial_rows)} from "
                f"{len(documents)} documents: add longer documents, or ones that share words"
            )
        facts = {"pseudo_queries": _counts(queries), "held_out_pseudo_queries": _counts(held_out_queries)}
        rows = PseudoQueryViews(documents, queries)
        return cls(documents, rows, trial_rows, held_out_queries, {"rows": len(queries), **facts})


def choose_settings(
    data: AutomaticData,
    base: IsotropicGaussianModel,
    training: IsotropicGaussianTrainingArguments,
    store: FeatureStore,
) -> tuple[ChosenSettings, dict[str, Any]]:
    """Try all candidates and choose; return what was chosen, and what the record says of the choice."""
    scores = try_candidates(data, base, training, store)
    chosen = choose_candidate(scores)
    start = "frozen base" if base.lexical is None else "frozen base with exact words"
    say(format_scores(scores, chosen))
    if chosen is scores[0]:
        say(f"No candidate beats the {start} by more than chance: the model will be the unchanged {start}.")
    else:
        say(
            f"Chosen (*): on pseudo-queries of held-out documents it gains {chosen.gain:+.4f} over the {start}. "
            "It is now trained on all documents."
        )
    candidate = chosen.candidate
    settings = ChosenSettings(candidate.model_settings, candidate.whitening, candidate.epochs, chosen.blend)
    return settings, {"chosen": chosen.as_row(), "tried": [each.as_row() for each in scores]}


def _counts(queries: Sequence[PseudoQuery]) -> dict[str, int]:
    return dict(sorted(Counter(query.kind for query in queries).items()))


def try_candidates(
    data: AutomaticData,
    base: IsotropicGaussianModel,
    training: IsotropicGaussianTrainingArguments,
    store: FeatureStore,
) -> list[CandidateScore]:
    """Train every candidate on pseudo-queries, and measure it at every blend on those of held-out documents.

    The first score is that of the untrained start, with gain 0. `base` is a model with the encoder of the store.
    """
    prompts = (base.config.query_prompt, base.config.document_prompt)
    validation = PseudoValidation(data.documents, data.held_out_queries, store, prompts)
    rows = HeadData.of_rows(base, data.trial_rows, store)
    shared = (training.seed, ModelArguments.of_config(base.config), training)
    candidates = CANDIDATES if base.lexical is None else WITH_EXACT_WORDS
    trials = [make_trial(each.as_setting(), *shared) for each in candidates]

    def score(candidate: Candidate, blend: float, scores: np.ndarray) -> CandidateScore:
        weights, differences = validation.weights, scores - base_scores
        gain = float(weights @ differences)
        error = float(np.sqrt(np.sum((weights * (differences - gain)) ** 2)))
        return CandidateScore(candidate, blend, float(weights @ scores), gain, error)

    # Candidates have to beat the start that no training follows, even if it is not among them.
    untrained = make_trial(_BASE, *shared)
    template = with_head(base, untrained.model)
    template.load_state_dict(rows.initial_weights(template, untrained), strict=False)
    base_scores = validation.scores(template.eval())
    found = [score(Candidate(0.0, "linear", 0.0), 0.0, base_scores)]
    measured_starts = {0.0}
    with tqdm(
        total=sum(rows.num_steps(each.training) for each in trials), desc="Trying candidates", unit="step"
    ) as bar:
        for candidate, trial in zip(candidates, trials, strict=True):
            template = with_head(base, trial.model)
            start = rows.initial_weights(template, trial)
            heads = HeadBatch(template, [start], [trial])
            for _ in heads.train(rows, total_steps=rows.num_steps(trial.training)):
                bar.update()
            for blend in BLENDS:
                if blend == 0.0 and candidate.whitening in measured_starts:
                    continue
                template.load_state_dict(blend_weights(start, heads.heads()[0], blend), strict=False)
                found.append(score(candidate, blend, validation.scores(template.eval())))
            measured_starts.add(candidate.whitening)
    return found


def choose_candidate(scores: Sequence[CandidateScore]) -> CandidateScore:
    """Return the candidate with the highest score, or the untrained start, the first, if the gain may be chance."""
    best = max(scores, key=lambda each: each.score)
    return best if best.gain > REQUIRED_Z * best.standard_error else scores[0]


def format_scores(scores: Sequence[CandidateScore], chosen: CandidateScore) -> str:
    """Format scores as a table for the terminal; a star marks the chosen one."""
    rows = [("", "head", "whitening", "epochs", "blend", "pseudo-NDCG@10", "gain", "std. error")]
    for each in scores:
        candidate, width = each.candidate, each.candidate.projection_hidden_dim
        head = candidate.projection_kind if width is None else f"{candidate.projection_kind} {width}"
        settings = (f"{candidate.whitening:.2f}", f"{candidate.epochs:.0f}", f"{each.blend:.2f}")
        figures = (f"{each.score:.4f}", f"{each.gain:+.4f}", f"{each.standard_error:.4f}")
        rows.append(("*" if each is chosen else "", head, *settings, *figures))
    return format_table(rows, num_names=2)
