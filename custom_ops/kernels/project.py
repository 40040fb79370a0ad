"""p = x φᵀ and ss = Σ x²: the skinny product that makes the coefficients.

φ is fp32; a product with 16-bit x takes it as hi + lo, each exact in the tensor cores' type, in
interleaved rows of one operand: two bf16 halves (16 mantissa bits) for bf16 x, two tf32 halves
(21 bits) for fp16 x. fp32 x takes three tf32 passes. `precision` "bf16" and "tf32" keep hi alone
(8 and 11 bits; at fp32 x both mean tf32), "ieee" multiplies in plain fp32.
"""

import torch
import triton
import triton.language as tl

from custom_ops.kernels.launch import INTERPRETED, cdiv, launch, tokens_of
from custom_ops.kernels.slots import hc_places, sum_turns, turns_apart
from custom_ops.kernels.tile import padded

PRECISIONS = ("bf16", "bf16x2", "tf32", "ieee")
COEFFICIENT_TILE = 128  # more coefficients than this take another read of x


@triton.jit
def hc_project_split(phi_ptr, parts_ptr, total, depth, KEEP_LO: tl.constexpr, BLOCK: tl.constexpr):
    """parts [M, 2, K] = hi and lo of φ: bf16 halves, or the tf32 mantissa and its rest."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < total
    phi = tl.load(phi_ptr + offs, mask=mask, other=0.0)
    if parts_ptr.dtype.element_ty == tl.float32:
        hi = ((phi.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
    else:
        hi = phi.to(parts_ptr.dtype.element_ty)
    lo = (phi - hi.to(tl.float32)).to(hi.dtype)
    if not KEEP_LO:
        lo = tl.zeros_like(lo)
    out_ptrs = parts_ptr + offs + (offs // depth) * depth
    tl.store(out_ptrs, hi, mask=mask)
    tl.store(out_ptrs + depth, lo, mask=mask)


@triton.jit
def hc_project_step(x_tile, phi_ptrs, mask, total, HALVES: tl.constexpr, DOT: tl.constexpr):
    """total + x φᵀ of one block of K.

    Adding the halves here also makes the tensor cores finish with x's buffer before the next
    copy into it: left to run on, they were seen to read what Triton 3.6 had already overwritten.
    """
    phi = tl.load(phi_ptrs, mask=mask, other=0.0)
    product = tl.dot(x_tile.to(phi.dtype), phi, input_precision=DOT)
    if HALVES == 2:
        product = tl.sum(tl.reshape(product, [total.shape[0], total.shape[1], 2]), axis=2)
    return total + product


@triton.jit(do_not_specialize=["tokens", "slots"])
def hc_project(
    x_ptr,
    phi_ptr,
    p_ptr,
    ss_ptr,
    tokens,
    depth,
    slots,
    M: tl.constexpr,
    HALVES: tl.constexpr,
    DOT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAIL_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BLOCK_T tokens × (BLOCK_M + TAIL_M) coefficients over a slot of one of SPLITS spans of K."""
    place = tl.program_id(0) % (slots * SPLITS)
    tile = tl.program_id(0) // (slots * SPLITS)
    token_offs = tile.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    token_mask = token_offs < tokens
    m_first = tl.program_id(1) * BLOCK_M  # several tiles of coefficients have no tail
    row_offs = m_first * HALVES + tl.arange(0, BLOCK_M * HALVES)
    row_mask = row_offs < M * HALVES
    k_offs = tl.arange(0, BLOCK_K)
    x_rows = x_ptr + token_offs[:, None] * depth + k_offs[None, :]
    phi_rows = phi_ptr + row_offs[None, :].to(tl.int64) * depth + k_offs[:, None]
    total = tl.zeros([BLOCK_T, BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_T], tl.float32)
    if TAIL_M > 0:
        tail_offs = BLOCK_M * HALVES + tl.arange(0, TAIL_M * HALVES)
        tail_mask = tail_offs < M * HALVES
        tail_rows = phi_ptr + tail_offs[None, :].to(tl.int64) * depth + k_offs[:, None]
        tail = tl.zeros([BLOCK_T, TAIL_M], tl.float32)
    turns = tl.cdiv(depth, SPLITS * BLOCK_K)  # of a span
    start = (place % SPLITS * turns + place // SPLITS) * BLOCK_K
    end = tl.minimum(start + turns // slots * BLOCK_K, depth)
    for k in tl.range(start, end, BLOCK_K, num_stages=STAGES):
        k_mask = k + k_offs < depth
        x_tile = tl.load(x_rows + k, mask=token_mask[:, None] & k_mask[None, :], other=0.0)
        mask = row_mask[None, :] & k_mask[:, None]
        total = hc_project_step(x_tile, phi_rows + k, mask, total, HALVES, DOT)
        if TAIL_M > 0:
            mask = tail_mask[None, :] & k_mask[:, None]
            tail = hc_project_step(x_tile, tail_rows + k, mask, tail, HALVES, DOT)
        x_wide = x_tile.to(tl.float32)
        squares += tl.sum(x_wide * x_wide, axis=1)
    slot = place.to(tl.int64) * tokens + token_offs
    m_offs = m_first + tl.arange(0, BLOCK_M)
    mask = token_mask[:, None] & (m_offs < M)[None, :]
    tl.store(p_ptr + slot[:, None] * M + m_offs[None, :], total, mask=mask)
    if TAIL_M > 0:
        m_offs = BLOCK_M + tl.arange(0, TAIL_M)
        mask = token_mask[:, None] & (m_offs < M)[None, :]
        tl.store(p_ptr + slot[:, None] * M + m_offs[None, :], tail, mask=mask)
    tl.store(ss_ptr + slot, squares, mask=token_mask & (tl.program_id(1) == 0))


@triton.jit(do_not_specialize=["tokens"])
def hc_project_sum(
    p_parts_ptr,
    ss_parts_ptr,
    p_ptr,
    ss_ptr,
    tokens,
    M: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """p and ss from their slots p [SPLITS, T, M] and ss [SPLITS, T], in ascending order."""
    ptrs, mask, step = hc_places(p_parts_ptr, ss_parts_ptr, tokens, M, BLOCK)
    value = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        value += tl.load(ptrs + split * step, mask=mask, other=0.0)
    ptrs, mask, step = hc_places(p_ptr, ss_ptr, tokens, M, BLOCK)
    tl.store(ptrs, value, mask=mask)


def project_operand(phi: torch.Tensor, dtype: torch.dtype, precision: str):
    """(φ or its halves, how many, input_precision) for the product with x of `dtype`."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    if precision == "ieee":
        return phi, 1, "ieee"
    if precision == "bf16x2" and dtype == torch.float32:
        return phi, 1, "tf32x3"
    half = dtype == torch.bfloat16 and precision != "tf32" and not INTERPRETED
    depth = phi.shape[1]
    parts = phi.new_empty(phi.shape[0], 2, depth, dtype=torch.bfloat16 if half else phi.dtype)
    total = phi.numel()
    launch(
        hc_project_split,
        (cdiv(total, 1024),),
        phi,
        parts,
        total,
        depth,
        KEEP_LO=precision == "bf16x2",
        BLOCK=1024,
    )
    return parts, 2, "tf32"


def project(
    x: torch.Tensor, phi: torch.Tensor, precision: str = "bf16x2"
) -> tuple[torch.Tensor, torch.Tensor]:
    """p = x_flat φᵀ and ss = Σ x².

    Args: x [T, n, C] float, phi [M, n·C] fp32, contiguous; precision of φ in the product.
    Returns: p [T, M] fp32, ss [T] fp32. A token's result does not depend on the others.
    Moves: n (x again for every 128 coefficients, 64 at fp32).
    """
    lead, tokens = x.shape[:-2], tokens_of(x)
    coefficients, depth = phi.shape
    operand, halves, dot = project_operand(phi, x.dtype, precision)
    tile = project_tile(coefficients, operand.dtype)
    splits = max(1, min(4, depth // 1024))
    turns = cdiv(depth, splits * tile["BLOCK_K"])
    # With φ whole the compiler may add the turns within the tensor cores: then all in one slot.
    slots, few = turns_apart(turns if halves == 2 and splits > 1 else 1, tokens, coefficients)
    parts = [x.new_empty(slots * splits, tokens, coefficients, dtype=torch.float32)]
    parts.append(x.new_empty(slots * splits, tokens, dtype=torch.float32))
    columns = cdiv(coefficients, tile["BLOCK_M"] + tile["TAIL_M"])
    meta = {"M": coefficients, "HALVES": halves, "DOT": dot, "SPLITS": splits, **tile}
    grid = (cdiv(tokens, tile["BLOCK_T"]) * splits * slots, columns)
    launch(hc_project, grid, x, operand, *parts, tokens, depth, slots, **meta)
    sum_turns(*parts, splits, slots, few)
    p = x.new_empty(*lead, coefficients, dtype=torch.float32)
    ss = x.new_empty(lead, dtype=torch.float32)
    meta = {"M": coefficients, "SPLITS": splits, "BLOCK": 128, "num_warps": 4}
    grid = (cdiv(tokens * (coefficients + 1), 128),)
    launch(hc_project_sum, grid, *parts, p, ss, tokens, **meta)
    return p, ss


def project_tile(coefficients: int, operand: torch.dtype) -> dict:
    """Tile of `project`, from M and the type its operands have in the tensor cores."""
    block_m = max(16, padded(coefficients))
    if operand == torch.float32:
        return {
            "BLOCK_M": min(64, block_m),
            "TAIL_M": 0,
            "BLOCK_T": 64,
            "BLOCK_K": 32,
            "STAGES": 3,
            "num_warps": 4,
        }
    tail = 0
    if 32 < coefficients <= 128:  # 80 coefficients are 64 + 16, not 128
        tail = max(16, padded(coefficients - block_m // 2))
        block_m, tail = (block_m, 0) if 2 * tail >= block_m else (block_m // 2, tail)
    wide = block_m + tail > 48
    return {
        "BLOCK_M": min(COEFFICIENT_TILE, block_m),
        "TAIL_M": tail,
        "BLOCK_T": 128 if wide else 64,
        "BLOCK_K": 64 if wide else 128,
        "STAGES": 4 if wide and block_m < 128 else 3,
        "num_warps": 8 if wide else 4,
    }
