"""The read and the norm after it in one pass over the streams, a token's row in registers."""
# ruff: noqa: RUF005 (Triton has no starred tuples)

import torch
import triton
import triton.language as tl

from custom_ops.kernels.launch import cdiv, launch
from custom_ops.kernels.tile import padded

MOST_STREAMS = 8
WIDEST = 16_384
PROGRAMS = 264  # of the backward: two a multiprocessor of an H100


@triton.jit
def hc_normalised(u, mask, width, eps: tl.constexpr, CENTRED: tl.constexpr):
    """u, centred or not, over its root mean square; and the inverse of that root."""
    if CENTRED:
        u = tl.where(mask, u - tl.sum(u, axis=0) / width, 0.0)
    rstd = tl.rsqrt(tl.sum(u * u, axis=0) / width + eps)
    return u * rstd, rstd


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
    unit, _rstd = hc_normalised(u, mask, width, eps, CENTRED)
    out = unit * tl.load(weight_ptr + c_offs, mask=mask, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        out += tl.load(shift_ptr + c_offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * width + c_offs, out.to(out_ptr.dtype.element_ty), mask=mask)


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
    width,
    eps: tl.constexpr,
    N: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """du and ⟨du, x_i⟩ of a span of tokens, and its share of dweight and dshift."""
    program = tl.program_id(0)
    span = tl.cdiv(tokens, tl.num_programs(0))
    c_offs = tl.arange(0, BLOCK_C)
    mask = c_offs < width
    dweight = tl.zeros([BLOCK_C], tl.float32)
    dshift = tl.zeros([BLOCK_C], tl.float32)
    first = program * span
    for index in tl.range(first, tl.minimum(first + span, tokens), num_stages=STAGES):
        token = tl.full((), 0, tl.int64) + index
        x_row = x_ptr + token * (N * width) + c_offs
        dv = tl.load(dv_ptr + token * width + c_offs, mask=mask, other=0.0)
        weight = tl.load(weight_ptr + c_offs, mask=mask, other=0.0)
        x_tiles = ()
        for i in tl.static_range(N):
            x_tiles = x_tiles + (tl.load(x_row + i * width, mask=mask, other=0.0),)
        u = tl.zeros([BLOCK_C], tl.float32)
        for i in tl.static_range(N):
            u += tl.load(pre_ptr + token * N + i) * x_tiles[i].to(tl.float32)
        u = u.to(du_ptr.dtype.element_ty).to(tl.float32)
        unit, rstd = hc_normalised(u, mask, width, eps, CENTRED)
        dweight += dv.to(tl.float32) * unit
        if dshift_ptr is not None:
            dshift += dv.to(tl.float32)
        g = dv.to(tl.float32) * weight.to(tl.float32)
        du = g - unit * (tl.sum(g * unit, axis=0) / width)
        if CENTRED:
            du -= tl.sum(g, axis=0) / width
        narrow = (du * rstd).to(du_ptr.dtype.element_ty)
        tl.store(du_ptr + token * width + c_offs, narrow, mask=mask)
        du = tl.where(mask, narrow.to(tl.float32), 0.0)
        for i in tl.static_range(N):
            dot = tl.sum(du * x_tiles[i].to(tl.float32), axis=0)
            tl.store(dots_ptr + token * N + i, dot)
    slot = program.to(tl.int64) * width + c_offs
    tl.store(dweight_ptr + slot, dweight, mask=mask)
    if dshift_ptr is not None:
        tl.store(dshift_ptr + slot, dshift, mask=mask)


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
    shares = [pre.new_empty(PROGRAMS, width) for _ in range(1 + has_shift)]
    meta = {"eps": eps, "N": streams, "CENTRED": centred, "STAGES": 2, **norm_tile(width)}
    arguments = (dv, x, pre, weight, du, dots, shares[0], shares[1] if has_shift else None)
    launch(hc_aggregate_norm_backward, (PROGRAMS,), *arguments, tokens, width, **meta)
    sums = [pre.new_empty(width) for _ in shares]
    for share, out in zip(shares, sums, strict=True):
        grid = (cdiv(width, 32),)
        launch(hc_sum_rows, grid, share, out, PROGRAMS, width, ROWS=64, COLUMNS=32, num_warps=4)
    return du, dots, sums[0], sums[1] if has_shift else pre.new_empty(0)
