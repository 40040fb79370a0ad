"""hc::aggregate: u_v = Σ_i pre_vi x_i, what a branch reads (mHC eq. 3).

Moves: n + V C-units forward; 2n + V backward.
"""

import torch
from torch import Tensor

from custom_ops import reference
from custom_ops.registration import (
    compute_dtype,
    define,
    double_backward,
    total,
    use_triton,
)


def has_views(x: Tensor, pre: Tensor) -> bool:
    """Whether pre is [..., V, n] (several input views) rather than [..., n] or static [n]."""
    return pre.dim() == x.dim()


def per_token(coefficient: Tensor, lead: torch.Size, keep: int) -> Tensor:
    """A coefficient with `keep` own dimensions, expanded over the tokens if it is static."""
    if coefficient.dim() > keep:
        return coefficient  # not expanded to its own shape, which a compiler would trace
    return coefficient.expand(*lead, *coefficient.shape)


def over_tokens(gradient: Tensor, like: Tensor) -> Tensor:
    """Gradient of `per_token`: summed over the tokens if the coefficient is static."""
    extra = gradient.dim() - like.dim()
    return (gradient.sum(tuple(range(extra))) if extra else gradient).to(like.dtype)


def forward(x: Tensor, pre: Tensor) -> Tensor:
    views = has_views(x, pre)
    weights = per_token(pre, x.shape[:-2], 2 if views else 1)
    if use_triton(x):
        from custom_ops.kernels import aggregate as kernels

        return kernels.aggregate(x.contiguous(), weights.contiguous().float())
    weights = weights if views else weights.unsqueeze(-2)
    dtype = compute_dtype(x, pre)
    wide, weights = x.to(dtype), weights.to(dtype)
    u = torch.stack(
        [
            total(weights[..., v, i, None] * wide[..., i, :] for i in range(x.shape[-2]))
            for v in range(weights.shape[-2])
        ],
        -2,
    ).to(x.dtype)
    return u if views else u.squeeze(-2)


def backward(du: Tensor, x: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    views = has_views(x, pre)
    weights = per_token(pre, x.shape[:-2], 2 if views else 1)
    if use_triton(x):
        from custom_ops.kernels import aggregate as kernels

        weights = weights.contiguous().float()
        dx, dpre = kernels.aggregate_backward(du.contiguous(), x.contiguous(), weights)
        return dx, over_tokens(dpre, pre)
    weights, du = (weights, du) if views else (weights.unsqueeze(-2), du.unsqueeze(-2))
    dtype = compute_dtype(x, pre)
    dx = into_streams(du.to(dtype), weights.to(dtype)).to(x.dtype)
    dpre = dots(du.to(dtype), x.to(dtype))
    return dx, over_tokens(dpre if views else dpre.squeeze(-2), pre)


def dots(du: Tensor, x: Tensor) -> Tensor:
    """<du_v, x_i>: [..., V, n]."""
    return torch.stack([(du[..., v, None, :] * x).sum(-1) for v in range(du.shape[-2])], -2)


def into_streams(du: Tensor, pre: Tensor) -> Tensor:
    """Σ_v pre_vi du_v: [..., n, C]."""
    parts = [pre[..., v, :, None] * du[..., v, None, :] for v in range(du.shape[-2])]
    return total(parts)


def _fake(x, pre):
    shape = (*x.shape[:-2], *pre.shape[-2:-1], x.shape[-1]) if has_views(x, pre) else None
    shape = shape or (*x.shape[:-2], x.shape[-1])
    return torch.empty(shape, dtype=x.dtype, device=x.device)


def _backward_fake(du, x, pre):
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        torch.empty(pre.shape, dtype=pre.dtype, device=x.device),
    )


aggregate = define("aggregate", forward, _fake)
aggregate_backward = define("aggregate_backward", backward, _backward_fake)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _autograd(ctx, du):
    return torch.ops.hc.aggregate_backward(du, *ctx.saved_tensors)


aggregate.register_autograd(_autograd, setup_context=_setup_context)
double_backward(aggregate_backward, 1, 2, lambda prims, rest: [reference.aggregate(*prims)])
