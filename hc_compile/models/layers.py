"""RMSNorm, RoPE, SwiGLU and causal attention as pure functions, and thin modules that own weights.

Legend: B batch, S positions, C hidden size of one stream, H heads, D head size (C = H·D), F hidden
size of the MLP. Everything is plain torch that Inductor fuses; there is no kernel here.

Weights may be kept in a wider dtype than the activations: `linear` casts them to the input's dtype
at the point of use, so bf16 streams run through fp32 master weights without autocast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def check_last_dim(name: str, tensor: Tensor, expected: int) -> None:
    """Raise ValueError unless `tensor` is floating point with last dimension `expected`."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must have a floating dtype, got {tensor.dtype}")
    if tensor.dim() == 0 or tensor.shape[-1] != expected:
        raise ValueError(f"{name} must be [..., {expected}], got {list(tensor.shape)}")


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ in x's dtype, whatever dtype the weight is stored in.

    Args:
        x: [..., in], floating.
        weight: [out, in], floating; cast to x's dtype.
    Returns: [..., out] in x's dtype (or autocast's).
    """
    return F.linear(x, weight.to(x.dtype))


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, computed in fp32 or wider.

    Args:
        x: [..., C], floating.
        weight: [C], floating.
        eps: inside the root, ≥ 0.
    Returns: [..., C] in x's dtype.
    Raises:
        ValueError: when the last dimensions of x and weight differ.
    """
    check_last_dim("x", x, weight.shape[0])
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight).to(x.dtype)


def rope_tables(
    positions: int, head_dim: int, base: float = 10_000.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles t · base^(-2i/D) for t < positions, i < D/2.

    Returns: (cos, sin), each [positions, D/2] in `dtype`.
    Raises:
        ValueError: when head_dim is odd or either size is not positive.
    """
    if positions < 1:
        raise ValueError(f"positions must be at least 1, got {positions}")
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim must be even and positive, got {head_dim}")
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    angle = torch.outer(torch.arange(positions, dtype=torch.float64), base**-exponent)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves (x₁, x₂) of each head to (x₁cos − x₂sin, x₂cos + x₁sin) (half-split form).

    Args:
        x: [B, H, S, D], floating.
        cos, sin: [S, D/2], the rows of `rope_tables` for these positions.
    Returns: [B, H, S, D] in x's dtype.
    Raises:
        ValueError: when the tables do not fit x.
    """
    expected = [x.shape[-2], x.shape[-1] // 2]
    if list(cos.shape) != expected or list(sin.shape) != expected:
        raise ValueError(
            f"cos and sin must be [S, D/2] = {expected}, "
            f"got {list(cos.shape)} and {list(sin.shape)}"
        )
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


def causal_attention(
    x: Tensor, w_qkv: Tensor, w_out: Tensor, cos: Tensor, sin: Tensor, heads: int
) -> Tensor:
    """Multi-head causal self-attention with rotary positions, by torch's SDPA.

    Args:
        x: [B, S, C], floating.
        w_qkv: [3C, C], rows ordered query, key, value.
        w_out: [C, C].
        cos, sin: [S, D/2].
        heads: H, divides C.
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
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
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
    return linear(F.silu(gate) * up, w_down)


class RMSNorm(nn.Module):
    """`rms_norm` with a learned weight [C], initially ones."""

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        return rms_norm(x, self.weight, self.eps)


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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, S, C], tables [S, D/2] -> [B, S, C]."""
        return causal_attention(x, self.w_qkv, self.w_out, cos, sin, self.heads)


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
