"""The Transformer's two branches, causal attention and SwiGLU, as functions and as modules.

Legend: B batch, S positions, C hidden size of one stream, H heads, D head size (C = H·D), F hidden
size of the MLP. Everything is plain torch that Inductor fuses; there is no kernel here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hc_compile.layers import apply_rope, check_last_dim, fused_swiglu, linear

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend_causally(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q kᵀ/√D) v over the positions up to each query's own, by torch's SDPA.

    Args:
        query, key, value: [B, H, S, D].
    Returns: [B, H, S, D].
    """
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def causal_attention(
    x: Tensor,
    w_qkv: Tensor,
    w_out: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    attend: Attend = attend_causally,
) -> Tensor:
    """Multi-head causal self-attention with rotary positions.

    Args:
        x: [B, S, C], floating.
        w_qkv: [3C, C], rows ordered query, key, value.
        w_out: [C, C].
        cos, sin: [S, D/2], or [B, 1, S, D/2] where rows are at positions of their own.
        heads: H, divides C.
        attend: what mixes query, key and value; a cache brings its own.
    Returns: [B, S, C].
    Raises:
        ValueError: on a wrong rank or size.
    """
    if x.dim() != 3:
        raise ValueError(f"x must be [B, S, C], got {list(x.shape)}")
    check_last_dim("x", x, w_out.shape[0])
    qkv = linear(x, w_qkv).unflatten(-1, (3, heads, -1))
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    query, key = apply_rope(query, cos, sin), apply_rope(key, cos, sin)
    mixed = attend(query, key, value)
    return linear(mixed.transpose(1, 2).flatten(-2), w_out)


def swiglu(x: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """W_down (silu(W_gate x) ⊙ W_up x).

    Args:
        x: [..., C], floating.
        w_gate_up: [2F, C], rows ordered gate, up.
        w_down: [C, F].
    Returns: [..., C].
    Raises:
        ValueError: when the last dimension of x is not C.
    """
    check_last_dim("x", x, w_gate_up.shape[1])
    gate, up = linear(x, w_gate_up).chunk(2, dim=-1)
    return linear(fused_swiglu(gate, up), w_down)


class CausalAttention(nn.Module):
    """`causal_attention` with its weights; `w_out` is the branch's output projection."""

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim = {dim}, got {heads}")
        self.heads = heads
        self.w_qkv = nn.Parameter(torch.empty(3 * dim, dim, device=device, dtype=dtype))
        self.w_out = nn.Parameter(torch.empty(dim, dim, device=device, dtype=dtype))

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend = attend_causally
    ) -> Tensor:
        """x [B, S, C], tables [S, D/2] -> [B, S, C]."""
        return causal_attention(x, self.w_qkv, self.w_out, cos, sin, self.heads, attend)


class SwiGLU(nn.Module):
    """`swiglu` with its weights; `w_out` is the branch's output projection."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden}")
        self.w_gate_up = nn.Parameter(torch.empty(2 * hidden, dim, device=device, dtype=dtype))
        self.w_out = nn.Parameter(torch.empty(dim, hidden, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        return swiglu(x, self.w_gate_up, self.w_out)
