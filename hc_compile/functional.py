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
from custom_ops.constraint import CHOICES, NEWTON_SCHULZ_SCHEDULE, Constraint, check_count
from hc_compile.checks import (
    require_device,
    require_float,
    require_shape,
    require_square,
    require_streams,
)

Coefficients = tuple[Tensor, Tensor, Tensor]


def _transforming() -> bool:
    """Whether a torch.func transform or forward-mode AD is active (an op's jvp would be 0)."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def sinkhorn(
    logits: Tensor,
    iterations: int = 20,
    *,
    start: str = "exp-globalmax",
    first: str = "column",
    denominator: str = "max",
    eps: float = 1e-30,
) -> Tensor:
    """Truncated Sinkhorn–Knopp: `iterations` × (first side, other side) of normalisation.

    res = (T_r T_c)^iterations exp(logits − max) (mHC, arXiv 2512.24880, eq. 9). The side
    normalised last is exact, the other approximate; the gradient is that of the truncated
    iteration.

    Args:
        logits: [..., n, n], any floating dtype; computed in float32 (float64 for float64).
        iterations: >= 0.
        start: "exp", "exp-rowmax", "exp-globalmax", "softmax" (over rows, + eps; counts as the
            first half step), "abs" (+ eps) or "log" (log domain).
        first: side normalised first, "row" (sums over the last axis) or "column".
        denominator: "add" divides by sum + eps, "max" by max(sum, eps).
        eps: see `start` and `denominator`.

    Returns: [..., n, n] in the dtype of logits.
    Raises: ValueError, TypeError for a wrong shape, dtype, choice or count.
    Moves: 2n² floats a matrix.
    """
    require_square("logits", logits)
    check_count("iterations", iterations, least=0)
    for name, value in (("start", start), ("first", first), ("denominator", denominator)):
        if value not in CHOICES[name]:
            raise ValueError(f"{name} must be one of {CHOICES[name]}, got {value!r}")
    if start == "softmax" and first != "row":
        raise ValueError(f"first must be 'row' when start is 'softmax', got {first!r}")
    if _transforming():
        return reference.sinkhorn(logits, iterations, start, first, denominator, eps)
    return torch.ops.hc.sinkhorn(logits, iterations, start, first, denominator, eps)


def newton_schulz(
    matrix: Tensor,
    schedule: tuple[tuple[float, float, float], ...] = NEWTON_SCHULZ_SCHEDULE,
    *,
    eps: float = 1e-7,
) -> Tensor:
    """Polar factor of every matrix by Newton–Schulz steps X <- aX + (bA + cA²)X, A = XXᵀ.

    Each matrix is first divided by its own Frobenius norm + eps.

    Args:
        matrix: [..., n, n], any floating dtype; computed in float32 (float64 for float64).
        schedule: (a, b, c) of each step; the default is 8 steps and 2 that finish convergence.
        eps: added to the norm.

    Returns: [..., n, n] in the dtype of matrix.
    Raises: ValueError, TypeError for a wrong shape or dtype.
    """
    require_square("matrix", matrix)
    if any(len(step) != 3 for step in schedule):
        raise ValueError(f"schedule must hold (a, b, c) triples, got {schedule!r}")
    if _transforming():
        return reference.newton_schulz(matrix, schedule, eps)
    flat = [float(value) for step in schedule for value in step]
    return torch.ops.hc.newton_schulz(matrix, flat, eps)


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
    require_shape("phi", phi, legend, (constraint.rows, columns))
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
        phi: [M, n·C] (or [M/n, C] for projection "stream", None for "static").
        alpha: [3] gates of pre, post and res (None for "static").
        bias: [M] in the order [pre | post | res].
        constraint: how they are normalised, activated and constrained.

    Returns: pre [..., n] (or [..., V, n]), post [..., n] (or [..., W, n]), res [..., n, n];
        without the leading dimensions if static. Moves: n C-units.
    """
    _check_parameters(x, phi, alpha, bias, constraint)
    if _transforming() or constraint.projection == "static":
        return reference.coefficients(x, phi, alpha, bias, constraint)
    per_stream = constraint.projection == "stream"
    p, ss = torch.ops.hc.project(x, phi, per_stream, constraint.precision)
    width = constraint.norm_width(x.shape[-1])
    return torch.ops.hc.constrain(p, ss, alpha, bias, width, constraint.spec)


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
    if _transforming():
        return reference.aggregate(x, pre)
    return torch.ops.hc.aggregate(x, pre)


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
    if _transforming():
        return reference.post(x, y, post, res)
    return torch.ops.hc.post(x, y, post, res, ghost)


def pre(
    x: Tensor,
    phi: Tensor | None,
    alpha: Tensor | None,
    bias: Tensor,
    constraint: Constraint,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read side of a sublayer, `coefficients` and `aggregate` in one: u, pre, post, res."""
    _check_parameters(x, phi, alpha, bias, constraint)
    if _transforming():
        return reference.pre(x, phi, alpha, bias, constraint)
    return torch.ops.hc.pre(x, phi, alpha, bias, constraint.spec)[:4]


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
    if _transforming():
        return *reference.pre(x, phi, alpha, bias, constraint), None
    u, pre, post, res, _, _, ghost = torch.ops.hc.pre(x, phi, alpha, bias, constraint.spec, True)
    return u, pre, post, res, ghost


def post_pre(
    x: Tensor,
    y: Tensor,
    post: Tensor,
    res: Tensor,
    phi: Tensor | None,
    alpha: Tensor | None,
    bias: Tensor,
    constraint: Constraint,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The boundary of two sublayers, `post` of one and `pre` of the next.

    Returns: x' [..., n, C], u, pre, post, res of the next sublayer. Moves: 3n + 2 C-units.
    """
    check_write(x, y, post, res)
    _check_parameters(x, phi, alpha, bias, constraint)
    if _transforming():
        return reference.post_pre(x, y, post, res, phi, alpha, bias, constraint)
    return torch.ops.hc.post_pre(x, y, post, res, phi, alpha, bias, constraint.spec)[:5]
