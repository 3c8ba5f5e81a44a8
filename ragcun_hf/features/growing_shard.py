"""Features on their way to the cache."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self

import numpy as np

if TYPE_CHECKING:
    from .feature_cache import FeatureCache

_TEXTS_PER_SHARD = 4_096  # bounds the buffer in memory
_SECONDS_PER_SHARD = 20.0  # what a killed process loses at most


class GrowingShard:
    """Features that are not on disk yet; written when they are many or old enough, and at the end.

    What was encoded before an interruption is kept.

    Args:
        cache: Where they are written.

    Attributes:
        names: Of the files that were written.
    """

    def __init__(self, cache: FeatureCache) -> None:
        self.names: list[str] = []
        self._cache = cache
        self._begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._write()

    def _begin(self) -> None:
        self._digests: list[bytes] = []
        self._pieces: list[np.ndarray] = []
        self._started = time.monotonic()

    def add(self, digests: list[bytes], features: np.ndarray) -> None:
        """Take in features, shape (len(digests), H)."""
        self._digests.extend(digests)
        self._pieces.append(features)
        if len(self._digests) >= _TEXTS_PER_SHARD or time.monotonic() - self._started > _SECONDS_PER_SHARD:
            self._write()

    def _write(self) -> None:
        digests, pieces = self._digests, self._pieces
        self._begin()  # first: what cannot be written is not tried again
        if digests:
            self.names.append(self._cache.write(digests, np.concatenate(pieces)))
