"""Do the next piece of preparatory work while the caller still uses the last one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def one_ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Apply a function to each item in a thread, always one item ahead of the caller.

    Args:
        function: Best one that waits for a disk or computes outside of Python's lock.
        items: In order; taken one by one, by the caller's thread.

    Yields:
        Result: What the function returns, in the order of the items. What it raises is raised in its turn.

    Example:
        >>> list(one_ahead(str.upper, ["a", "b", "c"]))
        ['A', 'B', 'C']
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="one_ahead") as thread:
        upcoming = None
        for item in items:
            last, upcoming = upcoming, thread.submit(function, item)
            if last is not None:
                yield last.result()
        if upcoming is not None:
            yield upcoming.result()
