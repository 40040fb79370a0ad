"""The norm on what a branch reads, folded into the read: v = norm(Σ_i pre_i x_i).

"rms":   v = u / sqrt(mean(u²) + eps) · weight                       (RMSNorm, arXiv 1910.07467)
"layer": v = (u - mean(u)) / sqrt(var(u) + eps) · weight + shift     (LayerNorm, arXiv 1607.06450)

u is rounded to the streams' dtype as if it had been written, and made again in the backward,
which needs no more than x and pre. Moves n + 1 C-units forward where a norm of its own makes it
n + 3; backward n + 2, where du alone takes 3 and ⟨du, x⟩ n + 1.
"""

import torch
from torch import Tensor

from custom_ops import aggregate as agg
from custom_ops.constraint import Constraint
from custom_ops.registration import compute_dtype, flat, use_triton


def fits(x: Tensor) -> bool:
    """Whether the kernels take it: a token's row of every stream on chip."""
    if not use_triton(x):
        return False
    from custom_ops.kernels import aggregate_norm as kernels

    return x.shape[-2] <= kernels.MOST_STREAMS and x.shape[-1] <= kernels.WIDEST


def forward(x: Tensor, pre: Tensor, weight: Tensor, shift: Tensor | None, c: Constraint) -> Tensor:
    """v [..., C] of streams [..., n, C] and pre [..., n] or [n], in x's dtype."""
    if fits(x):
        from custom_ops.kernels import aggregate_norm as kernels

        weights = flat(agg.per_token(pre, x.shape[:-2], 1), 1).float()
        out = kernels.aggregate_norm(
            flat(x, 2), weights, weight.contiguous(), _contiguous(shift), _centred(c), c.read_eps
        )
        return out.reshape(*x.shape[:-2], x.shape[-1])
    u, dtype = agg.forward(x, pre), compute_dtype(x, pre)
    unit, _ = _normalised(u.to(dtype), c)
    out = unit * weight.to(dtype)
    return (out if shift is None else out + shift.to(dtype)).to(x.dtype)


def backward(
    dv: Tensor, x: Tensor, pre: Tensor, weight: Tensor, shift: Tensor | None, c: Constraint
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """du [..., C], ⟨du, x_i⟩ [..., n] of every token, dweight and dshift (empty without one)."""
    if fits(x):
        from custom_ops.kernels import aggregate_norm as kernels

        weights = flat(agg.per_token(pre, x.shape[:-2], 1), 1).float()
        du, dots, dweight, dshift = kernels.aggregate_norm_backward(
            flat(dv, 1), flat(x, 2), weights, weight.contiguous(), shift is not None,
            _centred(c), c.read_eps,
        )  # fmt: skip
        du, dots = du.reshape(*x.shape[:-2], x.shape[-1]), dots.reshape(x.shape[:-1])
    else:
        dtype = compute_dtype(x, pre)
        unit, rstd = _normalised(agg.forward(x, pre).to(dtype), c)
        wide = dv.to(dtype)
        g = wide * weight.to(dtype)
        du = g - unit * (g * unit).mean(-1, keepdim=True)
        if _centred(c):
            du = du - g.mean(-1, keepdim=True)
        du = (du * rstd).to(x.dtype)
        dots = agg.dots(du.to(dtype).unsqueeze(-2), x.to(dtype)).squeeze(-2)
        dweight, dshift = (wide * unit).flatten(0, -2).sum(0), wide.flatten(0, -2).sum(0)
    dshift = dshift.new_empty(0) if shift is None else dshift.to(shift.dtype)
    return du, dots, dweight.to(weight.dtype), dshift


def _centred(c: Constraint) -> bool:
    return c.read_norm == "layer"


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _normalised(u: Tensor, c: Constraint) -> tuple[Tensor, Tensor]:
    """u centred if the norm does, over its root mean square, and that root's inverse."""
    u = u - u.mean(-1, keepdim=True) if _centred(c) else u
    rstd = torch.rsqrt(u.square().mean(-1, keepdim=True) + c.read_eps)
    return u * rstd, rstd
