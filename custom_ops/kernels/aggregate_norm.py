"""The read and the norm after it in one pass over the streams, a token's row on chip."""
# ruff: noqa: RUF005 (Triton has no starred tuples)

import torch
import triton
import triton.language as tl

from custom_ops.kernels.launch import cdiv, launch
from custom_ops.kernels.tile import padded
from custom_ops.registration import INTERPRETED

MOST_STREAMS = 8
WIDEST = 16_384
# Warps of the backward: 12 a multiprocessor of an H100, which holds 16 at 128 registers a thread.
# 8192×2560 108 µs, 4096×7168 144, 16384×4096 340 there; with 20 of them 105, 167, 385.
WARPS = 5 if INTERPRETED else 12 * 132


@triton.jit
def hc_normalised(u, mask, width, eps: tl.constexpr, CENTRED: tl.constexpr):
    """u, centred or not, over its root mean square."""
    if CENTRED:
        u = tl.where(mask, u - tl.sum(u, axis=0) / width, 0.0)
    return u * tl.rsqrt(tl.sum(u * u, axis=0) / width + eps)


@triton.jit
def hc_aggregate_norm(
    x_ptr,
    pre_ptr,
    weight_ptr,
    shift_ptr,
    out_ptr,
    width,
    eps: tl.constexpr,
    N: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """norm(Σ_i pre_i x_i) of one token, the last tokens first (see hc_aggregate)."""
    token = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    c_offs = tl.arange(0, BLOCK_C)
    mask = c_offs < width
    x_row = x_ptr + token * (N * width) + c_offs
    u = tl.zeros([BLOCK_C], tl.float32)
    for i in tl.static_range(N):
        x_tile = tl.load(x_row + i * width, mask=mask, other=0.0).to(tl.float32)
        u += tl.load(pre_ptr + token * N + i) * x_tile
    u = u.to(out_ptr.dtype.element_ty).to(tl.float32)
    unit = hc_normalised(u, mask, width, eps, CENTRED)
    out = unit * tl.load(weight_ptr + c_offs, mask=mask, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        out += tl.load(shift_ptr + c_offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * width + c_offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def hc_tile(row_ptr, k, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, AGAIN: tl.constexpr):
    """Tile k of a row, 0 behind its end; AGAIN: its second and last reading, from L1."""
    c_offs = k * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (c_offs < WIDTH) | ((k + 1) * BLOCK_C <= WIDTH)
    policy: tl.constexpr = "evict_first" if AGAIN else ""
    return tl.load(row_ptr + c_offs, mask=mask, other=0.0, eviction_policy=policy)


@triton.jit
def hc_store_tile(row_ptr, k, tile, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr):
    c_offs = k * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (c_offs < WIDTH) | ((k + 1) * BLOCK_C <= WIDTH)
    tl.store(row_ptr + c_offs, tile.to(row_ptr.dtype.element_ty), mask=mask)


@triton.jit
def hc_by_lane(tile, LANES: tl.constexpr):
    """Sums of the columns that one of LANES threads holds."""
    return tl.sum(tl.reshape(tile, [LANES, tile.shape[0] // LANES]), axis=1)


@triton.jit
def hc_sums(values, M: tl.constexpr, LANES: tl.constexpr):
    """[M] sums of as many tensors [LANES], M ≤ 8 a power of two, all in one exchange."""
    level = values
    for bit in tl.static_range(3):
        if M >> bit > 1:
            joined = ()
            for k in tl.static_range(M >> (bit + 1)):
                joined = joined + (tl.join(level[k], level[k + (M >> (bit + 1))]),)
            level = joined
    return tl.sum(tl.reshape(level[0], [LANES, M]), axis=0)


@triton.jit
def hc_slopes(
    u,
    dv,
    weight_ptr,
    eps: tl.constexpr,
    CENTRED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LANES: tl.constexpr,
):
    """mean(u) and mean(g), g = dv · weight, or zeros; 1/rms of d = u - mean(u); ⟨d, g⟩ / |d|²."""
    mean, mean_g = 0.0, 0.0
    g = ()
    for k in tl.static_range(len(u)):
        weight = hc_tile(weight_ptr, k, WIDTH, BLOCK_C, False)
        g = g + (dv[k].to(tl.float32) * weight.to(tl.float32),)
    if CENTRED:
        total = tl.zeros([BLOCK_C], tl.float32)
        total_g = tl.zeros([BLOCK_C], tl.float32)
        for k in tl.static_range(len(u)):
            total += u[k].to(tl.float32)
            total_g += g[k]
        both = hc_sums((hc_by_lane(total, LANES), hc_by_lane(total_g, LANES)), 2, LANES)
        mean, mean_g = tl.split(both / WIDTH)
    square = tl.zeros([BLOCK_C], tl.float32)
    along = tl.zeros([BLOCK_C], tl.float32)
    for k in tl.static_range(len(u)):
        d = u[k].to(tl.float32) - mean
        if CENTRED and (k + 1) * BLOCK_C > WIDTH:
            d = tl.where(k * BLOCK_C + tl.arange(0, BLOCK_C) < WIDTH, d, 0.0)
        square += d * d
        along += d * g[k]
    both = hc_sums((hc_by_lane(square, LANES), hc_by_lane(along, LANES)), 2, LANES)
    square, along = tl.split(both / WIDTH)
    rstd = tl.rsqrt(square + eps)
    return mean, mean_g, rstd, along * rstd * rstd


@triton.jit(do_not_specialize=["tokens"])
def hc_aggregate_norm_backward(
    dv_ptr,
    x_ptr,
    pre_ptr,
    weight_ptr,
    du_ptr,
    dots_ptr,
    dweight_ptr,
    dshift_ptr,
    tokens,
    eps: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    CENTRED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LANES: tl.constexpr,
):
    """du and ⟨du, x_i⟩ of every P-th token of P programs, and their share of dweight, dshift.

    x and dv are read twice, the second time from L1: kept in registers they would leave too few
    warps to hide the reads. M is N padded; the last tokens come first (see hc_aggregate).
    """
    CHUNKS: tl.constexpr = (WIDTH + BLOCK_C - 1) // BLOCK_C
    dweight = ()
    for _ in tl.static_range(CHUNKS):
        dweight = dweight + (tl.zeros([BLOCK_C], tl.float32),)
    dshift = dweight
    for index in tl.range(tl.program_id(0), tokens, tl.num_programs(0)):
        token = tl.full((), 0, tl.int64) + (tokens - 1 - index)
        x_row = x_ptr + token * (N * WIDTH)
        dv_row = dv_ptr + token * WIDTH
        dv, x, u = (), (), ()
        for k in tl.static_range(CHUNKS):
            dv = dv + (hc_tile(dv_row, k, WIDTH, BLOCK_C, False),)
            for i in tl.static_range(N):
                x = x + (hc_tile(x_row + i * WIDTH, k, WIDTH, BLOCK_C, False),)
        for k in tl.static_range(CHUNKS):
            total = tl.zeros([BLOCK_C], tl.float32)
            for i in tl.static_range(N):
                total += tl.load(pre_ptr + token * N + i) * x[k * N + i].to(tl.float32)
            u = u + (total.to(du_ptr.dtype.element_ty),)
        mean, mean_g, rstd, slope = hc_slopes(
            u, dv, weight_ptr, eps, CENTRED, WIDTH, BLOCK_C, LANES
        )
        dots, sums, sums_shift = (), (), ()
        for _ in tl.static_range(M):
            dots = dots + (tl.zeros([LANES], tl.float32),)
        for k in tl.static_range(CHUNKS):
            wide = hc_tile(dv_row, k, WIDTH, BLOCK_C, True).to(tl.float32)
            weight = hc_tile(weight_ptr, k, WIDTH, BLOCK_C, False).to(tl.float32)
            d = u[k].to(tl.float32) - mean
            sums = sums + (dweight[k] + wide * (d * rstd),)
            sums_shift = sums_shift + (dshift[k] + wide,)
            du = (wide * weight - mean_g - d * slope) * rstd
            hc_store_tile(du_ptr + token * WIDTH, k, du, WIDTH, BLOCK_C)
            added = ()
            for i in tl.static_range(N):
                again = hc_tile(x_row + i * WIDTH, k, WIDTH, BLOCK_C, True)
                added = added + (dots[i] + hc_by_lane(du * again.to(tl.float32), LANES),)
            dots = added + dots[N:]
        dweight, dshift = sums, sums_shift
        i_offs = tl.arange(0, M)
        tl.store(dots_ptr + token * N + i_offs, hc_sums(dots, M, LANES), mask=i_offs < N)
    slot = tl.program_id(0).to(tl.int64) * WIDTH
    for k in tl.static_range(CHUNKS):
        hc_store_tile(dweight_ptr + slot, k, dweight[k], WIDTH, BLOCK_C)
        if dshift_ptr is not None:
            hc_store_tile(dshift_ptr + slot, k, dshift[k], WIDTH, BLOCK_C)


@triton.jit(do_not_specialize=["slots"])
def hc_sum_rows(parts_ptr, out_ptr, slots, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum of parts [slots, C], lane by lane and then in a tree: an order of its own, but fixed."""
    c_offs = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, slots, ROWS):
        rows = first + tl.arange(0, ROWS)
        mask = (rows < slots)[:, None] & (c_offs < width)[None, :]
        offs = rows[:, None].to(tl.int64) * width + c_offs[None, :]
        total += tl.load(parts_ptr + offs, mask=mask, other=0.0)
    tl.store(out_ptr + c_offs, tl.sum(total, axis=0), mask=c_offs < width)


def norm_tile(width: int) -> dict:
    """A whole row of C elements, 16 a thread."""
    block = max(128, padded(width))
    return {"BLOCK_C": block, "num_warps": max(1, min(32, block // 512))}


def norm_backward_tile(width: int, streams: int, centred: bool) -> dict:
    """A row in tiles of four columns a thread, as many as 128 registers a thread bear."""
    most = 5 if centred or streams > 4 else 7
    warps = next((w for w in (1, 2, 4, 8) if cdiv(width, 128 * w) <= most), 16)
    lanes = {"BLOCK_C": 128 * warps, "LANES": 32 * warps, "num_warps": warps}
    return {"M": max(2, padded(streams)), "WIDTH": int(width), **lanes}


def aggregate_norm(
    x: torch.Tensor,
    pre: torch.Tensor,
    weight: torch.Tensor,
    shift: torch.Tensor | None,
    centred: bool,
    eps: float,
) -> torch.Tensor:
    """norm(Σ_i pre_i x_i) · weight + shift.

    Args: x [T, n, C], weight and shift [C] float, pre [T, n] fp32; contiguous; n ≤ 8, C ≤ 16,384.
    Returns: [T, C] in x's dtype. Moves: n + 1.
    """
    tokens, streams, width = x.shape
    out = x.new_empty(tokens, width)
    meta = {"eps": eps, "N": streams, "CENTRED": centred, **norm_tile(width)}
    launch(hc_aggregate_norm, (tokens,), x, pre, weight, shift, out, width, **meta)
    return out


def aggregate_norm_backward(
    dv: torch.Tensor,
    x: torch.Tensor,
    pre: torch.Tensor,
    weight: torch.Tensor,
    has_shift: bool,
    centred: bool,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """du [T, C] in x's dtype, ⟨du, x_i⟩ [T, n], dweight and dshift [C] fp32.

    Args: as `aggregate_norm`, and dv [T, C] float. Moves: n + 2.
    """
    tokens, streams, width = x.shape
    du = x.new_empty(tokens, width)
    dots = pre.new_empty(tokens, streams)
    tile = norm_backward_tile(width, streams, centred)
    programs = max(1, WARPS // tile["num_warps"])
    shares = [pre.new_empty(programs, width) for _ in range(1 + has_shift)]
    meta = {"eps": eps, "N": streams, "CENTRED": centred, **tile}
    arguments = (dv, x, pre, weight, du, dots, shares[0], shares[1] if has_shift else None)
    launch(hc_aggregate_norm_backward, (programs,), *arguments, tokens, **meta)
    sums = [pre.new_empty(width) for _ in shares]
    for share, out in zip(shares, sums, strict=True):
        grid = (cdiv(width, 32),)
        launch(hc_sum_rows, grid, share, out, programs, width, ROWS=256, COLUMNS=32, num_warps=8)
    return du, dots, sums[0], sums[1] if has_shift else pre.new_empty(0)
