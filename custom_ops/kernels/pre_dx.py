"""dx and dφ of the reading side in one pass over the streams, for up to 4 streams.

The work is slices of BLOCK_C columns × tiles of BLOCK_T tokens, slice by slice, and every program
takes an equal run of it: φ's slice and the sums of dφ stay with the program, which leaves the sums
in a slot when it comes to the next slice. Which program adds what depends on the shape alone.
Whole numbers of programs a slice keep neighbours at the same tokens, so that they read whole rows
of memory: 128 programs took 720 µs where 132 took 752 (16384×4096, H100).
"""
# ruff: noqa: RUF005 (Triton has no starred tuples)

import torch
import triton
import triton.language as tl

from custom_ops.kernels.launch import INTERPRETED, before_hopper, cdiv, launch
from custom_ops.kernels.mix import packed_mix
from custom_ops.kernels.pre_wide import hc_round_tf32
from custom_ops.kernels.slots import sum_slots
from custom_ops.kernels.tile import padded

PROGRAMS = 5 if INTERPRETED else 132  # at most: the streaming multiprocessors of an H100


@triton.jit
def hc_long(value):
    """value as int64, also where it is a number of the interpreter's."""
    return tl.full((), 0, tl.int64) + value


@triton.jit
def hc_share(index, tiles, slices, programs):
    """First piece of work of program `index`: work = slices · tiles pieces, dealt out evenly."""
    work = hc_long(tiles) * slices
    count = tl.minimum(work, programs)
    return tl.minimum(index, count) * work // tl.maximum(count, 1)


@triton.jit
def hc_owner(piece, tiles, slices, programs):
    """The program that a piece of work belongs to: the last whose share starts at or before it."""
    work = hc_long(tiles) * slices
    return ((piece + 1) * tl.minimum(work, programs) - 1) // tl.maximum(work, 1)


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


@triton.jit(do_not_specialize=["tokens", "programs"])
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
    programs,
    N: tl.constexpr,
    V: tl.constexpr,
    M: tl.constexpr,
    HAS_G: tl.constexpr,
    PARTS: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx on an equal share of the work, and the sums of dφ over it, one slot a slice.

    With dots_ptr (of a single view) also every slice's share of ⟨du, x_j⟩.
    """
    tiles = tl.cdiv(tokens, BLOCK_T)
    slices = tl.cdiv(width, BLOCK_C)
    index = hc_long(tl.program_id(0))
    begin = hc_share(index, tiles, slices, programs)
    end = hc_share(index + 1, tiles, slices, programs)
    span = hc_long(tl.maximum(tiles, 1))
    SQUARE: tl.constexpr = N * N if HAS_G else 0
    COUNT: tl.constexpr = SQUARE + V * N + 1
    depth = N * width
    m_offs = tl.arange(0, BLOCK_M)
    t_offs = tl.arange(0, BLOCK_T)
    dp_offs = t_offs[:, None] * M + m_offs[None, :]
    first_piece = (begin // span).to(tl.int32)
    stop_piece = tl.where(begin < end, (end + span - 1) // span, 0).to(tl.int32)
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
        first = tl.maximum(begin - piece * span, 0).to(tl.int32)
        last = tl.minimum(end - piece * span, span).to(tl.int32)
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
                dots_ptrs = dots_ptr + (hc_long(piece) * tokens + token + t_offs) * N
            for j in tl.static_range(N):
                x_ptrs = x_ptr + token * depth + j * width + rows
                x_tile = tl.load(x_ptrs, mask=mask, other=0.0)
                sums = sums + (hc_dphi_parts(dphi[j], x_tile, dp, PARTS, DOT),)
                part = tl.dot(dp_short, tl.trans(phi[j]), input_precision=DOT)
                dx = dx + (part + dss[:, None] * x_tile.to(tl.float32),)
                if dots_ptr is not None:
                    dot = tl.sum(only_du * x_tile.to(tl.float32), axis=1)
                    tl.store(dots_ptrs + j, dot, mask=t_mask)
            dphi = sums
            for v in tl.static_range(V):
                if dots_ptr is None:
                    du_offs = t_offs[:, None] * (V * width) + v * width + c_offs[None, :]
                    du_ptrs = du_ptr + token * (V * width) + du_offs
                    du_tile = tl.load(du_ptrs, mask=mask, other=0.0).to(tl.float32)
                else:
                    du_tile = only_du
                dx = hc_add_mixed(dx, du_tile, mix_tile + (SQUARE + v * N) * BLOCK_T, N, BLOCK_T)
            if HAS_G:
                for i in tl.static_range(N):
                    g_ptrs = g_ptr + token * depth + i * width + rows
                    g_tile = tl.load(g_ptrs, mask=mask, other=0.0).to(tl.float32)
                    dx = hc_add_mixed(dx, g_tile, mix_tile + i * N * BLOCK_T, N, BLOCK_T)
            for j in tl.static_range(N):
                dx_ptrs = dx_ptr + token * depth + j * width + rows
                tl.store(dx_ptrs, dx[j].to(dx_ptr.dtype.element_ty), mask=mask)
        slot = index - hc_owner(piece * span, tiles, slices, programs)
        slot_ptr = part_ptr + (slot * slices + piece) * (N * BLOCK_C * BLOCK_M)
        slot_offs = tl.arange(0, BLOCK_C)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        for j in tl.static_range(N):
            tl.store(slot_ptr + j * (BLOCK_C * BLOCK_M) + slot_offs, dphi[j])


@triton.jit(do_not_specialize=["tokens", "programs"])
def hc_pre_dx_sum(
    part_ptr,
    dphi_ptr,
    tokens,
    width,
    programs,
    N: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dφ [M, n·C] of one slice of one stream: its slots, in the order of their tokens.

    A program takes BLOCK_M of the ROWS coefficients that a slot holds.
    """
    tiles = tl.cdiv(tokens, BLOCK_T)
    slices = tl.cdiv(width, BLOCK_C)
    piece = tl.program_id(0)
    begin = hc_long(piece) * tiles
    first = hc_owner(begin, tiles, slices, programs)
    last = hc_owner(begin + tiles - 1, tiles, slices, programs)
    c_offs = tl.arange(0, BLOCK_C)
    m_offs = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    part_ptrs = part_ptr + (piece * N + tl.program_id(1)) * (BLOCK_C * ROWS)
    part_ptrs += c_offs[:, None] * ROWS + m_offs[None, :]
    total = tl.zeros([BLOCK_C, BLOCK_M], tl.float32)
    for _ in range(tl.where(tiles > 0, last - first + 1, 0)):
        total += tl.load(part_ptrs)
        part_ptrs += slices * (N * BLOCK_C * ROWS)
    c_offs += piece * BLOCK_C
    offs = m_offs[:, None].to(tl.int64) * (N * width) + tl.program_id(1) * width + c_offs[None, :]
    mask = (m_offs < M)[:, None] & (c_offs < width)[None, :]
    tl.store(dphi_ptr + offs, tl.trans(total), mask=mask)


def fused_dx(
    x, du, pre, phi, dp, dss, g, res, dx, views: int, has_g: bool, precision: str, with_dots: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dx, written; dφ and ⟨du, x⟩ [T, n] if asked, returned; the arguments are `pre_dx`'s."""
    tokens, streams, width = x.shape
    coefficients = phi.shape[0]
    tile = fused_tile(x, coefficients, precision)
    block_t = tile["BLOCK_T"]
    mix = packed_mix(pre, dss, res, streams, views, has_g, block_t)
    slices = cdiv(width, tile["BLOCK_C"])
    programs = PROGRAMS // slices * slices if slices <= PROGRAMS else PROGRAMS
    block = tile["BLOCK_C"] * tile["BLOCK_M"]
    sums = phi.new_empty((programs // slices + 2) * slices * streams * block)
    dots = dp.new_empty(slices, tokens, streams) if with_dots else None
    launch(
        hc_pre_dx,
        (programs,),
        *(x, du, g, phi, mix, dp, dx, sums, dots, tokens, width, programs),
        N=streams,
        V=views,
        M=coefficients,
        HAS_G=has_g,
        **tile,
    )
    dphi = torch.empty_like(phi)
    launch(
        hc_pre_dx_sum,
        (slices, streams),
        *(sums, dphi, tokens, width, programs),
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
    1.5 times as long on an H100, 16 warps 1.14 times; before sm_90 and where rows are not aligned,
    large tiles do spill inside.
    """
    half = x.dtype == torch.bfloat16
    old = before_hopper(x.device)
    large = half and not old and x.shape[2] % 8 == 0
    return {
        "PARTS": 1 if not half or INTERPRETED else 3 if precision == "ieee" else 2,
        "DOT": "tf32" if half else "tf32x3",
        "BLOCK_T": 64 if large else 32 if half else 16,
        "BLOCK_M": max(16, padded(coefficients)),
        "BLOCK_C": 64 if half and not old else 32,
        "STAGES": 3 if large else 2,
        "num_warps": 8 if half else 4,
    }
