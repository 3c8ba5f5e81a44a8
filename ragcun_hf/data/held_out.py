"""Hold out validation data. No document and no query is in both parts, or validation would measure memory."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import UserError
from .documents import document_texts, text_digest, text_position
from .pairs import pair_features
from .word_spans import has_two_words

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

Views = TypeVar("Views")

_RARE, _VERY_RARE = 0.05, 0.001  # chances of a draw below which it is made anew; see `_positions`


def hold_out_pairs(
    pairs: Dataset, held_out: Dataset | None, *, val_fraction: float, seed: int
) -> tuple[Dataset, Dataset | None]:
    """Return training and validation pairs; the latter are those held out before, a `val_fraction`, or None.

    Validation documents are also removed from the training negatives.
    """
    if held_out is None:
        if val_fraction == 0:
            return pairs, None
        pairs, held_out = split_by_document(pairs, val_fraction, seed=seed)
    return drop_validation_negatives(pairs, held_out), held_out


def split_by_document(pairs: Dataset, fraction: float, seed: int = 0, *, salt: str = "") -> tuple[Dataset, Dataset]:
    """Split pairs so that the two parts share no query text and no positive text.

    Rows that share a query or a positive, directly or through other rows, form a group. A hash of the seed and of a
    text of the group decides its part. So rows added later do not move other rows, and a larger fraction holds out
    what a smaller one does. A group larger than half the wanted share goes to training. Neither part is empty.

    A split of what an earlier split with the same seed has left is drawn by other hashes, as all those of the rest lie
    above the earlier fraction. Tell the splits apart by a `salt` where you know of both: few rows do not show it.
    """
    if not 0 < fraction < 1:
        raise UserError(f"expected a validation fraction between 0 and 1, got {fraction}: set it to e.g. 0.1")
    groups = _connected_rows(pairs)
    if len(groups) < 2:
        raise UserError(
            f"expected pairs of at least two unrelated documents, got {len(pairs)} rows that all share queries or "
            "documents: add data or do without validation"
        )
    chosen = _draw_groups(groups, fraction, f"{seed}/{salt}/" if salt else f"{seed}/", len(pairs))
    held_out = sorted(row for key in chosen for row in groups[key])
    train = pairs.select(sorted(set(range(len(pairs))).difference(held_out)))
    # In NFCorpus, for example, almost all rows form one group: a larger part cannot be held out without a leak.
    is_small = len(held_out) < fraction * len(pairs) / 2
    logger.log(
        logging.WARNING if is_small else logging.INFO,
        "held out %d of %d pairs (%d of %d groups that share no query and no document)",
        *(len(held_out), len(pairs), len(chosen), len(groups)),
    )
    return train, pairs.select(held_out)


def _connected_rows(pairs: Dataset) -> dict[bytes, list[int]]:
    """Group rows that share a text (union-find); the key of a group is the smallest digest of its positives."""
    parent: dict[bytes, bytes] = {}

    def root(node: bytes) -> bytes:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    positives = []
    for row in pairs.select_columns(["query", "positive"]):
        # A query and a positive with the same text are the same node: that text must not be in both parts either.
        query, positive = _stripped_digest(row["query"]), _stripped_digest(row["positive"])
        for node in (query, positive):
            parent.setdefault(node, node)
        parent[root(query)] = root(positive)
        positives.append(positive)
    by_root: dict[bytes, list[int]] = {}
    for index, positive in enumerate(positives):
        by_root.setdefault(root(positive), []).append(index)
    return {min(positives[index] for index in members): members for members in by_root.values()}


def _draw_groups(groups: dict[bytes, list[int]], fraction: float, salt: str, num_rows: int) -> list[bytes]:
    """Choose the groups for validation by their hashes; at least one, and never all."""
    largest = max(1.0, fraction * num_rows / 2)
    small = {key for key, members in groups.items() if len(members) <= largest}
    position = _positions(groups, small, fraction, salt)
    chosen = [key for key, place in position.items() if place < fraction and key in small]
    if not chosen:
        smallest = min(len(members) for members in groups.values())
        chosen = [min((key for key in groups if len(groups[key]) == smallest), key=position.__getitem__)]
    if len(chosen) == len(groups):
        chosen.remove(max(chosen, key=position.__getitem__))
    return chosen


def _positions(groups: Iterable[bytes], small: Collection[bytes], fraction: float, salt: str) -> dict[bytes, float]:
    """Hash the groups to numbers in [0, 1); with another salt if an earlier split seems to have taken the lowest ones.

    It seems so if the lowest number of the `small` groups is improbably high, or rather high and none is drawn.
    """
    for redraws in itertools.count():
        again = f"{redraws}/" if redraws else ""
        position = {key: text_position(f"{salt}{again}{key.hex()}") for key in groups}
        lowest = min((position[key] for key in small), default=0.0)
        if (1 - lowest) ** len(small) >= (_RARE if lowest >= fraction else _VERY_RARE):
            break
    return position


def drop_validation_negatives(train: Dataset | IterableDataset, validation: Dataset) -> Dataset | IterableDataset:
    """Remove the positives of validation rows from the negatives of training rows, in a stream while it is read."""
    import datasets

    held_out = {_stripped_digest(text) for text in validation["positive"]}
    if isinstance(train, datasets.Dataset):
        num_dropped = sum(_stripped_digest(text) in held_out for negatives in train["negative"] for text in negatives)
        if num_dropped == 0:
            return train
        logger.info("dropped %d negatives of training rows that are documents of validation rows", num_dropped)
    options: dict[str, Any] = {"input_columns": "negative", "fn_kwargs": {"held_out": held_out}}
    return train.map(_negatives_without, features=pair_features(), **options)


def _negatives_without(negatives: list[str], held_out: set[bytes]) -> dict[str, list[str]]:
    return {"negative": [text for text in negatives if _stripped_digest(text) not in held_out]}


def _stripped_digest(text: str) -> bytes:
    return text_digest(text.strip())


def usable_texts(documents: Dataset, *, name: str) -> tuple[list[str], dict[str, int]]:
    """Join titles and texts, and keep those of two words or more, at least two; messages call the documents `name`.

    Returns them with the counts `documents` (read), `rows` (kept) and `too_short`.
    """
    texts = document_texts(documents)
    kept = [text for text in texts if has_two_words(text)]
    if len(kept) < 2:
        raise UserError(f"{name}: expected at least two documents of two words or more, got {len(kept)}: add some")
    return kept, {"documents": len(texts), "rows": len(kept), "too_short": len(texts) - len(kept)}


def hold_out_texts(
    texts: Sequence[str], make_views: Callable[[list[str]], Views], *, val_fraction: float, seed: int
) -> tuple[Views, Views | None]:
    """Split distinct texts by a hash of seed and text, and make rows of both parts; a fraction of 0 holds out none."""
    if val_fraction == 0:
        return make_views(list(texts)), None
    if not 0 < val_fraction < 1:
        raise UserError(f"expected a --val_fraction from 0 to below 1, got {val_fraction}: set it to e.g. 0.1")
    held_out = [text_position(f"{seed}", text) < val_fraction for text in texts]
    train = [text for text, is_out in zip(texts, held_out, strict=True) if not is_out]
    validation = [text for text, is_out in zip(texts, held_out, strict=True) if is_out]
    if len(train) < 2 or len(validation) < 2:
        raise UserError(
            f"expected at least two documents on each side of --val_fraction {val_fraction}, got {len(train)} and "
            f"{len(validation)}: change the fraction or add documents"
        )
    return make_views(train), make_views(validation)
