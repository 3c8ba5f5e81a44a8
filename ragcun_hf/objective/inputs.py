"""Datasets and collators of the Trainer, from texts or from precomputed features.

Both collators arrange a batch alike, so that one forward pass serves queries, positives and negatives:

    rows of the model's input:  B queries, then B positives, then all hard negatives
    query_ids     (B,)          equal for equal query texts
    document_ids  (M,)          equal for equal document texts; M = B + number of hard negatives
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from ..data.documents import text_digest
from ..data.training_rows import TrainingRow, TrainingRows, read_columns
from ..evaluation.validation import RetrievalValidation
from ..features.feature_store import SAMPLE_ROWS, FeatureStore
from ..model.encoding_isotropic_gaussian import tokenize
from .known_pairs import PairIds

if TYPE_CHECKING:
    from ..model.modeling_isotropic_gaussian import IsotropicGaussianModel


def text_ids(texts: Sequence[str]) -> Tensor:
    """Return (N,) integers, equal for equal texts."""
    return torch.tensor([int.from_bytes(text_digest(text)[:8], "little", signed=True) for text in texts])


@dataclass
class TextPairCollator:
    """Tokenizes rows of texts, with prompts, as the model does."""

    tokenizer: Any
    max_length: int
    query_prompt: str = ""
    document_prompt: str = ""

    def __call__(self, rows: Sequence[TrainingRow]) -> dict[str, Tensor]:
        """Return `query_ids`, `document_ids`, `input_ids` and `attention_mask`."""
        queries = [row["query"] for row in rows]
        documents = [row["positive"] for row in rows]
        documents += [text for row in rows for text in row.get("negative") or []]
        texts = [self.query_prompt + text for text in queries] + [self.document_prompt + text for text in documents]
        tokens = tokenize(self.tokenizer, texts, max_length=self.max_length)
        return {
            "query_ids": text_ids(queries),
            "document_ids": text_ids(documents),
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
        }


class FeaturePairs:
    """Features of N training rows; equal texts share one. The Trainer's dataset is then a range of row numbers.

    It is the collator of such rows too: a batch has ids only, and `LossTrainer` looks up the features where it needs
    them. On a card, the features of all texts stay there if they take at most half of its free memory.

    `query_vectors` (U, H + L) and `document_vectors` (V, H + L) hold the features of distinct texts. `query_rows`
    (N,), `positive_rows` (N,) and `negative_rows` (an array per row) are the places of each row's texts in them.
    """

    def __init__(
        self,
        queries: Sequence[str],
        positives: Sequence[str],
        negatives: Sequence[Sequence[str]],
        *,
        store: FeatureStore,
        query_prompt: str = "",
        document_prompt: str = "",
    ) -> None:
        query_table = store.features(queries, prompt=query_prompt)
        flat_negatives = [text for texts in negatives for text in texts]
        document_table = store.features([*positives, *flat_negatives], prompt=document_prompt)
        self.query_vectors = query_table.vectors
        self.document_vectors = document_table.vectors
        self.query_rows = query_table.rows
        self.positive_rows = document_table.rows[: len(positives)]
        ends = np.cumsum([len(texts) for texts in negatives])
        self.negative_rows = np.split(document_table.rows[len(positives) :], ends[:-1]) if len(ends) else []
        self._on_cards: dict[torch.device, tuple[Tensor, Tensor] | None] = {}

    @classmethod
    def of_rows(cls, parts: Sequence[TrainingRows], store: FeatureStore, model: IsotropicGaussianModel) -> Self:
        """Encode all rows of the first part, then all rows of the next."""
        read = [read_columns(rows) for rows in parts]
        texts = ([text for part in column for text in part] for column in zip(*read, strict=True))
        return cls(*texts, store=store, **_prompts(model))

    def __getstate__(self) -> dict[str, Any]:
        # A loader's process reads rows only, and has no use for the features on a card.
        return {**self.__dict__, "_on_cards": {}}

    def __len__(self) -> int:
        return len(self.query_rows)

    def __call__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return `query_ids` and `document_ids` of some rows: places in the two tables of features."""
        chosen = np.array(rows)
        documents = [self.positive_rows[chosen], *(self.negative_rows[row] for row in rows)]
        return {
            "query_ids": torch.from_numpy(self.query_rows[chosen]),
            "document_ids": torch.from_numpy(np.concatenate(documents).astype(np.int64)),
        }

    def features(self, query_ids: Tensor, document_ids: Tensor) -> Tensor:
        """Look up features of B queries and M documents, on the device of their ids: (B + M, H + L)."""
        device, ids = query_ids.device, (query_ids, document_ids)
        if (tables := self._tables(device)) is not None:
            return torch.cat([table[rows] for table, rows in zip(tables, ids, strict=True)])
        arrays = (self.query_vectors, self.document_vectors)
        found = [vectors[rows.cpu().numpy()] for vectors, rows in zip(arrays, ids, strict=True)]
        return torch.from_numpy(np.concatenate(found)).to(device)

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Return the features of queries and of documents on a card; None for a card that is too small, or no card."""
        if device.type != "cuda":
            return None
        if device not in self._on_cards:
            arrays = (self.query_vectors, self.document_vectors)
            fits = sum(array.nbytes for array in arrays) <= torch.cuda.mem_get_info(device)[0] // 2
            queries, documents = (torch.from_numpy(np.array(array)).to(device) if fits else None for array in arrays)
            self._on_cards[device] = None if queries is None or documents is None else (queries, documents)
        return self._on_cards[device]

    def pair_ids(self, rows: slice) -> PairIds:
        """Return the ids of some rows."""
        return PairIds(torch.from_numpy(self.query_rows[rows]), torch.from_numpy(self.positive_rows[rows]))

    def sample(self, num_rows: int) -> np.ndarray:
        """Return features (S, H + L) of distinct texts of the first rows: at most 4,096 queries, then documents."""
        parts = []
        for vectors, rows in ((self.query_vectors, self.query_rows), (self.document_vectors, self.positive_rows)):
            distinct = np.unique(rows[:num_rows])
            parts.append(vectors[distinct[:: max(1, -(-len(distinct) // SAMPLE_ROWS))]])
        return np.concatenate(parts)


@dataclass(frozen=True)
class TrainerInputs:
    """What the Trainer reads. Ids are None if an epoch's rows are not known before it."""

    train_rows: Any
    validation_rows: Any
    collator: Callable[[Any], dict[str, Tensor]]
    sample: Callable[[], Tensor]  # features (S, H + L) of some training texts, to initialize a projection from
    pair_ids: PairIds | None
    eval_pair_ids: PairIds | None


def _prompts(model: IsotropicGaussianModel) -> dict[str, str]:
    return {"query_prompt": model.config.query_prompt, "document_prompt": model.config.document_prompt}


def text_inputs(model: IsotropicGaussianModel, train: TrainingRows, validation: TrainingRows | None) -> TrainerInputs:
    """Train on texts, which the encoder reads at every step."""
    collator = TextPairCollator(model.tokenizer, max_length=model.config.max_length, **_prompts(model))

    def sample() -> Tensor:
        rows = list(islice(train, SAMPLE_ROWS))
        store = FeatureStore(model, cache_folder=None, dtype="auto")
        queries = store.features([row["query"] for row in rows], prompt=collator.query_prompt)
        documents = store.features([row["positive"] for row in rows], prompt=collator.document_prompt)
        return torch.cat([torch.from_numpy(table.vectors) for table in (queries, documents)])

    known = [None if rows is None else rows.known_pairs() for rows in (train, validation)]
    ids = [None if pairs is None else PairIds(*map(text_ids, pairs)) for pairs in known]
    return TrainerInputs(train, validation, collator, sample, *ids)


def feature_inputs(
    model: IsotropicGaussianModel, train: TrainingRows, validation: TrainingRows | None, store: FeatureStore
) -> TrainerInputs:
    """Encode all texts once, and train on their features."""
    parts = [train] if validation is None else [train, validation]
    pairs, num_rows = FeaturePairs.of_rows(parts, store, model), train.num_rows or 0
    return TrainerInputs(
        train_rows=range(num_rows),
        validation_rows=None if validation is None else range(num_rows, len(pairs)),
        collator=pairs,
        sample=lambda: torch.from_numpy(pairs.sample(num_rows)),
        pair_ids=pairs.pair_ids(slice(num_rows)),
        eval_pair_ids=pairs.pair_ids(slice(num_rows, None)),
    )


def retrieval_validation(
    rows: TrainingRows, store: FeatureStore | None, *, corpus: Sequence[str] = ()
) -> RetrievalValidation:
    """Measure models on held-out rows, which search their own documents and negatives, and a corpus if there is one.

    Without a store, texts are encoded at every call.
    """
    queries, documents, negatives = read_columns(rows)
    distractors = [text for texts in negatives for text in texts]
    return RetrievalValidation(queries, documents, distractors=[*distractors, *corpus], store=store)
