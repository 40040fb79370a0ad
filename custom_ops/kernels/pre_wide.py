"""dx and dφ as two passes, for many streams, views or coefficients, and the steps they share."""
# ruff: noqa: RUF005 (Triton has no starred tuples)

import torch
import triton
import triton.language as tl

from custom_ops.kernels.launch import INTERPRETED, cdiv, launch
from custom_ops.kernels.mix import packed_mix
from custom_ops.kernels.slots import sum_slots
from custom_ops.kernels.tile import padded


@triton.jit
def hc_round_tf32(value):
    """value to the nearest number of 10 mantissa bits, which the tensor cores take exactly."""
    return ((value.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def hc_dphi_step(dphi, x_tile, dp, PARTS: tl.constexpr, DOT: tl.constexpr):
    """dφᵀ + xᵀdp of one tile of tokens; dp enters as 2 bf16 parts (16 bits), or as fp32.

    The tile's product leaves the tensor cores, which truncate as they add, before it joins the
    long sum. Three parts, as pre_dx.py takes, were seen to differ from run to run in this pass.
    """
    if PARTS == 1:
        product = tl.dot(tl.trans(x_tile.to(tl.float32)), dp, input_precision=DOT)
    else:
        hi = dp.to(tl.bfloat16)
        mid = (dp - hi.to(tl.float32)).to(tl.bfloat16)
        operand = tl.reshape(tl.join(hi, mid), [dp.shape[0], 2 * dp.shape[1]])
        product = tl.dot(tl.trans(x_tile), operand)
        product = tl.sum(tl.reshape(product, [x_tile.shape[1], dp.shape[1], 2]), axis=2)
    return dphi + product


@triton.jit
def hc_pre_transpose(
    phi_ptr,
    out_ptr,
    depth,
    M: tl.constexpr,
    STRIDE: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out [K, STRIDE] = φᵀ, zero beyond M, rounded to tf32 if that is what the product takes."""
    k_offs = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_offs = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k_mask = k_offs < depth
    phi_offs = m_offs[:, None].to(tl.int64) * depth + k_offs[None, :]
    phi = tl.load(phi_ptr + phi_offs, mask=(m_offs < M)[:, None] & k_mask[None, :], other=0.0)
    if DOT == "tf32":
        phi = hc_round_tf32(phi)
    out_offs = k_offs[:, None].to(tl.int64) * STRIDE + m_offs[None, :]
    mask = k_mask[:, None] & (m_offs < STRIDE)[None, :]
    tl.store(out_ptr + out_offs, tl.trans(phi), mask=mask)


@triton.jit
def hc_dp_tile(dp_ptr, t_offs, t_mask, m_offs, M: tl.constexpr, DOT: tl.constexpr):
    """dpᵀ [BLOCK_M, BLOCK_T]: transposed once more by its user it stays in shared memory."""
    mask = (m_offs < M)[:, None] & t_mask[None, :]
    dp = tl.load(dp_ptr + t_offs[None, :] * M + m_offs[:, None], mask=mask, other=0.0)
    return hc_round_tf32(dp) if DOT == "tf32" else dp


@triton.jit(do_not_specialize=["tokens"])
def hc_pre_dx_wide(
    x_ptr,
    du_ptr,
    phi_ptr,
    dp_ptr,
    g_ptr,
    mix_ptr,
    dx_ptr,
    tokens,
    width,
    N: tl.constexpr,
    V: tl.constexpr,
    M: tl.constexpr,
    STRIDE: tl.constexpr,
    G: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx on one tile of BLOCK_T tokens × BLOCK_C columns of every stream."""
    column_tiles = tl.cdiv(width, BLOCK_C)
    tile = tl.program_id(0)
    c_offs = (tile % column_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c_offs < width
    t_offs = (tile // column_tiles).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    t_mask = t_offs < tokens
    mask = t_mask[:, None] & c_mask[None, :]
    rows = t_offs[:, None] * (N * width) + c_offs[None, :]
    MIXED: tl.constexpr = G * N
    COUNT: tl.constexpr = MIXED + V * N + 1
    mix = mix_ptr + (tile // column_tiles).to(tl.int64) * (COUNT * BLOCK_T) + tl.arange(0, BLOCK_T)
    dss = tl.load(mix + (COUNT - 1) * BLOCK_T)
    g_tiles = ()
    if G > 0:
        g_rows = g_ptr + t_offs[:, None] * (G * width) + c_offs[None, :]
        for i in tl.static_range(G):
            g_tiles = g_tiles + (tl.load(g_rows + i * width, mask=mask, other=0.0),)
    TILES: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    dp = hc_dp_tile(dp_ptr, t_offs, t_mask, tl.arange(0, BLOCK_M), M, DOT)
    for j in tl.range(0, N, num_stages=STAGES):  # unrolled, n = 16 would compile for minutes
        x_tile = tl.load(x_ptr + rows + j * width, mask=mask, other=0.0)
        dx = dss[:, None] * x_tile.to(tl.float32)
        for v in tl.static_range(V):
            du_offs = t_offs[:, None] * (V * width) + v * width + c_offs[None, :]
            du_tile = tl.load(du_ptr + du_offs, mask=mask, other=0.0)
            pre = tl.load(mix + (MIXED + v * N + j) * BLOCK_T)
            dx += pre[:, None] * du_tile.to(tl.float32)
        if G > 0:
            for i in tl.static_range(G):
                res = tl.load(mix + (i * N + j) * BLOCK_T)
                dx += res[:, None] * g_tiles[i].to(tl.float32)
        for m_tile in tl.static_range(TILES):
            m_offs = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
            if TILES > 1:
                dp = hc_dp_tile(dp_ptr, t_offs, t_mask, m_offs, M, DOT)
            phi_offs = (j * width + c_offs[:, None]).to(tl.int64) * STRIDE + m_offs[None, :]
            phi_mask = c_mask[:, None] & (m_offs < STRIDE)[None, :]
            phi = tl.load(phi_ptr + phi_offs, mask=phi_mask, other=0.0)
            dx = tl.dot(tl.trans(dp), tl.trans(phi), dx, input_precision=DOT)
        tl.store(dx_ptr + rows + j * width, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "token_splits"])
def hc_pre_dphi(
    x_ptr,
    dp_ptr,
    part_ptr,
    tokens,
    depth,
    token_splits,
    M: tl.constexpr,
    PARTS: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dφ on BLOCK_M coefficients × BLOCK_K columns over one of token_splits spans of tokens."""
    column_tiles = tl.cdiv(depth, BLOCK_K)
    split = tl.program_id(1) // column_tiles
    k_offs = (tl.program_id(1) % column_tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
    k_mask = k_offs < depth
    m_offs = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_mask = m_offs < M
    dphi = tl.zeros([BLOCK_K, BLOCK_M], tl.float32)
    span = tl.cdiv(tokens, token_splits * BLOCK_T) * BLOCK_T
    start = split * span
    for first in tl.range(start, tl.minimum(start + span, tokens), BLOCK_T, num_stages=STAGES):
        t_offs = first + tl.arange(0, BLOCK_T).to(tl.int64)
        t_mask = (t_offs < tokens)[:, None]
        dp_offs = t_offs[:, None] * M + m_offs[None, :]
        dp = tl.load(dp_ptr + dp_offs, mask=t_mask & m_mask[None, :], other=0.0)
        x_offs = t_offs[:, None] * depth + k_offs[None, :]
        x_tile = tl.load(x_ptr + x_offs, mask=t_mask & k_mask[None, :], other=0.0)
        dphi = hc_dphi_step(dphi, x_tile, dp, PARTS, DOT)
    offs = (split * M + m_offs[None, :]).to(tl.int64) * depth + k_offs[:, None]
    tl.store(part_ptr + offs, dphi, mask=k_mask[:, None] & m_mask[None, :])


def wide_dx(x, du, pre, phi, dp, dss, g, res, dx, views: int, g_rows: int) -> None:
    """dx of `pre_dx` alone; every tile of tokens reads φᵀ again, from L2."""
    tokens, streams, width = x.shape
    coefficients, depth = phi.shape
    dot = "tf32" if x.dtype == torch.bfloat16 else "tf32x3"
    stride = cdiv(coefficients, 16) * 16
    turned = phi.new_empty(depth, stride)
    grid = (cdiv(depth, 64), cdiv(stride, 32))
    meta = {"M": coefficients, "STRIDE": stride, "DOT": dot}
    launch(hc_pre_transpose, grid, phi, turned, depth, BLOCK_M=32, BLOCK_K=64, **meta)
    tile = wide_dx_tile(streams, views, coefficients, x.dtype)
    tiles = cdiv(tokens, tile["BLOCK_T"]) * cdiv(width, tile["BLOCK_C"])
    mix = packed_mix(pre, dss, res, streams, views, g_rows, tile["BLOCK_T"])
    launch(
        hc_pre_dx_wide,
        (tiles,),
        *(x, du, turned, dp, g, mix, dx, tokens, width),
        N=streams,
        V=views,
        G=g_rows,
        **meta,
        **tile,
    )


def wide_dx_tile(streams: int, views: int, coefficients: int, dtype: torch.dtype) -> dict:
    """Tile of `wide_dx`; its stages hold φᵀ, dp and du tiles within 227 KB of shared memory.

    Two small programs a multiprocessor that take φᵀ 16 coefficients at a time hide more of each
    other's waiting than one large program: 759 µs against 907 (n = 8, 8192×2560, H100).
    """
    half = dtype == torch.bfloat16
    stages = 3 if half and views <= 2 else 2
    if coefficients > 128 or views > 4:
        stages = 1
    if half and streams <= 8:
        block_m = 16 if coefficients <= 128 else 32
        return {
            "BLOCK_T": 32,
            "BLOCK_M": block_m,
            "BLOCK_C": 64,
            "STAGES": stages,
            "num_warps": 4,
        }
    whole = coefficients <= (128 if half else 32)
    return {
        "BLOCK_T": 64,
        "BLOCK_M": max(16, padded(coefficients)) if whole else 32,
        "BLOCK_C": 32,
        "STAGES": 2 if stages > 1 else 1,
        "num_warps": 8,
    }


def wide_dphi(x: torch.Tensor, dp: torch.Tensor, phi: torch.Tensor) -> torch.Tensor:
    """dφ = Σ_t dp_t ⊗ x_t in its own pass over x, relative error 2.5e-6 at bf16 x."""
    coefficients, depth = phi.shape
    half = x.dtype == torch.bfloat16 and not INTERPRETED
    block_m = min(32, max(16, padded(coefficients)))
    block_k = 128 if half else 32
    columns = cdiv(depth, block_k)
    splits = max(1, min(16, 512 // columns))
    parts = phi.new_empty(splits, *phi.shape)
    launch(
        hc_pre_dphi,
        (cdiv(coefficients, block_m), columns * splits),
        x,
        dp,
        parts,
        x.shape[0],
        depth,
        splits,
        M=coefficients,
        PARTS=2 if half else 1,
        DOT="tf32" if half else "tf32x3",
        BLOCK_T=64 if half else 32,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        STAGES=3,
        num_warps=8 if half else 4,
    )
    return parts[0] if splits == 1 else sum_slots(parts)
