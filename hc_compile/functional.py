"""Pure functions on tensors: the hc:: ops behind checked arguments.

Legend: T tokens (leading dimensions, any number of them), n streams, C width of a stream, V input
views, W branch outputs. x [..., n, C] in float64/32/16 or bfloat16; coefficients are float32
(float64 for float64 streams). Under torch.func transforms and forward-mode AD every function
computes its reference instead of its op, with the same result and correct derivatives.
"""

import torch
from torch import Tensor

import custom_ops  # noqa: F401  (registers torch.ops.hc)
from custom_ops import reference
from custom_ops.constraint import Constraint
from hc_compile.checks import (
    require_device,
    require_float,
    require_shape,
    require_streams,
    transforming,
)
from hc_compile.matrices import newton_schulz, sinkhorn

__all__ = [
    "aggregate",
    "attention_pool",
    "check_write",
    "coefficients",
    "newton_schulz",
    "post",
    "post_pre",
    "pre",
    "pre_with_ghost",
    "read",
    "sinkhorn",
]

Coefficients = tuple[Tensor, Tensor, Tensor]


def _check_parameters(
    x: Tensor, phi: Tensor | None, alpha: Tensor | None, bias: Tensor, constraint: Constraint
) -> None:
    require_streams(x, constraint.streams)
    require_shape("bias", bias, "[M]", (constraint.total,))
    require_device(x, phi=phi, alpha=alpha, bias=bias)
    if constraint.projection == "static":
        if phi is not None or alpha is not None:
            raise ValueError("phi and alpha must be None for a static constraint")
        return
    if phi is None or alpha is None:
        raise ValueError("phi and alpha must be tensors unless the constraint is static")
    wide = constraint.projection == "flat"
    columns = constraint.streams * x.shape[-1] if wide else x.shape[-1]
    legend = "[M, n*C]" if wide else "[M/n, C]"
    proposals = phi.shape[:1] if phi.dim() == 3 else ()
    require_shape("phi", phi, legend, (*proposals, constraint.rows, columns))
    require_shape("alpha", alpha, "[3]", (3,))


def coefficients(
    x: Tensor,
    phi: Tensor | None,
    alpha: Tensor | None,
    bias: Tensor,
    constraint: Constraint,
) -> Coefficients:
    """pre, post and res of one sublayer (mHC eq. 5–8).

    Args:
        x: [..., n, C] streams.
        phi: [M, n·C] (or [M/n, C] for projection "stream", None for "static"); [P, M, n·C] for P
            proposals, whose coefficients are averaged.
        alpha: [3] gates of pre, post and res (None for "static").
        bias: [M] in the order [pre | post | res].
        constraint: how they are normalised, activated and constrained.

    Returns: pre [..., n] (or [..., V, n]), post [..., n] (or [..., W, n]), res [..., n, n];
        without the leading dimensions if static. Moves: n C-units.
    """
    _check_parameters(x, phi, alpha, bias, constraint)
    if transforming() or constraint.projection == "static":
        return reference.coefficients(x, phi, alpha, bias, constraint)
    assert phi is not None
    p, ss = _project(x, phi.flatten(0, -2), constraint)
    options = (ss, alpha, bias, constraint.norm_width(x.shape[-1]), constraint.spec)
    made = [torch.ops.hc.constrain(part, *options) for part in p.split(constraint.rows, -1)]
    if len(made) == 1:
        return made[0]
    pre, post, res = (torch.stack(same).mean(0) for same in zip(*made, strict=True))
    return pre, post, res


def _project(x: Tensor, phi: Tensor, constraint: Constraint) -> tuple[Tensor, Tensor]:
    """p = φx and ss = Σx², of x less its mean for norm "layer": φ is centred, a row sums x."""
    options = (constraint.projection == "stream", constraint.precision)
    if constraint.norm == "rms":
        return torch.ops.hc.project(x, phi, *options)
    centred = phi - phi.mean(-1, keepdim=True)
    rows = torch.cat([centred, torch.ones_like(phi[:1])])
    p, ss = torch.ops.hc.project(x, rows, *options)
    variance = ss - p[..., -1].square() / phi.shape[-1]
    return p[..., :-1], variance.clamp_min(0)


def _composed(phi: Tensor | None, constraint: Constraint) -> bool:
    """Whether the read is made of several ops: hc::pre has one φ and an RMS norm."""
    return phi is not None and (phi.dim() == 3 or constraint.norm != "rms")


def aggregate(x: Tensor, pre: Tensor) -> Tensor:
    """What a branch reads: u_v = Σ_i pre_vi x_i (mHC eq. 3).

    Args:
        x: [..., n, C] streams.
        pre: [..., n], static [n], or [..., V, n] for V input views.

    Returns: [..., C] or [..., V, C], dtype of x. Moves: n + V C-units.
    """
    require_streams(x)
    require_float("pre", pre)
    require_device(x, pre=pre)
    lead, n = x.shape[:-2], x.shape[-2]
    if pre.dim() == x.dim():
        require_shape("pre", pre, "[..., V, n]", (*lead, pre.shape[-2], n))
    elif pre.dim() == 1:
        require_shape("pre", pre, "[n]", (n,))
    else:
        require_shape("pre", pre, "[..., n]", (*lead, n))
    if transforming():
        return reference.aggregate(x, pre)
    return torch.ops.hc.aggregate(x, pre)


def attention_pool(x: Tensor, weight: Tensor) -> Tensor:
    """Streams to one by attention over them, a weight a channel: Σ_i softmax_i(W x_i) ⊙ x_i.

    Args:
        x: [..., n, C] streams.
        weight: W [C, C]; the identity weighs each channel by itself.

    Returns: [..., C] in the dtype of x.
    """
    require_streams(x)
    require_shape("weight", weight, "[C, C]", (x.shape[-1], x.shape[-1]))
    require_device(x, weight=weight)
    logits = torch.nn.functional.linear(x, weight.to(x.dtype))
    dtype = reference.compute_dtype(x)
    return (logits.to(dtype).softmax(-2) * x.to(dtype)).sum(-2).to(x.dtype)


def check_write(x: Tensor, y: Tensor, post: Tensor, res: Tensor) -> None:
    """Raise unless the arguments of `post` fit together."""
    require_streams(x)
    for name, value in (("y", y), ("post", post), ("res", res)):
        require_float(name, value)
    require_device(x, y=y, post=post, res=res)
    lead, n, width = x.shape[:-2], x.shape[-2], x.shape[-1]
    branches = y.dim() == x.dim()
    own = (y.shape[-2], n) if branches else (n,)
    if branches:
        require_shape("y", y, "[..., W, C]", (*lead, y.shape[-2], width))
    else:
        require_shape("y", y, "[..., C]", (*lead, width))
    legend = "W, n" if branches else "n"
    if post.dim() == len(own):
        require_shape("post", post, f"[{legend}]", own)
    else:
        require_shape("post", post, f"[..., {legend}]", (*lead, *own))
    if res.dim() == 2:
        require_shape("res", res, "[n, n]", (n, n))
    else:
        require_shape("res", res, "[..., n, n]", (*lead, n, n))


def post(
    x: Tensor, y: Tensor, post: Tensor, res: Tensor, *, ghost: Tensor | None = None
) -> Tensor:
    """What a branch writes: x'_i = Σ_j res_ij x_j + Σ_w post_wi y_w (mHC eq. 3).

    Args:
        x: [..., n, C] streams.
        y: [..., C] branch output, or [..., W, C] for W branches; any floating dtype.
        post: [..., n] or static [n] ([..., W, n] or [W, n] for W branches).
        res: [..., n, n] applied [out, in], or static [n, n].
        ghost: stand-in for x from `pre`; it then carries ∂x' to that pre (compiled code only).

    Returns: [..., n, C] in the dtype of x. Moves: 2n + W C-units.
    """
    check_write(x, y, post, res)
    if transforming():
        return reference.post(x, y, post, res)
    return torch.ops.hc.post(x, y, post, res, ghost)


def _check_carried(x: Tensor, carried: Tensor | None, constraint: Constraint) -> None:
    if carried is None:
        return
    if constraint.views > 1:
        raise ValueError(f"carried must be None with several views, got {constraint.views} views")
    n = x.shape[-2]
    require_float("carried", carried)
    require_device(x, carried=carried)
    static = carried.dim() == 1
    lead = () if static else x.shape[:-2]
    require_shape("carried", carried, "[n]" if static else "[..., n]", (*lead, n))


def pre(
    x: Tensor,
    phi: Tensor | None,
    alpha: Tensor | None,
    bias: Tensor,
    constraint: Constraint,
    carried: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read side of a sublayer, `coefficients` and `aggregate` in one: u, pre, post, res.

    carried: [..., n] (or [n]) weights to read with in place of pre, which is then for the next
    sublayer (delayed pre, DeepSeek-V4.1).
    """
    _check_parameters(x, phi, alpha, bias, constraint)
    _check_carried(x, carried, constraint)
    if transforming():
        return reference.pre(x, phi, alpha, bias, constraint, carried=carried)
    if _composed(phi, constraint):
        made = coefficients(x, phi, alpha, bias, constraint)
        return aggregate(x, made[0] if carried is None else carried), *made
    rest = (constraint.spec, False, None, None, carried)
    return torch.ops.hc.pre(x, phi, alpha, bias, *rest)[:4]


def pre_with_ghost(
    x: Tensor,
    phi: Tensor | None,
    alpha: Tensor | None,
    bias: Tensor,
    constraint: Constraint,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """`pre`, and a ghost for its `post`: x then gets its whole gradient in one pass.

    Double backward is refused through a ghost, so this is for compiled code, where it can't be
    had anyway.
    """
    _check_parameters(x, phi, alpha, bias, constraint)
    if transforming() or _composed(phi, constraint):
        return *pre(x, phi, alpha, bias, constraint), None
    made = torch.ops.hc.pre(x, phi, alpha, bias, constraint.spec, True)
    return *made[:4], made[6]


def read(
    x: Tensor,
    phi: Tensor | None,
    alpha: Tensor | None,
    bias: Tensor,
    constraint: Constraint,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """`pre_with_ghost` where Dynamo compiles the read and its `post` for training, else `pre`.

    Not `torch.compiler.is_exporting()`: under torch.compile, torch 2.11 folds it to True.
    """
    if torch.compiler.is_dynamo_compiling() and torch.is_grad_enabled():
        return pre_with_ghost(x, phi, alpha, bias, constraint)
    return *pre(x, phi, alpha, bias, constraint), None


def post_pre(
    x: Tensor,
    y: Tensor,
    post: Tensor,
    res: Tensor,
    phi: Tensor | None,
    alpha: Tensor | None,
    bias: Tensor,
    constraint: Constraint,
    carried: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The boundary of two sublayers, `post` of one and `pre` of the next.

    Returns: x' [..., n, C], u, pre, post, res of the next sublayer. Moves: 3n + 2 C-units, 2n + 2
        where the read is `carried` (see `pre`).
    """
    check_write(x, y, post, res)
    _check_parameters(x, phi, alpha, bias, constraint)
    _check_carried(x, carried, constraint)
    write = (x, y, post, res)
    if transforming():
        return reference.post_pre(*write, phi, alpha, bias, constraint, carried=carried)
    if _composed(phi, constraint):
        x = torch.ops.hc.post(*write, None)
        return x, *pre(x, phi, alpha, bias, constraint, carried)
    rest = (constraint.spec, None, False, None, None, carried)
    return torch.ops.hc.post_pre(*write, phi, alpha, bias, *rest)[:5]
