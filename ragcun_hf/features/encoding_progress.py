"""A bar of encoded texts, with tokens per second and the time left."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from tqdm.auto import tqdm

if TYPE_CHECKING:
    from types import TracebackType

_CHARACTERS_PER_TOKEN = 4  # of English; only the time left goes by it


class EncodingProgress:
    """Progress of one or several rounds; long texts come first, so the time left goes by the text still to read.

    Args:
        is_shown: Show the bar, from the first round that has something to encode.

    Attributes:
        num_later: Texts of later rounds, as far as they are known; they count like those so far.
    """

    def __init__(self, *, is_shown: bool = True) -> None:
        self.num_later = 0
        self._is_shown = is_shown
        self._bar: Any = None
        self._started = time.perf_counter()
        self._size_left = self._size_done = self._num_tokens = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is None:
            return
        if error is None:
            self._bar.total = self._bar.n  # later rounds may have had nothing to encode
        self._bar.close()

    def begin(self, sizes: Sequence[int]) -> None:
        """Take in what the next round will encode: the size of each text."""
        if not self._is_shown or (self._bar is None and not sizes):
            return
        if self._bar is None:
            self._started = time.perf_counter()
            self._bar = tqdm(
                desc="Encoding",
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}",
                total=len(sizes) + self.num_later,
            )
        self._size_left += sum(sizes)
        self._bar.total = self._bar.n + len(sizes) + self.num_later

    def advance(self, sizes: Sequence[int], *, num_tokens: int) -> None:
        """Count some texts as encoded."""
        if self._bar is None:
            return
        size = sum(sizes)
        self._size_left, self._size_done = self._size_left - size, self._size_done + size
        self._num_tokens += num_tokens
        self._bar.update(len(sizes))
        seconds = time.perf_counter() - self._started
        size_left = self._size_left + self.num_later * self._size_done / self._bar.n
        left = tqdm.format_interval(seconds * size_left / self._size_done)
        speeds = f"{self._bar.n / seconds:,.0f} texts/s, {self._num_tokens / seconds:,.0f} tokens/s, {left} left"
        self._bar.set_postfix_str(speeds, refresh=False)


def text_size(text: str, *, max_length: int) -> int:
    """Estimate what a text costs, in characters; what is cut off costs nothing."""
    return 1 + min(len(text), _CHARACTERS_PER_TOKEN * max_length)
