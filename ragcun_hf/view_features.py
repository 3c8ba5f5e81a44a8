"""From rows of text to what trains and validates heads: features of all texts, once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .data.documents import text_digest
from .evaluation.validation import RetrievalValidation
from .features.feature_pairs import FeaturePairs

if TYPE_CHECKING:
    from .features.feature_store import FeatureStore
    from .modeling_isotropic_gaussian import IsotropicGaussianModel


def prompts_of(model: IsotropicGaussianModel) -> dict[str, str]:
    """Return a model's prompts under the names that readers of texts take them by."""
    return {"query_prompt": model.config.query_prompt, "document_prompt": model.config.document_prompt}


def views_digest(views: Any) -> str:
    """Return a checksum of all texts of a view, in their order, as 32 hexadecimal digits."""
    columns = _columns(views)
    return text_digest(*(text_digest(*_flat(column)).hex() for column in columns)).hex()


def as_feature_pairs(views: Sequence[Any], store: FeatureStore, prompts: dict[str, str]) -> FeaturePairs:
    """Replace the texts of all views, one after the other, by features in one pair of tables.

    Args:
        views: Each with rows `{"query", "positive", "negative"}` of text.
        store: Gives the features.
        prompts: As from `prompts_of`.

    Returns:
        All rows of the first view, then all of the next.
    """
    columns = [_columns(view) for view in views]
    queries, positives, negatives = (
        [text for part in column for text in part] for column in zip(*columns, strict=True)
    )
    return FeaturePairs(queries, positives, negatives, store=store, **prompts)


def retrieval_validation(views: Any, store: FeatureStore | None) -> RetrievalValidation:
    """Make held-out rows the measure of a model; their negatives are distractors.

    Args:
        views: Rows `{"query", "positive", "negative"}` of text.
        store: Gives the features; None encodes at every call.

    Returns:
        A function of a model.
    """
    queries, documents, negatives = _columns(views)
    distractors = [text for texts in negatives for text in texts]
    return RetrievalValidation(queries, documents, distractors=distractors, store=store)


def _flat(column: list[Any]) -> Iterator[str]:
    for each in column:
        yield from [each] if isinstance(each, str) else (str(len(each)), *each)


def _columns(views: Any) -> tuple[list[str], list[str], list[list[str]]]:
    rows = [views[index] for index in range(len(views))]
    return (
        [row["query"] for row in rows],
        [row["positive"] for row in rows],
        [list(row.get("negative") or []) for row in rows],
    )
