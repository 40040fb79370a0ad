"""hc::constrain: the coefficients pre, post and res from p = φx and ss = Σx² (mHC eq. 7–8).

The RMS form, α, b, activations, manifold and orientation all live here, in the Constraint whose
`spec` string is the op's last argument. Moves: (M + 1) + M floats a token, no streams.
"""

import itertools

import torch
from torch import Tensor

from custom_ops import newton_schulz as ns
from custom_ops import reference
from custom_ops import sinkhorn as sk
from custom_ops.constraint import Constraint, parse
from custom_ops.registration import compute_dtype, define, double_backward, flat, use_triton

NEWTON_SCHULZ_EPS = 1e-7


def token_shapes(c: Constraint) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shapes of one token's pre, post and res."""
    n = c.streams
    pre = (n,) if c.views == 1 else (c.views, n)
    post = (n,) if c.branches == 1 else (c.branches, n)
    return pre, post, (n, n)


def is_static(c: Constraint) -> bool:
    return c.projection == "static"


# The pieces, each with its derivative. All take and give [T, ...] in the compute dtype.


def activate(z: Tensor, kind: str, scale: float, eps: float) -> Tensor:
    if kind == "linear":
        return z
    if kind == "softmax":
        return scale * torch.softmax(z, -1) + eps
    gate = torch.sigmoid(z)
    if kind == "sigmoid-sum":
        return scale * gate / (gate.sum(-1, keepdim=True) + eps)
    return scale * gate + eps


def activate_backward(grad: Tensor, z: Tensor, kind: str, scale: float, eps: float) -> Tensor:
    if kind == "linear":
        return grad
    if kind == "softmax":
        soft = torch.softmax(z, -1)
        return scale * soft * (grad - (grad * soft).sum(-1, keepdim=True))
    gate = torch.sigmoid(z)
    slope = gate * (1 - gate)
    if kind == "sigmoid-sum":
        total = gate.sum(-1, keepdim=True) + eps
        return scale * slope * (grad - (grad * gate).sum(-1, keepdim=True) / total) / total
    return scale * slope * grad


def permutations(n: int, like: Tensor) -> Tensor:
    """The n! permutation matrices, [n!, n·n], in lexicographic order."""
    table = torch.zeros(len(order := list(itertools.permutations(range(n)))), n, n)
    for row, permutation in enumerate(order):
        table[row, torch.arange(n), list(permutation)] = 1
    return table.flatten(1).to(like)


def manifold(z: Tensor, c: Constraint) -> Tensor:
    n = c.streams
    if c.manifold in ("identity", "none"):
        return torch.eye(n, dtype=z.dtype, device=z.device).expand(*z.shape[:-1], n, n)
    z = z / c.temperature
    if c.manifold == "permutation":
        res = (torch.softmax(z, -1).unsqueeze(-1) * permutations(n, z)).sum(-2)
        res = res.unflatten(-1, (n, n))
    else:
        res = z.unflatten(-1, (n, n))
        if c.manifold == "sinkhorn":
            res = sk.forward(res, c.iterations, c.start, c.first, c.denominator, c.eps)
        elif c.manifold == "newton-schulz":
            res = ns.forward(res, schedule_of(c), NEWTON_SCHULZ_EPS).square()
    return res.mT if c.transpose else res


def manifold_backward(grad: Tensor, z: Tensor, c: Constraint) -> Tensor:
    n = c.streams
    if c.manifold in ("identity", "none"):
        return z
    grad = (grad.mT if c.transpose else grad).contiguous()
    z = z / c.temperature
    if c.manifold == "permutation":
        soft = torch.softmax(z, -1)
        weights = (permutations(n, z) * grad.flatten(-2).unsqueeze(-2)).sum(-1)
        return soft * (weights - (weights * soft).sum(-1, keepdim=True)) / c.temperature
    matrix = z.unflatten(-1, (n, n))
    if c.manifold == "sinkhorn":
        options = (c.iterations, c.start, c.first, c.denominator, c.eps)
        grad = sk.backward(grad, matrix, *options)
    elif c.manifold == "newton-schulz":
        root = ns.forward(matrix, schedule_of(c), NEWTON_SCHULZ_EPS)
        grad = ns.backward(2 * root * grad, matrix, schedule_of(c), NEWTON_SCHULZ_EPS)
    return grad.flatten(-2) / c.temperature


def schedule_of(c: Constraint) -> list[float]:
    return [value for step in c.schedule for value in step]


def gains(alpha: Tensor, c: Constraint) -> Tensor:
    """α [3] spread over the M coefficients."""
    return torch.cat([alpha[k].expand(size) for k, size in enumerate(c.sizes)])


def by_kind(hidden: Tensor, c: Constraint) -> Tensor:
    """Projection rows [T, n, V + W + n] of "stream" reordered to [T, M] = [pre | post | res]."""
    if c.projection != "stream":
        return hidden
    pre, post, res = hidden.split([size // c.streams for size in c.sizes], -1)
    return torch.cat([pre.mT.flatten(-2), post.mT.flatten(-2), res.flatten(-2)], -1)


def by_stream(hidden: Tensor, c: Constraint) -> Tensor:
    """Inverse of `by_kind`."""
    if c.projection != "stream":
        return hidden
    n = c.streams
    pre, post, res = (part.unflatten(-1, (-1, n)) for part in hidden.split(list(c.sizes), -1))
    return torch.cat([pre.mT, post.mT, res], -1)


def rms_scale(ss: Tensor, width: int, c: Constraint) -> tuple[Tensor, Tensor]:
    """r and ∂r/∂ss."""
    mean_square = ss / width
    if c.norm_form == "inside":
        r = torch.rsqrt(mean_square + c.norm_eps)
        return r, -0.5 * r**3 / width
    root = mean_square.sqrt()
    r = 1 / (root + c.norm_eps)
    return r, -0.5 * r.square() / (root * width)


def split_logits(z: Tensor, c: Constraint) -> tuple[Tensor, Tensor, Tensor]:
    """z [T, M] as z_pre [T, V, n], z_post [T, W, n] (V, W = 0 for kind "none") and z_res."""
    pre, post, res = z.split(list(c.sizes), -1)
    n = c.streams
    tokens = z.shape[:-1]
    pre = pre.reshape(*tokens, c.sizes[0] // n, n)
    return pre, post.reshape(*tokens, c.sizes[1] // n, n), res


def from_logits(z: Tensor, c: Constraint) -> tuple[Tensor, Tensor, Tensor]:
    """pre [T, V, n], post [T, W, n] and res [T, n, n]; kind "none" gives ones."""
    z_pre, z_post, z_res = split_logits(z, c)
    tokens, n = z.shape[:-1], c.streams
    pre = post = None
    if c.pre != "none":
        pre = activate(z_pre, c.pre, 1.0, c.pre_eps)
    if c.post != "none":
        post = activate(z_post, c.post, c.post_scale, c.post_eps)
    pre = z.new_ones(*tokens, c.views, n) if pre is None else pre
    post = z.new_ones(*tokens, c.branches, n) if post is None else post
    return pre, post, manifold(z_res, c)


def from_logits_backward(
    dpre: Tensor, dpost: Tensor, dres: Tensor, z: Tensor, c: Constraint
) -> Tensor:
    z_pre, z_post, z_res = split_logits(z, c)
    dz_pre, dz_post = z_pre, z_post
    if c.pre != "none":
        dz_pre = activate_backward(dpre.reshape(z_pre.shape), z_pre, c.pre, 1.0, c.pre_eps)
    if c.post != "none":
        dpost = dpost.reshape(z_post.shape)
        dz_post = activate_backward(dpost, z_post, c.post, c.post_scale, c.post_eps)
    dz_res = manifold_backward(dres, z_res, c)
    return torch.cat([dz_pre.flatten(-2), dz_post.flatten(-2), dz_res], -1)


def hidden_of(p: Tensor, ss: Tensor, width: int, c: Constraint) -> Tensor:
    """squash(r·p) as [T, M]."""
    hidden = p * rms_scale(ss, width, c)[0].unsqueeze(-1)
    return by_kind(torch.tanh(hidden) if c.squash == "tanh" else hidden, c)


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

        parts = kernels.constrain(
            flat(p, keep), flat(ss, keep - 1), alpha.float(), bias.float(), width, c
        )
    else:
        dtype = compute_dtype(p, alpha, bias)
        hidden = hidden_of(flat(p, keep).to(dtype), flat(ss, keep - 1).to(dtype), width, c)
        parts = from_logits(gains(alpha.to(dtype), c) * hidden + bias.to(dtype), c)
        parts = [fresh(t) for t in parts]
    pre, post, res = parts
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
    keep = 2 if c.projection == "stream" else 1
    if use_triton(p):
        from custom_ops.kernels import constrain as kernels

        n = c.streams
        dp, dss, dalpha, dbias = kernels.constrain_backward(
            dpre.reshape(-1, c.views, n).contiguous(),
            dpost.reshape(-1, c.branches, n).contiguous(),
            flat(dres, 2),
            flat(p, keep),
            flat(ss, keep - 1),
            alpha.float(),
            bias.float(),
            width,
            c,
        )
    else:
        dp, dss, dalpha, dbias = _torch_backward(dpre, dpost, dres, p, ss, alpha, bias, width, c)
    dalpha, dbias = dalpha.to(alpha.dtype), dbias.to(bias.dtype)
    return dp.reshape(p.shape).contiguous(), dss.reshape(ss.shape).contiguous(), dalpha, dbias


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
