# Licensed under the Apache License, Version 2.0. This file travels with every published model.
"""From an encoder's token states to its part of a feature: pooling, and the layers that its makers put behind it.

Shape letters: B = texts, T = tokens per text, W = width of the token states, H = width of the result.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

POOLINGS = ("mean", "cls", "last", "max", "mean_sqrt", "weighted_mean")
ACTIVATIONS = {"identity": nn.Identity, "tanh": nn.Tanh, "gelu": nn.GELU, "relu": nn.ReLU}


def pool(states: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """Reduce (B, T, W) token states to (B, W), with padding on either side.

    `mean_sqrt` divides the sum by the square root of the number of tokens; `weighted_mean` weights the first token by
    1, the second by 2, and so on (Muennighoff, "SGPT", 2022).
    """
    if pooling in ("cls", "last"):
        positions = torch.arange(states.shape[1], device=states.device)
        mask_BT = attention_mask.long()
        # The first 1, or the last one.
        chosen = mask_BT.argmax(1) if pooling == "cls" else (mask_BT * positions).argmax(1)
        return states[torch.arange(states.shape[0], device=states.device), chosen]
    weights = attention_mask.unsqueeze(-1).to(states.dtype)
    if pooling == "max":
        return states.masked_fill(weights == 0, -torch.inf).amax(1)
    if pooling == "weighted_mean":
        weights = weights * weights.cumsum(1)
    count = weights.sum(1).clamp(min=1e-9)
    return (states * weights).sum(1) / (count.sqrt() if pooling == "mean_sqrt" else count)


def pooled_width(width: int, layers: Sequence[dict[str, Any]] | None) -> int:
    """Return H, the width after the layers of `config.pooled_layers`."""
    return layers[-1]["out_dim"] if layers else width


class PooledLayers(nn.Sequential):
    """The dense layers between pooling and feature, as the encoder's makers trained them."""

    def __init__(self, width: int, layers: Sequence[dict[str, Any]]) -> None:
        super().__init__()
        for layer in layers:
            self.append(_DenseLayer(width, **layer))
            width = layer["out_dim"]


class _DenseLayer(nn.Module):
    def __init__(self, width: int, out_dim: int, *, bias: bool, activation: str, normalize_input: bool) -> None:
        super().__init__()
        self.normalize_input = normalize_input
        self.linear = nn.Linear(width, out_dim, bias=bias)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, width) to (B, out_dim)."""
        x = x.to(self.linear.weight.dtype)  # pooling is done in float32
        return self.activation(self.linear(nn.functional.normalize(x, dim=-1) if self.normalize_input else x))
