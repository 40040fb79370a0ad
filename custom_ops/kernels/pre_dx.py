"""dx and dφ of the reading side in one pass over the streams, for up to 4 streams.

The work is slices of BLOCK_C columns × tiles of BLOCK_T tokens, dealt out as shares.py says. φ's
slice and the sums of dφ stay with a program while it walks tokens; it leaves the sums in a slot
when it is done with a slice.
"""
# ruff: noqa: RUF005 (Triton has no starred tuples)

import torch
import triton
import triton.language as tl

from custom_ops.kernels.launch import (
    INTERPRETED,
    cdiv,
    generation,
    launch,
    memory_speed,
    tokens_of,
)
from custom_ops.kernels.pre_dx_parts import (
    hc_add_mixed,
    hc_dphi_parts,
    hc_phi_together,
    hc_turn_back,
)
from custom_ops.kernels.pre_wide import hc_round_tf32
from custom_ops.kernels.shares import (
    hc_lane_tiles,
    hc_long,
    hc_mine,
    hc_owner,
    hc_slot,
    hc_walk,
    lanes_and_helpers,
)
from custom_ops.kernels.slots import sum_slots
from custom_ops.kernels.tile import padded
from custom_ops.kernels.together import hc_together

SWIFT = 4e12  # bytes a second of a memory that bank conflicts would hold back


@triton.jit(do_not_specialize=["tokens", "lanes", "helpers"])
def hc_pre_dx(
    x_ptr,
    du_ptr,
    g_ptr,
    phi_ptr,
    pre_ptr,
    res_ptr,
    dp_ptr,
    dss_ptr,
    dx_ptr,
    part_ptr,
    dots_ptr,
    tokens,
    width,
    lanes,
    helpers,
    N: tl.constexpr,
    PAD_N: tl.constexpr,
    V: tl.constexpr,
    M: tl.constexpr,
    G: tl.constexpr,
    PARTS: tl.constexpr,
    DOT: tl.constexpr,
    TOGETHER: tl.constexpr,
    AGAIN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx on this program's share of the work, and the sums of dφ over it, one slot a slice.

    With dots_ptr (of a single view) also every slice's share of ⟨du, x_j⟩. If TOGETHER, φᵀdp of
    all streams is one product. If AGAIN, dp is read once for each of its two products: one copy
    can't lie so in shared memory that both read it without bank conflicts.
    """
    EARLY: tl.constexpr = BLOCK_T < 64  # dφ before dx: after it, small tiles spill
    tiles = tl.cdiv(tokens, BLOCK_T)
    slices = tl.cdiv(width, BLOCK_C)
    mine = hc_mine(tiles, slices, lanes, helpers)
    depth = N * width
    m_offs = tl.arange(0, BLOCK_M)
    t_offs = tl.arange(0, BLOCK_T)
    dp_offs = t_offs[:, None] * M + m_offs[None, :]
    for piece in range(mine[0], mine[1]):
        c_offs = piece * BLOCK_C + tl.arange(0, BLOCK_C)
        c_mask = c_offs < width
        dphi = ()
        for _ in tl.static_range(N):
            dphi = dphi + (tl.zeros([BLOCK_C, BLOCK_M], tl.float32),)
        if TOGETHER:
            first_column = piece * BLOCK_C
            phi = hc_phi_together(phi_ptr, first_column, width, m_offs, M, N, PAD_N, BLOCK_C, DOT)
        else:
            phi = ()
            phi_mask = c_mask[:, None] & (m_offs < M)[None, :]
            phi_ptrs = phi_ptr + m_offs[None, :].to(tl.int64) * depth + c_offs[:, None]
            for j in tl.static_range(N):
                phi_tile = tl.load(phi_ptrs + j * width, mask=phi_mask, other=0.0)
                phi = phi + (hc_round_tf32(phi_tile) if DOT == "tf32" else phi_tile,)
        first, last, step = hc_walk(mine, piece, lanes)
        rows = t_offs[:, None] * depth + c_offs[None, :]
        for tile in tl.range(first, last, step, num_stages=STAGES):
            token = hc_long(tile) * BLOCK_T
            t_mask = token + t_offs < tokens
            mask = t_mask[:, None] & c_mask[None, :]
            dp_mask = t_mask[:, None] & (m_offs < M)[None, :]
            dp = tl.load(dp_ptr + token * M + dp_offs, mask=dp_mask, other=0.0)
            operand = dp
            if AGAIN:  # the policy keeps the compiler from making one load of two
                operand = tl.load(
                    dp_ptr + token * M + dp_offs,
                    mask=dp_mask,
                    other=0.0,
                    eviction_policy="evict_first",
                )
            dp_short = hc_round_tf32(operand) if DOT == "tf32" else operand
            dss = 2.0 * tl.load(dss_ptr + token + t_offs, mask=t_mask, other=0.0)
            x_tiles = ()
            for j in tl.static_range(N):
                x_ptrs = x_ptr + token * depth + j * width + rows
                x_tiles = x_tiles + (tl.load(x_ptrs, mask=mask, other=0.0),)
            if dots_ptr is not None:
                du_ptrs = du_ptr + token * width + t_offs[:, None] * width + c_offs[None, :]
                only_du = tl.load(du_ptrs, mask=mask, other=0.0).to(tl.float32)
                dots = ()
                for j in tl.static_range(N):
                    dots = dots + (tl.sum(only_du * x_tiles[j].to(tl.float32), axis=1),)
                n_offs = tl.arange(0, PAD_N)
                dots_ptrs = dots_ptr + (hc_long(piece) * tokens + token) * N
                dots_ptrs += t_offs[:, None] * N + n_offs[None, :]
                dots_mask = t_mask[:, None] & (n_offs < N)[None, :]
                tl.store(dots_ptrs, hc_together(dots, N), mask=dots_mask)
            dx = ()
            sums = ()
            if TOGETHER:
                parts = hc_turn_back(dp_short, phi, PAD_N, DOT)
            for j in tl.static_range(N):
                if TOGETHER:
                    part = parts[j]
                else:
                    if EARLY:
                        sums = sums + (hc_dphi_parts(dphi[j], x_tiles[j], dp, PARTS, DOT),)
                    part = tl.dot(dp_short, tl.trans(phi[j]), input_precision=DOT)
                dx = dx + (part + dss[:, None] * x_tiles[j].to(tl.float32),)
            for v in tl.static_range(V):
                if dots_ptr is None:
                    du_offs = t_offs[:, None] * (V * width) + v * width + c_offs[None, :]
                    du_ptrs = du_ptr + token * (V * width) + du_offs
                    du_tile = tl.load(du_ptrs, mask=mask, other=0.0).to(tl.float32)
                else:
                    du_tile = only_du
                weight_ptr = pre_ptr + token * (V * N) + v * N
                dx = hc_add_mixed(dx, du_tile, weight_ptr, t_offs, t_mask, V * N, N, PAD_N)
            if G > 0:
                g_offs = t_offs[:, None] * (G * width) + c_offs[None, :]
                for i in tl.static_range(G):
                    g_ptrs = g_ptr + token * (G * width) + i * width + g_offs
                    g_tile = tl.load(g_ptrs, mask=mask, other=0.0).to(tl.float32)
                    weight_ptr = res_ptr + token * (G * N) + i * N
                    dx = hc_add_mixed(dx, g_tile, weight_ptr, t_offs, t_mask, G * N, N, PAD_N)
            for j in tl.static_range(N):
                dx_ptrs = dx_ptr + token * depth + j * width + rows
                tl.store(dx_ptrs, dx[j].to(dx_ptr.dtype.element_ty), mask=mask)
            if not EARLY:
                for j in tl.static_range(N):
                    sums = sums + (hc_dphi_parts(dphi[j], x_tiles[j], dp, PARTS, DOT),)
            dphi = sums
        slot = hc_slot(mine, piece, slices, lanes, helpers)
        slot_ptr = part_ptr + (hc_long(slot) * slices + piece) * (N * BLOCK_C * BLOCK_M)
        slot_offs = tl.arange(0, BLOCK_C)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        for j in tl.static_range(N):
            tl.store(slot_ptr + j * (BLOCK_C * BLOCK_M) + slot_offs, dphi[j])


@triton.jit(do_not_specialize=["tokens", "lanes", "helpers"])
def hc_pre_dx_sum(
    part_ptr,
    dphi_ptr,
    tokens,
    width,
    lanes,
    helpers,
    N: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dφ [M, n·C] of one slice of one stream: its slots, the lanes' first.

    A program takes BLOCK_M of the ROWS coefficients that a slot holds.
    """
    tiles = tl.cdiv(tokens, BLOCK_T)
    slices = tl.cdiv(width, BLOCK_C)
    piece = tl.program_id(0)
    late = tiles - hc_lane_tiles(tiles, slices, lanes, helpers)
    first = hc_owner(piece * late, late * slices, helpers)
    last = hc_owner(piece * late + late - 1, late * slices, helpers)
    slots = lanes + tl.where(late > 0, last - first + 1, 0)
    c_offs = tl.arange(0, BLOCK_C)
    m_offs = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    part_ptrs = part_ptr + (piece * N + tl.program_id(1)) * (BLOCK_C * ROWS)
    part_ptrs += c_offs[:, None] * ROWS + m_offs[None, :]
    total = tl.zeros([BLOCK_C, BLOCK_M], tl.float32)
    for _ in range(slots):
        total += tl.load(part_ptrs)
        part_ptrs += slices * (N * BLOCK_C * ROWS)
    c_offs += piece * BLOCK_C
    offs = m_offs[:, None].to(tl.int64) * (N * width) + tl.program_id(1) * width + c_offs[None, :]
    mask = (m_offs < M)[:, None] & (c_offs < width)[None, :]
    tl.store(dphi_ptr + offs, tl.trans(total), mask=mask)


def sum_dphi(
    sums, phi, tokens, streams: int, lanes, helpers, *, rows, block_t, block_c, block_m
) -> torch.Tensor:
    """dφ [M, n·C] from the slots that lanes and helpers left, of `rows` ≥ M coefficients each."""
    coefficients, depth = phi.shape
    width = depth // streams
    dphi = torch.empty_like(phi)
    launch(
        hc_pre_dx_sum,
        (cdiv(width, block_c), streams, cdiv(rows, block_m)),
        *(sums, dphi, tokens, width, lanes, helpers),
        N=streams,
        M=coefficients,
        ROWS=rows,
        BLOCK_T=block_t,
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        num_warps=4,
    )
    return dphi


def fused_dx(
    x, du, pre, phi, dp, dss, g, res, dx, views: int, g_rows: int, precision: str, with_dots: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dx, written; dφ and ⟨du, x⟩ [T, n] if asked, returned; the arguments are `pre_dx`'s."""
    tokens, (streams, width) = tokens_of(x), x.shape[-2:]
    coefficients = phi.shape[0]
    tile = fused_tile(x, coefficients, precision, with_dots)
    slices = cdiv(width, tile["BLOCK_C"])
    lanes, helpers = lanes_and_helpers(slices)
    block = tile["BLOCK_C"] * tile["BLOCK_M"]
    sums = phi.new_empty((lanes + helpers // slices + 2) * slices * streams * block)
    dots = dp.new_empty(slices, tokens, streams) if with_dots else None
    launch(
        hc_pre_dx,
        (lanes * slices + helpers,),
        *(x, du, g, phi, pre, res, dp, dss, dx, sums, dots, tokens, width, lanes, helpers),
        N=streams,
        PAD_N=padded(streams),
        V=views,
        M=coefficients,
        G=g_rows,
        **tile,
    )
    rows = tile["BLOCK_M"]
    blocks = {"block_t": tile["BLOCK_T"], "block_c": tile["BLOCK_C"], "block_m": rows}
    dphi = sum_dphi(sums, phi, tokens, streams, lanes, helpers, rows=rows, **blocks)
    return dphi, None if dots is None else sum_slots(dots)


def fused_tile(x: torch.Tensor, coefficients: int, precision: str, with_dots: bool) -> dict:
    """Tile of `fused_dx`: 64 tokens × 64 columns fill Hopper's tensor cores at bf16.

    Half as many tokens took 1.25 to 1.5 times as long on an H100, 16 warps 1.14 times, and 1.17
    times with g an operand of a product, so that it lies swizzled in shared memory, where its
    reads conflict; two streams stored at a time, with half the barriers, up to 1.05 times. Before
    sm_90 and where rows are not aligned, large tiles spill inside the loop over tokens.

    φᵀdp of all streams at once takes registers that small tiles and ⟨du, x⟩ leave no room for. It
    leaves bank conflicts, too, which hide behind an H100's memory but not behind an H200's: there
    a product a stream and dp read AGAIN take 0.69 to 0.74 times as long (with ⟨du, x⟩ 0.87, 0.88).
    On the H100, whose memory then gives less, they take 1.03 to 1.12 times.
    """
    half = x.dtype == torch.bfloat16
    chip = generation(x.device)
    large = half and chip >= 9 and x.shape[-1] % 8 == 0
    swift = large and chip == 9 and memory_speed(x.device) > SWIFT
    return {
        "PARTS": 1 if not half or INTERPRETED else 3 if precision == "ieee" else 2,
        "DOT": "tf32" if half else "tf32x3",
        "TOGETHER": large and not with_dots and not swift,
        "AGAIN": swift,
        "BLOCK_T": 64 if large else 32 if half else 16,
        "BLOCK_M": max(16, padded(coefficients)),
        "BLOCK_C": 64 if large else 32,
        "STAGES": 3 if large else 2,
        "num_warps": 8 if half else 4,
    }
