"""Small matrices in registers: tiles [A, B, tokens] with the tokens across the lanes of a warp.

A tile's last axis is the token, so a whole n × n matrix lies in one lane (or in a few, when a
program takes fewer tokens than it has lanes) and row and column sums need few or no shuffles.
Axes are padded to powers of two; `tile_valid` marks what is real.
"""

import triton
import triton.language as tl


@triton.jit
def hc_axis(SIZE: tl.constexpr):
    """arange(SIZE), its contiguity hidden from the compiler so that lanes go to tokens."""
    return tl.arange(0, SIZE).to(tl.float32).to(tl.int32)


@triton.jit
def hc_tokens(BT: tl.constexpr):
    """Token numbers of this program, int64."""
    return tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)


@triton.jit
def hc_offsets(
    tokens,
    stride_t: tl.constexpr,
    stride_a: tl.constexpr,
    stride_b: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    BT: tl.constexpr,
):
    """Element offsets [A, B, BT] of one small matrix a token.

    The hint orders the layout, tokens first. It is false where stride_t is not 1, so it must never
    widen an access: the zero that went through a float leaves the offsets no known divisibility,
    whatever the strides, alignments and number of tokens are known to be.
    """
    inner = hc_axis(A)[:, None, None] * stride_a + hc_axis(B)[None, :, None] * stride_b
    rows = tokens * stride_t + (tokens.to(tl.float32) * 0.0).to(tl.int64)
    return tl.max_contiguous(inner + rows[None, None, :], (1, 1, BT))


@triton.jit
def hc_valid(tokens, T, a: tl.constexpr, b: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Mask [A, B, BT] of the real entries of real tokens."""
    inside = (tl.arange(0, A) < a)[:, None, None] & (tl.arange(0, B) < b)[None, :, None]
    return inside & (tokens < T)[None, None, :]


@triton.jit
def hc_exp(x):
    """exp to 1 ulp also for large arguments: exp2 of x·log2(e) with the product's error added."""
    high = x * 1.4426950408889634
    low = tl.fma(x, 1.4426950216293335, -high) + x * 1.9259629911266175e-08
    fine = tl.abs(x) < 80.0
    return tl.exp2(high) * tl.where(fine, 1.0 + low * 0.6931471805599453, 1.0)


def padded(size: int) -> int:
    """The power of two that holds `size`."""
    return 1 << max(size - 1, 0).bit_length()
