"""A validation split that no document and no query crosses.

A split by rows lets a document be trained on and validated with, which measures memory, not retrieval.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ..errors import UserError
from .documents import text_digest

if TYPE_CHECKING:
    from datasets import Dataset

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
