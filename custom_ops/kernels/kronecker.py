"""Kronecker product of log2(n) doubly stochastic 2 × 2 matrices (KromHC, arXiv 2601.21579).

Factor k is [[a, 1-a], [1-a, a]] with a = sigmoid of its logit, so entry (i, j) of the product
depends on i xor j alone: it is the weight of that pattern, Π_k a_k where bit k of it is 0 and
Π_k (1-a_k) where it is 1. The first factor has the most significant bit. Logits are tiles
[1, K, tokens], K the power of two that holds the factors.
"""
# ruff: noqa: RUF005 (Triton has no starred tuples)

import triton
import triton.language as tl

from custom_ops.kernels.tile import hc_exp, hc_offsets


@triton.jit
def hc_kronecker_gates(logits, FACTORS: tl.constexpr):
    """(a_k, 1 - a_k, slope of a_k), [1, 1, tokens] each, of every factor."""
    index = tl.arange(0, logits.shape[1])[None, :, None]
    gates = ()
    for k in tl.static_range(FACTORS):
        z = tl.sum(tl.where(index == k, logits, 0.0), 1)[:, None, :]
        decay = hc_exp(-tl.abs(z))
        large = 1.0 / (1 + decay)
        small = decay / (1 + decay)
        positive = z >= 0
        gate = tl.where(positive, large, small), tl.where(positive, small, large), large * small
        gates = gates + (gate,)
    return gates


@triton.jit
def hc_kronecker_weight(gates, pattern: tl.constexpr, LEFT_OUT: tl.constexpr):
    """Π of the factors' entries at `pattern`, factor LEFT_OUT (-1: none) left out."""
    FACTORS: tl.constexpr = len(gates)
    weight = gates[0][0] * 0.0 + 1.0
    for k in tl.static_range(FACTORS):
        if k != LEFT_OUT:
            weight = weight * gates[k][(pattern >> (FACTORS - 1 - k)) & 1]
    return weight


@triton.jit
def hc_kronecker_store(logits, res_ptr, tokens, T, n: tl.constexpr, FACTORS: tl.constexpr):
    """Write the product [n, n] of every token; it is symmetric."""
    gates = hc_kronecker_gates(logits, FACTORS)
    valid = (tokens < T)[None, None, :]
    offsets = hc_offsets(tokens, n * n, 0, 0, 1, 1, tokens.shape[0])
    for pattern in tl.static_range(n):
        weight = hc_kronecker_weight(gates, pattern, -1)
        for i in tl.static_range(n):
            tl.store(res_ptr + offsets + (i * n + (i ^ pattern)), weight, mask=valid)


@triton.jit
def hc_kronecker_backward(logits, dres_ptr, tokens, T, n: tl.constexpr, FACTORS: tl.constexpr):
    """Gradient of the logits [1, K, tokens] from that of the product in memory."""
    gates = hc_kronecker_gates(logits, FACTORS)
    valid = (tokens < T)[None, None, :]
    offsets = hc_offsets(tokens, n * n, 0, 0, 1, 1, tokens.shape[0])
    index = tl.arange(0, logits.shape[1])[None, :, None]
    grad = tl.zeros_like(logits)
    for pattern in tl.static_range(n):
        total = gates[0][0] * 0.0
        for i in tl.static_range(n):
            place = dres_ptr + offsets + (i * n + (i ^ pattern))
            total += tl.load(place, mask=valid, other=0.0).to(tl.float32)
        for k in tl.static_range(FACTORS):
            slope = gates[k][2] * (1 - 2 * ((pattern >> (FACTORS - 1 - k)) & 1))
            share = total * slope * hc_kronecker_weight(gates, pattern, k)
            grad += tl.where(index == k, share, 0.0)
    return grad
