"""Answer queries that come at the same time together, without letting one alone wait.

Gradio has batches too (`batch=True`), but there a request with too few values fails all requests of its batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Batches(Generic[Item, Answer]):
    """Run a function on batches of items, in one thread: while it answers a batch, the next one gathers.

    Args:
        answer_all: Returns one answer for each item, in their order. If it raises, each item of the batch is tried
            alone, so that an item fails by its own fault only.
        most: Items in a batch, at most.

    Example:
        >>> lengths = Batches(lambda words: [len(word) for word in words], most=32)
        >>> lengths.submit("fish").result()
        4
    """

    def __init__(self, answer_all: Callable[[Sequence[Item]], Sequence[Answer]], *, most: int) -> None:
        self._answer_all, self._most = answer_all, most
        self._waiting: deque[tuple[Item, Future[Answer]]] = deque()
        # One thread, as tokenizers and models are not safe for several, and torch keeps threads of its own for each.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")

    def submit(self, item: Item) -> Future[Answer]:
        """Return the future answer to an item; one that is canceled before its batch starts costs nothing."""
        future: Future[Answer] = Future()
        self._waiting.append((item, future))
        # Once for each item: where an earlier batch took the item along, there is nothing left to do.
        self._thread.submit(self._answer_waiting)
        return future

    def _answer_waiting(self) -> None:
        batch: list[tuple[Item, Future[Answer]]] = []
        while self._waiting and len(batch) < self._most:
            item, future = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                batch.append((item, future))
        if batch:
            self._answer(batch)

    def _answer(self, batch: list[tuple[Item, Future[Answer]]]) -> None:
        try:
            answers = list(zip(batch, self._answer_all([item for item, _ in batch]), strict=True))
        except Exception as error:  # noqa: BLE001 (whatever it is, it goes to whoever asked)
            if len(batch) == 1:
                batch[0][1].set_exception(error)
            else:
                for each in batch:
                    self._answer([each])
            return
        for (_, future), answer in answers:
            future.set_result(answer)
