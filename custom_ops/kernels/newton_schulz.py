"""Newton–Schulz polar factors of many small matrices in registers, forward and exact backward.

X <- aX + (bA + cA²)X with A = XXᵀ, each matrix divided by its own norm first. The backward
replays the steps. Matrices wider than 8 take the tiled path of newton_schulz_tiled.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.kernels.launch import cdiv, launch
from custom_ops.kernels.newton_schulz_tiled import (
    newton_schulz_tiled,
    newton_schulz_tiled_backward,
)
from custom_ops.kernels.tile import hc_offsets, hc_tokens, hc_valid, padded

# SCHEDULE = ((a, b, c), ...), a compile-time tuple everywhere below.


@triton.jit
def hc_transpose(x):
    return tl.trans(x, (1, 0, 2))


@triton.jit
def hc_product(left, right):
    """left @ right of tiles [N, N, tokens]; adding -0.0 is free, so the selections vanish."""
    N: tl.constexpr = left.shape[0]
    index = tl.arange(0, N)
    total = tl.zeros_like(left)
    for k in tl.static_range(N):
        column = tl.sum(tl.where((index == k)[None, :, None], left, -0.0), 1)
        row = tl.sum(tl.where((index == k)[:, None, None], right, -0.0), 0)
        total += column[:, None, :] * row[None, :, :]
    return total


@triton.jit
def hc_pick(step, SCHEDULE: tl.constexpr, FIELD: tl.constexpr):
    """Coefficient FIELD of a step known only at run time."""
    value = tl.full((), SCHEDULE[0][FIELD], tl.float32)
    for i in tl.static_range(1, len(SCHEDULE)):
        value = tl.where(step == i, SCHEDULE[i][FIELD], value)
    return value


@triton.jit
def hc_newton_schulz_norm(matrix):
    """Frobenius norm [1, 1, tokens]."""
    return tl.sqrt(tl.sum(tl.sum(matrix * matrix, 1), 0))[None, None, :]


@triton.jit
def hc_newton_schulz_steps(x, first, steps, SCHEDULE: tl.constexpr):
    """Steps first .. first + steps - 1."""
    for i in range(steps):
        step = tl.full((), 0, tl.int32) + first + i
        gram = hc_product(x, hc_transpose(x))
        mixed = hc_pick(step, SCHEDULE, 1) * gram
        mixed += hc_pick(step, SCHEDULE, 2) * hc_product(gram, gram)
        x = hc_pick(step, SCHEDULE, 0) * x + hc_product(mixed, x)
    return x


@triton.jit
def hc_newton_schulz_forward(matrix, EPS: tl.constexpr, SCHEDULE: tl.constexpr):
    """Polar factor of each matrix of a tile [N, N, tokens] (padding: 0)."""
    x = matrix / (hc_newton_schulz_norm(matrix) + EPS)
    return hc_newton_schulz_steps(x, 0, len(SCHEDULE), SCHEDULE)


@triton.jit
def hc_newton_schulz_undo(x, grad, step, SCHEDULE: tl.constexpr):
    """Gradient before a step from that after it; x is the step's input.

    With D = GXᵀ + XGᵀ and E = DA: dX = aG + (bA + cA²)G + (bD + c(E + Eᵀ))X.
    """
    b = hc_pick(step, SCHEDULE, 1)
    c = hc_pick(step, SCHEDULE, 2)
    gram = hc_product(x, hc_transpose(x))
    mixed = b * gram + c * hc_product(gram, gram)
    result = hc_pick(step, SCHEDULE, 0) * grad + hc_product(mixed, grad)
    outer = hc_product(grad, hc_transpose(x))
    outer += hc_transpose(outer)
    inner = hc_product(outer, gram)
    return result + hc_product(b * outer + c * (inner + hc_transpose(inner)), x)


@triton.jit
def hc_newton_schulz_backward(
    grad, matrix, SQUARED: tl.constexpr, EPS: tl.constexpr, SCHEDULE: tl.constexpr
):
    """Gradient of the matrices; `grad` is that of the polar factor, or SQUARED of its square.

    Keeps the state halfway and replays each half from its start.
    """
    STEPS: tl.constexpr = len(SCHEDULE)
    HALF: tl.constexpr = STEPS // 2
    norm = hc_newton_schulz_norm(matrix)
    start = matrix / (norm + EPS)
    middle = tl.zeros_like(start)
    last = start
    for half in range(2 if SQUARED else 1):
        middle = tl.where(half == 0, middle, last)
        first = tl.full((), 0, tl.int32) + half * HALF
        last = hc_newton_schulz_steps(last, first, HALF + half * (STEPS % 2), SCHEDULE)
    if SQUARED:
        grad = 2 * grad * last
    else:
        middle = last
    for done in range(STEPS):
        step = tl.full((), STEPS - 1, tl.int32) - done
        late = step >= HALF
        first = tl.where(late, HALF, 0)
        x = tl.where(late, middle, start)
        x = hc_newton_schulz_steps(x, first, step - first, SCHEDULE)
        grad = hc_newton_schulz_undo(x, grad, step, SCHEDULE)
    slope = tl.sum(tl.sum(grad * start, 1), 0)[None, None, :]
    slope = tl.where(norm > 0, slope / norm, 0.0)
    return grad / (norm + EPS) - slope * start


@triton.jit(do_not_specialize=["T"])
def hc_newton_schulz_kernel(
    matrix_ptr,
    out_ptr,
    T,
    n: tl.constexpr,
    N: tl.constexpr,
    BT: tl.constexpr,
    EPS: tl.constexpr,
    SCHEDULE: tl.constexpr,
):
    tokens = hc_tokens(BT)
    offsets = hc_offsets(tokens, n * n, n, 1, N, N, BT)
    valid = hc_valid(tokens, T, n, n, N, N)
    matrix = tl.load(matrix_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
    x = hc_newton_schulz_forward(matrix, EPS, SCHEDULE)
    tl.store(out_ptr + offsets, x.to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["T"])
def hc_newton_schulz_backward_kernel(
    grad_ptr,
    matrix_ptr,
    out_ptr,
    T,
    n: tl.constexpr,
    N: tl.constexpr,
    BT: tl.constexpr,
    EPS: tl.constexpr,
    SCHEDULE: tl.constexpr,
):
    tokens = hc_tokens(BT)
    offsets = hc_offsets(tokens, n * n, n, 1, N, N, BT)
    valid = hc_valid(tokens, T, n, n, N, N)
    matrix = tl.load(matrix_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
    grad = hc_newton_schulz_backward(grad, matrix, False, EPS, SCHEDULE)
    tl.store(out_ptr + offsets, grad.to(out_ptr.dtype.element_ty), mask=valid)


# N -> (tokens a program, warps)
FORWARD = {1: (128, 4), 2: (128, 4), 4: (32, 1), 8: (16, 1)}
BACKWARD = {1: (128, 4), 2: (128, 4), 4: (32, 1), 8: (8, 1)}


def newton_schulz(matrix: Tensor, schedule: tuple, eps: float = 1e-7) -> Tensor:
    """Polar factor of each matrix [T, n, n], in its dtype. Moves 2·T·n² elements if n <= 8."""
    tokens, n, _ = matrix.shape
    if n > 8:
        return newton_schulz_tiled(matrix, schedule, eps)
    out = torch.empty_like(matrix)
    block, warps = FORWARD[padded(n)]
    launch(
        hc_newton_schulz_kernel, (cdiv(tokens, block),), matrix, out, tokens,
        n=n, N=padded(n), BT=block, EPS=eps, SCHEDULE=schedule, num_warps=warps,
    )  # fmt: skip
    return out


def newton_schulz_backward(
    grad: Tensor, matrix: Tensor, schedule: tuple, eps: float = 1e-7
) -> Tensor:
    """Gradient of the matrices [T, n, n], in their dtype. Moves 3·T·n² elements if n <= 8."""
    tokens, n, _ = matrix.shape
    if n > 8:
        return newton_schulz_tiled_backward(grad, matrix, schedule, eps)
    out = torch.empty_like(matrix)
    block, warps = BACKWARD[padded(n)]
    launch(
        hc_newton_schulz_backward_kernel, (cdiv(tokens, block),), grad, matrix, out, tokens,
        n=n, N=padded(n), BT=block, EPS=eps, SCHEDULE=schedule, num_warps=warps,
    )  # fmt: skip
    return out
