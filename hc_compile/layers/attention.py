"""`flexible_attention`: one call, whichever attention is installed and chosen."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from hc_compile.installed import FLASH_ATTN_AVAILABLE, XFORMERS_AVAILABLE

BACKENDS = ("auto", "flash", "xformers", "flex", "sdpa")
_state = {"backend": "auto"}


def set_attention_backend(backend: str) -> None:
    """Choose what `flexible_attention` calls from now on, and what is compiled from now on.

    Args:
        backend: "flash" (flash-attn 2), "xformers", "flex" (torch's FlexAttention), "sdpa"
            (torch's scaled_dot_product_attention), or "auto": the first of flash, xformers and
            sdpa that is installed and serves the call.
    Raises: ValueError for another name, ImportError when the chosen package is not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "flash" and not FLASH_ATTN_AVAILABLE:
        raise ImportError("backend 'flash' needs the package flash-attn, which is not installed")
    if backend == "xformers" and not XFORMERS_AVAILABLE:
        raise ImportError("backend 'xformers' needs the package xformers, which is not installed")
    _state["backend"] = backend


def get_attention_backend() -> str:
    """What `set_attention_backend` was told last; "auto" at the start."""
    return _state["backend"]


def flexible_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ + mask) v with grouped key and value heads.

    Args:
        q: [B, H, S, D]. k, v: [B, G, T, D], G divides H: H/G query heads share a key head.
        attn_mask: broadcastable to [B, H, S, T]; bool, True where a query may look, or floating,
            added to the scores. With is_causal both hold.
        dropout_p: of the weights; pass 0 in evaluation.
        is_causal: the last query stands at the last key, as with cached keys.
        scale: default 1/√D.
    Returns: [B, H, S, D].
    Raises: ValueError for shapes that do not fit, and when a backend chosen by name can't serve
        the call (it never falls back).
    """
    _check(q, k, v)
    backend = _state["backend"]
    if backend == "auto":
        backend = next(
            name for name in ("flash", "xformers", "sdpa") if _serves(name, q, attn_mask)
        )
    elif backend in ("flash", "xformers") and not _serves(backend, q, attn_mask):
        raise ValueError(
            f"q must be float16 or bfloat16 on a GPU and attn_mask None for backend {backend!r}, "
            f"got {q.dtype} on {q.device.type} and "
            f"{'None' if attn_mask is None else 'a mask'}"
        )
    return CALLS[backend](q, k, v, attn_mask, dropout_p, is_causal, scale)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(
            f"q and k must be [B, H, S, D] and [B, G, T, D], got {list(q.shape)}, {list(k.shape)}"
        )
    if k.shape != v.shape or (k.shape[0], k.shape[3]) != (q.shape[0], q.shape[3]):
        raise ValueError(
            f"k and v must be [B, G, T, D] with q's B and D = {q.shape[0]}, {q.shape[3]}, "
            f"got {list(k.shape)} and {list(v.shape)}"
        )
    if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k's heads must divide q's {q.shape[1]}, got {k.shape[1]}")


def _serves(backend: str, q: Tensor, attn_mask: Tensor | None) -> bool:
    if backend == "sdpa":
        return True
    installed = FLASH_ATTN_AVAILABLE if backend == "flash" else XFORMERS_AVAILABLE
    half = q.dtype in (torch.float16, torch.bfloat16)
    return installed and half and q.is_cuda and attn_mask is None


def _flash(q, k, v, attn_mask, dropout_p, is_causal, scale) -> Tensor:
    call = import_module("flash_attn").flash_attn_func
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = call(q, k, v, dropout_p=dropout_p, softmax_scale=scale, causal=is_causal)
    return out.transpose(1, 2)


def _xformers(q, k, v, attn_mask, dropout_p, is_causal, scale) -> Tensor:
    ops = import_module("xformers.ops")
    bias = ops.fmha.attn_bias.LowerTriangularFromBottomRightMask() if is_causal else None
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = ops.memory_efficient_attention(q, k, v, attn_bias=bias, p=dropout_p, scale=scale)
    return out.transpose(1, 2)


def _sdpa(q, k, v, attn_mask, dropout_p, is_causal, scale) -> Tensor:
    queries, keys = q.shape[-2], k.shape[-2]
    is_causal = is_causal and queries > 1  # one query stands at the last key
    plain = attn_mask is None and queries == keys
    if is_causal and not plain:
        keep = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        if attn_mask is None:
            attn_mask = keep
        elif attn_mask.dtype == torch.bool:
            attn_mask = attn_mask & keep
        else:
            attn_mask = attn_mask.masked_fill(~keep, float("-inf"))
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal and plain,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _score_with(attn_mask: Tensor, query_shape: torch.Size, keys: int) -> Callable[..., Tensor]:
    given = attn_mask.expand(*query_shape[:3], keys)

    def score(value: Tensor, b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        here = given[b, h, row, column]
        return (
            torch.where(here, value, -float("inf")) if here.dtype == torch.bool else value + here
        )

    return score


def _flex(q, k, v, attn_mask, dropout_p, is_causal, scale) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if dropout_p:
        raise ValueError(f"dropout_p must be 0 for backend 'flex', got {dropout_p}")
    offset, block = k.shape[-2] - q.shape[-2], None
    score = None if attn_mask is None else _score_with(attn_mask, q.shape, k.shape[2])
    if is_causal:
        sizes = (q.shape[-2], k.shape[-2])
        block = create_block_mask(
            lambda b, h, row, column: row + offset >= column, None, None, *sizes, device=q.device
        )
    grouped = q.shape[1] != k.shape[1]
    return flex_attention(q, k, v, score, block, scale=scale, enable_gqa=grouped)  # type: ignore[return-value]


CALLS: dict[str, Callable[..., Tensor]] = {
    "flash": _flash,
    "xformers": _xformers,
    "flex": _flex,
    "sdpa": _sdpa,
}
