"""hc::pre: everything a sublayer reads, project + constrain + aggregate (mHC eq. 3–8).

Returns u, pre, post, res, and what its backward needs: p, ss and, if asked, the ghost of post.py.
Moves: n + (n + V) C-units forward; backward n + V for <du, x>, then x, du, [g] and ∂x.

Delayed pre (DeepSeek-V4.1): with `carried`, the pre of the sublayer before, u = Σ_i carried_i x_i
and the own pre is for the next. ∂x then waits for no ⟨du, x⟩, which the same pass makes: n + V
C-units less.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from custom_ops import aggregate as agg
from custom_ops import constrain as con
from custom_ops import project as proj
from custom_ops import read_norm, reference
from custom_ops.constraint import Constraint, parse
from custom_ops.post import mix
from custom_ops.registration import (
    compute_dtype,
    define,
    double_backward,
    use_triton,
)


def coefficients(
    x: Tensor, phi: Tensor | None, alpha: Tensor | None, bias: Tensor, c: Constraint
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """pre, post, res, p, ss; p and ss are empty and the rest has no token axis if static."""
    if con.is_static(c):
        bias = bias.to(compute_dtype(x, bias))
        empty = bias.new_empty(0)
        return *con.static_forward(bias, c), empty, empty.clone()
    assert phi is not None and alpha is not None and c.norm == "rms"
    p, ss = proj.forward(x, phi, c.projection == "stream", c.precision)
    width = c.norm_width(x.shape[-1])
    return *con.forward(p, ss, alpha, bias, width, c.spec), p, ss


def read(
    x: Tensor, pre: Tensor, weight: Tensor | None, shift: Tensor | None, c: Constraint
) -> Tensor:
    """u = Σ_i pre_i x_i, or with a read_norm norm(u)."""
    if c.read_norm == "none":
        return agg.forward(x, pre if c.views == 1 else agg.per_token(pre, x.shape[:-2], 2))
    assert weight is not None
    return read_norm.forward(x, pre, weight, shift, c)


def forward(
    x: Tensor,
    phi: Tensor | None,
    alpha: Tensor | None,
    bias: Tensor,
    spec: str,
    with_ghost: bool = False,
    weight: Tensor | None = None,
    shift: Tensor | None = None,
    carried: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    c = parse(spec)
    assert carried is None or c.views == 1
    pre, post, res, p, ss = coefficients(x, phi, alpha, bias, c)
    u = read(x, pre if carried is None else carried, weight, shift, c)
    return u, pre, post, res, p, ss, ghost_of(x, with_ghost)


def ghost_of(x: Tensor, with_ghost: bool, weighed: bool = False) -> Tensor:
    """The stand-in for x (see post.py), or for the one row that is left of it; else empty."""
    if not with_ghost:
        return x.new_empty(0)
    *lead, streams, width = x.shape
    return x.new_zeros(()).expand(*lead, 1 if weighed else streams, width)


def backward(
    du: Tensor,
    dpre: Tensor | None,
    dpost: Tensor | None,
    dres: Tensor | None,
    g: Tensor | None,
    x: Tensor,
    phi: Tensor | None,
    alpha: Tensor | None,
    bias: Tensor,
    weight: Tensor | None,
    shift: Tensor | None,
    carried: Tensor | None,
    pre: Tensor,
    post: Tensor,
    res: Tensor,
    p: Tensor,
    ss: Tensor,
    spec: str,
    extra: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """∂x, ∂φ, ∂α, ∂b, ∂weight, ∂shift, ∂carried (empty where there is none).

    g is the cotangent of the ghost, whose resᵀg belongs to ∂x. extra, what else ∂x consists of,
    is added in the same pass.
    """
    c = parse(spec)
    parameters = (phi, alpha, bias, weight, shift, carried)
    before = before_dx(c, du, dpre, dpost, dres, x, parameters, (pre, post, res, p, ss))
    g, res_all, extra = from_above(g, extra, pre, res, x)
    known = (before.du, before.weights, phi, before.dp, before.dss)
    dx, dphi, dots = _form_dx(x, *known, g, res_all, before.wants_dots, c)
    return dx if extra is None else dx + extra, dphi, *before.gradients(dots, carried)


def from_above(
    g: Tensor | None, extra: Tensor | None, pre: Tensor, res: Tensor, x: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """g and the res of every token that mixes it, one row of each if all streams have one g.

    A g of one row belongs to the next streams weighed by pre (post_pre.py). Without g extra takes
    its place, with the identity for res; the last result is extra else.
    """
    if g is not None and g.shape[-2] < x.shape[-2]:
        res = (pre.unsqueeze(-1) * res).sum(-2, keepdim=True)
    if g is None and extra is not None:
        g, extra = extra, None
        res = torch.eye(res.shape[-1], dtype=res.dtype, device=res.device)
    if g is None:
        return None, None, None
    res = agg.per_token(res, x.shape[:-2], 2)
    if g.stride(-2) == 0 and g.shape[-2] > 1:
        g, res = g[..., :1, :], res.sum(-2, keepdim=True)
    return g, res, extra


class Before(NamedTuple):
    """What the backward knows before it forms ∂x.

    du is that of the read before its norm, weights [..., V, n] or [..., n] are those it was read
    with, dots are ⟨du, x_i⟩, None as long as only ∂carried wants them.
    """

    du: Tensor
    weights: Tensor
    dots: Tensor | None
    dp: Tensor | None
    dss: Tensor | None
    dalpha: Tensor
    dbias: Tensor
    dweight: Tensor
    dshift: Tensor
    delayed: bool

    @property
    def wants_dots(self) -> bool:
        """Whether who forms ∂x is to make ⟨du, x_i⟩, for which then nothing waits."""
        return self.delayed and self.dots is None

    def gradients(
        self, dots: Tensor | None, carried: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """∂α, ∂b, ∂weight, ∂shift, ∂carried, with the dots that were wanted."""
        dcarried = self.dshift.new_empty(0)
        if carried is not None:
            made = dots if self.dots is None else self.dots
            assert made is not None
            dcarried = agg.over_tokens(made, carried)
        return self.dalpha, self.dbias, self.dweight, self.dshift, dcarried


def before_dx(
    c: Constraint, du: Tensor, dpre, dpost, dres, x: Tensor, parameters: tuple, saved: tuple
) -> Before:
    """The backward up to ∂x: of the read's norm, if any, and from the coefficients to p and ss."""
    _, alpha, bias, weight, shift, carried = parameters
    pre, post, res, p, ss = saved
    dweight, dshift = x.new_empty(0), x.new_empty(0)
    weights = pre if carried is None else carried
    dots = None
    if c.read_norm != "none":
        du, dots, dweight, dshift = read_norm.backward(du, x, weights, weight, shift, c)
    weights_all = agg.per_token(weights, x.shape[:-2], len(con.token_shapes(c)[0]))
    if carried is None:
        if dots is None:
            dots = _dots(du, x)
        dots = agg.over_tokens(dots, weights).to(weights.dtype)
        dpre = dots if dpre is None else dots + dpre
    dpre = torch.zeros_like(pre) if dpre is None else dpre
    dpost = torch.zeros_like(post) if dpost is None else dpost
    dres = torch.zeros_like(res) if dres is None else dres
    if con.is_static(c):
        dp = dss = None
        dalpha = bias.new_empty(0)
        dbias = con.static_backward(dpre, dpost, dres, bias, c)
    else:
        width = c.norm_width(x.shape[-1])
        dp, dss, dalpha, dbias = con.backward(dpre, dpost, dres, p, ss, alpha, bias, width, c.spec)
    made = (dp, dss, dalpha, dbias, dweight, dshift)
    return Before(du, weights_all, dots, *made, carried is not None)


def _dots(du: Tensor, x: Tensor) -> Tensor:
    """<du_v, x_i> [..., V, n] (or [..., n] of a du [..., C]), the number that ∂x waits for."""
    if use_triton(x):
        from custom_ops.kernels import pre_backward as kernels

        return kernels.aggregate_dots(du.contiguous(), x.contiguous())
    dtype = compute_dtype(x, du)
    if du.dim() < x.dim():
        return agg.dots(du.to(dtype).unsqueeze(-2), x.to(dtype)).squeeze(-2)
    return agg.dots(du.to(dtype), x.to(dtype))


def _form_dx(
    x, du, pre, phi, dp, dss, g, res, with_dots: bool, c: Constraint
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The whole of ∂x, written once, ∂φ and, if asked, ⟨du, x_i⟩."""
    if use_triton(x) and c.projection == "flat":
        from custom_ops.kernels import pre_backward as kernels

        dx, dphi, dots = kernels.pre_dx(
            x.contiguous(),
            du.contiguous(),
            pre.contiguous().float(),
            phi.float().contiguous(),
            dp.contiguous(),
            dss.contiguous(),
            None if g is None else g.contiguous(),
            None if res is None else res.contiguous().float(),
            c.precision,
            with_dots,
        )
        dots = None if dots is None else dots.reshape(x.shape[:-1])
        return dx, dphi.to(phi.dtype), dots
    dots = _dots(du, x) if with_dots else None
    if du.dim() < x.dim():
        du, pre = du.unsqueeze(-2), pre.unsqueeze(-2)
    dtype = compute_dtype(x, pre)
    dx = agg.into_streams(du.to(dtype), pre.to(dtype))
    if g is not None:
        dx = dx + mix(res.mT.to(dtype), g.to(dtype))
    if dp is None:
        return dx.to(x.dtype), x.new_empty(0), dots
    through = proj.backward if use_triton(x) else proj.gradients
    rest, dphi = through(dp, dss, x, phi, c.projection == "stream")
    return (dx + rest).to(x.dtype), dphi.to(phi.dtype), dots


def _fake(x, phi, alpha, bias, spec, with_ghost=False, weight=None, shift=None, carried=None):
    c = parse(spec)
    lead, dim = x.shape[:-2], x.shape[-1]
    dtype = compute_dtype(x, phi, alpha, bias)
    static = con.is_static(c)
    u = x.new_empty((*lead, dim) if c.views == 1 else (*lead, c.views, dim))
    shapes = [s if static else (*lead, *s) for s in con.token_shapes(c)]
    coefs = (x.new_empty(s, dtype=dtype) for s in shapes)
    p_lead = (*lead, c.streams) if c.projection == "stream" else lead
    p = x.new_empty((0,) if static else (*p_lead, c.rows), dtype=dtype)
    ss = x.new_empty((0,) if static else p_lead, dtype=dtype)
    return u, *coefs, p, ss, ghost_of(x, with_ghost)


def _backward_fake(du, dpre, dpost, dres, g, x, *rest):
    return tuple(
        x.new_empty(0) if t is None else torch.empty(t.shape, dtype=t.dtype, device=x.device)
        for t in (x, *rest[:6])
    )


pre = define("pre", forward, _fake)
pre_backward = define("pre_backward", backward, _backward_fake)


def _setup_context(ctx, inputs, output):
    *primals, ctx.spec, with_ghost, weight, shift, carried = inputs
    u, pre, post, res, p, ss, ghost = output
    ctx.mark_non_differentiable(p, ss, *(() if with_ghost else (ghost,)))
    ctx.set_materialize_grads(False)
    ctx.u_shape = u.shape
    ctx.save_for_backward(*primals, weight, shift, carried, pre, post, res, p, ss)


def _autograd(ctx, du, dpre, dpost, dres, dp, dss, g):
    saved = ctx.saved_tensors
    if du is None:
        du = saved[0].new_zeros(()).expand(ctx.u_shape)
    grads = torch.ops.hc.pre_backward(du, dpre, dpost, dres, g, *saved, ctx.spec)
    present = [g if t is not None else None for g, t in zip(grads, saved[:7], strict=True)]
    return *present[:4], None, None, *present[4:]


def _reference(prims, rest):
    x, phi, alpha, bias, *read = prims
    return [*reference.pre(x, phi, alpha, bias, parse(rest[-2]), *read), None]


pre.register_autograd(_autograd, setup_context=_setup_context)
double_backward(pre_backward, 5, 7, _reference)
