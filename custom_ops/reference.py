"""The whole mathematics in plain torch, in data-flow order: the oracle of every op.

Works in any floating dtype (float64 inputs stay float64, everything else is computed in float32)
and under every autograd and torch.func transform. Shares no code with the ops or kernels.
Legend as in constraint.py; x [..., n, C], u [..., C] or [..., V, C], y [..., C] or [..., W, C],
pre [..., n] or [..., V, n], post [..., n] or [..., W, n], res [..., n, n] applied [out, in].
"""

import itertools

import torch
from torch import Tensor

from custom_ops.constraint import Constraint


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any input is float64, else float32."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def project(x: Tensor, phi: Tensor, per_stream: bool = False) -> tuple[Tensor, Tensor]:
    """p = φx and ss = Σx², not normalised (mHC eq. 5): p [..., M], ss [...], or one per stream."""
    dtype = compute_dtype(x, phi)
    rows = x.to(dtype) if per_stream else x.to(dtype).flatten(-2)
    with torch.autocast(x.device.type, enabled=False):
        p = rows @ phi.to(dtype).transpose(0, 1)
    return p, rows.square().sum(-1)


def sinkhorn(
    logits: Tensor,
    iterations: int = 20,
    start: str = "exp-globalmax",
    first: str = "column",
    denominator: str = "max",
    eps: float = 1e-30,
) -> Tensor:
    """Truncated Sinkhorn–Knopp on [..., n, n] (mHC eq. 9): `iterations` × (first side, other)."""
    sides = (-1, -2) if first == "row" else (-2, -1)
    if start == "log":
        for _ in range(iterations):
            for side in sides:
                logits = logits - torch.logsumexp(logits, side, keepdim=True)
        return logits.exp()
    steps = list(sides) * iterations
    if start == "softmax":
        matrix = torch.softmax(logits, -1) + eps
        steps = steps[1:]
    elif start == "abs":
        matrix = logits.abs() + eps
    elif start == "exp-rowmax":
        matrix = (logits - logits.amax(-1, keepdim=True)).exp()
    elif start == "exp-globalmax":
        matrix = (logits - logits.amax((-2, -1), keepdim=True)).exp()
    else:
        matrix = logits.exp()
    for side in steps:
        total = matrix.sum(side, keepdim=True)
        divisor = total + eps if denominator == "add" else total.clamp_min(eps)
        matrix = matrix / torch.where(total == 0, torch.inf, divisor)  # underflow stays zero
    return matrix


def newton_schulz(matrix: Tensor, schedule, eps: float = 1e-7) -> Tensor:
    """Polar factor of each [..., n, n] matrix by the given (a, b, c) steps, per matrix."""
    x = matrix / (torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True) + eps)
    for a, b, c in schedule:
        gram = x @ x.transpose(-2, -1)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x


def permutation_mix(logits: Tensor, n: int) -> Tensor:
    """Σ_r softmax(logits)_r P_r over the n! permutations in lexicographic order (mHC-lite)."""
    weights = torch.softmax(logits, -1)
    table = torch.eye(n, dtype=logits.dtype, device=logits.device)[
        torch.tensor(list(itertools.permutations(range(n))), device=logits.device)
    ]
    return (weights[..., None, None] * table).sum(-3)


def kronecker(logits: Tensor) -> Tensor:
    """U_1 ⊗ U_2 ⊗ … of U = [[a, 1-a], [1-a, a]], a = σ(logit) (KromHC): [..., 2^K, 2^K]."""
    res = logits.new_ones(*logits.shape[:-1], 1, 1)
    for z in logits.unbind(-1):
        keep, swap = torch.sigmoid(z), torch.sigmoid(-z)
        factor = torch.stack([torch.stack([keep, swap], -1), torch.stack([swap, keep], -1)], -2)
        blocks = res[..., :, None, :, None] * factor[..., None, :, None, :]
        res = blocks.flatten(-4, -3).flatten(-2)
    return res


def manifold(z_res: Tensor, c: Constraint) -> Tensor:
    """res [..., n, n] in our orientation from its logits."""
    n = c.streams
    z_res = z_res / c.temperature
    if c.manifold in ("identity", "none"):
        eye = torch.eye(n, dtype=z_res.dtype, device=z_res.device)
        return eye.expand(*z_res.shape[:-1], n, n)
    if c.manifold == "permutation":
        res = permutation_mix(z_res, n)
    elif c.manifold == "kronecker":
        res = kronecker(z_res)
    else:
        res = z_res.unflatten(-1, (n, n))
        if c.manifold == "sinkhorn":
            res = sinkhorn(res, c.iterations, c.start, c.first, c.denominator, c.eps)
        elif c.manifold == "newton-schulz":
            res = newton_schulz(res, c.schedule).square()
    return res.transpose(-2, -1) if c.transpose else res


def activate(z: Tensor, kind: str, scale: float, eps: float) -> Tensor:
    """Activation of pre or post over the last axis (the streams)."""
    if kind == "linear":
        return z
    if kind == "softmax":
        return scale * torch.softmax(z, -1) + eps
    gate = torch.sigmoid(z)
    if kind == "sigmoid-sum":
        return scale * gate / (gate.sum(-1, keepdim=True) + eps)
    return scale * gate + eps


def logits(
    p: Tensor, ss: Tensor, alpha: Tensor, bias: Tensor, width: int, c: Constraint
) -> Tensor:
    """z = α ⊙ squash(r·p) + b, [..., M] in the order [pre | post | res] (mHC eq. 7)."""
    mean_square = ss / width
    if c.norm_form == "inside":
        scale = torch.rsqrt(mean_square + c.norm_eps)
    else:
        scale = 1 / (mean_square.sqrt() + c.norm_eps)
    hidden = p * scale[..., None]
    if c.squash == "tanh":
        hidden = torch.tanh(hidden)
    if c.projection == "stream":  # [..., n, V + W + n] -> [pre | post | res]
        parts = hidden.split([s // c.streams for s in c.sizes], -1)
        pre, post, res = parts
        hidden = torch.cat(
            [
                pre.transpose(-2, -1).flatten(-2),
                post.transpose(-2, -1).flatten(-2),
                res.flatten(-2),
            ],
            -1,
        )
    gains = torch.cat([a.expand(s) for a, s in zip(alpha.unbind(), c.sizes, strict=True)])
    return gains * hidden + bias


def constrain(
    p: Tensor | None,
    ss: Tensor | None,
    alpha: Tensor | None,
    bias: Tensor,
    width: int,
    c: Constraint,
) -> tuple[Tensor, Tensor, Tensor]:
    """pre [..., n], post [..., n], res [..., n, n] (mHC eq. 8); static ones have no token axis."""
    dtype = compute_dtype(p, ss, alpha, bias)
    bias = bias.to(dtype)
    if c.projection == "static":
        z = bias
    else:
        assert p is not None and ss is not None and alpha is not None
        z = logits(p.to(dtype), ss.to(dtype), alpha.to(dtype), bias, width, c)
    z_pre, z_post, z_res = z.split(list(c.sizes), -1)
    n = c.streams
    z_pre = (
        z_pre.unflatten(-1, (-1, n)) if c.sizes[0] else z_pre.new_ones(*z.shape[:-1], c.views, n)
    )
    z_post = (
        z_post.unflatten(-1, (-1, n))
        if c.sizes[1]
        else z_post.new_ones(*z.shape[:-1], c.branches, n)
    )
    pre = z_pre if c.pre == "none" else activate(z_pre, c.pre, 1.0, c.pre_eps)
    post = z_post if c.post == "none" else activate(z_post, c.post, c.post_scale, c.post_eps)
    pre = pre.squeeze(-2) if c.views == 1 else pre
    post = post.squeeze(-2) if c.branches == 1 else post
    return pre, post, manifold(z_res, c)


def coefficients(
    x: Tensor, phi: Tensor | None, alpha: Tensor | None, bias: Tensor, c: Constraint
) -> tuple[Tensor, Tensor, Tensor]:
    """pre, post and res of one sublayer from its streams; φ [P, ...] averages P proposals."""
    if c.projection == "static":
        bias = bias.to(compute_dtype(x, bias))
        return constrain(None, None, None, bias, 0, c)
    assert phi is not None
    if phi.dim() == 3:
        made = [coefficients(x, each, alpha, bias, c) for each in phi.unbind()]
        pre, post, res = (torch.stack(same).mean(0) for same in zip(*made, strict=True))
        return pre, post, res
    if c.norm == "layer":
        x = x.to(compute_dtype(x, phi))
        x = x - x.mean(-1 if c.projection == "stream" else (-2, -1), keepdim=True)
    p, ss = project(x, phi, c.projection == "stream")
    return constrain(p, ss, alpha, bias, c.norm_width(x.shape[-1]), c)


def aggregate(x: Tensor, pre: Tensor) -> Tensor:
    """u_v = Σ_i pre_vi x_i (mHC eq. 3): [..., C], or [..., V, C] for pre [..., V, n]."""
    dtype = compute_dtype(x, pre)
    views = pre.dim() == x.dim() and pre.dim() > 1
    weights = pre.to(dtype) if views else pre.to(dtype).unsqueeze(-2)
    u = (weights.unsqueeze(-1) * x.to(dtype).unsqueeze(-3)).sum(-2)
    return (u if views else u.squeeze(-2)).to(x.dtype)


def post(x: Tensor, y: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """x'_i = Σ_j res_ij x_j + Σ_w post_wi y_w (mHC eq. 3), rounded to the dtype of x."""
    dtype = compute_dtype(x, post, res)
    branches = y.dim() == x.dim()
    y = y.to(dtype) if branches else y.to(dtype).unsqueeze(-2)
    weights = post.to(dtype) if branches else post.to(dtype).unsqueeze(-2)
    mixed = (res.to(dtype).unsqueeze(-1) * x.to(dtype).unsqueeze(-3)).sum(-2)
    return (mixed + (weights.unsqueeze(-1) * y.unsqueeze(-2)).sum(-3)).to(x.dtype)


def read_norm(u: Tensor, weight: Tensor, shift: Tensor | None, c: Constraint) -> Tensor:
    """RMSNorm or LayerNorm of u [..., C] with weight and shift [C], rounded to the dtype of u."""
    dtype = compute_dtype(u, weight)
    wide = u.to(dtype)
    if c.read_norm == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    wide = wide / (wide.square().mean(-1, keepdim=True) + c.read_eps).sqrt() * weight.to(dtype)
    return (wide if shift is None else wide + shift.to(dtype)).to(u.dtype)


def pre(
    x: Tensor,
    phi: Tensor | None,
    alpha: Tensor | None,
    bias: Tensor,
    c: Constraint,
    weight: Tensor | None = None,
    shift: Tensor | None = None,
    carried: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read side of a sublayer: u (normed if c says so) and the coefficients pre, post, res.

    u is read with `carried` where it is given, the pre of the sublayer before (V4.1).
    """
    pre, post, res = coefficients(x, phi, alpha, bias, c)
    weights = pre if carried is None else carried
    u = aggregate(x, weights if c.views == 1 else pre.expand(*x.shape[:-2], *pre.shape[-2:]))
    if c.read_norm != "none":
        assert weight is not None
        u = read_norm(u, weight, shift, c)
    return u, pre, post, res


def post_pre(
    x: Tensor,
    y: Tensor,
    post_l: Tensor,
    res_l: Tensor,
    phi: Tensor | None,
    alpha: Tensor | None,
    bias: Tensor,
    c: Constraint,
    weight: Tensor | None = None,
    shift: Tensor | None = None,
    carried: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The boundary of two sublayers: post of one, then pre of the next: x', u, pre, post, res."""
    x = post(x, y, post_l, res_l)
    return x, *pre(x, phi, alpha, bias, c, weight, shift, carried)
