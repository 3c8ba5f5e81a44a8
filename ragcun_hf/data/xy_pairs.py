"""Masked pairs from a file: x is the original text, y the same text with words masked.

Training predicts the original from the masked text, so y becomes the query and x the positive, and the
rows have the columns of every other set of pairs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from .documents import check_limit
from .pairs import pair_features
from .rows import Row
from .sources import Source, build_table, open_source

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)


def read_xy_pairs(
    source: str | os.PathLike[str],
    *,
    split: str = "train",
    x_column: str = "x",
    y_column: str = "y",
    streaming: bool = False,
    limit: int | None = None,
) -> Dataset | IterableDataset:
    """Read masked pairs, every row checked.

    Args:
        source: A file, a folder of files of one kind, or a Hub id `org/name`.
        split: Part of a Hub dataset or folder.
        x_column: Column with the original text.
        y_column: Column with the masked text.
        streaming: Return an `IterableDataset`, which reads and checks while it is walked through.
        limit: Read only so many rows; None reads all.

    Returns:
        A dataset with the columns `query` (y), `positive` (x) and `negative` (always empty).

    Raises:
        UserError: If the source cannot be read, or a text is missing, blank or not a text.

    Example:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp(), "xy.json")
        >>> _ = file.write_text('[{"x": "a red fox", "y": "a [MASK] fox"}]')
        >>> read_xy_pairs(file)[0]
        {'query': 'a [MASK] fox', 'positive': 'a red fox', 'negative': []}
    """
    check_limit(limit)
    opened = open_source(source, split=split, streaming=streaming or limit is not None)
    return build_table(_checked, (opened, x_column, y_column, limit), pair_features(), streaming=streaming)


def _checked(opened: Source, x_column: str, y_column: str, limit: int | None) -> Iterator[tuple[Row, dict[str, Any]]]:
    unmasked = 0
    for row in islice(opened.rows(), limit):
        original, masked = row.text(x_column), row.text(y_column)
        unmasked += original == masked
        yield row, {"query": masked, "positive": original, "negative": []}
    if unmasked:
        logger.warning("%s: %d rows have the same text in %r and %r", opened.name, unmasked, x_column, y_column)
