"""Backward of the reading side: ⟨du, x⟩, then dx and dφ formed once for the whole sublayer."""
# ruff: noqa: RUF005 (Triton has no starred tuples)

import torch
import triton
import triton.language as tl

from custom_ops.kernels.launch import INTERPRETED, launch, row_tile
from custom_ops.kernels.pre_wide import hc_dphi_step, hc_round_tf32, wide_dphi, wide_dx
from custom_ops.kernels.project import sum_slots


@triton.jit(do_not_specialize=["tokens"])
def hc_aggregate_dots(
    du_ptr,
    x_ptr,
    dpre_ptr,
    tokens,
    width,
    N: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr,
):
    """ROWS views of one token: dpre_vi = ⟨du_v, x_i⟩."""
    GROUPS: tl.constexpr = (V + ROWS - 1) // ROWS
    token = (tl.program_id(0) // GROUPS).to(tl.int64)
    first = (tl.program_id(0) % GROUPS) * ROWS
    column_offs = tl.arange(0, BLOCK_C)
    dots = ()
    for _ in tl.static_range(ROWS * N):
        dots = dots + (tl.zeros([BLOCK_C // GROUP], tl.float32),)
    for start in range(0, width, BLOCK_C):
        mask = start + column_offs < width
        x_rows = x_ptr + token * (N * width) + start + column_offs
        du_rows = du_ptr + (token * V + first) * width + start + column_offs
        x_tiles = ()
        for stream in tl.static_range(N):
            x_tiles = x_tiles + (tl.load(x_rows + stream * width, mask=mask, other=0.0),)
        sums = ()
        for row in tl.static_range(ROWS):
            du_mask = mask & (first + row < V)
            du = tl.load(du_rows + row * width, mask=du_mask, other=0.0).to(tl.float32)
            for stream in tl.static_range(N):
                product = du * x_tiles[stream].to(tl.float32)
                product = tl.reshape(product, [BLOCK_C // GROUP, GROUP])
                sums = sums + (dots[row * N + stream] + tl.sum(product, axis=1),)
        dots = sums
    for row in tl.static_range(ROWS):
        for stream in tl.static_range(N):
            dpre = dpre_ptr + (token * V + first + row) * N + stream
            tl.store(dpre, tl.sum(dots[row * N + stream], axis=0), mask=first + row < V)


@triton.jit(do_not_specialize=["tokens", "token_splits"])
def hc_pre_dx(
    x_ptr,
    du_ptr,
    pre_ptr,
    phi_ptr,
    dp_ptr,
    dss_ptr,
    g_ptr,
    res_ptr,
    dx_ptr,
    part_ptr,
    tokens,
    width,
    token_splits,
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
    """BLOCK_C columns of every stream over one of token_splits spans of tokens."""
    column_tiles = tl.cdiv(width, BLOCK_C)
    split = tl.program_id(0) // column_tiles
    c_offs = (tl.program_id(0) % column_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c_offs < width
    m_offs = tl.arange(0, BLOCK_M)
    m_mask = m_offs < M
    depth = N * width
    phi_mask = c_mask[:, None] & m_mask[None, :]
    phi_offs = m_offs[None, :].to(tl.int64) * depth + c_offs[:, None]
    phi = ()
    dphi = ()
    for j in tl.static_range(N):
        phi_tile = tl.load(phi_ptr + phi_offs + j * width, mask=phi_mask, other=0.0)
        phi = phi + (hc_round_tf32(phi_tile) if DOT == "tf32" else phi_tile,)
        dphi = dphi + (tl.zeros([BLOCK_C, BLOCK_M], tl.float32),)
    span = tl.cdiv(tokens, token_splits * BLOCK_T) * BLOCK_T
    start = split * span
    for first in tl.range(start, tl.minimum(start + span, tokens), BLOCK_T, num_stages=STAGES):
        t_offs = first + tl.arange(0, BLOCK_T).to(tl.int64)
        t_mask = t_offs < tokens
        mask = t_mask[:, None] & c_mask[None, :]
        rows = t_offs[:, None] * depth + c_offs[None, :]
        dp_mask = t_mask[:, None] & m_mask[None, :]
        dp = tl.load(dp_ptr + t_offs[:, None] * M + m_offs[None, :], mask=dp_mask, other=0.0)
        dp_short = hc_round_tf32(dp) if DOT == "tf32" else dp
        dss = 2.0 * tl.load(dss_ptr + t_offs, mask=t_mask, other=0.0)
        du_tiles = ()
        g_tiles = ()
        for v in tl.static_range(V):
            du_offs = t_offs[:, None] * (V * width) + v * width + c_offs[None, :]
            du_tiles = du_tiles + (tl.load(du_ptr + du_offs, mask=mask, other=0.0),)
        if HAS_G:
            for i in tl.static_range(N):
                g_tiles = g_tiles + (tl.load(g_ptr + rows + i * width, mask=mask, other=0.0),)
        sums = ()
        for j in tl.static_range(N):
            x_tile = tl.load(x_ptr + rows + j * width, mask=mask, other=0.0)
            sums = sums + (hc_dphi_step(dphi[j], x_tile, dp, PARTS, DOT),)
            dx = tl.dot(dp_short, tl.trans(phi[j]), input_precision=DOT)
            dx += dss[:, None] * x_tile.to(tl.float32)
            for v in tl.static_range(V):
                pre = tl.load(pre_ptr + t_offs * (V * N) + v * N + j, mask=t_mask, other=0.0)
                dx += pre[:, None] * du_tiles[v].to(tl.float32)
            if HAS_G:
                for i in tl.static_range(N):
                    res_offs = t_offs * (N * N) + i * N + j
                    res = tl.load(res_ptr + res_offs, mask=t_mask, other=0.0)
                    dx += res[:, None] * g_tiles[i].to(tl.float32)
            tl.store(dx_ptr + rows + j * width, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dphi = sums
    slot = part_ptr + (split * M).to(tl.int64) * depth
    for j in tl.static_range(N):
        tl.store(slot + phi_offs + j * width, dphi[j], mask=phi_mask)


def aggregate_dots(du: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """dpre_vi = ⟨du_v, x_i⟩.

    Args: du [T, V, C] float, x [T, n, C] float; contiguous.
    Returns: dpre [T, V, n] fp32.
    Moves: n + V (x again for every group of views when n·V > 32).
    """
    tokens, streams, width = x.shape
    views = du.shape[1]
    rows = max(1, min(views, 32 // streams))
    dpre = x.new_empty(tokens, views, streams, dtype=torch.float32)
    launch(
        hc_aggregate_dots,
        (tokens * triton.cdiv(views, rows),),
        du,
        x,
        dpre,
        tokens,
        width,
        N=streams,
        V=views,
        ROWS=rows,
        **row_tile(width, 1024 if streams <= 4 else 512),
    )
    return dpre


def pre_dx(
    x: torch.Tensor,
    du: torch.Tensor | None,
    pre: torch.Tensor | None,
    phi: torch.Tensor,
    dp: torch.Tensor,
    dss: torch.Tensor,
    g: torch.Tensor | None = None,
    res: torch.Tensor | None = None,
    dphi_parts: int = 2,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx_j = Σ_i res_ij g_i + Σ_v pre_vj du_v + (φᵀdp)_j + 2·dss·x_j and dφ = Σ_t dp_t ⊗ x_t.

    Args: x [T, n, C], du [T, V, C] or None, g [T, n, C] or None, float; pre [T, V, n],
    phi [M, n·C], dp [T, M], dss [T], res [T, n, n] fp32; all contiguous. dphi_parts: at bf16 x,
    dp enters dφ as 2 bf16 parts (relative error 2.5e-6) or 3 (1.7e-7, below an fp32 product's
    5.3e-7 over 65,536 tokens, for 13 % more time); φᵀdp takes both factors as tf32.
    Returns: dx [T, n, C] in x's dtype, dphi [M, n·C] fp32.
    Moves: 3n + 1; 4n + 1 where the sums of dφ do not fit the registers (n > 4, V > 1, M > 32).
    """
    tokens, streams, width = x.shape
    views = 0 if du is None else du.shape[1]
    du = x if du is None else du
    pre = dp if pre is None else pre
    has_g = g is not None
    g = x if g is None else g
    res = dp if res is None else res
    dx = torch.empty_like(x)
    coefficients = phi.shape[0]
    if streams > 4 or views > 1 or coefficients > 32:
        wide_dx(x, du, pre, phi, dp, dss, g, res, dx, views, has_g)
        return dx, wide_dphi(x, dp, phi, dphi_parts)
    tile = pre_dx_tile(coefficients, x.dtype, dphi_parts)
    slices = triton.cdiv(width, tile["BLOCK_C"])
    splits = max(1, 132 // slices)
    parts = phi.new_empty(splits, *phi.shape)
    launch(
        hc_pre_dx,
        (slices * splits,),
        x,
        du,
        pre,
        phi,
        dp,
        dss,
        g,
        res,
        dx,
        parts,
        tokens,
        width,
        splits,
        N=streams,
        V=views,
        M=coefficients,
        HAS_G=has_g,
        **tile,
    )
    return dx, parts[0] if splits == 1 else sum_slots(parts)


def pre_dx_tile(coefficients: int, dtype: torch.dtype, dphi_parts: int) -> dict:
    """Tile of `pre_dx`: 64 tokens × 64 columns fill the tensor cores at bf16."""
    half = dtype == torch.bfloat16
    return {
        "PARTS": dphi_parts if half and not INTERPRETED else 1,
        "DOT": "tf32" if half else "tf32x3",
        "BLOCK_T": 64 if half else 16,
        "BLOCK_M": max(16, triton.next_power_of_2(coefficients)),
        "BLOCK_C": 64 if half else 32,
        "STAGES": 3 if half else 2,
        "num_warps": 8 if half else 4,
    }


def project_backward(
    dp: torch.Tensor,
    dss: torch.Tensor,
    x: torch.Tensor,
    phi: torch.Tensor,
    dphi_parts: int = 2,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx = φᵀdp + 2·dss·x and dφ = Σ_t dp_t ⊗ x_t: `pre_dx` without du and g.

    Args: dp [T, M], dss [T], phi [M, n·C] fp32, x [T, n, C] float; dphi_parts as in `pre_dx`.
    Returns: dx [T, n, C] in x's dtype, dphi [M, n·C] fp32.
    Moves: 2n (3n where `pre_dx` moves 4n + 1).
    """
    return pre_dx(x, None, None, phi, dp, dss, dphi_parts=dphi_parts)
