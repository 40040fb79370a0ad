"""Blocks of four tokens of 4 streams, as the tensor cores mix them.

A token's mixes are products of its 4 × 4 matrix and its 4 rows. Four tokens together are a block:
a block-diagonal [16, 16] and 16 rows that lie side by side in memory; the inner products are the
blocks on the diagonal of [16, C] × [C, 16]. What is not of a token enters its sums times zero:
exactly nothing, but of four tokens one that is not finite takes the others along.

Rows of a block are in the order in which a thread of a product holds two streams of a token: row
r is stream 2 (r // 8) + r % 2 of token r % 8 // 2. Weights enter as two bf16 halves (16 bits).
"""

import triton
import triton.language as tl

from custom_ops.kernels.launch import INTERPRETED
from custom_ops.kernels.post_pre import hc_narrow_pairs

EXACT = tl.constexpr(INTERPRETED)  # the interpreter has no products in bf16, only its rounding


@triton.jit
def hc_short(wide):
    """wide rounded to bf16."""
    if EXACT:
        return wide.to(tl.bfloat16).to(tl.float32)
    else:
        return hc_narrow_pairs(wide)


@triton.jit
def hc_operand(tile):
    """A loaded tile as an operand of a product."""
    return tile.to(tl.float32) if EXACT else tile


@triton.jit
def hc_halves(weight):
    """hi, lo: two operands whose sum is weight to 16 bits."""
    high = weight.to(tl.bfloat16)
    low = (weight - high.to(tl.float32)).to(tl.bfloat16)
    return hc_operand(high), hc_operand(low)


@triton.jit
def hc_place(index):
    """Of a block's row the token (0 to 3) and the stream."""
    return index % 8 // 2, index // 8 * 2 + index % 2


@triton.jit
def hc_beside(
    weight_ptr, first, left, PART: tl.constexpr, PAIRS: tl.constexpr, BLOCKS: tl.constexpr
):
    """[BLOCKS, 16, 16]: weights [T, 4] of part PART of the rows that are read together.

    Turned, [k, r], so that pairs lie side by side: only so do products find them in order.
    """
    PERIOD: tl.constexpr = 8 if PAIRS else 16
    b = tl.arange(0, BLOCKS)[:, None, None]
    k = tl.arange(0, 16)[None, :, None]
    token, stream = hc_place(tl.arange(0, 16)[None, None, :])
    inside = (b * 4 + token < left) & (k % PERIOD == token + 4 * PART)
    offs = tl.max_contiguous((first + b * 4 + token) * 4 + stream, (1, 1, 2)) + k * 0
    return tl.load(weight_ptr + offs, mask=inside, other=0.0)


@triton.jit
def hc_turned(matrix_ptr, first, left, IN_MEMORY: tl.constexpr, BLOCKS: tl.constexpr):
    """[BLOCKS, 16, 16]: the blocks [k, r] of matrices [T, 4, 4], turned as those of `hc_beside`.

    As operands they are transposed matrices times rows that lie as IN_MEMORY, or as a block's.
    """
    b = tl.arange(0, BLOCKS)[:, None, None]
    k = tl.arange(0, 16)[None, :, None]
    token, column = hc_place(tl.arange(0, 16)[None, None, :])
    if IN_MEMORY:
        token_k, row = k // 4, k % 4
    else:
        token_k, row = hc_place(k)
    inside = (b * 4 + token < left) & (token_k == token)
    offs = tl.max_contiguous((first + b * 4 + token) * 16 + row * 4 + column, (1, 1, 2))
    return tl.load(matrix_ptr + offs, mask=inside, other=0.0)


@triton.jit
def hc_operands(turned, PAIRS: tl.constexpr):
    """Turned weights as operands: both halves in the first if PAIRS, else one each."""
    high, low = hc_halves(turned)
    if PAIRS:
        high = tl.where(tl.arange(0, 16)[None, :, None] < 8, high, low)
    return tl.trans(high, (0, 2, 1)), tl.trans(low, (0, 2, 1))


@triton.jit
def hc_add(total, operands, tile, PAIRS: tl.constexpr):
    """total + weights · tile."""
    total = tl.dot(operands[0], tile, total)
    if not PAIRS:
        total = tl.dot(operands[1], tile, total)
    return total


@triton.jit
def hc_over_streams(wide, BLOCKS: tl.constexpr):
    """Sums over the streams of a token: [BLOCKS, 4, C] of [BLOCKS, 16, C]."""
    wide = tl.reshape(wide, [BLOCKS, 2, 4, 2, wide.shape[2]])
    return tl.sum(tl.sum(wide, axis=1), axis=2)
