"""RMSNorm, rotary positions, QK-norm and SwiGLU as pure functions.

Legend: B batch, S positions, C hidden size of one stream, H heads, D head size. Everything is
plain torch; "fused" says what Inductor makes of it, forward and backward, with its neighbours.

Weights may be kept in a wider dtype than the activations: `linear` casts them to the input's dtype
at the point of use, so bf16 streams run through fp32 master weights without autocast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def check_last_dim(name: str, tensor: Tensor, expected: int) -> None:
    """Raise ValueError unless `tensor` is floating point with last dimension `expected`."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must have a floating dtype, got {tensor.dtype}")
    if tensor.dim() == 0 or tensor.shape[-1] != expected:
        raise ValueError(f"{name} must be [..., {expected}], got {list(tensor.shape)}")


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ in x's dtype, whatever dtype the weight is stored in.

    Args:
        x: [..., in], floating.
        weight: [out, in], floating; cast to x's dtype.
    Returns: [..., out] in x's dtype (or autocast's).
    """
    return F.linear(x, weight.to(x.dtype))


def rms_norm(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, computed in fp32 or wider.

    Args:
        x: [..., C], floating.
        weight: [C], floating, or None for ones.
        eps: inside the root, ≥ 0.
    Returns: [..., C] in x's dtype.
    Raises:
        ValueError: when the last dimensions of x and weight differ.
    """
    check_last_dim("x", x, x.shape[-1] if weight is None else weight.shape[0])
    wide = _wide(x)
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (scaled if weight is None else scaled * weight).to(x.dtype)


fused_rms_norm = rms_norm


def rope_tables(
    positions: int,
    head_dim: int,
    base: float = 10_000.0,
    dtype: torch.dtype = torch.float32,
    scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles t · base^(-2i/D) / scaling_factor, t < positions.

    Returns: (cos, sin), each [positions, D/2] in `dtype`.
    Raises:
        ValueError: when head_dim is odd or a size is not positive.
    """
    if positions < 1:
        raise ValueError(f"positions must be at least 1, got {positions}")
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim must be even and positive, got {head_dim}")
    if scaling_factor <= 0:
        raise ValueError(f"scaling_factor must be positive, got {scaling_factor}")
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    angle = torch.outer(torch.arange(positions, dtype=torch.float64), base**-exponent)
    angle = angle / scaling_factor
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate pairs (x₁, x₂) of each head to (x₁cos − x₂sin, x₂cos + x₁sin).

    Args:
        x: [..., S, D], floating.
        cos, sin: [S, D/2], the rows of `rope_tables` for these positions; of x [B, H, S, D] also
            [B, 1, S, D/2], where each row of the batch has positions of its own.
        interleaved: pairs are (x[2i], x[2i + 1]); else (x[i], x[i + D/2]), the half-split form.
    Returns: the shape and dtype of x.
    Raises:
        ValueError: when the tables do not fit x.
    """
    expected = [x.shape[-2], x.shape[-1] // 2]
    own = [x.shape[0], 1, *expected]  # of each row
    if list(cos.shape) not in (expected, own) or sin.shape != cos.shape:
        raise ValueError(
            f"cos and sin must be [S, D/2] = {expected} or [B, 1, S, D/2], "
            f"got {list(cos.shape)} and {list(sin.shape)}"
        )
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    whole = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return whole.to(x.dtype)


def fused_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = True) -> Tensor:
    """`apply_rope` with the first S rows of longer tables.

    Args:
        x: [B, H, S, D], floating.
        cos, sin: [≥S, D/2] or [1, 1, ≥S, D/2].
        interleaved: see `apply_rope`.
    Returns: the shape and dtype of x.
    Raises: ValueError when the tables do not fit x.
    """
    rows, half = x.shape[-2], cos.shape[-1]
    if cos.numel() != cos.shape[-2] * half or sin.shape != cos.shape:
        raise ValueError(
            f"cos and sin must be [S, D/2] or [1, 1, S, D/2], "
            f"got {list(cos.shape)} and {list(sin.shape)}"
        )
    cos, sin = (table.reshape(-1, half)[:rows] for table in (cos, sin))
    return apply_rope(x, cos, sin, interleaved)


def fused_qk_norm(
    q: Tensor, k: Tensor, scale: float = 1.0, temperature: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """scale · q/‖q‖ and scale · temperature · k/‖k‖ over each head, computed in fp32 or wider.

    Args:
        q: [..., D], floating. k: [..., D], any number of heads.
        scale: of both; √D makes elements of size 1.
        temperature: of k; a number or a broadcastable tensor, which gets a gradient.
    Returns: q and k in their dtypes; a head of zeros stays zero.
    Raises: ValueError when the head sizes differ.
    """
    check_last_dim("k", k, q.shape[-1])
    check_last_dim("q", q, q.shape[-1])
    unit_q, unit_k = (
        wide * torch.rsqrt(wide.square().sum(-1, keepdim=True).clamp_min(1e-24))
        for wide in (_wide(q), _wide(k))
    )
    return (unit_q * scale).to(q.dtype), (unit_k * scale * temperature).to(k.dtype)


def fused_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) ⊙ up.

    Args:
        gate, up: [..., F], floating, of one shape.
    Returns: [..., F].
    Raises: ValueError when the shapes differ.
    """
    if gate.shape != up.shape:
        raise ValueError(f"up must have gate's shape {list(gate.shape)}, got {list(up.shape)}")
    return F.silu(gate) * up
