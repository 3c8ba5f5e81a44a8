"""What the Trainer reads: both sets, their collator, and what is known of the training rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Subset

from .collators import FeaturePairCollator, TextPairCollator, text_ids
from .features.feature_store import FeatureStore
from .known_pairs import PairIds
from .view_features import as_feature_pairs, prompts_of

if TYPE_CHECKING:
    from .modeling_isotropic_gaussian import IsotropicGaussianModel

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
