"""φ and dp as the tensor cores take them: fp16 with scales for dx, bf16 in two parts for dφ.

fp16 has the 11 bits of tf32 in half its bytes. A power of two brings the largest number of a token
of dp, and of a block of columns of φ, to 2¹⁴, so that numbers down to 2⁻²⁸ of it keep all bits.
"""

import torch
import triton
import triton.language as tl

from custom_ops.kernels.launch import INTERPRETED, cdiv, launch
from custom_ops.kernels.tile import padded


@triton.jit
def hc_power_scale(biggest):
    """(scale, 1 / scale), powers of two: biggest · scale lies in [2¹⁴, 2¹⁵), or below if tiny."""
    exponent = tl.maximum((biggest.to(tl.int32, bitcast=True) >> 23) & 255, 20)
    scale = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    return scale, ((exponent - 14) << 23).to(tl.float32, bitcast=True)


@triton.jit
def hc_pack_phi(
    phi_ptr,
    out_ptr,
    scale_ptr,
    width,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """φ [ROWS, K] in fp16, each block of BLOCK_C columns of a stream scaled by a power of two."""
    stream = tl.program_id(1)
    depth = width * tl.num_programs(1)
    c_offs = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_offs = tl.arange(0, BLOCK_M)
    c_mask = (c_offs < width)[None, :]
    offs = m_offs[:, None].to(tl.int64) * depth + stream * width + c_offs[None, :]
    phi = tl.load(phi_ptr + offs, mask=(m_offs < M)[:, None] & c_mask, other=0.0)
    scale, back = hc_power_scale(tl.max(tl.max(tl.abs(phi), axis=1), axis=0))
    tl.store(out_ptr + offs, (phi * scale).to(tl.float16), mask=(m_offs < ROWS)[:, None] & c_mask)
    tl.store(scale_ptr + stream * tl.num_programs(0) + tl.program_id(0), back)


@triton.jit(do_not_specialize=["tokens"])
def hc_pack_dp(
    dp_ptr,
    parts_ptr,
    half_ptr,
    scale_ptr,
    tokens,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """parts [T, 2, ROWS] = dp in bf16 and its rest; half [T, ROWS] = scaled dp in fp16."""
    t_offs = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_offs = tl.arange(0, BLOCK_M)
    t_mask = (t_offs < tokens)[:, None]
    mask = t_mask & (m_offs < M)[None, :]
    dp = tl.load(dp_ptr + t_offs[:, None] * M + m_offs[None, :], mask=mask, other=0.0)
    scale, back = hc_power_scale(tl.max(tl.abs(dp), axis=1))
    offs = t_offs[:, None] * ROWS + m_offs[None, :]
    mask = t_mask & (m_offs < ROWS)[None, :]
    tl.store(half_ptr + offs, (dp * scale[:, None]).to(tl.float16), mask=mask)
    tl.store(scale_ptr + t_offs, back, mask=t_offs < tokens)
    hi = dp.to(tl.bfloat16)
    lo = (dp - hi.to(tl.float32)).to(parts_ptr.dtype.element_ty)
    parts_ptrs = parts_ptr + t_offs[:, None] * (2 * ROWS) + m_offs[None, :]
    tl.store(parts_ptrs, hi.to(lo.dtype), mask=mask)
    tl.store(parts_ptrs + ROWS, lo, mask=mask)


def coefficient_blocks(coefficients: int) -> tuple[int, int]:
    """Two powers of two that pad M less than one: 80 = 64 + 16, 48 = 32 + 16, 63 = 64 + 0."""
    block = max(16, padded(coefficients))
    if block == 16 or block == coefficients:
        return block, 0
    tail = max(16, padded(coefficients - block // 2))
    return (block, 0) if 2 * tail >= block else (block // 2, tail)


def pack_dp(dp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dp [T, M] as (bf16 parts [T, 2, R], fp16 [T, R], what undoes its scale [T]); R pads M."""
    tokens, coefficients = dp.shape
    rows = sum(coefficient_blocks(coefficients))
    half = dp.new_empty(tokens, rows, dtype=torch.float16)
    # The interpreter has no products in bf16.
    parts = dp.new_empty(tokens, 2, rows, dtype=dp.dtype if INTERPRETED else torch.bfloat16)
    scale = dp.new_empty(tokens)
    launch(
        hc_pack_dp,
        (cdiv(tokens, 16),),
        *(dp, parts, half, scale, tokens),
        M=coefficients,
        ROWS=rows,
        BLOCK_T=16,
        BLOCK_M=padded(rows),
        num_warps=4,
    )
    return parts, half, scale


def pack_phi(phi: torch.Tensor, streams: int, block_c: int) -> tuple[torch.Tensor, torch.Tensor]:
    """φ [M, n·C] as (fp16 [R, n·C], what undoes the scale of a block of columns [n, blocks])."""
    coefficients, depth = phi.shape
    rows = sum(coefficient_blocks(coefficients))
    width = depth // streams
    half = phi.new_empty(rows, depth, dtype=torch.float16)
    scale = phi.new_empty(streams, cdiv(width, block_c))
    launch(
        hc_pack_phi,
        (cdiv(width, block_c), streams),
        *(phi, half, scale, width),
        M=coefficients,
        ROWS=rows,
        BLOCK_M=padded(rows),
        BLOCK_C=block_c,
        num_warps=4,
    )
    return half, scale
