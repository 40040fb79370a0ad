"""dx and dφ of the reading side in one pass over the streams, for up to 4 streams.

The work is slices of BLOCK_C columns × tiles of BLOCK_T tokens, dealt out as shares.py says. φ's
slice and the sums of dφ stay with a program while it walks tokens; it leaves the sums in a slot
when it is done with a slice.
"""
# ruff: noqa: RUF005 (Triton has no starred tuples)

import torch
import triton
import triton.language as tl

from custom_ops.kernels.launch import INTERPRETED, cdiv, generation, launch, tokens_of
from custom_ops.kernels.mix import packed_mix
from custom_ops.kernels.pre_wide import hc_round_tf32
from custom_ops.kernels.shares import hc_lane_tiles, hc_long, hc_owner, hc_share, lanes_and_helpers
from custom_ops.kernels.slots import sum_slots
from custom_ops.kernels.tile import padded


@triton.jit
def hc_dphi_parts(dphi, x_tile, dp, PARTS: tl.constexpr, DOT: tl.constexpr):
    """dφᵀ + xᵀdp of one tile of tokens.

    The tile's product leaves the tensor cores, which truncate as they add, before it joins the
    long sum. dp enters as 2 (16 bits) or 3 (24 bits) bf16 parts, or as fp32.
    """
    if PARTS == 1:
        product = tl.dot(tl.trans(x_tile.to(tl.float32)), dp, input_precision=DOT)
    else:
        hi = dp.to(tl.bfloat16)
        rest = dp - hi.to(tl.float32)
        mid = rest.to(tl.bfloat16)
        # Eights of hi and mid alternate, as columns do in the registers of a product.
        EIGHTS: tl.constexpr = dp.shape[1] // 8
        halves = tl.reshape(tl.join(hi, mid), [dp.shape[0], EIGHTS, 8, 2])
        halves = tl.reshape(tl.trans(halves, (0, 1, 3, 2)), [dp.shape[0], 2 * dp.shape[1]])
        turned = tl.trans(x_tile)
        product = tl.reshape(tl.dot(turned, halves), [x_tile.shape[1], EIGHTS, 2, 8])
        product = tl.reshape(tl.sum(product, axis=2), [x_tile.shape[1], dp.shape[1]])
        if PARTS == 3:
            low = ((rest - mid.to(tl.float32)) * 65536.0).to(tl.bfloat16)
            product += tl.dot(turned, low) * (1.0 / 65536.0)  # scaled: not the dot's accumulator
    return dphi + product


@triton.jit
def hc_add_mixed(dx, tile, mix_ptr, N: tl.constexpr, BLOCK_T: tl.constexpr):
    """dx_j + mix_j · tile for every stream j."""
    out = ()
    for j in tl.static_range(N):
        weight = tl.load(mix_ptr + j * BLOCK_T + tl.arange(0, BLOCK_T))
        out = out + (dx[j] + weight[:, None] * tile,)
    return out


@triton.jit(do_not_specialize=["tokens", "lanes", "helpers"])
def hc_pre_dx(
    x_ptr,
    du_ptr,
    g_ptr,
    phi_ptr,
    mix_ptr,
    dp_ptr,
    dx_ptr,
    part_ptr,
    dots_ptr,
    tokens,
    width,
    lanes,
    helpers,
    N: tl.constexpr,
    V: tl.constexpr,
    M: tl.constexpr,
    G: tl.constexpr,
    PARTS: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx on this program's share of the work, and the sums of dφ over it, one slot a slice.

    With dots_ptr (of a single view) also every slice's share of ⟨du, x_j⟩.
    """
    tiles = tl.cdiv(tokens, BLOCK_T)
    slices = tl.cdiv(width, BLOCK_C)
    lane = tl.program_id(0) // slices
    helper = tl.program_id(0) - lanes * slices
    early = hc_lane_tiles(tiles, slices, lanes, helpers)  # tiles of the lanes
    late = tiles - early
    begin = hc_share(helper, late * slices, helpers)
    end = hc_share(helper + 1, late * slices, helpers)
    span = tl.maximum(late, 1)
    MIXED: tl.constexpr = G * N
    COUNT: tl.constexpr = MIXED + V * N + 1
    depth = N * width
    m_offs = tl.arange(0, BLOCK_M)
    t_offs = tl.arange(0, BLOCK_T)
    PAD_N: tl.constexpr = N + N // 3 * (4 - N)  # N ≤ 4, to a power of two
    n_offs = tl.arange(0, PAD_N)[None, :]
    dp_offs = t_offs[:, None] * M + m_offs[None, :]
    in_lane = helper < 0
    first_piece = tl.where(in_lane, tl.program_id(0) % slices, begin // span)
    stop_piece = tl.where(begin < end, tl.cdiv(end, span), 0)
    stop_piece = tl.where(in_lane, first_piece + 1, stop_piece)
    for piece in range(first_piece, stop_piece):
        c_offs = piece * BLOCK_C + tl.arange(0, BLOCK_C)
        c_mask = c_offs < width
        phi_mask = c_mask[:, None] & (m_offs < M)[None, :]
        phi_offs = m_offs[None, :].to(tl.int64) * depth + c_offs[:, None]
        phi = ()
        dphi = ()
        for j in tl.static_range(N):
            phi_tile = tl.load(phi_ptr + phi_offs + j * width, mask=phi_mask, other=0.0)
            phi = phi + (hc_round_tf32(phi_tile) if DOT == "tf32" else phi_tile,)
            dphi = dphi + (tl.zeros([BLOCK_C, BLOCK_M], tl.float32),)
        first = early + tl.maximum(begin - piece * span, 0)
        last = early + tl.minimum(end - piece * span, span)
        first = tl.where(in_lane, hc_share(lane, early, lanes), first)
        last = tl.where(in_lane, hc_share(lane + 1, early, lanes), last)
        rows = t_offs[:, None] * depth + c_offs[None, :]
        for tile in tl.range(first, last, num_stages=STAGES):
            token = hc_long(tile) * BLOCK_T
            t_mask = token + t_offs < tokens
            mask = t_mask[:, None] & c_mask[None, :]
            mix_tile = mix_ptr + token * COUNT
            dp_mask = t_mask[:, None] & (m_offs < M)[None, :]
            dp = tl.load(dp_ptr + token * M + dp_offs, mask=dp_mask, other=0.0)
            dp_short = hc_round_tf32(dp) if DOT == "tf32" else dp
            dss = tl.load(mix_tile + (COUNT - 1) * BLOCK_T + t_offs)
            dx = ()
            sums = ()
            if dots_ptr is not None:
                only_ptrs = du_ptr + token * width + t_offs[:, None] * width + c_offs[None, :]
                only_du = tl.load(only_ptrs, mask=mask, other=0.0).to(tl.float32)
                dots = tl.zeros([BLOCK_T, PAD_N], tl.float32)
            for j in tl.static_range(N):
                x_ptrs = x_ptr + token * depth + j * width + rows
                x_tile = tl.load(x_ptrs, mask=mask, other=0.0)
                sums = sums + (hc_dphi_parts(dphi[j], x_tile, dp, PARTS, DOT),)
                part = tl.dot(dp_short, tl.trans(phi[j]), input_precision=DOT)
                dx = dx + (part + dss[:, None] * x_tile.to(tl.float32),)
                if dots_ptr is not None:
                    dot = tl.sum(only_du * x_tile.to(tl.float32), axis=1)
                    dots += tl.where(n_offs == j, dot[:, None], 0.0)
            if dots_ptr is not None:
                dots_ptrs = dots_ptr + (hc_long(piece) * tokens + token) * N
                dots_mask = t_mask[:, None] & (n_offs < N)
                tl.store(dots_ptrs + t_offs[:, None] * N + n_offs, dots, mask=dots_mask)
            dphi = sums
            for v in tl.static_range(V):
                if dots_ptr is None:
                    du_offs = t_offs[:, None] * (V * width) + v * width + c_offs[None, :]
                    du_ptrs = du_ptr + token * (V * width) + du_offs
                    du_tile = tl.load(du_ptrs, mask=mask, other=0.0).to(tl.float32)
                else:
                    du_tile = only_du
                dx = hc_add_mixed(dx, du_tile, mix_tile + (MIXED + v * N) * BLOCK_T, N, BLOCK_T)
            if G > 0:
                g_offs = t_offs[:, None] * (G * width) + c_offs[None, :]
                for i in tl.static_range(G):
                    g_ptrs = g_ptr + token * (G * width) + i * width + g_offs
                    g_tile = tl.load(g_ptrs, mask=mask, other=0.0).to(tl.float32)
                    dx = hc_add_mixed(dx, g_tile, mix_tile + i * N * BLOCK_T, N, BLOCK_T)
            for j in tl.static_range(N):
                dx_ptrs = dx_ptr + token * depth + j * width + rows
                tl.store(dx_ptrs, dx[j].to(dx_ptr.dtype.element_ty), mask=mask)
        slot = lanes + helper - hc_owner(piece * span, late * slices, helpers)
        slot = tl.where(in_lane, lane, slot)
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


def fused_dx(
    x, du, pre, phi, dp, dss, g, res, dx, views: int, g_rows: int, precision: str, with_dots: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dx, written; dφ and ⟨du, x⟩ [T, n] if asked, returned; the arguments are `pre_dx`'s."""
    tokens, (streams, width) = tokens_of(x), x.shape[-2:]
    coefficients = phi.shape[0]
    tile = fused_tile(x, coefficients, precision)
    block_t = tile["BLOCK_T"]
    mix = packed_mix(pre, dss, res, streams, views, g_rows, block_t)
    slices = cdiv(width, tile["BLOCK_C"])
    lanes, helpers = lanes_and_helpers(slices)
    block = tile["BLOCK_C"] * tile["BLOCK_M"]
    sums = phi.new_empty((lanes + helpers // slices + 2) * slices * streams * block)
    dots = dp.new_empty(slices, tokens, streams) if with_dots else None
    launch(
        hc_pre_dx,
        (lanes * slices + helpers,),
        *(x, du, g, phi, mix, dp, dx, sums, dots, tokens, width, lanes, helpers),
        N=streams,
        V=views,
        M=coefficients,
        G=g_rows,
        **tile,
    )
    dphi = torch.empty_like(phi)
    launch(
        hc_pre_dx_sum,
        (slices, streams),
        *(sums, dphi, tokens, width, lanes, helpers),
        N=streams,
        M=coefficients,
        ROWS=tile["BLOCK_M"],
        BLOCK_T=block_t,
        BLOCK_M=tile["BLOCK_M"],
        BLOCK_C=tile["BLOCK_C"],
        num_warps=4,
    )
    return dphi, None if dots is None else sum_slots(dots)


def fused_tile(x: torch.Tensor, coefficients: int, precision: str) -> dict:
    """Tile of `fused_dx`: 64 tokens × 64 columns fill Hopper's tensor cores at bf16.

    Its spills lie outside the loop over tokens. Half as many tokens do not spill but took 1.25 to
    1.5 times as long on an H100, 16 warps 1.14 times, and 1.17 times with g an operand of a
    product, so that it lies swizzled in shared memory, where its reads conflict. Before sm_90 and
    where rows are not aligned, large tiles do spill inside.
    """
    half = x.dtype == torch.bfloat16
    old = generation(x.device) < 9
    large = half and not old and x.shape[-1] % 8 == 0
    return {
        "PARTS": 1 if not half or INTERPRETED else 3 if precision == "ieee" else 2,
        "DOT": "tf32" if half else "tf32x3",
        "BLOCK_T": 64 if large else 32 if half else 16,
        "BLOCK_M": max(16, padded(coefficients)),
        "BLOCK_C": 64 if large else 32,
        "STAGES": 3 if large else 2,
        "num_warps": 8 if half else 4,
    }
