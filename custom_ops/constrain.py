"""hc::constrain: the coefficients pre, post and res from p = φx and ss = Σx² (mHC eq. 7–8).

The RMS form, α, b, activations, manifold and orientation all live here, in the Constraint whose
`spec` string is the op's last argument. Moves: (M + 1) + M floats a token, no streams.
"""

import torch
from torch import Tensor

from custom_ops import reference
from custom_ops.coefficients import (
    by_stream,
    from_logits,
    from_logits_backward,
    gains,
    hidden_of,
    rms_scale,
)
from custom_ops.constraint import Constraint, parse
from custom_ops.registration import compute_dtype, define, double_backward, flat, use_triton


def token_shapes(c: Constraint) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shapes of one token's pre, post and res."""
    n = c.streams
    pre = (n,) if c.views == 1 else (c.views, n)
    post = (n,) if c.branches == 1 else (c.branches, n)
    return pre, post, (n, n)


def is_static(c: Constraint) -> bool:
    return c.projection == "static"


def fresh(t: Tensor) -> Tensor:
    """A contiguous copy: an op's outputs may not be views of each other."""
    return t.clone(memory_format=torch.contiguous_format)


def forward(
    p: Tensor, ss: Tensor, alpha: Tensor, bias: Tensor, width: int, spec: str
) -> tuple[Tensor, Tensor, Tensor]:
    c = parse(spec)
    keep = 2 if c.projection == "stream" else 1
    lead = p.shape[: p.dim() - keep]
    if use_triton(p):
        from custom_ops.kernels import constrain as kernels

        inputs = (p.contiguous(), ss.contiguous(), alpha.float(), bias.float())
        return kernels.constrain(*inputs, width, c)  # type: ignore[return-value]
    dtype = compute_dtype(p, alpha, bias)
    hidden = hidden_of(flat(p, keep).to(dtype), flat(ss, keep - 1).to(dtype), width, c)
    parts = from_logits(gains(alpha.to(dtype), c) * hidden + bias.to(dtype), c)
    pre, post, res = (fresh(t) for t in parts)
    shapes = [(*lead, *own) for own in token_shapes(c)]
    return pre.reshape(shapes[0]), post.reshape(shapes[1]), res.reshape(shapes[2])


def static_forward(bias: Tensor, c: Constraint) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of a static constraint, without a token axis."""
    bias = bias.to(compute_dtype(bias))
    pre, post, res = from_logits(bias.unsqueeze(0), c)
    shapes = token_shapes(c)
    return (
        fresh(pre.reshape(shapes[0])),
        fresh(post.reshape(shapes[1])),
        fresh(res.reshape(shapes[2])),
    )


def static_backward(
    dpre: Tensor, dpost: Tensor, dres: Tensor, bias: Tensor, c: Constraint
) -> Tensor:
    """Gradient of `static_forward`."""
    wide = bias.to(compute_dtype(bias))
    pre, post, res = token_shapes(c)
    grads = dpre.reshape(1, *pre), dpost.reshape(1, *post), dres.reshape(1, *res)
    return from_logits_backward(*grads, wide.unsqueeze(0), c)[0].to(bias.dtype)


def backward(
    dpre: Tensor,
    dpost: Tensor,
    dres: Tensor,
    p: Tensor,
    ss: Tensor,
    alpha: Tensor,
    bias: Tensor,
    width: int,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c = parse(spec)
    if use_triton(p):
        from custom_ops.kernels import constrain as kernels

        dpre, dpost, dres = dpre.contiguous(), dpost.contiguous(), dres.contiguous()
        inputs = (p.contiguous(), ss.contiguous(), alpha.float(), bias.float())
        dp, dss, dalpha, dbias = kernels.constrain_backward(dpre, dpost, dres, *inputs, width, c)
    else:
        dp, dss, dalpha, dbias = _torch_backward(dpre, dpost, dres, p, ss, alpha, bias, width, c)
        dp, dss = dp.reshape(p.shape).contiguous(), dss.reshape(ss.shape).contiguous()
    return dp, dss, dalpha.to(alpha.dtype), dbias.to(bias.dtype)


def _torch_backward(dpre, dpost, dres, p, ss, alpha, bias, width, c):
    keep = 2 if c.projection == "stream" else 1
    dtype = compute_dtype(p, alpha, bias)
    p, ss = flat(p, keep).to(dtype), flat(ss, keep - 1).to(dtype)
    gain = gains(alpha.to(dtype), c)
    hidden = hidden_of(p, ss, width, c)
    lead = dres.dim() - 2
    dpre, dpost, dres = (flat(g, g.dim() - lead).to(dtype) for g in (dpre, dpost, dres))
    dz = from_logits_backward(dpre, dpost, dres, gain * hidden + bias.to(dtype), c)
    parts = (dz * hidden).sum(0).split(list(c.sizes))
    dalpha = torch.stack([part.sum() for part in parts])
    dhidden = dz * gain
    if c.squash == "tanh":
        dhidden = dhidden * (1 - hidden.square())
    dhidden = by_stream(dhidden, c)
    r, slope = rms_scale(ss, width, c)
    dss = (dhidden * p).sum(-1) * slope
    return dhidden * r.unsqueeze(-1), dss, dalpha, dz.sum(0)


def _fake(p, ss, alpha, bias, width, spec):
    c = parse(spec)
    lead = p.shape[: p.dim() - (2 if c.projection == "stream" else 1)]
    dtype = compute_dtype(p, alpha, bias)
    return tuple(torch.empty((*lead, *s), dtype=dtype, device=p.device) for s in token_shapes(c))


def _backward_fake(dpre, dpost, dres, p, ss, alpha, bias, width, spec):
    return tuple(
        torch.empty(t.shape, dtype=t.dtype, device=p.device) for t in (p, ss, alpha, bias)
    )


constrain = define("constrain", forward, _fake)
constrain_backward = define("constrain_backward", backward, _backward_fake)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.width, ctx.spec = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, dpre, dpost, dres):
    grads = torch.ops.hc.constrain_backward(
        dpre, dpost, dres, *ctx.saved_tensors, ctx.width, ctx.spec
    )
    return *grads, None, None


def _reference(prims, rest):
    p, ss, alpha, bias = prims
    return list(reference.constrain(p, ss, alpha, bias, rest[0], parse(rest[1])))


constrain.register_autograd(_autograd, setup_context=_setup_context)
double_backward(constrain_backward, 3, 4, _reference)
