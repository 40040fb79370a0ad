"""Truncated Sinkhorn–Knopp (mHC eq. 9) of many small matrices, forward and exact backward.

The backward keeps no history in memory: it walks back over the iterations in chunks, replays the
forward up to a chunk, keeps the chunk's divisors in registers and undoes its steps one by one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.kernels.launch import cdiv, launch
from custom_ops.kernels.tile import hc_exp, hc_offsets, hc_tokens, hc_valid, padded

# RULE = (iterations, start, first, denominator, eps), a compile-time tuple everywhere below.
LOG_PAD = tl.constexpr(-1e30)
# Divisor of a line of zeros (underflow, padding): its entries stay 0 and so does their gradient,
# which dividing by eps again and again would overflow.
DEAD = tl.constexpr(1e38)


@triton.jit
def hc_sum(x, AXIS: tl.constexpr):
    return tl.expand_dims(tl.sum(x, AXIS), AXIS)


@triton.jit
def hc_max(x, AXIS: tl.constexpr):
    return tl.expand_dims(tl.max(x, AXIS), AXIS)


@triton.jit
def hc_square(n: tl.constexpr, N: tl.constexpr):
    """Mask [N, N, 1] of the real entries."""
    return (tl.arange(0, N) < n)[:, None, None] & (tl.arange(0, N) < n)[None, :, None]


@triton.jit
def hc_line(n: tl.constexpr, N: tl.constexpr, AXIS: tl.constexpr):
    """Mask of the real lines that a sum over AXIS leaves: [N, 1, 1] or [1, N, 1]."""
    if AXIS == 1:
        return (tl.arange(0, N) < n)[:, None, None]
    else:
        return (tl.arange(0, N) < n)[None, :, None]


@triton.jit
def hc_peak(x, START: tl.constexpr):
    """The maximum that the start subtracts."""
    top = hc_max(x, 1)
    if START == "exp-globalmax":
        top = hc_max(top, 0)
    return top


@triton.jit
def hc_sinkhorn_half(x, n: tl.constexpr, AXIS: tl.constexpr, RULE: tl.constexpr):
    """One half step: x normalised over AXIS, and the divisor (log domain: the logsumexp)."""
    N: tl.constexpr = x.shape[0]
    if RULE[1] == "log":
        top = hc_max(x, AXIS)
        divisor = top + tl.log(hc_sum(tl.exp(x - top), AXIS))
        x = x - divisor
        if n != N:
            x = tl.where(hc_square(n, N), x, LOG_PAD)
    else:
        total = hc_sum(x, AXIS)
        if RULE[3] == "add":
            divisor = total + RULE[4]
        else:
            divisor = tl.where(total < RULE[4], RULE[4], total)
        divisor = tl.where(total == 0, DEAD, divisor)
        x = x * (1.0 / divisor)
    return x, divisor


@triton.jit
def hc_sinkhorn_undo(x, grad, divisor, AXIS: tl.constexpr, RULE: tl.constexpr):
    """Input of a half step and its gradient, from its output, the output's gradient, divisor."""
    if RULE[1] == "log":
        grad = grad - tl.exp(x) * hc_sum(grad, AXIS)
        x = x + divisor
    else:
        shift = hc_sum(grad * x, AXIS)
        if RULE[3] == "max":
            shift = tl.where(divisor <= RULE[4], 0.0, shift)
        grad = (grad - shift) * (1.0 / divisor)
        x = x * divisor
    return x, grad


@triton.jit
def hc_sinkhorn_start(logits, n: tl.constexpr, RULE: tl.constexpr):
    """The matrix before the first full iteration, and the divisor of a lone first column step."""
    N: tl.constexpr = logits.shape[0]
    START: tl.constexpr = RULE[1]
    x = logits
    if n != N:
        x = tl.where(hc_square(n, N), x, LOG_PAD if START == "log" else float("-inf"))
    if START == "softmax":
        x = hc_exp(x - hc_peak(x, START))
        x = x / hc_sum(x, 1) + RULE[4]
    elif START == "abs":
        x = tl.abs(x) + RULE[4]
    elif START == "exp":
        x = hc_exp(x)
    elif START != "log":
        x = hc_exp(x - hc_peak(x, START))
    if n != N:
        x = tl.where(hc_square(n, N), x, LOG_PAD if START == "log" else 0.0)
    divisor = hc_sum(x, 0)
    if START == "softmax" and RULE[0] > 0:
        x, divisor = hc_sinkhorn_half(x, n, 0, RULE)
    return x, divisor


@triton.jit
def hc_sinkhorn_start_backward(grad, logits, n: tl.constexpr, RULE: tl.constexpr):
    """Gradient of the logits from that of the starting matrix."""
    N: tl.constexpr = logits.shape[0]
    START: tl.constexpr = RULE[1]
    x, divisor = hc_sinkhorn_start(logits, n, RULE)
    if START == "softmax":
        if RULE[0] > 0:
            x, grad = hc_sinkhorn_undo(x, grad, divisor, 0, RULE)
        x = x - RULE[4]
        if n != N:
            x = tl.where(hc_square(n, N), x, 0.0)
        grad = x * (grad - hc_sum(grad * x, 1))
    elif START == "abs":
        grad = tl.where(logits > 0, grad, tl.where(logits < 0, -grad, 0.0))
    elif START != "log":
        grad = grad * x
        if START != "exp":
            if n != N:
                logits = tl.where(hc_square(n, N), logits, float("-inf"))
            ties = tl.where(logits == hc_peak(logits, START), 1.0, 0.0)
            if n != N:
                ties = tl.where(hc_square(n, N), ties, 0.0)
            lost = hc_sum(grad, 1)
            count = hc_sum(ties, 1)
            if START == "exp-globalmax":
                lost = hc_sum(lost, 0)
                count = hc_sum(count, 0)
            elif n != N:
                count = tl.where(hc_line(n, N, 1), count, 1.0)
            grad = grad - ties * (lost / count)
    return grad


@triton.jit
def hc_sinkhorn_steps(x, steps, n: tl.constexpr, RULE: tl.constexpr):
    """`steps` full iterations."""
    FIRST: tl.constexpr = 1 if RULE[2] == "row" else 0
    for _ in range(steps):
        x, _first = hc_sinkhorn_half(x, n, FIRST, RULE)
        x, _second = hc_sinkhorn_half(x, n, 1 - FIRST, RULE)
    return x


@triton.jit
def hc_sinkhorn_chunk(x, grad, n: tl.constexpr, CHUNK: tl.constexpr, RULE: tl.constexpr):
    """Gradient before CHUNK full iterations that start at x, from the gradient after them."""
    FIRST: tl.constexpr = 1 if RULE[2] == "row" else 0
    divisors = ()
    for _ in tl.static_range(CHUNK):
        x, first = hc_sinkhorn_half(x, n, FIRST, RULE)
        x, second = hc_sinkhorn_half(x, n, 1 - FIRST, RULE)
        divisors = divisors + (first, second)  # noqa: RUF005  (no starred tuples in Triton)
    for i in tl.static_range(CHUNK):
        x, grad = hc_sinkhorn_undo(x, grad, divisors[2 * (CHUNK - i) - 1], 1 - FIRST, RULE)
        x, grad = hc_sinkhorn_undo(x, grad, divisors[2 * (CHUNK - i) - 2], FIRST, RULE)
    return grad


@triton.jit
def hc_sinkhorn_forward(logits, n: tl.constexpr, RULE: tl.constexpr):
    """Sinkhorn of a tile [N, N, tokens] of logits (padding: any finite value)."""
    ITERATIONS: tl.constexpr = RULE[0] - 1 if RULE[1] == "softmax" else RULE[0]
    x, _divisor = hc_sinkhorn_start(logits, n, RULE)
    x = hc_sinkhorn_steps(x, ITERATIONS, n, RULE)
    if RULE[1] == "log":
        x = tl.exp(x)
    return x


@triton.jit
def hc_sinkhorn_backward(grad, logits, n: tl.constexpr, CHUNK: tl.constexpr, RULE: tl.constexpr):
    """Gradient of the logits (padding of grad: 0; of the logits: any finite value)."""
    ITERATIONS: tl.constexpr = max(RULE[0] - 1, 0) if RULE[1] == "softmax" else RULE[0]
    REST: tl.constexpr = ITERATIONS % CHUNK
    if RULE[1] == "log":
        grad = grad * hc_sinkhorn_forward(logits, n, RULE)
    for done in range(ITERATIONS // CHUNK):
        x, _divisor = hc_sinkhorn_start(logits, n, RULE)
        x = hc_sinkhorn_steps(x, ITERATIONS - (done + 1) * CHUNK, n, RULE)
        grad = hc_sinkhorn_chunk(x, grad, n, CHUNK, RULE)
    if REST > 0:
        x, _divisor = hc_sinkhorn_start(logits, n, RULE)
        grad = hc_sinkhorn_chunk(x, grad, n, REST, RULE)
    return hc_sinkhorn_start_backward(grad, logits, n, RULE)


@triton.jit(do_not_specialize=["T"])
def hc_sinkhorn_kernel(
    logits_ptr,
    out_ptr,
    T,
    n: tl.constexpr,
    N: tl.constexpr,
    BT: tl.constexpr,
    RULE: tl.constexpr,
):
    tokens = hc_tokens(BT)
    offsets = hc_offsets(tokens, n * n, n, 1, N, N, BT)
    valid = hc_valid(tokens, T, n, n, N, N)
    logits = tl.load(logits_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
    x = hc_sinkhorn_forward(logits, n, RULE)
    tl.store(out_ptr + offsets, x.to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["T"])
def hc_sinkhorn_backward_kernel(
    grad_ptr,
    logits_ptr,
    out_ptr,
    T,
    n: tl.constexpr,
    N: tl.constexpr,
    BT: tl.constexpr,
    CHUNK: tl.constexpr,
    RULE: tl.constexpr,
):
    tokens = hc_tokens(BT)
    offsets = hc_offsets(tokens, n * n, n, 1, N, N, BT)
    valid = hc_valid(tokens, T, n, n, N, N)
    logits = tl.load(logits_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
    grad = hc_sinkhorn_backward(grad, logits, n, CHUNK, RULE)
    tl.store(out_ptr + offsets, grad.to(out_ptr.dtype.element_ty), mask=valid)


# N -> (tokens a program, warps[, iterations undone a chunk]). Warps must not share a token, so a
# program of fewer than 32 tokens a warp has one warp.
FORWARD = {1: (128, 4), 2: (128, 4), 4: (16, 1), 8: (8, 1), 16: (4, 1)}
BACKWARD = {1: (128, 4, 10), 2: (128, 4, 10), 4: (16, 1, 10), 8: (8, 1, 4), 16: (1, 1, 4)}


def sinkhorn(
    logits: Tensor, iterations: int, start: str, first: str, denominator: str, eps: float
) -> Tensor:
    """Sinkhorn of logits [T, n, n] (n <= 16), in their dtype. Moves 2·T·n² elements."""
    tokens, n, _ = logits.shape
    out = torch.empty_like(logits)
    block, warps = FORWARD[padded(n)]
    rule = (iterations, start, first, denominator, eps)
    grid = (cdiv(tokens, block),)
    launch(
        hc_sinkhorn_kernel, grid, logits, out, tokens,
        n=n, N=padded(n), BT=block, RULE=rule, num_warps=warps,
    )  # fmt: skip
    return out


def sinkhorn_backward(
    grad: Tensor,
    logits: Tensor,
    iterations: int,
    start: str,
    first: str,
    denominator: str,
    eps: float,
) -> Tensor:
    """Gradient of the logits [T, n, n], in their dtype. Moves 3·T·n² elements."""
    tokens, n, _ = logits.shape
    out = torch.empty_like(logits)
    block, warps, chunk = BACKWARD[padded(n)]
    rule = (iterations, start, first, denominator, eps)
    grid = (cdiv(tokens, block),)
    launch(
        hc_sinkhorn_backward_kernel, grid, grad, logits, out, tokens,
        n=n, N=padded(n), BT=block, CHUNK=chunk, RULE=rule, num_warps=warps,
    )  # fmt: skip
    return out
