"""Softmax over the n! permutations mixed to a doubly stochastic matrix (mHC-lite), n <= 5.

Tiles are [1, R, tokens], R the power of two that holds n!. Entry (i, j) of the mix sums the
weights of the permutations that send i to j; the permutations are decoded in the kernel.
"""

import triton
import triton.language as tl

from custom_ops.kernels.tile import hc_exp, hc_offsets

FACTORIALS = tl.constexpr((1, 1, 2, 6, 24, 120))


@triton.jit
def hc_permutation_images(n: tl.constexpr, R: tl.constexpr):
    """Where each permutation, in lexicographic order, sends 0 .. n-1: n tensors [R]."""
    rest = tl.arange(0, R)
    used = rest * 0
    images = ()
    for i in tl.static_range(n):
        rank = (rest // FACTORIALS[n - 1 - i]) % (n - i)
        image = rest * 0
        for value in tl.static_range(n):
            free = ((used >> value) & 1) == 0
            image = tl.where(free & (rank == 0), value, image)
            rank = tl.where(free, rank - 1, rank)
        used = used | (1 << image)
        images = images + (image,)  # noqa: RUF005
    return images


@triton.jit
def hc_permutation_weights(logits, n: tl.constexpr):
    """softmax of [1, R, tokens] over the real permutations."""
    R: tl.constexpr = logits.shape[1]
    real = (tl.arange(0, R) < FACTORIALS[n])[None, :, None]
    logits = tl.where(real, logits, float("-inf"))
    weights = hc_exp(logits - tl.max(logits, 1)[:, None, :])
    weights = tl.where(real, weights, 0.0)
    return weights / tl.sum(weights, 1)[:, None, :]


@triton.jit
def hc_permutation_store(
    logits, res_ptr, tokens, T, n: tl.constexpr, stride_i: tl.constexpr, stride_j: tl.constexpr
):
    """Write the mix [n, n] of every token."""
    BT: tl.constexpr = tokens.shape[0]
    weights = hc_permutation_weights(logits, n)
    images = hc_permutation_images(n, logits.shape[1])
    valid = (tokens < T)[None, None, :]
    offsets = hc_offsets(tokens, n * n, 0, 0, 1, 1, BT)
    for i in tl.static_range(n):
        for j in tl.static_range(n):
            chosen = tl.where((images[i] == j)[None, :, None], weights, -0.0)
            entry = tl.sum(chosen, 1)[:, None, :]
            tl.store(res_ptr + offsets + (i * stride_i + j * stride_j), entry, mask=valid)


@triton.jit
def hc_permutation_backward(
    logits, dres_ptr, tokens, T, n: tl.constexpr, stride_i: tl.constexpr, stride_j: tl.constexpr
):
    """Gradient of the logits [1, R, tokens] from that of the mix in memory."""
    BT: tl.constexpr = tokens.shape[0]
    weights = hc_permutation_weights(logits, n)
    images = hc_permutation_images(n, logits.shape[1])
    valid = (tokens < T)[None, None, :]
    offsets = hc_offsets(tokens, n * n, 0, 0, 1, 1, BT)
    grad = tl.zeros_like(logits)
    for i in tl.static_range(n):
        for j in tl.static_range(n):
            place = dres_ptr + offsets + (i * stride_i + j * stride_j)
            entry = tl.load(place, mask=valid, other=0.0).to(tl.float32)
            grad += tl.where((images[i] == j)[None, :, None], entry, 0.0)
    return weights * (grad - tl.sum(grad * weights, 1)[:, None, :])
