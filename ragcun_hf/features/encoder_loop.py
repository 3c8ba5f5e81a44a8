"""The loop that runs the frozen encoder over many texts, in batches of similar length, tokenizing ahead."""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
from tqdm.auto import tqdm

from ..errors import UserError
from .tokenizing import CHARACTERS_PER_TOKEN, TokenBlock, text_size

if TYPE_CHECKING:
    from torch import Tensor

    from ..model.modeling_isotropic_gaussian import IsotropicGaussianModel
    from .encoder_backends import ComputeFeatures

# A block of texts is tokenized while the previous one is encoded, and goes to one process as a whole. Small blocks at
# the end, of about one batch, let all processes finish at about the same time. Sizes as `text_size` counts them.
BLOCK_SIZE = 65_536
LAST_BLOCK_SIZE = 16_384
_LAST_SHARE = 0.25
TOKEN_BUDGET = 4_096  # padded tokens per batch; the fastest of 1k to 16k on two AVX-512 cores
PADDING_SHARE = 0.05  # of a batch, at most

# On a card: a batch of 4k tokens computes in less time than it takes to start its kernels.
CARD_TOKEN_BUDGET = 65_536
CARD_BLOCK_SIZE, CARD_LAST_BLOCK_SIZE = 1_048_576, 262_144
CARD_PADDING_SHARE = 0.125
CARD_BATCHES_AHEAD = 8  # batches that are started before the first of them is read back

Item = TypeVar("Item")


@dataclass
class BatchLimits:
    """Limit a batch and say how it is padded; `token_budget` shrinks when a device runs out of memory."""

    token_budget: int  # padded tokens per batch
    padding_share: float  # of a batch, at most
    block_size: int
    last_block_size: int
    has_few_shapes: bool = False  # lengths and numbers of rows are rounded up, so that a card meets the same again
    batches_ahead: int = 0

    @classmethod
    def of(cls, device: torch.device) -> BatchLimits:
        """Return the limits for a kind of device."""
        if device.type != "cuda":
            return cls(TOKEN_BUDGET, PADDING_SHARE, BLOCK_SIZE, LAST_BLOCK_SIZE)
        limits = cls(CARD_TOKEN_BUDGET, CARD_PADDING_SHARE, CARD_BLOCK_SIZE, CARD_LAST_BLOCK_SIZE)
        limits.has_few_shapes, limits.batches_ahead = True, CARD_BATCHES_AHEAD
        return limits

    def padded_length(self, length: int, *, max_length: int) -> int:
        """Return the number of tokens that a text of some length is padded to, at least."""
        if not self.has_few_shapes:
            return length
        return max(length, min(_rounded_up(length, per_doubling=8, step=16), max_length))

    def padded_rows(self, num_rows: int, length: int) -> int:
        """Return the number of rows that a batch is padded to."""
        if not self.has_few_shapes:
            return num_rows
        most = max(num_rows, self.token_budget // length)
        return min(_rounded_up(num_rows, per_doubling=4, step=1), most)

    def shrink(self, num_tokens: int) -> None:
        """Lower the budget to half of a batch that did not fit, of `num_tokens`."""
        self.token_budget = min(self.token_budget, num_tokens // 2)


def _rounded_up(number: int, *, per_doubling: int, step: int) -> int:
    """Round up to a multiple of `step`, and of larger ones for larger numbers: some values from n to 2n.

    >>> [_rounded_up(number, per_doubling=4, step=1) for number in (3, 8, 9, 17, 33, 63)]
    [3, 8, 10, 20, 40, 64]
    """
    step = max(step, 2 ** (number - 1).bit_length() // 2 // per_doubling)
    return -(-number // step) * step


class WorkShare:
    """Assigns each block of texts to the process with the least work so far; every process repeats all assignments."""

    def __init__(self, number: int = 0, num_processes: int = 1) -> None:
        self.number, self.num_processes = number, num_processes
        self._loads = [(0, process) for process in range(num_processes)]  # a heap

    def deal(self, size: int) -> int:
        """Assign the next block, and return the number of the process that gets it."""
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
    limits: BatchLimits | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Run the encoder over distinct texts, longest first; yield positions and features, (rows, H) float32 on the CPU.

    The last bits of a feature depend on the other texts in its batch. So batches are formed as in one process, and the
    processes of a `share` together give exactly its features, if none runs out of memory. Features that are not finite
    are a UserError. The default `limits` are those of the model's device; they may shrink.
    """
    sizes = [text_size(text, max_length=model.config.max_length) for text in texts]
    share, limits = share or WorkShare(), limits or BatchLimits.of(model.device)
    progress = progress or EncodingProgress(is_shown=False)
    blocks = [block for block, size in blocks_by_size(texts, sizes, limits) if share.deal(size) == share.number]
    progress.begin([sizes[position] for block in blocks for position in block])

    def start_device() -> None:
        # Loading kernels and reserving memory takes a card as long as some batches: the longest texts' would be first.
        if limits.batches_ahead and len(blocks) > 1:
            length = max(1, sizes[blocks[0][0]] // CHARACTERS_PER_TOKEN)
            ones = torch.ones(max(1, limits.token_budget // length), length, dtype=torch.int64)
            _computed_if_it_fits(compute, ones, ones)

    started = (
        (block, rows, _ArrivingFeatures(features))
        for block in _tokenized_ahead(model, texts, blocks, prompt, meanwhile=start_device)
        for rows, features in _computed(block, compute, limits, max_length=model.config.max_length)
    )
    for block, rows, arriving in _behind(started, limits.batches_ahead):
        batch, features = [block.positions[row] for row in rows], arriving.read()
        if not bool(features.isfinite().all()):
            raise UserError(
                f"expected finite features, got NaN or infinity for text {batch[0] + 1} or another one in its batch: "
                "check the encoder, or try --encoder_dtype bfloat16 or float32"
            )
        progress.advance([sizes[position] for position in batch], num_tokens=int(block.lengths[rows].sum()))
        yield batch, features


def _behind(items: Iterable[Item], distance: int) -> Iterator[Item]:
    """Yield items in their order, each when `distance` more were taken."""
    waiting: deque[Item] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > distance:
            yield waiting.popleft()
    yield from waiting


class _ArrivingFeatures:
    """Features on their way to the CPU: a card goes on with its work until they are read, and after."""

    def __init__(self, features: Tensor) -> None:
        is_on_card = features.device.type == "cuda"
        self._features = features.to("cpu", non_blocking=is_on_card)  # into pinned memory
        self._is_copied = torch.cuda.Event() if is_on_card else None
        if self._is_copied is not None:
            self._is_copied.record(torch.cuda.current_stream(features.device))

    def read(self) -> Tensor:
        """Wait for the features, and return them."""
        if self._is_copied is not None:
            self._is_copied.synchronize()
        return self._features


def blocks_by_size(
    texts: Sequence[str], sizes: Sequence[int], limits: BatchLimits | None = None
) -> Iterator[tuple[list[int], int]]:
    """Group positions into blocks of similar cost, longest texts first; yield each block with its cost."""
    limits = limits or BatchLimits.of(torch.device("cpu"))
    block: list[int] = []
    size, size_left = 0, sum(sizes)
    size_of_last = _LAST_SHARE * size_left
    # Character counts predict token counts well enough to group texts of similar length before tokenizing.
    for position in sorted(range(len(texts)), key=lambda position: -len(texts[position])):
        block.append(position)
        size += sizes[position]
        size_left -= sizes[position]
        if size >= (limits.block_size if size_left > size_of_last else limits.last_block_size):
            yield block, size
            block, size = [], 0
    if block:
        yield block, size


def _tokenized_ahead(
    model: IsotropicGaussianModel,
    texts: Sequence[str],
    blocks: Sequence[list[int]],
    prompt: str,
    *,
    meanwhile: Callable[[], object],
) -> Iterator[TokenBlock]:
    """Yield each block with its token ids; a thread tokenizes the next block while the caller encodes this one.

    While the thread tokenizes the first block, `meanwhile` runs.
    """

    def tokenize(positions: list[int]) -> TokenBlock:
        token_ids = model.token_ids([prompt + texts[position] for position in positions])
        return TokenBlock.of(model.tokenizer, positions, token_ids)

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer") as thread:
        upcoming = None
        for block in blocks:
            current, upcoming = upcoming, thread.submit(tokenize, block)
            if current is None:
                meanwhile()
            else:
                yield current.result()
        if upcoming is not None:
            yield upcoming.result()


def _computed(
    block: TokenBlock, compute: ComputeFeatures, limits: BatchLimits, *, max_length: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Compute the features of a block in batches; yield rows and features.

    A batch that a device has too little memory for is halved until it fits, and later ones are smaller.
    """
    lengths = [limits.padded_length(length, max_length=max_length) for length in block.lengths.tolist()]
    for batch in batches_by_tokens(lengths, limits):
        parts = [batch]
        while parts:
            rows = parts.pop(0)
            length = lengths[rows[0]]
            most = max(1, limits.token_budget // length)
            if len(rows) > most:
                parts = [rows[:most], rows[most:], *parts]
                continue
            # More rows than there are texts repeat the last one.
            filled = rows + [rows[-1]] * (limits.padded_rows(len(rows), length) - len(rows))
            features = _computed_if_it_fits(compute, *block.batch(filled, length))
            if features is not None:
                yield rows, features[: len(rows)]
            elif len(filled) > 1:
                limits.shrink(len(filled) * length)
                parts = [rows, *parts]
            else:
                raise UserError(
                    f"expected memory for one text of {length} tokens, got too little: give the model a smaller "
                    "max_length, or free memory on the device"
                )


def _computed_if_it_fits(compute: ComputeFeatures, input_ids: Tensor, attention_mask: Tensor) -> Tensor | None:
    try:
        return compute(input_ids, attention_mask)
    except torch.OutOfMemoryError:
        pass  # the error holds the tensors of the attempt: free memory when it is gone
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return None


def batches_by_tokens(lengths: Sequence[int], limits: BatchLimits | None = None) -> Iterator[list[int]]:
    """Group positions of similar length (in tokens) into batches, longest first, so that a lack of memory shows early.

    A batch stays within the token budget, padding included, unless it is a single text; the padding stays small.
    """
    limits = limits or BatchLimits.of(torch.device("cpu"))
    batch: list[int] = []
    num_tokens = 0
    for position in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        padded = (len(batch) + 1) * lengths[batch[0]] if batch else 0
        if padded > limits.token_budget or padded * (1 - limits.padding_share) > num_tokens + lengths[position]:
            yield batch
            batch, num_tokens = [], 0
        batch.append(position)
        num_tokens += lengths[position]
    if batch:
        yield batch


class EncodingProgress:
    """One progress bar over several rounds.

    Long texts come first, so the time left follows from the amount of text, not from the number of texts. The
    `num_upcoming` texts of later rounds are expected to be like those so far.
    """

    def __init__(self, *, is_shown: bool = True) -> None:
        self.num_upcoming = 0
        self._is_shown = is_shown
        self._bar: Any = None
        self._started = time.perf_counter()
        self._size_left = self._size_done = self._num_tokens = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if self._bar is None:
            return
        if error_type is None:
            self._bar.total = self._bar.n  # later rounds may have had nothing to encode
        self._bar.close()

    def begin(self, sizes: Sequence[int]) -> None:
        """Start a round, given the size of each text in it; the first round with a text shows the bar."""
        if not self._is_shown or (self._bar is None and not sizes):
            return
        if self._bar is None:
            self._started = time.perf_counter()
            bar_format = "{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}"
            self._bar = tqdm(desc="Encoding", bar_format=bar_format, total=len(sizes) + self.num_upcoming)
        self._size_left += sum(sizes)
        self._bar.total = self._bar.n + len(sizes) + self.num_upcoming

    def advance(self, sizes: Sequence[int], *, num_tokens: int) -> None:
        """Count texts as encoded."""
        if self._bar is None:
            return
        size = sum(sizes)
        self._size_left, self._size_done = self._size_left - size, self._size_done + size
        self._num_tokens += num_tokens
        self._bar.update(len(sizes))
        seconds = time.perf_counter() - self._started
        size_left = self._size_left + self.num_upcoming * self._size_done / self._bar.n
        left = tqdm.format_interval(seconds * size_left / self._size_done)
        speeds = f"{self._bar.n / seconds:,.0f} texts/s, {self._num_tokens / seconds:,.0f} tokens/s, {left} left"
        self._bar.set_postfix_str(speeds, refresh=False)
