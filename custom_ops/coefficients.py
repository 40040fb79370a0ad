"""From logits to pre, post and res in plain torch, each piece with its derivative.

All functions take and give [T, ...] tensors in the compute dtype; the Triton kernels of
`kernels/constrain.py` do the same in registers. Formulas: `constraint.Constraint`.
"""

import itertools

import torch
from torch import Tensor

from custom_ops import newton_schulz as ns
from custom_ops import sinkhorn as sk
from custom_ops.constraint import Constraint

NEWTON_SCHULZ_EPS = 1e-7


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


def patterns(n: int, like: Tensor) -> Tensor:
    """i xor j, [n, n] int64: the entry of a Kronecker product of swaps depends on it alone."""
    index = torch.arange(n, device=like.device)
    return index[:, None] ^ index[None, :]


def pattern_weights(gates: list[Tensor], left_out: int = -1) -> Tensor:
    """Π_k (a_k or 1 - a_k) for every pattern of bits, [..., 2^K]; a factor left out counts 1."""
    weights = gates[0].new_ones(*gates[0].shape[:-1], 1)
    for k, gate in enumerate(gates):
        pair = torch.ones_like(gate) if k == left_out else gate
        weights = (weights.unsqueeze(-1) * pair.unsqueeze(-2)).flatten(-2)
    return weights


def pairs_of(z: Tensor) -> list[Tensor]:
    """(a, 1 - a) [..., 2] of every factor."""
    return [torch.sigmoid(torch.stack([part, -part], -1)) for part in z.unbind(-1)]


def kronecker(z: Tensor, n: int) -> Tensor:
    return pattern_weights(pairs_of(z))[..., patterns(n, z)]


def kronecker_backward(grad: Tensor, z: Tensor, n: int) -> Tensor:
    gates, table = pairs_of(z), patterns(n, z)
    rows = torch.arange(n, device=z.device)
    totals = grad[..., rows, table].sum(-1)  # [p] is Σ_i grad[i, i xor p], the table symmetric
    parts = []
    for k, gate in enumerate(gates):
        share = (totals * pattern_weights(gates, k)).unflatten(-1, (2**k, 2, -1)).sum((-3, -1))
        parts.append((share[..., 0] - share[..., 1]) * gate.prod(-1))
    return torch.stack(parts, -1)


def manifold(z: Tensor, c: Constraint) -> Tensor:
    n = c.streams
    if not c.sizes[2]:
        return torch.eye(n, dtype=z.dtype, device=z.device).expand(*z.shape[:-1], n, n)
    z = z / c.temperature
    if c.manifold == "kronecker":
        return kronecker(z, n)
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
    if not c.sizes[2]:
        return z
    grad = (grad.mT if c.transpose else grad).contiguous()
    z = z / c.temperature
    if c.manifold == "kronecker":
        return kronecker_backward(grad, z, n) / c.temperature
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
    pre, post, res = hidden.split(list(c.sizes), -1)
    pre, post = (part.unflatten(-1, (part.shape[-1] // n, n)).mT for part in (pre, post))
    return torch.cat([pre, post, res.unflatten(-1, (n, res.shape[-1] // n))], -1)


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
