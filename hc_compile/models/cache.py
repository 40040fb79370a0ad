"""Keys and values of a generating model; hyper-connections are per token and need no cache."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer, written in place.

    Args:
        layers: number of attention layers.
        batch, heads, max_seq_len, head_dim: sizes of each [B, H, max_seq_len, D] buffer.
        device, dtype: of the buffers.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        max_seq_len: int,
        head_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        size = (layers, batch, heads, max_seq_len, head_dim)
        self.keys = torch.zeros(size, device=device, dtype=dtype)
        self.values = torch.zeros(size, device=device, dtype=dtype)
        self.max_seq_len = max_seq_len
        self.length = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write [B, H, S, D] behind the `length` positions already there; all of them return."""
        end = self.length + keys.shape[-2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, tokens: int) -> None:
        """Count `tokens` positions as written, once every layer has appended them."""
        self.length += tokens
