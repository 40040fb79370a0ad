"""Backward of the reading side: ⟨du, x⟩, then dx and dφ formed once for the whole sublayer."""
# ruff: noqa: RUF005 (Triton has no starred tuples)

import torch
import triton
import triton.language as tl

from custom_ops.kernels.launch import cdiv, launch, plural, row_tile, tokens_of
from custom_ops.kernels.pre_dx import fused_dx
from custom_ops.kernels.pre_packed import packed_dx, packs
from custom_ops.kernels.pre_wide import wide_dphi, wide_dx
from custom_ops.registration import flat


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
    """ROWS views of one token: dpre_vi = ⟨du_v, x_i⟩.

    The last tokens come first: L2 still holds them of du, and then the first of x for `pre_dx`.
    """
    GROUPS: tl.constexpr = (V + ROWS - 1) // ROWS
    token = ((tl.num_programs(0) - 1 - tl.program_id(0)) // GROUPS).to(tl.int64)
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


def aggregate_dots(du: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """dpre_vi = ⟨du_v, x_i⟩.

    Args: du [T, V, C] or [T, C] float, x [T, n, C] float; contiguous.
    Returns: dpre [T, V, n] or [T, n] fp32.
    Moves: n + V (x again for every group of views when n·V > 32).
    """
    tokens, (streams, width) = tokens_of(x), x.shape[-2:]
    views = plural(du, x)
    rows = max(1, min(views, 32 // streams))
    dpre = x.new_empty(*du.shape[:-1], streams, dtype=torch.float32)
    launch(
        hc_aggregate_dots,
        (tokens * cdiv(views, rows),),
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
    precision: str = "bf16x2",
    with_dots: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """dx_j = Σ_i res_ij g_i + Σ_v pre_vj du_v + (φᵀdp)_j + 2·dss·x_j and dφ = Σ_t dp_t ⊗ x_t.

    with_dots, of a single view, asks for ⟨du, x_j⟩ as well, which then costs no pass of its own.

    Args: x [T, n, C], du [T, V, C] or None, g [T, n', C] or None, float; pre [T, V, n],
    phi [M, n·C], dp [T, M], dss [T], res [T, n', n] fp32; all contiguous. At bf16 x, dp enters
    dφ as 2 bf16 parts (relative error 2.5e-6 over 65,536 tokens, where an fp32 product has 5.3e-7)
    or, if precision is "ieee" and dφ does not take its own pass, as 3 (1.7e-7); φᵀdp takes both
    factors as tf32, or at 5 to 8 streams as scaled fp16, which has as many bits.
    Returns: dx [T, n, C] in x's dtype, dphi [M, n·C] fp32, ⟨du, x⟩ [T, n] fp32 or None.
    Moves: 2n + n' + 1; n more where dφ's sums don't fit the registers (n > 4, V > 1, M > 32).
    """
    streams = x.shape[-2]
    views = 0 if du is None else plural(du, x)
    du = x if du is None else du
    pre = dp if pre is None else pre
    g_rows = 0 if g is None else g.shape[-2]
    g = x if g is None else g
    res = dp if res is None else res
    if streams > 4 or views > 1 or phi.shape[0] > 32:
        dots = aggregate_dots(du, x).reshape(x.shape[:-1]) if with_dots else None
        shape, x, dp = x.shape, flat(x, 2), flat(dp, 1)
        dx = torch.empty_like(x)
        if packs(streams, views, phi.shape[0], x.dtype):
            dphi = packed_dx(x, du, pre, phi, dp, dss, g, res, dx, views, g_rows)
        else:
            wide_dx(x, du, pre, phi, dp, dss, g, res, dx, views, g_rows)
            dphi = wide_dphi(x, dp, phi)
        return dx.reshape(shape), dphi, dots
    dx = torch.empty_like(x)
    options = (views, g_rows, precision, with_dots)
    return dx, *fused_dx(x, du, pre, phi, dp, dss, g, res, dx, *options)


def project_backward(
    dp: torch.Tensor,
    dss: torch.Tensor,
    x: torch.Tensor,
    phi: torch.Tensor,
    precision: str = "bf16x2",
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx = φᵀdp + 2·dss·x and dφ = Σ_t dp_t ⊗ x_t: `pre_dx` without du and g.

    Nothing mixes streams here, so a single one is taken for four a quarter as wide: programs then
    hold as much at a time as `pre_dx` is tuned for.

    Args: dp [T, M], dss [T], phi [M, n·C] fp32, x [T, n, C] float; precision as in `pre_dx`.
    Returns: dx [T, n, C] in x's dtype, dphi [M, n·C] fp32.
    Moves: 2n (3n where `pre_dx` moves 4n + 1).
    """
    rows = x
    if x.shape[-2] == 1 and x.shape[-1] % 32 == 0 and phi.shape[0] <= 32:
        rows = x.reshape(*x.shape[:-2], 4, x.shape[-1] // 4)
    dx, dphi, _ = pre_dx(rows, None, None, phi, dp, dss, precision=precision)
    return dx.reshape(x.shape), dphi
