"""The loop that runs the frozen encoder over many texts, in batches of similar length, tokenizing ahead."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self

from tqdm.auto import tqdm

from ..errors import UserError

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
_CHARACTERS_PER_TOKEN = 4  # of English


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
) -> Iterator[tuple[list[int], Tensor]]:
    """Run the encoder over distinct texts, longest first; yield positions and features, (rows, H) float32 on the CPU.

    The last bits of a feature depend on the other texts in its batch. So batches are formed as in one process, and the
    processes of a `share` together give exactly its features. Features that are not finite are a UserError.
    """
    sizes = [text_size(text, max_length=model.config.max_length) for text in texts]
    share = share or WorkShare()
    progress = progress or EncodingProgress(is_shown=False)
    blocks = [block for block, size in blocks_by_size(texts, sizes) if share.deal(size) == share.number]
    progress.begin([sizes[position] for block in blocks for position in block])
    for positions, token_ids in _tokenized_ahead(model, texts, blocks, prompt):
        for rows in batches_by_tokens([len(ids) for ids in token_ids]):
            batch = [positions[row] for row in rows]
            tokens = model.pad([token_ids[row] for row in rows])
            features = compute(tokens["input_ids"], tokens["attention_mask"])
            if not bool(features.isfinite().all()):
                raise UserError(
                    f"expected finite features, got NaN or infinity for text {batch[0] + 1} or another one in its "
                    "batch: check the encoder, or try --encoder_dtype float32"
                )
            num_tokens = sum(len(token_ids[row]) for row in rows)
            progress.advance([sizes[position] for position in batch], num_tokens=num_tokens)
            yield batch, features


def text_size(text: str, *, max_length: int) -> int:
    """Estimate the cost of encoding a text, in characters; truncated characters cost nothing."""
    return 1 + min(len(text), _CHARACTERS_PER_TOKEN * max_length)


def blocks_by_size(texts: Sequence[str], sizes: Sequence[int]) -> Iterator[tuple[list[int], int]]:
    """Group positions into blocks of similar cost, longest texts first; yield each block with its cost."""
    block: list[int] = []
    size, size_left = 0, sum(sizes)
    size_of_last = _LAST_SHARE * size_left
    # Character counts predict token counts well enough to group texts of similar length before tokenizing.
    for position in sorted(range(len(texts)), key=lambda position: -len(texts[position])):
        block.append(position)
        size += sizes[position]
        size_left -= sizes[position]
        if size >= (BLOCK_SIZE if size_left > size_of_last else LAST_BLOCK_SIZE):
            yield block, size
            block, size = [], 0
    if block:
        yield block, size


def _tokenized_ahead(
    model: IsotropicGaussianModel, texts: Sequence[str], blocks: Sequence[list[int]], prompt: str
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Yield each block with its token ids; a thread tokenizes the next block while the caller encodes this one."""

    def tokenize(positions: list[int]) -> tuple[list[int], list[list[int]]]:
        block = [prompt + texts[position] for position in positions]
        tokens = model.tokenizer(
            block, truncation=True, max_length=model.config.max_length, return_token_type_ids=False
        )
        # A blank text without special tokens becomes one padding token, as in the model's own `tokenize`.
        return positions, [ids or [model.tokenizer.pad_token_id] for ids in tokens["input_ids"]]

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer") as thread:
        upcoming = None
        for block in blocks:
            current, upcoming = upcoming, thread.submit(tokenize, block)
            if current is not None:
                yield current.result()
        if upcoming is not None:
            yield upcoming.result()


def batches_by_tokens(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Group positions of similar length (in tokens) into batches, longest first, so that a lack of memory shows early.

    A batch stays within the token budget, padding included, unless it is a single text; the padding stays small.
    """
    batch: list[int] = []
    num_tokens = 0
    for position in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        padded = (len(batch) + 1) * lengths[batch[0]] if batch else 0
        if padded > TOKEN_BUDGET or padded * (1 - PADDING_SHARE) > num_tokens + lengths[position]:
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
