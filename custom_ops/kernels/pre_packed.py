"""dx and dφ as two passes at bf16 where pre_dx.py's sums do not fit: up to 8 streams, M ≤ 128.

dx takes φᵀdp in fp16, 11 bits as in tf32, so a tile of tokens reads half the bytes of φ from L2.
dφ keeps the sums of all coefficients on many columns, so x is read once and dp seldom.
"""
# ruff: noqa: RUF005 (Triton has no starred tuples)

import torch
import triton
import triton.language as tl

from custom_ops.kernels.launch import cdiv, generation, launch
from custom_ops.kernels.mix import packed_mix
from custom_ops.kernels.pre_dx import sum_dphi
from custom_ops.kernels.pre_pack import coefficient_blocks, pack_dp, pack_phi
from custom_ops.kernels.shares import hc_long, hc_mine, hc_slot, hc_walk, lanes_and_helpers


@triton.jit(do_not_specialize=["tokens"])
def hc_pre_dx_packed(
    x_ptr,
    du_ptr,
    g_ptr,
    phi_ptr,
    phi_scale_ptr,
    mix_ptr,
    dp_ptr,
    dp_scale_ptr,
    dx_ptr,
    tokens,
    width,
    N: tl.constexpr,
    HAS_DU: tl.constexpr,
    G: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx on one tile of BLOCK_T tokens × BLOCK_C columns of every stream."""
    column_tiles = tl.cdiv(width, BLOCK_C)
    tile = tl.program_id(0)
    column_tile = tile % column_tiles
    c_offs = column_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c_offs < width
    token = (tile // column_tiles).to(tl.int64) * BLOCK_T
    t_offs = tl.arange(0, BLOCK_T)
    t_mask = token + t_offs < tokens
    mask = t_mask[:, None] & c_mask[None, :]
    depth = N * width
    rows = t_offs[:, None] * depth + c_offs[None, :]
    x_ptr += token * depth
    g_ptr += token * (G * width)
    dx_ptr += token * depth
    MIXED: tl.constexpr = G * N
    COUNT: tl.constexpr = MIXED + N * HAS_DU + 1
    ROWS: tl.constexpr = MAIN + TAIL
    mix = mix_ptr + token * COUNT + t_offs
    g_tiles = ()
    g_rows = g_ptr + t_offs[:, None] * (G * width) + c_offs[None, :]
    for i in tl.static_range(G):
        g_tiles = g_tiles + (tl.load(g_rows + i * width, mask=mask, other=0.0),)
    if HAS_DU:
        du_offs = t_offs[:, None] * width + c_offs[None, :]
        du_tile = tl.load(du_ptr + token * width + du_offs, mask=mask, other=0.0)
    dss = tl.load(mix + (COUNT - 1) * BLOCK_T)
    scale = tl.load(dp_scale_ptr + token + t_offs, mask=t_mask, other=0.0)
    m_offs = tl.arange(0, MAIN)
    dp_ptrs = dp_ptr + token * ROWS + t_offs[:, None] * ROWS
    main = tl.load(dp_ptrs + m_offs[None, :], mask=t_mask[:, None], other=0.0)
    phi_ptrs = phi_ptr + m_offs[:, None] * tl.full((), depth, tl.int64) + c_offs[None, :]
    if TAIL > 0:
        tail_offs = MAIN + tl.arange(0, TAIL)
        tail = tl.load(dp_ptrs + tail_offs[None, :], mask=t_mask[:, None], other=0.0)
        tail_ptrs = phi_ptr + tail_offs[:, None] * tl.full((), depth, tl.int64) + c_offs[None, :]
    for j in tl.range(0, N, num_stages=STAGES):
        x_tile = tl.load(x_ptr + rows + j * width, mask=mask, other=0.0)
        phi = tl.load(phi_ptrs + j * width, mask=c_mask[None, :], other=0.0)
        back = (scale * tl.load(phi_scale_ptr + j * column_tiles + column_tile))[:, None]
        dx = tl.dot(main, phi) * back  # if the tail went on in this sum, warps would repeat work
        if TAIL > 0:
            phi = tl.load(tail_ptrs + j * width, mask=c_mask[None, :], other=0.0)
            dx += tl.dot(tail, phi) * back
        dx += dss[:, None] * x_tile.to(tl.float32)
        if HAS_DU:
            pre = tl.load(mix + (MIXED + j) * BLOCK_T)
            dx += pre[:, None] * du_tile.to(tl.float32)
        for i in tl.static_range(G):
            res = tl.load(mix + (i * N + j) * BLOCK_T)
            dx += res[:, None] * g_tiles[i].to(tl.float32)
        tl.store(dx_ptr + rows + j * width, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def hc_dphi_planes(total, x_tile, hi, lo):
    """dφᵀ + xᵀdp of one tile of tokens, whose product leaves the tensor cores as they truncate."""
    turned = tl.trans(x_tile.to(hi.dtype))
    product = tl.dot(turned, hi)
    return total + tl.dot(turned, lo, product)


@triton.jit(do_not_specialize=["tokens", "lanes", "helpers"])
def hc_pre_dphi_packed(
    x_ptr,
    parts_ptr,
    sums_ptr,
    tokens,
    depth,
    lanes,
    helpers,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dφ over a share (shares.py) of slices of BLOCK_C columns × tiles of BLOCK_T tokens."""
    slices = tl.cdiv(depth, BLOCK_C)
    mine = hc_mine(tl.cdiv(tokens, BLOCK_T), slices, lanes, helpers)
    ROWS: tl.constexpr = MAIN + TAIL
    t_offs = tl.arange(0, BLOCK_T)
    main_offs = t_offs[:, None] * (2 * ROWS) + tl.arange(0, MAIN)[None, :]
    if TAIL > 0:
        tail_offs = t_offs[:, None] * (2 * ROWS) + MAIN + tl.arange(0, TAIL)[None, :]
    for piece in range(mine[0], mine[1]):
        c_offs = piece * BLOCK_C + tl.arange(0, BLOCK_C)
        c_mask = (c_offs < depth)[None, :]
        x_offs = t_offs[:, None].to(tl.int64) * depth + c_offs[None, :]
        main_sum = tl.zeros([BLOCK_C, MAIN], tl.float32)
        if TAIL > 0:
            tail_sum = tl.zeros([BLOCK_C, TAIL], tl.float32)
        first, last, step = hc_walk(mine, piece, lanes)
        for tile in tl.range(first, last, step, num_stages=STAGES):
            token = hc_long(tile) * BLOCK_T
            t_mask = (token + t_offs < tokens)[:, None]
            x_tile = tl.load(x_ptr + token * depth + x_offs, mask=t_mask & c_mask, other=0.0)
            parts = parts_ptr + token * (2 * ROWS)
            hi = tl.load(parts + main_offs, mask=t_mask, other=0.0)
            lo = tl.load(parts + ROWS + main_offs, mask=t_mask, other=0.0)
            main_sum = hc_dphi_planes(main_sum, x_tile, hi, lo)
            if TAIL > 0:
                hi = tl.load(parts + tail_offs, mask=t_mask, other=0.0)
                lo = tl.load(parts + ROWS + tail_offs, mask=t_mask, other=0.0)
                tail_sum = hc_dphi_planes(tail_sum, x_tile, hi, lo)
        slot = hc_slot(mine, piece, slices, lanes, helpers)
        sums_ptrs = sums_ptr + (hc_long(slot) * slices + piece) * (BLOCK_C * ROWS)
        sums_ptrs += tl.arange(0, BLOCK_C)[:, None] * ROWS
        tl.store(sums_ptrs + tl.arange(0, MAIN)[None, :], main_sum)
        if TAIL > 0:
            tl.store(sums_ptrs + MAIN + tl.arange(0, TAIL)[None, :], tail_sum)


def packs(streams: int, views: int, coefficients: int, dtype: torch.dtype) -> bool:
    """Whether `packed_dx` takes this case."""
    return dtype == torch.bfloat16 and streams <= 8 and views <= 1 and coefficients <= 128


def packed_dx(x, du, pre, phi, dp, dss, g, res, dx, views: int, g_rows: int) -> torch.Tensor:
    """dx, written, and dφ, returned; the arguments are those of `pre_dx`."""
    tokens, streams, width = x.shape
    parts, dp_half, dp_scale = pack_dp(dp)
    tile = packed_tile(x)
    phi_half, phi_scale = pack_phi(phi, streams, tile["BLOCK_C"])
    mix = packed_mix(pre, dss, res, streams, views, g_rows, tile["BLOCK_T"])
    main, tail = coefficient_blocks(phi.shape[0])
    launch(
        hc_pre_dx_packed,
        (cdiv(tokens, tile["BLOCK_T"]) * cdiv(width, tile["BLOCK_C"]),),
        *(x, du, g, phi_half, phi_scale, mix, dp_half, dp_scale, dx, tokens, width),
        N=streams,
        HAS_DU=views == 1,
        G=g_rows,
        MAIN=main,
        TAIL=tail,
        **tile,
    )
    return packed_dphi(x, parts, phi)


def packed_dphi(x: torch.Tensor, parts: torch.Tensor, phi: torch.Tensor) -> torch.Tensor:
    """dφ = Σ_t dp_t ⊗ x_t, from dp in bf16 parts: relative error 2.5e-6."""
    tokens = x.shape[0]
    coefficients, depth = phi.shape
    main, tail = coefficient_blocks(coefficients)
    tile = packed_dphi_tile(x, main + tail)
    block_c = tile["BLOCK_C"]
    slices = cdiv(depth, block_c)
    lanes, helpers = lanes_and_helpers(slices)
    slots = (lanes + helpers // slices + 2) * slices
    sums = phi.new_empty(slots * block_c * (main + tail))
    launch(
        hc_pre_dphi_packed,
        (lanes * slices + helpers,),
        *(x, parts, sums, tokens, depth, lanes, helpers),
        MAIN=main,
        TAIL=tail,
        **tile,
    )
    blocks = {"block_t": tile["BLOCK_T"], "block_c": block_c, "block_m": 16}
    return sum_dphi(sums, phi, tokens, 1, lanes, helpers, rows=main + tail, **blocks)


def packed_tile(x: torch.Tensor) -> dict:
    """Tile of dx, two programs a multiprocessor; φ comes from L2 once for every tile of tokens.

    H100, n = 8, 8192×2560: 541 µs, with 64 columns 561 (8 warps) and 633 (16); 766 before, with
    φᵀdp in tf32 and tiles of 32 tokens.
    """
    old = generation(x.device) < 9
    return {
        "BLOCK_T": 32 if old else 64,
        "BLOCK_C": 64 if old else 32,
        "STAGES": 2 if old else 3,
        "num_warps": 4 if generation(x.device) == 9 else 8,
    }


def packed_dphi_tile(x: torch.Tensor, rows: int) -> dict:
    """Tile of dφ: the sums of 256 columns × 80 coefficients take 40 registers a thread.

    H100, n = 8, 8192×2560: 147 µs; 229 before, when a program took 32 coefficients.
    """
    wide = generation(x.device) == 9 and rows <= 96
    return {
        "BLOCK_T": 32 if generation(x.device) < 9 or rows > 96 else 64,
        "BLOCK_C": 256 if wide else 128,
        "STAGES": 3,
        "num_warps": 16 if wide else 8,
    }
