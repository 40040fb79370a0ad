"""p = x φᵀ and ss = Σ x²: the skinny product that makes the coefficients.

φ is fp32; a product with 16-bit x takes it as hi + lo, each exact in the tensor cores' type, in
interleaved rows of one operand: two bf16 halves (16 mantissa bits) for bf16 x, two tf32 halves
(21 bits) for fp16 x. fp32 x takes three tf32 passes. `precision` "bf16" and "tf32" keep hi alone
(8 and 11 bits; at fp32 x both mean tf32), "ieee" multiplies in plain fp32.
"""

import torch
import triton
import triton.language as tl

from custom_ops.kernels.launch import INTERPRETED, launch

PRECISIONS = ("bf16", "bf16x2", "tf32", "ieee")
COEFFICIENT_TILE = 64  # more coefficients than this take another read of x


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


@triton.jit(do_not_specialize=["tokens"])
def hc_project(
    x_ptr,
    phi_ptr,
    part_ptr,
    tokens,
    depth,
    M: tl.constexpr,
    HALVES: tl.constexpr,
    DOT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BLOCK_T tokens × BLOCK_M coefficients over one of SPLITS spans of K."""
    split = tl.program_id(0) % SPLITS
    tile = tl.program_id(0) // SPLITS
    token_offs = tile.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    token_mask = token_offs < tokens
    row_offs = tl.program_id(1) * BLOCK_M * HALVES + tl.arange(0, BLOCK_M * HALVES)
    row_mask = row_offs < M * HALVES
    k_offs = tl.arange(0, BLOCK_K)
    span = tl.cdiv(depth, SPLITS * BLOCK_K) * BLOCK_K
    x_rows = x_ptr + token_offs[:, None] * depth + k_offs[None, :]
    phi_rows = phi_ptr + row_offs[None, :].to(tl.int64) * depth + k_offs[:, None]
    total = tl.zeros([BLOCK_T, BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_T], tl.float32)
    start = split * span
    for k in tl.range(start, tl.minimum(start + span, depth), BLOCK_K, num_stages=STAGES):
        k_mask = k + k_offs < depth
        x_tile = tl.load(x_rows + k, mask=token_mask[:, None] & k_mask[None, :], other=0.0)
        phi = tl.load(phi_rows + k, mask=row_mask[None, :] & k_mask[:, None], other=0.0)
        product = tl.dot(x_tile.to(phi_ptr.dtype.element_ty), phi, input_precision=DOT)
        if HALVES == 2:
            # Adding the halves here also makes the tensor cores finish with x's buffer before
            # the next copy into it: Triton 3.6 overwrites it early when they may run on.
            product = tl.sum(tl.reshape(product, [BLOCK_T, BLOCK_M, 2]), axis=2)
        total += product
        x_wide = x_tile.to(tl.float32)
        squares += tl.sum(x_wide * x_wide, axis=1)
    m_offs = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_mask = m_offs < M
    slot = part_ptr + (split * tokens.to(tl.int64) + token_offs) * (M + 1)
    part_mask = token_mask[:, None] & m_mask[None, :]
    tl.store(slot[:, None] + m_offs[None, :], total, mask=part_mask)
    tl.store(slot + M, squares, mask=token_mask & (tl.program_id(1) == 0))


@triton.jit(do_not_specialize=["total", "splits"])
def hc_sum_slots(part_ptr, out_ptr, total, splits, BLOCK: tl.constexpr):
    """out = Σ_s part_s in ascending s."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < total
    stride = total.to(tl.int64)
    value = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        value += tl.load(part_ptr + split * stride + offs, mask=mask, other=0.0)
    tl.store(out_ptr + offs, value, mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def hc_project_sum(
    part_ptr,
    p_ptr,
    ss_ptr,
    tokens,
    M: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """p and ss of BLOCK_T tokens from their slots [SPLITS, T, M + 1], in ascending order."""
    token_offs = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_offs = tl.arange(0, BLOCK_M)
    token_mask = token_offs < tokens
    mask = token_mask[:, None] & (m_offs <= M)[None, :]
    value = tl.zeros([BLOCK_T, BLOCK_M], tl.float32)
    for split in tl.static_range(SPLITS):
        rows = (split * tokens.to(tl.int64) + token_offs) * (M + 1)
        value += tl.load(part_ptr + rows[:, None] + m_offs[None, :], mask=mask, other=0.0)
    p_offs = token_offs[:, None] * M + m_offs[None, :]
    tl.store(p_ptr + p_offs, value, mask=token_mask[:, None] & (m_offs < M)[None, :])
    ss_ptrs = ss_ptr + token_offs[:, None] + m_offs[None, :] * 0
    tl.store(ss_ptrs, value, mask=token_mask[:, None] & (m_offs == M)[None, :])


def sum_slots(parts: torch.Tensor) -> torch.Tensor:
    """Σ_s parts_s, in a fixed order."""
    out = torch.empty_like(parts[0])
    total = out.numel()
    grid = (triton.cdiv(total, 512),)
    launch(hc_sum_slots, grid, parts, out, total, parts.shape[0], BLOCK=512, num_warps=4)
    return out


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
        (triton.cdiv(total, 1024),),
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
    Moves: n (x again for every 64 coefficients).
    """
    tokens = x.shape[0]
    coefficients, depth = phi.shape
    operand, halves, dot = project_operand(phi, x.dtype, precision)
    tile = project_tile(coefficients, operand.dtype)
    splits = max(1, min(4, depth // 1024))
    parts = x.new_empty(splits, tokens, coefficients + 1, dtype=torch.float32)
    token_tiles = triton.cdiv(tokens, tile["BLOCK_T"])
    launch(
        hc_project,
        (token_tiles * splits, triton.cdiv(coefficients, tile["BLOCK_M"])),
        x,
        operand,
        parts,
        tokens,
        depth,
        M=coefficients,
        HALVES=halves,
        DOT=dot,
        SPLITS=splits,
        **tile,
    )
    p = x.new_empty(tokens, coefficients, dtype=torch.float32)
    ss = x.new_empty(tokens, dtype=torch.float32)
    launch(
        hc_project_sum,
        (triton.cdiv(tokens, 16),),
        parts,
        p,
        ss,
        tokens,
        M=coefficients,
        SPLITS=splits,
        BLOCK_T=16,
        BLOCK_M=triton.next_power_of_2(coefficients + 1),
        num_warps=4,
    )
    return p, ss


def project_tile(coefficients: int, operand: torch.dtype) -> dict:
    """Tile of `project`, from M and the type its operands have in the tensor cores."""
    block_m = min(COEFFICIENT_TILE, max(16, triton.next_power_of_2(coefficients)))
    if operand == torch.float32:
        tile = {"BLOCK_T": 64, "BLOCK_K": 32, "STAGES": 3, "num_warps": 4}
    else:
        tile = {"BLOCK_T": 64, "BLOCK_K": 128, "STAGES": 3, "num_warps": 4}
    return {"BLOCK_M": block_m, **tile}
