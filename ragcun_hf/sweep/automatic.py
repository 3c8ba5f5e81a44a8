"""From documents to what a training run needs: pseudo-queries, and settings chosen by those of held-out documents."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..command_line import say
from ..data.held_out import read_texts
from ..data.pseudo_queries import PseudoQuery, PseudoQueryKind, PseudoQueryViews, draw_pseudo_queries
from ..data.splitting import splittable
from ..errors import UserError
from ..files import source_name
from ..trainer.inputs import as_feature_pairs, prompts_of
from .candidates import Outcome, choose, format_outcomes, try_candidates
from .heads import TrainingPairs
from .pseudo_validation import PseudoValidation
from .settings import trainer_only_flags

if TYPE_CHECKING:
    from ..trainer.arguments import ParsedArguments

_HELD_OUT_SHARE = 0.2
_LEAST_HELD_OUT = 100  # documents; fewer make every gain look like chance
_VALIDATION_COUNTS: dict[PseudoQueryKind, int] = {"sentence": 1, "span": 1}


def automatic_views(
    parsed: ParsedArguments, documents: Sequence[str], counts: Mapping[PseudoQueryKind, int]
) -> tuple[PseudoQueryViews, dict[str, Any]]:
    """Draw pseudo-queries and choose how to train on them; the choice is written into the arguments.

    Args:
        parsed: All arguments; whitening, kind of projection, epochs and blend are set to what was chosen.
        documents: The corpus, distinct texts.
        counts: Kind of pseudo-query -> how many per document are trained on.

    Returns:
        The pseudo-queries of all documents with their documents, and what the record says of the choice.

    Raises:
        UserError: If a flag contradicts, or there are too few documents to choose by.
    """
    check_automatic(parsed)
    seed = parsed.training.seed
    queries = draw_pseudo_queries(documents, counts, seed=seed)
    held_out = _held_out_documents(documents, seed)
    asking = _asking(documents, held_out, seed + 1)
    training = PseudoQueryViews(documents, [query for query in queries if query.document not in held_out])
    if len(training) < 2:
        raise UserError(
            f"--automatic expects pseudo-queries of {', '.join(counts)}, got {len(training)} from {len(documents)} "
            "documents: add longer documents, or ones that share words"
        )
    outcomes = _outcomes(parsed, documents, training, asking)
    chosen = choose(outcomes)
    say(f"{format_outcomes(outcomes, chosen)}\n{_verdict(chosen, outcomes[0])}")
    _apply(parsed, chosen)
    facts = {
        "pseudo_queries": _counts(queries),
        "held_out_pseudo_queries": _counts(asking),
        "chosen": chosen.as_row(),
        "tried": [each.as_row() for each in outcomes],
    }
    return PseudoQueryViews(documents, queries), facts


def _asking(documents: Sequence[str], held_out: set[int], seed: int) -> list[PseudoQuery]:
    """Draw the pseudo-queries that choose."""
    drawn = draw_pseudo_queries(documents, _VALIDATION_COUNTS, seed=seed)
    asking = [query for query in drawn if query.document in held_out and query.rest]
    num_documents = len({query.document for query in asking})
    if num_documents < _LEAST_HELD_OUT:
        raise UserError(
            f"--automatic expects at least {_LEAST_HELD_OUT} held-out documents of several sentences or words, got "
            f"{num_documents} of {len(documents)} documents: add documents, or choose settings yourself"
        )
    return asking


def _outcomes(
    parsed: ParsedArguments, documents: Sequence[str], training: PseudoQueryViews, asking: Sequence[PseudoQuery]
) -> list[Outcome]:
    """Encode what is needed, train the candidates and measure them."""
    base = parsed.model.build()
    base.to(parsed.training.device)  # type: ignore[arg-type]  # transformers wraps Module.to without its types
    store, prompts = parsed.features.store(base), prompts_of(base)
    validation = PseudoValidation(documents, asking, store, (prompts["query_prompt"], prompts["document_prompt"]))
    pairs = TrainingPairs(base, as_feature_pairs([training], store, prompts), len(training))
    return try_candidates(pairs, validation, parsed.model, parsed.training)


def automatic_document_views(
    parsed: ParsedArguments, counts: Mapping[PseudoQueryKind, int]
) -> tuple[PseudoQueryViews, None, dict[str, Any]]:
    """Read `--documents` and do as `automatic_views`, for the two self-supervised scripts.

    Args:
        parsed: All arguments.
        counts: As for `automatic_views`.

    Returns:
        Training views, no validation views, and what the record says.
    """
    data = parsed.data
    names = ("split", "text_column", "title_column", "limit")
    texts, read = read_texts(data.documents, usable=splittable, **{name: getattr(data, name) for name in names})
    views, facts = automatic_views(parsed, texts, counts)
    return views, None, {"train": [source_name(data.documents)], **read, "rows": len(views), **facts}


def check_automatic(parsed: ParsedArguments) -> None:
    """Raise UserError where a flag leaves nothing to choose, or contradicts."""
    model, validation = parsed.model, parsed.validation
    if not model.freeze_base or not parsed.features.feature_cache or parsed.training.world_size != 1:
        raise UserError(
            "--automatic trains heads on cached features of a frozen encoder in one process: leave --no_freeze_base, "
            "--no_feature_cache and accelerate launch out"
        )
    if validation.val_data or validation.val_fraction:
        raise UserError("--automatic holds documents out itself: leave --val_data and --val_fraction out")
    if model.projection_init != "identity" or model.use_predictor or model.whitening or parsed.run.blend != 1.0:
        raise UserError(
            "--automatic chooses start and blend of a projection itself: leave --projection_init, --use_predictor, "
            "--whitening and --blend out"
        )
    training = parsed.training
    has_length = training.num_train_epochs != type(training).num_train_epochs or training.max_steps > 0
    has_shape = model.projection_kind != type(model).projection_kind or model.projection_hidden_dim is not None
    if has_length or has_shape:
        raise UserError(
            "--automatic chooses kind and width of the projection and length of training: leave --projection_kind, "
            "--projection_hidden_dim, --epochs and --max_steps out"
        )
    if refused := trainer_only_flags(training):
        raise UserError(f"--automatic cannot do what --{refused[0]} asks for: leave the flag out")


def _held_out_documents(documents: Sequence[str], seed: int) -> set[int]:
    count = max(round(_HELD_OUT_SHARE * len(documents)), min(_LEAST_HELD_OUT * 3, len(documents) // 2))
    return set(random.Random(seed).sample(range(len(documents)), count))


def _apply(parsed: ParsedArguments, chosen: Outcome) -> None:
    candidate = chosen.candidate
    names = ("whitening", "projection_kind", "projection_hidden_dim")
    parsed.model = replace(parsed.model, **{name: getattr(candidate, name) for name in names})
    parsed.run.blend = chosen.blend
    if chosen.blend:
        parsed.training.num_train_epochs = candidate.epochs


def _verdict(chosen: Outcome, base: Outcome) -> str:
    if chosen is base:
        return "No candidate beats the frozen base by more than chance: the model will be the base, unharmed."
    return (
        f"Chosen (*): pseudo-queries of held-out documents gain {chosen.gain:+.4f} over the frozen base. It is now "
        "made from all documents."
    )


def _counts(queries: Sequence[PseudoQuery]) -> dict[str, int]:
    kinds = sorted({query.kind for query in queries})
    return {kind: sum(query.kind == kind for query in queries) for kind in kinds}
