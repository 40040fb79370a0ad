"""hc::post_pre: the boundary of two sublayers, post of one and pre of the next, as one op.

x' = post(x, y, post, res), then pre(x'): u, pre', post', res', p, ss and, if asked, a ghost of x'.
Like hc::post it takes the ghost of x instead of giving x a gradient (see post.py), so in a chain
of boundaries every ∂x is formed once. Moves 3n + 2 C-units forward where x' is projected while it
is made (`fits`), 4n + 2 elsewhere; 5n + 4 backward where ∂x' and the inner products with it are
taken at once (`backward_fits`), 6n + 4 elsewhere. With `carried` (delayed pre, see pre.py) u needs
no second look at x': 2n + 2 forward; 4n + 3 backward, or 5n + 3.

Backward at once, tokens 4k to 4k + 3 share products: where one holds what is not finite, so do
the gradients of all four.
"""

import torch
from torch import Tensor

from custom_ops import aggregate as agg
from custom_ops import post as post_op
from custom_ops import pre as pre_op
from custom_ops import reference
from custom_ops.constraint import Constraint, parse
from custom_ops.registration import define, double_backward, use_triton

FUSED_STREAMS = 4
FUSED_COEFFICIENTS = 32
FUSED_ALIGNMENT = 16  # other widths take narrow loads, whose addresses spill


def fits(x: Tensor, y: Tensor, post: Tensor, res: Tensor, c: Constraint) -> bool:
    """Whether one kernel writes x' and projects it: bf16, few streams, one view and branch."""
    per_token = post.dim() == x.dim() - 1 and res.dim() == x.dim()
    return (
        use_triton(x)
        and x.dtype == torch.bfloat16
        and max(x.shape[-2], c.streams) <= FUSED_STREAMS
        and x.shape[-1] % FUSED_ALIGNMENT == 0
        and y.dim() == x.dim() - 1
        and per_token
        and c.projection == "flat"
        and c.precision == "bf16x2"
        and c.views == 1
        and 0 < c.total <= FUSED_COEFFICIENTS
    )


def backward_fits(
    x: Tensor, y: Tensor, post, res, g, dghost, has_ghost: bool, c: Constraint
) -> bool:
    """Whether one kernel, on Hopper, forms ∂x' of 4 streams from one cotangent, and uses it.

    It writes ∂x' for the ghost of x, or ∂x where there is none: x may then be one stream.
    """
    if (g is None) == (dghost is None) or not fits(x, y, post, res, c):
        return False
    from custom_ops.kernels.launch import generation

    return (
        x.shape[-2] in ((4,) if has_ghost else (1, 4))
        and c.streams == 4
        and y.dtype == x.dtype
        and x.shape[-1] % 64 == 0
        and generation(x.device) == 9
    )


def forward(
    x: Tensor,
    y: Tensor,
    post: Tensor,
    res: Tensor,
    phi: Tensor | None,
    alpha: Tensor | None,
    bias: Tensor,
    spec: str,
    ghost: Tensor | None = None,
    with_ghost: bool = False,
    weight: Tensor | None = None,
    shift: Tensor | None = None,
    carried: Tensor | None = None,
    weighed: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    c = parse(spec)
    if not fits(x, y, post, res, c):
        streams = post_op.forward(x, y, post, res)
        rest = (spec, False, weight, shift, carried)
        *made, _ = pre_op.forward(streams, phi, alpha, bias, *rest)
        ghost = pre_op.ghost_of(streams, with_ghost, weighed)
        return streams, *made, ghost  # type: ignore[return-value]
    once = carried if c.read_norm == "none" else None  # a norm needs the whole row of u
    streams, u, *coefficients, p, ss = _fused_write(x, y, post, res, phi, alpha, bias, once, c)
    if u is None:
        weights = coefficients[0] if carried is None else carried
        u = pre_op.read(streams, weights, weight, shift, c)
    ghost = pre_op.ghost_of(streams, with_ghost, weighed)
    return streams, u, *coefficients, p, ss, ghost  # type: ignore[return-value]


def backward(
    g: Tensor | None,
    du: Tensor,
    dpre: Tensor | None,
    dpost: Tensor | None,
    dres: Tensor | None,
    dghost: Tensor | None,
    x: Tensor,
    y: Tensor,
    post: Tensor,
    res: Tensor,
    phi: Tensor | None,
    alpha: Tensor | None,
    bias: Tensor,
    weight: Tensor | None,
    shift: Tensor | None,
    carried: Tensor | None,
    streams: Tensor,
    next_pre: Tensor,
    next_post: Tensor,
    next_res: Tensor,
    p: Tensor,
    ss: Tensor,
    spec: str,
    has_ghost: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """∂x, ∂y, ∂post, ∂res, ∂φ, ∂α, ∂b, ∂weight, ∂shift, ∂carried (empty where there is none).

    g is what other users of x' gave it; dghost (the whole cotangent of the streams that the next
    post makes) belongs to it through resᵀ. With a ghost the first output is the whole of ∂x', the
    ghost's cotangent, instead of ∂x.
    """
    parameters = (phi, alpha, bias, weight, shift, carried)
    saved = (next_pre, next_post, next_res, p, ss)
    c, write = parse(spec), (x, y, post, res)
    if backward_fits(*write, g, dghost, has_ghost, c):
        before = pre_op.before_dx(c, du, dpre, dpost, dres, streams, parameters, saved)
        above = pre_op.from_above(dghost, g, next_pre, next_res, streams)[:2]
        given = (before, write, streams, *above, phi, has_ghost)
        dx, dy, dpost, dres, dphi, dots = _backward_at_once(*given)
        return dx, dy, dpost, dres, dphi, *before.gradients(dots, carried)  # type: ignore[return-value]
    total, *grads = pre_op.backward(
        du, dpre, dpost, dres, dghost, streams, *parameters, *saved, spec, g
    )
    dx, dy, dpost, dres = post_op.backward(total, *write, not has_ghost)
    dx = total if has_ghost else dx
    return dx, dy, dpost, dres, *grads  # type: ignore[return-value]


def _backward_at_once(before: pre_op.Before, write, streams, g, mix, phi, has_ghost: bool):
    """∂x' or ∂x, with it ∂y, ∂post, ∂res of the write that made x', and ⟨du, x'⟩; then ∂φ."""
    from custom_ops.kernels.boundary_backward import boundary_backward

    x, y, post, res = write
    assert before.dp is not None and before.dss is not None
    dx, dy, dpost, dres, dphi, dots = boundary_backward(
        x.contiguous(),
        y.contiguous(),
        post.contiguous().float(),
        res.contiguous().float(),
        streams.contiguous(),
        before.du.contiguous(),
        g.contiguous(),
        before.weights.contiguous().float(),
        mix.contiguous().float(),
        phi.float().contiguous(),
        before.dp.contiguous(),
        before.dss.contiguous(),
        before.wants_dots,
        has_ghost,
    )
    return dx, dy, dpost.to(post.dtype), dres.to(res.dtype), dphi.to(phi.dtype), dots


def _fused_write(x, y, post, res, phi, alpha, bias, carried: Tensor | None, c: Constraint):
    """x', u (with `carried`) and, from x's projection, pre, post, res, p and ss of the next."""
    from custom_ops.kernels import post_pre as kernels

    write = (x.contiguous(), y.contiguous(), post.contiguous().float(), res.contiguous().float())
    parameters = (phi.float().contiguous(), alpha.float(), bias.float())
    if carried is not None:
        carried = agg.per_token(carried, x.shape[:-2], 1).contiguous().float()
    return kernels.post_pre(*write, *parameters, carried, c)


def _fake(
    x,
    y,
    post,
    res,
    phi,
    alpha,
    bias,
    spec,
    ghost=None,
    with_ghost=False,
    weight=None,
    shift=None,
    carried=None,
    weighed=False,
):
    streams = post_op._fake(x, y, post, res)
    *made, _ = pre_op._fake(streams, phi, alpha, bias, spec)
    return streams, *made, pre_op.ghost_of(streams, with_ghost, weighed)


def _backward_fake(g, du, dpre, dpost, dres, dghost, x, *rest):
    return tuple(
        x.new_empty(0) if t is None else torch.empty(t.shape, dtype=t.dtype, device=x.device)
        for t in (x, *rest[:9])
    )


post_pre = define("post_pre", forward, _fake)
post_pre_backward = define("post_pre_backward", backward, _backward_fake)


def _setup_context(ctx, inputs, output):
    *primals, ctx.spec, ghost, with_ghost, weight, shift, carried, _ = inputs
    streams, u, *coefficients, p, ss, next_ghost = output
    ctx.mark_non_differentiable(p, ss, *(() if with_ghost else (next_ghost,)))
    ctx.set_materialize_grads(False)
    ctx.u_shape = u.shape
    ctx.has_ghost = ghost is not None
    ctx.save_for_backward(*primals, weight, shift, carried, streams, *coefficients, p, ss)


def _autograd(ctx, g, du, dpre, dpost, dres, dp, dss, dghost):
    saved = ctx.saved_tensors
    du = saved[0].new_zeros(()).expand(ctx.u_shape) if du is None else du
    dx, *grads = torch.ops.hc.post_pre_backward(
        g, du, dpre, dpost, dres, dghost, *saved, ctx.spec, ctx.has_ghost
    )
    present = [d if t is not None else None for d, t in zip(grads, saved[1:10], strict=True)]
    dx, dghost = (None, dx) if ctx.has_ghost else (dx, None)
    return dx, *present[:6], None, dghost, None, *present[6:], None


post_pre.register_autograd(_autograd, setup_context=_setup_context)


def _reference(prims, rest):
    x, y, post, res, phi, alpha, bias, *read = prims
    c = parse(rest[-2])
    return [*reference.post_pre(x, y, post, res, phi, alpha, bias, c, *read), None]


double_backward(post_pre_backward, 6, 10, _reference)
