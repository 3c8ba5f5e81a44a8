"""The loop that runs the frozen encoder over many texts: batches of like length, half precision where it is native."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import UserError

if TYPE_CHECKING:
    from ..modeling_isotropic_gaussian import IsotropicGaussianModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_WINDOW = 16_384  # texts tokenized together; bounds memory, and sorting inside it leaves little padding
_TOKEN_BUDGET = 8_192  # padded tokens per batch; the fastest of 2k to 16k on two AVX-512 cores


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Choose the arithmetic of the encoder.

    Args:
        name: `float32`, `bfloat16`, or `auto`: bfloat16 where the processor computes it natively.
        device: Where the encoder runs.

    Returns:
        The torch dtype.

    Raises:
        UserError: On an unknown name.
    """
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise UserError(f"expected an encoder dtype of auto, {' or '.join(DTYPES)}, got {name!r}: change the flag")
    return torch.bfloat16 if _has_native_bfloat16(device) else torch.float32


def _has_native_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    # No public query exists in every supported torch; without this one, float32 is the safe answer.
    query = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(query and query())


def encode_in_batches(
    model: IsotropicGaussianModel,
    texts: Sequence[str],
    *,
    prompt: str = "",
    dtype: torch.dtype = torch.float32,
    show_progress: bool = False,
) -> Iterator[tuple[list[int], Tensor]]:
    """Run the encoder over texts, window by window, longest batch first.

    Args:
        model: Its encoder, pooling, normalisation, length and tokenizer are used; it must be in evaluation mode.
        texts: Any number; equal texts are encoded again, so pass distinct ones.
        prompt: Put before every text.
        dtype: Arithmetic of the encoder; features come out in float32.
        show_progress: Show texts and tokens per second with the time left.

    Yields:
        tuple[list[int], Tensor]: Positions in `texts` and their features, shape (rows, H), float32, on the CPU.
            Every position comes once.
    """
    bar = tqdm(total=len(texts), desc="Encoding", unit="text", disable=not show_progress, smoothing=0.1)
    started, num_tokens = time.perf_counter(), 0
    with bar:
        for start in range(0, len(texts), _WINDOW):
            window = [prompt + text for text in texts[start : start + _WINDOW]]
            token_ids = model.tokenizer(
                window, truncation=True, max_length=model.config.max_length, return_token_type_ids=False
            )["input_ids"]
            for rows in _batches_by_tokens([len(ids) for ids in token_ids]):
                features = _encode_batch(model, [token_ids[row] for row in rows], dtype)
                num_tokens += sum(len(token_ids[row]) for row in rows)
                bar.update(len(rows))
                bar.set_postfix_str(f"{num_tokens / (time.perf_counter() - started):,.0f} tokens/s", refresh=False)
                yield [start + row for row in rows], features


def _batches_by_tokens(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Group positions so that rows times longest row stays within the budget; longest first, to fail early."""
    batch: list[int] = []
    for position in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > _TOKEN_BUDGET:
            yield batch
            batch = []
        batch.append(position)
    if batch:
        yield batch


@torch.inference_mode()
def _encode_batch(model: IsotropicGaussianModel, token_ids: list[list[int]], dtype: torch.dtype) -> Tensor:
    tokens = model.tokenizer.pad({"input_ids": token_ids}, return_tensors="pt").to(model.device)
    with torch.autocast(model.device.type, dtype=dtype, enabled=dtype != torch.float32):
        features = model.compute_features(tokens["input_ids"], tokens["attention_mask"])
    return features.float().cpu()
