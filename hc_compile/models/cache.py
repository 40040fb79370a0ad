"""Keys and values of a generating model; hyper-connections are per token and need no cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hc_compile.models.layers import attend_causally

LayerAttend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class KVCache:
    """Keys and values of every layer in buffers that never change place or shape.

    `length` lives on the device, so that compiled code and CUDA graphs serve every position.
    Fill it without gradients (torch.no_grad or torch.inference_mode).

    Args:
        layers: number of attention layers.
        batch, heads, max_seq_len, head_dim: sizes of each [B, H, max_seq_len, D] buffer.
        device, dtype: of the buffers.

    Attributes:
        length: [B] int64, positions written in each row; the next token goes there. A write
            behind max_seq_len is an index error (on a GPU a device-side assertion).
        limit: how many positions `append` returns; None returns all, whatever is written.
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
        size = (batch, heads, max_seq_len, head_dim)
        self.keys = [torch.zeros(size, device=device, dtype=dtype) for _ in range(layers)]
        self.values = [torch.zeros(size, device=device, dtype=dtype) for _ in range(layers)]
        self.length = torch.zeros(batch, device=device, dtype=torch.int64)
        self.rows = torch.arange(batch, device=self.length.device).unsqueeze(1)
        self.slots = torch.arange(max_seq_len, device=self.length.device)
        for buffer in (*self.keys, *self.values, self.length, self.rows, self.slots):
            torch._dynamo.mark_static_address(buffer)  # CUDA graphs may write it in place
        self.max_seq_len = max_seq_len
        self.limit: int | None = None
        self.empty = True

    def positions(self, tokens: int) -> Tensor:
        """Where the next `tokens` tokens of each row go, [B, S] int64."""
        return self.length.unsqueeze(1) + torch.arange(tokens, device=self.length.device)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write [B, H, S, D] behind the positions already there; the buffers up to `limit`."""
        self._write(layer, self.positions(keys.shape[-2]), keys, values)
        return self.keys[layer][:, :, : self.limit], self.values[layer][:, :, : self.limit]

    def _write(self, layer: int, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        index = (self.rows, slice(None), positions)
        self.keys[layer][index] = keys.transpose(1, 2)
        self.values[layer][index] = values.transpose(1, 2)

    def attention(self, tokens: int) -> LayerAttend:
        """Causal attention of the next S tokens to themselves and to all that is written.

        Returns: (layer, query, key, value), each [B, H, S, D] -> [B, H, S, D], which also appends.
            The first tokens of an empty cache see only themselves; all others read the whole
            buffers under a mask, so that no shape depends on how much is written.
        """
        positions, keep = self.positions(tokens), None
        if tokens == 1 or not self.empty:
            keep = self.slots <= positions[:, None, :, None]

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self._write(layer, positions, key, value)
            if keep is None:
                return attend_causally(query, key, value)
            key, value = self.keys[layer], self.values[layer]
            return F.scaled_dot_product_attention(query, key, value, attn_mask=keep)

        return attend

    def advance(self, tokens: int) -> None:
        """Count `tokens` positions as written, once every layer has appended them."""
        self.length += tokens
        self.empty = False

    def reset(self, length: Tensor | int = 0) -> None:
        """Keep the first `length` positions of each row: a number, or [B] int64.

        0 starts anew in the same memory; the lengths of prompts that were padded on the right
        make what follows overwrite the padding; fewer than are written take tokens back.
        """
        if isinstance(length, Tensor):
            if self.limit is not None:
                raise ValueError("length must be a number where all rows go in step, got a tensor")
            self.length.copy_(length)
            self.empty = False
            return
        self.length.fill_(length)
        self.empty = length == 0
        self.limit = None if self.limit is None else length
