"""Backward of the boundary: the whole ∂x' formed in registers and used for everything at once.

One program owns BLOCK_C columns of every stream and walks a span of tokens, so that its dφ stays
in registers; the inner products dpost and dres leave one partial a column slice. Both kinds of
partials are added in a fixed order by small kernels.
"""
# ruff: noqa: RUF005 (Triton has no starred tuples)

import torch
import triton
import triton.language as tl

from custom_ops.kernels.boundary import (
    hc_boundary_dots,
    hc_boundary_mix,
    hc_boundary_tiles,
    hc_boundary_totals,
    hc_dphi_parts,
    hc_through_phi,
)
from custom_ops.kernels.launch import INTERPRETED, launch
from custom_ops.kernels.pre_wide import hc_round_tf32
from custom_ops.kernels.project import sum_slots

PROGRAMS = 132  # one wave of programs where one fills a multiprocessor


@triton.jit(do_not_specialize=["tokens", "token_splits"])
def hc_post_pre_backward(
    next_ptr,
    du_ptr,
    x_ptr,
    y_ptr,
    mix_ptr,
    add_ptr,
    next_pre_ptr,
    next_res_ptr,
    dp_ptr,
    dss_ptr,
    phi_ptr,
    post_ptr,
    res_ptr,
    out_ptr,
    dy_ptr,
    dphi_ptr,
    dots_ptr,
    tokens,
    width,
    token_splits,
    N: tl.constexpr,
    M: tl.constexpr,
    MIX: tl.constexpr,
    ADD: tl.constexpr,
    WHOLE: tl.constexpr,
    PARTS: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BLOCK_C columns of every stream over one of token_splits spans of tokens."""
    slices = tl.cdiv(width, BLOCK_C)
    slice_index = tl.program_id(0) % slices
    split = tl.program_id(0) // slices
    c_offs = slice_index * BLOCK_C + tl.arange(0, BLOCK_C)
    m_offs = tl.arange(0, BLOCK_M)
    phi_offs = m_offs[None, :].to(tl.int64) * (N * width) + c_offs[:, None]
    phi_mask = (c_offs < width)[:, None] & (m_offs < M)[None, :]
    phi = ()
    dphi = ()
    for j in tl.static_range(N):
        phi_tile = tl.load(phi_ptr + phi_offs + j * width, mask=phi_mask, other=0.0)
        phi = phi + (hc_round_tf32(phi_tile) if DOT == "tf32" else phi_tile,)
        dphi = dphi + (tl.zeros([BLOCK_C, BLOCK_M], tl.float32),)
    KINDS: tl.constexpr = 32 if N > 3 else 16
    kinds = tl.arange(0, KINDS)[None, :]
    inputs = (next_ptr, du_ptr, x_ptr, y_ptr, mix_ptr, add_ptr)
    scales = (next_pre_ptr, next_res_ptr, dss_ptr)
    span = tl.cdiv(tokens, token_splits * BLOCK_T) * BLOCK_T
    start = split * span
    stop = tl.minimum(start + span, tokens)
    for first in tl.range(start, stop, BLOCK_T, num_stages=STAGES):
        tiles = hc_boundary_tiles(inputs, first, stop, c_offs, width, N, MIX, ADD, BLOCK_T)
        t_offs = first + tl.arange(0, BLOCK_T).to(tl.int64)
        t_mask = t_offs < stop
        mask = t_mask[:, None] & (c_offs < width)[None, :]
        rows = t_offs[:, None] * (N * width) + c_offs[None, :]
        dp_mask = t_mask[:, None] & (m_offs < M)[None, :]
        dp = tl.load(dp_ptr + t_offs[:, None] * M + m_offs[None, :], mask=dp_mask, other=0.0)
        dp_short = hc_round_tf32(dp) if DOT == "tf32" else dp
        sums = ()
        totals = ()
        for j in tl.static_range(N):
            sums = sums + (hc_dphi_parts(dphi[j], tiles[2 + j], dp, PARTS, DOT),)
            totals = totals + (hc_through_phi(dp_short, phi[j], DOT),)
        dphi = sums
        totals = hc_boundary_totals(totals, tiles, scales, t_offs, t_mask, N, MIX, ADD)
        for j in tl.static_range(N):
            out = totals[j]
            if not WHOLE:
                out = hc_boundary_mix(totals, res_ptr, t_offs, t_mask, j, N)
            tl.store(out_ptr + rows + j * width, out.to(out_ptr.dtype.element_ty), mask=mask)
        dy = hc_boundary_mix(totals, post_ptr, t_offs, t_mask, 0, 1)
        dy_offs = t_offs[:, None] * width + c_offs[None, :]
        tl.store(dy_ptr + dy_offs, dy.to(dy_ptr.dtype.element_ty), mask=mask)
        dots = hc_boundary_dots(totals, tiles, KINDS, N)
        dots_offs = (slice_index.to(tl.int64) * tokens + t_offs[:, None]) * (N * N + N) + kinds
        tl.store(dots_ptr + dots_offs, dots, mask=t_mask[:, None] & (kinds < N * N + N))
    slot = dphi_ptr + (split * M).to(tl.int64) * (N * width)
    for j in tl.static_range(N):
        tl.store(slot + phi_offs + j * width, dphi[j], mask=phi_mask)


@triton.jit(do_not_specialize=["total", "slices"])
def hc_post_pre_dots(
    dots_ptr, dres_ptr, dpost_ptr, total, slices, N: tl.constexpr, BLOCK: tl.constexpr
):
    """dres and dpost from their partials [slices, T, n² + n], added in their order."""
    KINDS: tl.constexpr = N * N + N
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < total
    value = tl.zeros([BLOCK], tl.float32)
    dots = dots_ptr + offs
    for _ in tl.range(0, slices, loop_unroll_factor=8):
        value += tl.load(dots, mask=mask, other=0.0)
        dots += total
    token = offs // KINDS
    kind = offs % KINDS
    tl.store(dres_ptr + token * (N * N) + kind, value, mask=mask & (kind < N * N))
    tl.store(dpost_ptr + token * N + kind - N * N, value, mask=mask & (kind >= N * N))


def post_pre_backward(
    mixed: torch.Tensor | None,
    added: torch.Tensor | None,
    du: torch.Tensor,
    dp: torch.Tensor,
    dss: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    post: torch.Tensor,
    res: torch.Tensor,
    phi: torch.Tensor,
    streams: torch.Tensor,
    next_pre: torch.Tensor,
    next_res: torch.Tensor,
    whole: bool,
    tile: dict | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """total_j = Σ_i res'_ij mixed_i + added_j + pre'_j du + (φᵀdp)_j + 2·dss·x'_j, and its users.

    Args: mixed and added [T, n, C] or None, du [T, C], streams (x') and x [T, n, C], y [T, C]
    float; dp [T, M], dss [T], post and next_pre [T, n], res and next_res [T, n, n], phi [M, n·C]
    fp32; all contiguous, n ≤ 4 and M ≤ 32. whole says which of total and resᵀ total is wanted.
    Returns: total, or dx = resᵀ total; dy_i = Σ_i post_i total_i; dpost_i = ⟨total_i, y⟩ and
    dres_ij = ⟨total_i, x_j⟩ fp32; dφ = Σ_t dp_t ⊗ x'_t [M, n·C] fp32.
    Moves: 4n + 3 (mixed, x', x and the output; du, y and dy).
    """
    tokens, count, width = x.shape
    tile = post_pre_backward_tile(phi.shape[0], x.dtype) if tile is None else dict(tile)
    fill = tile.pop("FILL")
    slices = triton.cdiv(width, tile["BLOCK_C"])
    splits = max(1, fill * PROGRAMS // slices)
    out, dy = torch.empty_like(x), torch.empty_like(y)
    dphi = phi.new_empty(splits, *phi.shape)
    dots = phi.new_empty(slices, tokens, count * count + count)
    launch(
        hc_post_pre_backward,
        (slices * splits,),
        streams,
        du,
        x,
        y,
        x if mixed is None else mixed,
        x if added is None else added,
        next_pre,
        next_res,
        dp,
        dss,
        phi,
        post,
        res,
        out,
        dy,
        dphi,
        dots,
        tokens,
        width,
        splits,
        N=count,
        M=phi.shape[0],
        MIX=mixed is not None,
        ADD=added is not None,
        WHOLE=whole,
        **tile,
    )
    dpost, dres = torch.empty_like(post), torch.empty_like(res)
    total = dpost.numel() + dres.numel()
    grid = (triton.cdiv(total, 256),)
    launch(hc_post_pre_dots, grid, dots, dres, dpost, total, slices, N=count, BLOCK=256)
    return out, dy, dpost, dres, dphi[0] if splits == 1 else sum_slots(dphi)


def post_pre_backward_tile(coefficients: int, dtype: torch.dtype) -> dict:
    """Tile of `post_pre_backward`; FILL programs share a multiprocessor."""
    half = dtype == torch.bfloat16
    return {
        "PARTS": 3 if half and not INTERPRETED else 0,
        "DOT": "tf32" if half else "tf32x3",
        "BLOCK_T": 16,
        "BLOCK_M": max(16, triton.next_power_of_2(coefficients)),
        "BLOCK_C": 64 if half else 32,
        "STAGES": 4 if half else 1,
        "num_warps": 8,
        "FILL": 1,
    }
