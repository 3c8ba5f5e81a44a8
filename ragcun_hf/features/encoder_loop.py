"""The loop that runs the frozen encoder over many texts: batches of like length, the next ones tokenized ahead."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self, TypeVar

from tqdm.auto import tqdm

from ..errors import UserError

if TYPE_CHECKING:
    from types import TracebackType

    from torch import Tensor

    from ..model.modeling_isotropic_gaussian import IsotropicGaussianModel
    from .encoder_backends import ComputeFeatures

_BLOCK_SIZE = 65_536  # as `text_size` counts; tokenized while the block before runs, and dealt out as one
_LAST_BLOCK_SIZE = 16_384  # of the last texts: about one batch, with which processes come to end together
_LAST_SHARE = 0.25
_TOKEN_BUDGET = 4_096  # padded tokens per batch; the fastest of 1k to 16k on two AVX-512 cores
_PADDING_SHARE = 0.05  # of a batch


class WorkShare:
    """Deals out blocks of texts: each goes to the process that has least to do so far.

    Args:
        number: This process's, from 0.
        num_processes: How many share the work; all have to be asked about the same blocks in the same order.
    """

    def __init__(self, number: int = 0, num_processes: int = 1) -> None:
        self.number, self.num_processes = number, num_processes
        self._loads = [(0, process) for process in range(num_processes)]  # a heap

    def deal(self, size: int) -> int:
        """Deal out the next block, and return the number of the process that gets it."""
        load, process = self._loads[0]
        heapq.heapreplace(self._loads, (load + size, process))
        return process


def encode_in_batches(
    model: IsotropicGaussianModel,
    texts: Sequence[str],
    *,
    compute: ComputeFeatures,
    prompt: str = "",
    progress: EncodingProgress | None = None,
    share: WorkShare | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Run the encoder over texts, longest first, tokenizing the next ones meanwhile.

    A feature depends in its last bits on what shares its batch. Batches are therefore formed as if one process did
    all the work, and several give exactly what one gives.

    Args:
        model: Its tokenizer and length are used.
        texts: Any number; equal texts are encoded again, so pass distinct ones.
        compute: Turns token ids and mask, both (rows, T), into features; see `encoder_backends`.
        prompt: Put before every text.
        progress: Told what is encoded.
        share: Which blocks of the texts are encoded by this process; None encodes all.

    Yields:
        tuple[list[int], Tensor]: Positions in `texts` and their features, shape (rows, H), float32, on the CPU.
            Every position comes once, in one of the processes.

    Raises:
        UserError: If a feature is not finite.
    """
    sizes = [text_size(text, max_length=model.config.max_length) for text in texts]
    share = share or WorkShare()
    blocks = [block for block, size in _blocks(texts, sizes) if share.deal(size) == share.number]
    if progress is not None:
        progress.begin([sizes[position] for block in blocks for position in block])
    for positions, token_ids in _tokenized_ahead(model, texts, blocks, prompt):
        for rows in batches_by_tokens([len(ids) for ids in token_ids]):
            batch = [positions[row] for row in rows]
            tokens = model.tokenizer.pad({"input_ids": [token_ids[row] for row in rows]}, return_tensors="pt")
            features = compute(tokens["input_ids"], tokens["attention_mask"])
            if not bool(features.isfinite().all()):
                raise UserError(
                    f"expected finite features, got NaN or infinity for text {batch[0] + 1} or one like it: check "
                    "the encoder, or try --encoder_dtype float32"
                )
            if progress is not None:
                num_tokens = sum(len(token_ids[row]) for row in rows)
                progress.advance([sizes[position] for position in batch], num_tokens=num_tokens)
            yield batch, features


def _blocks(texts: Sequence[str], sizes: Sequence[int]) -> Iterator[tuple[list[int], int]]:
    """Part positions into blocks of like length and cost, the longest texts first; yield each one's cost, too."""
    block: list[int] = []
    size, size_left = 0, sum(sizes)
    size_of_last = _LAST_SHARE * size_left
    # Characters foretell tokens well enough to bring like lengths together before anything is tokenized.
    for position in sorted(range(len(texts)), key=lambda position: -len(texts[position])):
        block.append(position)
        size += sizes[position]
        size_left -= sizes[position]
        if size >= (_BLOCK_SIZE if size_left > size_of_last else _LAST_BLOCK_SIZE):
            yield block, size
            block, size = [], 0
    if block:
        yield block, size


def _tokenized_ahead(
    model: IsotropicGaussianModel, texts: Sequence[str], blocks: Sequence[list[int]], prompt: str
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Yield positions and token ids of like-long texts, tokenized while the block before runs."""

    def tokenize(positions: list[int]) -> tuple[list[int], list[list[int]]]:
        block = [prompt + texts[position] for position in positions]
        tokens = model.tokenizer(
            block, truncation=True, max_length=model.config.max_length, return_token_type_ids=False
        )
        # A blank text without special tokens is one padding token, as in the model's own `tokenize`.
        return positions, [ids or [model.tokenizer.pad_token_id] for ids in tokens["input_ids"]]

    yield from one_ahead(tokenize, blocks)


def batches_by_tokens(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Group positions of like length, longest first, to fail early.

    Args:
        lengths: Tokens of each text.

    Yields:
        list[int]: Positions. Rows times longest row stays within the budget (a longer text goes alone), and hardly
            anything of it is padding.
    """
    batch: list[int] = []
    num_tokens = 0
    for position in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        padded = (len(batch) + 1) * lengths[batch[0]] if batch else 0
        if padded > _TOKEN_BUDGET or padded * (1 - _PADDING_SHARE) > num_tokens + lengths[position]:
            yield batch
            batch, num_tokens = [], 0
        batch.append(position)
        num_tokens += lengths[position]
    if batch:
        yield batch


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
