"""A validation split that no document and no query crosses.

A split by rows lets a document be trained on and validated with, which measures memory, not retrieval.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import UserError
from .documents import read_documents, text_digest
from .pairs import pair_features, read_pairs
from .sources import build_table

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)


def split_by_document(pairs: Dataset, fraction: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Split pairs so that the two parts share no query text and no positive text.

    Rows that share a query or a positive, directly or through other rows, form a group. A hash of the
    seed and of a text of the group decides where it goes: rows added later do not move the others, and
    a larger fraction contains a smaller one.

    Args:
        pairs: Columns query and positive.
        fraction: Share of rows wanted for validation, in (0, 1). The result is near it: groups are
            drawn by chance, and a group larger than half the wanted share goes to training.
        seed: Another seed gives another split.

    Returns:
        Training and validation rows, each in their order; neither is empty.

    Raises:
        UserError: If the fraction is not between 0 and 1, or all rows form a single group.
    """
    if not 0 < fraction < 1:
        raise UserError(f"expected a validation fraction between 0 and 1, got {fraction}: set it to e.g. 0.1")
    groups = _connected_rows(pairs)
    if len(groups) < 2:
        raise UserError(
            f"expected pairs of at least two unrelated documents, got {len(pairs)} rows that all share queries or "
            "documents: add data or do without validation"
        )
    in_validation = _draw_groups(groups, fraction, seed, len(pairs))
    rows = sorted(row for key in in_validation for row in groups[key])
    chosen = set(rows)
    train = pairs.select([row for row in range(len(pairs)) if row not in chosen])
    few = len(rows) < fraction * len(pairs) / 2
    # NFCorpus, for one, is a single group but for a few rows: more cannot be held out without a leak.
    logger.log(
        logging.WARNING if few else logging.INFO,
        "held out %d of %d pairs (%d of %d groups that share no query and no document)",
        *(len(rows), len(pairs), len(in_validation), len(groups)),
    )
    return train, pairs.select(rows)


def _draw_groups(groups: dict[bytes, list[int]], fraction: float, seed: int, rows: int) -> list[bytes]:
    """Choose the groups for validation by the rank of their hash; never none, never all."""
    position = {key: _position(key, seed) for key in groups}
    largest = max(1.0, fraction * rows / 2)
    chosen = [key for key, place in position.items() if place < fraction and len(groups[key]) <= largest]
    if not chosen:
        smallest = min(len(members) for members in groups.values())
        chosen = [min((key for key in groups if len(groups[key]) == smallest), key=position.__getitem__)]
    if len(chosen) == len(groups):
        chosen.remove(max(chosen, key=position.__getitem__))
    return chosen


def _position(key: bytes, seed: int) -> float:
    digest = text_digest(f"{seed}/{key.hex()}")
    return int.from_bytes(digest[:8], "little") / 2**64


def _connected_rows(pairs: Dataset) -> dict[bytes, list[int]]:
    """Group rows that share a text; a group's key is the smallest digest of its positives."""
    parent: dict[bytes, bytes] = {}

    def root(node: bytes) -> bytes:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    positives = []
    for row in pairs.select_columns(["query", "positive"]):
        # A query and a positive of the same text are the same node: that text must not cross either.
        query, positive = text_digest(row["query"].strip()), text_digest(row["positive"].strip())
        for node in (query, positive):
            parent.setdefault(node, node)
        parent[root(query)] = root(positive)
        positives.append(positive)
    by_root: dict[bytes, list[int]] = {}
    for index, positive in enumerate(positives):
        by_root.setdefault(root(positive), []).append(index)
    return {min(positives[index] for index in members): members for members in by_root.values()}


Views = TypeVar("Views")


def hold_out_pairs(
    pairs: Dataset, *, val_data: str | None, val_split: str, val_fraction: float, seed: int
) -> tuple[Dataset, Dataset | None]:
    """Return training pairs and validation pairs: those of a file, a share of the documents, or none.

    Documents to validate with are no negatives in training either: they are taken out of those lists.

    Args:
        pairs: Columns query, positive, negative.
        val_data: Source of validation pairs; wins over the fraction.
        val_split: Split of that source.
        val_fraction: Share of the documents, with their queries, to hold out; 0 for none.
        seed: Another seed holds out others.

    Returns:
        Training pairs, and validation pairs or None.

    Raises:
        UserError: If the source is bad or the fraction is not in [0, 1).
    """
    if val_data:
        train, validation = pairs, read_pairs(val_data, split=val_split)
    elif val_fraction == 0:
        return pairs, None
    else:
        train, validation = split_by_document(pairs, val_fraction, seed=seed)
    return drop_validation_negatives(train, validation), validation


def drop_validation_negatives(train: Dataset, validation: Dataset) -> Dataset:
    """Take the positives of validation rows out of the negatives of training rows; no row is lost.

    Args:
        train: Columns query, positive, negative.
        validation: Column positive.

    Returns:
        The training rows in their order.
    """
    held_out = _digests(validation["positive"])
    num_dropped = sum(_digest(text) in held_out for negatives in train["negative"] for text in negatives)
    if num_dropped == 0:
        return train
    logger.info("dropped %d negatives of training rows that are documents of validation rows", num_dropped)
    return build_table(_rows_without, (train, held_out), pair_features(), streaming=False)


def drop_validation_negatives_of_stream(train: IterableDataset, validation: Dataset) -> IterableDataset:
    """Do as `drop_validation_negatives` while a stream is walked through; how many they are is not known.

    Args:
        train: Columns query, positive, negative.
        validation: Column positive.

    Returns:
        The stream, its order and columns the same.
    """
    options = {"held_out": _digests(validation["positive"])}
    return train.map(_negatives_without, input_columns="negative", fn_kwargs=options, features=pair_features())


def _rows_without(pairs: Dataset, held_out: set[bytes]) -> Iterator[tuple[None, dict[str, Any]]]:
    for row in pairs:
        yield None, {**row, **_negatives_without(row["negative"], held_out)}


def _negatives_without(negatives: list[str], held_out: set[bytes]) -> dict[str, list[str]]:
    return {"negative": [text for text in negatives if _digest(text) not in held_out]}


def _digests(texts: Sequence[str]) -> set[bytes]:
    return {_digest(text) for text in texts}


def _digest(text: str) -> bytes:
    return text_digest(text.strip())  # as the split compares texts


def read_texts(source: str, *, usable: Callable[[str], bool], **options: Any) -> tuple[list[str], dict[str, int]]:
    """Read documents as single texts, title in front, and leave out those no view can be made of.

    Args:
        source: As for `read_documents`.
        usable: Tells whether a text can be used.
        **options: As for `read_documents`.

    Returns:
        The texts, and the counts `documents` (read), `rows` (usable) and `too_short`.

    Raises:
        UserError: If fewer than two are usable.
    """
    from .documents import document_text

    documents = read_documents(source, **options)
    texts = [document_text(row["title"], row["text"]) for row in documents]
    kept = [text for text in texts if usable(text)]
    if len(kept) < 2:
        raise UserError(f"{source}: expected at least two documents of two words or more, got {len(kept)}: add some")
    return kept, {"documents": len(texts), "rows": len(kept), "too_short": len(texts) - len(kept)}


def hold_out_texts(
    texts: Sequence[str], make_views: Callable[[list[str]], Views], *, val_fraction: float, seed: int
) -> tuple[Views, Views | None]:
    """Make views of a training part and of a held-out part of the texts.

    Args:
        texts: Distinct texts.
        make_views: Turns texts into views.
        val_fraction: Share to hold out, in [0, 1); 0 for none. A text's part does not depend on the others.
        seed: Another seed holds out others.

    Returns:
        Training views, and validation views or None.

    Raises:
        UserError: If the fraction is out of range or leaves nothing on one side.
    """
    if val_fraction == 0:
        return make_views(list(texts)), None
    if not 0 < val_fraction < 1:
        raise UserError(f"expected a --val_fraction from 0 to below 1, got {val_fraction}: set it to e.g. 0.1")
    bound = int(val_fraction * 2**64)
    held_out = [int.from_bytes(text_digest(f"{seed}", text)[:8], "little") < bound for text in texts]
    train = [text for text, is_out in zip(texts, held_out, strict=True) if not is_out]
    validation = [text for text, is_out in zip(texts, held_out, strict=True) if is_out]
    if len(train) < 2 or len(validation) < 2:
        raise UserError(
            f"expected at least two documents on each side of --val_fraction {val_fraction}, got {len(train)} and "
            f"{len(validation)}: change the fraction or add documents"
        )
    return make_views(train), make_views(validation)
