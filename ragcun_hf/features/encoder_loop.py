"""The loop that runs the frozen encoder over many texts: batches of like length, the next ones tokenized ahead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..errors import UserError
from ..read_ahead import one_ahead
from .encoding_progress import EncodingProgress, text_size

if TYPE_CHECKING:
    from torch import Tensor

    from ..modeling_isotropic_gaussian import IsotropicGaussianModel
    from .encoder_backends import ComputeFeatures

_TEXTS_AHEAD = 1_024  # texts tokenized while those before run; sorting inside them leaves little padding
_LEAST_BLOCKS = 16  # so that several processes can share few texts evenly
_TOKEN_BUDGET = 4_096  # padded tokens per batch; the fastest of 1k to 16k on two AVX-512 cores
_PADDING_SHARE = 0.05  # of a batch


def encode_in_batches(
    model: IsotropicGaussianModel,
    texts: Sequence[str],
    *,
    compute: ComputeFeatures,
    prompt: str = "",
    progress: EncodingProgress | None = None,
    share: tuple[int, int] = (0, 1),
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
        share: This process's number and how many there are: each does its part of the tokens.

    Yields:
        tuple[list[int], Tensor]: Positions in `texts` and their features, shape (rows, H), float32, on the CPU.
            Every position comes once, in one of the processes.

    Raises:
        UserError: If a feature is not finite.
    """
    sizes = [text_size(text, max_length=model.config.max_length) for text in texts]
    blocks = _own_blocks(texts, sizes, *share)
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


def _own_blocks(texts: Sequence[str], sizes: Sequence[int], rank: int, num_processes: int) -> list[list[int]]:
    """Part positions into blocks of like length, and return this process's: each goes to whoever has least to do."""
    # Characters foretell tokens well enough to bring like lengths together before anything is tokenized.
    order = sorted(range(len(texts)), key=lambda position: -len(texts[position]))
    step = min(_TEXTS_AHEAD, max(1, -(-len(order) // _LEAST_BLOCKS)))
    loads, own = [0] * num_processes, []
    for start in range(0, len(order), step):
        block = order[start : start + step]
        least = loads.index(min(loads))
        loads[least] += sum(sizes[position] for position in block)
        if least == rank:
            own.append(block)
    return own


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
