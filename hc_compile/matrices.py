"""Functions on small [..., n, n] matrices: the manifolds' projections behind checked arguments."""

import torch
from torch import Tensor

import custom_ops  # noqa: F401  (registers torch.ops.hc)
from custom_ops import reference
from custom_ops.constraint import CHOICES, NEWTON_SCHULZ_SCHEDULE, check_count
from hc_compile.checks import require_square, transforming


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
    if transforming():
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
    if transforming():
        return reference.newton_schulz(matrix, schedule, eps)
    flat = [float(value) for step in schedule for value in step]
    return torch.ops.hc.newton_schulz(matrix, flat, eps)
