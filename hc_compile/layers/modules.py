"""Thin modules that own the weights and tables of `functions`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hc_compile.layers.functions import apply_rope, fused_swiglu, rms_norm, rope_tables

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "tanh": nn.Tanh,
}


def get_activation(name: str) -> nn.Module:
    """A new activation module by name: "gelu", "relu", "silu" ("swish") or "tanh"."""
    if name not in ACTIVATIONS:
        raise ValueError(f"name must be one of {tuple(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]()


class RMSNorm(nn.Module):
    """`rms_norm` with a learned weight [C], initially ones, or none without elementwise_affine."""

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        elementwise_affine: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        weight = torch.ones(dim, device=device, dtype=dtype) if elementwise_affine else None
        self.weight = None if weight is None else nn.Parameter(weight)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, elementwise_affine={self.weight is not None}"

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        return rms_norm(x, self.weight, self.eps)


class SwiGLUMLP(nn.Module):
    """W_down (silu(W_gate x) ⊙ W_up x), gate and up in one projection.

    Args:
        dim: C. hidden_dim: F ≥ 1.
        dropout: of the output. bias: of both projections.
    """

    def __init__(
        self, dim: int, hidden_dim: int, dropout: float = 0.0, bias: bool = False
    ) -> None:
        super().__init__()
        if hidden_dim < 1:
            raise ValueError(f"hidden_dim must be at least 1, got {hidden_dim}")
        self.gate_up = nn.Linear(dim, 2 * hidden_dim, bias=bias)
        self.down = nn.Linear(hidden_dim, dim, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.dropout(self.down(fused_swiglu(gate, up)))


class RotaryEmbedding(nn.Module):
    """Rotary positions with one pair of tables, for every layer that is given this instance.

    Args:
        head_dim: D, even. max_seq_len: rows of the tables.
        theta: base of the frequencies. scaling_factor: divides the positions.
        interleaved: see `apply_rope`.

    The tables stay float32 when the model goes to bfloat16, and no state dict holds them.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        head_dim: int,
        max_seq_len: int = 8192,
        theta: float = 10_000.0,
        scaling_factor: float = 1.0,
        interleaved: bool = True,
    ) -> None:
        super().__init__()
        self.max_seq_len, self.interleaved = max_seq_len, interleaved
        tables = rope_tables(max_seq_len, head_dim, theta, scaling_factor=scaling_factor)
        for name, table in zip(("cos", "sin"), tables, strict=True):
            self.register_buffer(name, table.to(torch.get_default_device()), persistent=False)

    def _apply(self, fn: Callable, recurse: bool = True) -> RotaryEmbedding:
        tables = self.cos, self.sin
        super()._apply(fn, recurse)
        if self.cos.dtype in (torch.bfloat16, torch.float16):
            self.cos, self.sin = (table.to(self.cos.device) for table in tables)
        return self

    def get_cos_sin(self, seq_len: int, start: int = 0) -> tuple[Tensor, Tensor]:
        """cos and sin [seq_len, D/2] of the positions from `start` on."""
        if start < 0 or start + seq_len > self.max_seq_len:
            raise ValueError(
                f"start and seq_len must stay within max_seq_len = {self.max_seq_len}, "
                f"got {start} + {seq_len}"
            )
        return self.cos[start : start + seq_len], self.sin[start : start + seq_len]

    def forward(self, x: Tensor, seq_len: int | None = None, *, start: int = 0) -> Tensor:
        """Rotate x [B, H, S, D], whose first position is `start`; seq_len, if given, is S."""
        if seq_len is not None and seq_len != x.shape[-2]:
            raise ValueError(f"seq_len must be S = {x.shape[-2]}, got {seq_len}")
        return apply_rope(x, *self.get_cos_sin(x.shape[-2], start), self.interleaved)
