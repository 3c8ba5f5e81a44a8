"""What the Trainer reads: both sets, their collator, and what is known of the training rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Subset

from ..data.documents import text_digest
from ..evaluation.validation import RetrievalValidation
from ..features.feature_store import FeatureStore
from .collators import FeaturePairCollator, TextPairCollator, text_ids
from .feature_pairs import FeaturePairs
from .known_pairs import PairIds

if TYPE_CHECKING:
    from ..model.modeling_isotropic_gaussian import IsotropicGaussianModel

_SAMPLE_ROWS = 4096  # rows that decide the start of a narrower or whitened projection, without cached features


@dataclass(frozen=True)
class TrainerInputs:
    """Both sets as the Trainer reads them, and what is known of them.

    Args:
        train_rows: To train on.
        validation_rows: Held out, or None.
        collator: Makes batches of rows.
        sample: Returns some texts' features, which decide where a head starts.
        pair_ids: Of the training rows; None where rows are not known before they are read.
        eval_pair_ids: The same of the held-out rows.
    """

    train_rows: Any
    validation_rows: Any
    collator: Callable[[Any], dict[str, Tensor]]
    sample: Callable[[], Tensor]
    pair_ids: PairIds | None
    eval_pair_ids: PairIds | None


def text_inputs(model: IsotropicGaussianModel, train_views: Any, validation_views: Any) -> TrainerInputs:
    """Leave everything text, which the encoder reads at every step.

    Args:
        model: Gives the tokenizer.
        train_views: Rows `{"query", "positive", "negative"}` of text; a stream will do.
        validation_views: The same, or None.

    Returns:
        What the Trainer needs.
    """
    collator = TextPairCollator(model.tokenizer, max_length=model.config.max_length, **prompts_of(model))
    sample = partial(_sample_features, model, train_views)
    return TrainerInputs(
        train_views, validation_views, collator, sample, _text_pair_ids(train_views), _text_pair_ids(validation_views)
    )


def _text_pair_ids(views: Any) -> PairIds | None:
    if not isinstance(views, Dataset):  # streams are not known yet, and views of documents drawn anew
        return None
    return PairIds(text_ids(views["query"]), text_ids(views["positive"]))


def feature_inputs(
    model: IsotropicGaussianModel, train_views: Any, validation_views: Any, store: FeatureStore
) -> TrainerInputs:
    """Encode all texts once.

    Args:
        model: Gives the prompts.
        train_views: Rows `{"query", "positive", "negative"}` of text.
        validation_views: The same, or None.
        store: Gives the features.

    Returns:
        What the Trainer needs.
    """
    views = [each for each in (train_views, validation_views) if each is not None]
    pairs = as_feature_pairs(views, store, prompts_of(model))
    num_rows = len(train_views)
    validation_rows = None if validation_views is None else Subset(pairs, range(num_rows, len(pairs)))
    collator = FeaturePairCollator(pairs.query_vectors, pairs.document_vectors)
    query_ids, document_ids = torch.from_numpy(pairs.query_rows), torch.from_numpy(pairs.positive_rows)
    train_ids, validation_ids = (
        PairIds(query_ids[rows], document_ids[rows]) for rows in (slice(num_rows), slice(num_rows, None))
    )

    def sample() -> Tensor:
        return torch.from_numpy(pairs.sample(num_rows))

    return TrainerInputs(Subset(pairs, range(num_rows)), validation_rows, collator, sample, train_ids, validation_ids)


def _sample_features(model: IsotropicGaussianModel, views: Any) -> Tensor:
    """Encode a few queries and documents, for the start of a narrower projection."""
    rows = (views[index] for index in range(len(views))) if hasattr(views, "__len__") else iter(views)
    queries, documents = zip(*((row["query"], row["positive"]) for row in islice(rows, _SAMPLE_ROWS)), strict=True)
    store = FeatureStore(model, cache_folder=None, dtype="auto")
    parts = ((queries, model.config.query_prompt), (documents, model.config.document_prompt))
    vectors = [torch.from_numpy(store.features(texts, prompt=prompt).vectors) for texts, prompt in parts]
    return torch.cat(vectors)


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
