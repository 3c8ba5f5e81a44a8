"""Stream of training rows: shuffled in a buffer, and resumed where an earlier run stopped."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset
from tqdm.auto import tqdm

from ..errors import UserError

if TYPE_CHECKING:
    import datasets


class ShuffledStream(IterableDataset):  # type: ignore[type-arg]
    """A stream of rows that can be read in many passes, each in another order, and from any position.

    The next row is drawn from a buffer of `buffer_size` rows; 1 keeps the order. A pass ends when fewer rows are left
    than a training step needs (`rows_at_once`). To reach a position, all rows before it are read again, so that the
    buffer holds the same rows as before; reading is far faster than training.
    """

    num_rows = None  # the length of a stream is not known
    documents: tuple[str, ...] = ()  # a stream is read only once

    def __init__(self, rows: datasets.IterableDataset, *, buffer_size: int, seed: int) -> None:
        self.stream_order = {"shuffle_buffer_size": buffer_size, "seed": seed}
        self._rows = rows.shuffle(seed=seed, buffer_size=buffer_size) if buffer_size > 1 else rows
        self.rows_at_once = 1
        self._epoch = self._first_pass = self._num_skipped = 0
        self._shows_skipping = False

    def start_at(self, number: int, num_rows: int, *, show_progress: bool = False) -> None:
        """Let epoch 0 continue pass `number` after `num_rows` rows, or start the next pass if this one is over."""
        self._first_pass, self._num_skipped = number, num_rows
        self._shows_skipping = show_progress

    def set_epoch(self, epoch: int) -> None:
        """Choose the pass to read next."""
        self._epoch = epoch

    @property
    def number_of_pass(self) -> int:
        """Number of this epoch's pass, from 0."""
        return self._first_pass + self._epoch

    @property
    def num_skipped(self) -> int:
        """Number of rows of this epoch's pass that are skipped."""
        return self._num_skipped if self._epoch == 0 else 0

    def known_pairs(self) -> None:
        """Return None: rows are not known before they are read."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._rows.set_epoch(self.number_of_pass)
        rows, num_skipped = iter(self._rows), self.num_skipped
        for _ in tqdm(range(num_skipped), desc="Skipping rows", disable=not (num_skipped and self._shows_skipping)):
            next(rows, None)
        step_rows = list(islice(rows, self.rows_at_once))
        if num_skipped and len(step_rows) < self.rows_at_once:
            self._first_pass, self._num_skipped = self._first_pass + 1, 0
            yield from self
            return
        if len(step_rows) < self.rows_at_once:
            raise UserError(
                f"expected a stream of at least {self.rows_at_once} rows, the rows of one step, got {len(step_rows)}: "
                "lower --batch_size, or leave --streaming out"
            )
        while len(step_rows) == self.rows_at_once:
            yield from step_rows
            step_rows = list(islice(rows, self.rows_at_once))


def interleave(sources: list[datasets.IterableDataset]) -> datasets.IterableDataset:
    """Let sources take turns. Each row comes once: a short source does not repeat while a long one goes on."""
    from datasets import interleave_datasets

    if len(sources) == 1:
        return sources[0]
    return interleave_datasets(sources, stopping_strategy="all_exhausted_without_replacement")
