"""hc::post: x'_i = Σ_j res_ij x_j + Σ_w post_wi y_w, what a branch writes (mHC eq. 3).

Moves: 2n + W C-units forward; 2n + 2W backward, n more where dx is wanted.

res need not be square: [.., n', n] makes n' streams of n. That is what the first sublayer of a
network (one stream in) and its mean (one out) need.

Ghost: `hc::pre` can also return an all-zero, zero-stride stand-in for x. A post that takes it
sends its own cotangent through it and gives x no gradient, so that the backward of that pre forms
the whole of ∂x in one pass instead of adding two stream tensors. A post of one stream out of many
takes it only where its row of res is the sum of the rows that the pre made (its cotangent is then
that of every stream) or where the ghost is one row, which the pre weighs as the post does.
"""

import torch
from torch import Tensor

from custom_ops import reference
from custom_ops.aggregate import over_tokens, per_token
from custom_ops.registration import (
    compute_dtype,
    define,
    double_backward,
    total,
    use_triton,
)


def mix(res: Tensor, x: Tensor) -> Tensor:
    """Σ_j res_ij x_j in the dtype of the arguments, written out for Inductor to fuse."""
    if x.shape[-2] == 1:
        return res * x
    rows = [
        total(res[..., i, j, None] * x[..., j, :] for j in range(x.shape[-2]))
        for i in range(res.shape[-2])
    ]
    return torch.stack(rows, -2)


def _expanded(x: Tensor, y: Tensor, post: Tensor, res: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y [..., W, C], post [..., W, n] and res [..., n, n] of every token."""
    branches = y.dim() == x.dim()
    lead = x.shape[:-2]
    post = per_token(post, lead, 2 if branches else 1)
    res = per_token(res, lead, 2)
    return (y, post, res) if branches else (y.unsqueeze(-2), post.unsqueeze(-2), res)


def _of_tokens(x: Tensor, y: Tensor, post: Tensor, res: Tensor) -> tuple[Tensor, Tensor]:
    """post [..., n] (or [..., W, n]) and res of every token, as the kernels take them."""
    post = per_token(post, x.shape[:-2], 2 if y.dim() == x.dim() else 1)
    res = per_token(res, x.shape[:-2], 2)
    return post.contiguous().float(), res.contiguous().float()


def forward(
    x: Tensor, y: Tensor, post: Tensor, res: Tensor, ghost: Tensor | None = None
) -> Tensor:
    one_of_many = res.shape[-2] == 1 < x.shape[-2]  # Inductor fuses it with the norm that follows
    if use_triton(x) and not one_of_many:
        from custom_ops.kernels import post as kernels

        return kernels.post(x.contiguous(), y.contiguous(), *_of_tokens(x, y, post, res))
    y, post, res = _expanded(x, y, post, res)
    dtype = compute_dtype(x, post, res)
    out = mix(res.to(dtype), x.to(dtype))
    for w in range(y.shape[-2]):
        out = out + post.to(dtype)[..., w, :, None] * y.to(dtype)[..., w, None, :]
    return out.to(x.dtype)


def backward(
    g: Tensor, x: Tensor, y: Tensor, post: Tensor, res: Tensor, need_dx: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx (empty unless wanted), dy, dpost, dres."""
    if use_triton(x):
        from custom_ops.kernels import post as kernels

        streams = (g.contiguous(), x.contiguous(), y.contiguous())
        weights = _of_tokens(x, y, post, res)
        dx, dy, dpost, dres = kernels.post_backward(*streams, *weights, need_dx)
        dx = x.new_empty(0) if dx is None else dx
    else:
        dtype = compute_dtype(x, post, res)
        wide = [t.to(dtype) for t in (g, x, *_expanded(x, y, post, res))]
        dx, dy, dpost, dres = gradients(wide[0], wide[1], wide[2], wide[3], wide[4], need_dx)
        dx, dy = dx.to(x.dtype), dy.to(y.dtype)
        if y.dim() < x.dim():
            dy, dpost = dy.squeeze(-2), dpost.squeeze(-2)
    return dx, dy, over_tokens(dpost, post), over_tokens(dres, res)


def gradients(
    g: Tensor, x: Tensor, y: Tensor, post: Tensor, res: Tensor, need_dx: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four gradients in one dtype, y [..., W, C]."""
    dx = mix(res.mT, g) if need_dx else x.new_empty(0)
    branches = range(y.shape[-2])
    dy = torch.stack(
        [
            total(post[..., w, i, None] * g[..., i, :] for i in range(g.shape[-2]))
            for w in branches
        ],
        -2,
    )
    dpost = torch.stack([(g * y[..., w, None, :]).sum(-1) for w in branches], -2)
    dres = torch.stack([(g * x[..., j, None, :]).sum(-1) for j in range(x.shape[-2])], -1)
    return dx, dy, dpost, dres


def _fake(x, y, post, res, ghost=None):
    shape = (*x.shape[:-2], res.shape[-2], x.shape[-1])
    return torch.empty(shape, dtype=x.dtype, device=x.device)


def _backward_fake(g, x, y, post, res, need_dx):
    shape = x.shape if need_dx else (0,)
    dx = torch.empty(shape, dtype=x.dtype, device=x.device)
    rest = (torch.empty(t.shape, dtype=t.dtype, device=x.device) for t in (y, post, res))
    return dx, *rest


post = define("post", forward, _fake)
post_backward = define("post_backward", backward, _backward_fake)


def _setup_context(ctx, inputs, output):
    x, y, post, res, ghost = inputs
    ctx.ghost = None if ghost is None else ghost.shape
    ctx.save_for_backward(x, y, post, res)


def _autograd(ctx, g):
    need_dx = ctx.needs_input_grad[0] and ctx.ghost is None
    dx, dy, dpost, dres = torch.ops.hc.post_backward(g, *ctx.saved_tensors, need_dx)
    dghost = None if ctx.ghost is None else g.expand(ctx.ghost)
    return dx if need_dx else None, dy, dpost, dres, dghost


post.register_autograd(_autograd, setup_context=_setup_context)
double_backward(post_backward, 1, 4, lambda prims, rest: [reference.post(*prims)])
