"""Rows read while they are trained on, shuffled in a buffer, and read on from where an earlier run stopped."""

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
    """A stream that is walked through any number of times, each time in another order, and from any position.

    A position is reached by drawing the same rows again without using them: only so does the buffer hold the same
    rows, and reading is far faster than training.

    Args:
        rows: Read anew for every pass.
        buffer_size: Rows among which the next one is drawn; 1 keeps the order.
        seed: Of the draws, which differ from pass to pass.

    Attributes:
        buffer_size: As given.
        seed: As given.
        rows_at_once: Rows that are trained on together; a pass ends where fewer are left.
    """

    def __init__(self, rows: datasets.IterableDataset, *, buffer_size: int, seed: int) -> None:
        self.buffer_size, self.seed = buffer_size, seed
        self._rows = rows.shuffle(seed=seed, buffer_size=buffer_size) if buffer_size > 1 else rows
        self.rows_at_once = 1
        self._epoch = self._first_pass = self._num_skipped = 0
        self._shows_skipping = False

    def start_at(self, number: int, num_rows: int, *, show_progress: bool = False) -> None:
        """Let epoch 0 begin in the midst of a pass, or with the next one where nothing is left of it.

        Args:
            number: The pass, from 0.
            num_rows: Rows of it that were used.
            show_progress: Show a bar while rows are read that were used.
        """
        self._first_pass, self._num_skipped = number, num_rows
        self._shows_skipping = show_progress

    def set_epoch(self, epoch: int) -> None:
        """Choose the pass that is walked through next."""
        self._epoch = epoch

    @property
    def number_of_pass(self) -> int:
        """The pass of this epoch, from 0."""
        return self._first_pass + self._epoch

    @property
    def num_skipped(self) -> int:
        """Rows of this epoch's pass that are left out."""
        return self._num_skipped if self._epoch == 0 else 0

    @property
    def num_rows(self) -> None:
        """None: the length of a stream is not known."""

    @property
    def documents(self) -> tuple[str, ...]:
        """No documents: a stream is not read a second time."""
        return ()

    def known_pairs(self) -> None:
        """Return None: rows are not known before they are read."""

    @property
    def stream_order(self) -> dict[str, int]:
        """The arguments that decide the order of rows."""
        return {"shuffle_buffer_size": self.buffer_size, "seed": self.seed}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows, num_skipped = self._pass(), self.num_skipped
        for _ in tqdm(range(num_skipped), desc="Reading on", disable=not (num_skipped and self._shows_skipping)):
            next(rows, None)
        together = list(islice(rows, self.rows_at_once))
        if num_skipped and len(together) < self.rows_at_once:
            self._first_pass, self._num_skipped = self._first_pass + 1, 0
            yield from self
            return
        if len(together) < self.rows_at_once:
            raise UserError(
                f"expected a stream of at least {self.rows_at_once} rows, which are trained on together, got "
                f"{len(together)}: lower --batch_size, or leave --streaming out"
            )
        while len(together) == self.rows_at_once:
            yield from together
            together = list(islice(rows, self.rows_at_once))

    def _pass(self) -> Iterator[dict[str, Any]]:
        self._rows.set_epoch(self.number_of_pass)
        return iter(self._rows)


def interleave(sources: list[datasets.IterableDataset]) -> datasets.IterableDataset:
    """Let sources take turns. Each row comes once: a short source does not repeat while a long one goes on."""
    from datasets import interleave_datasets

    if len(sources) == 1:
        return sources[0]
    return interleave_datasets(sources, stopping_strategy="all_exhausted_without_replacement")
