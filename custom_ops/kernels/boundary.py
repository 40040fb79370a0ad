"""What one tile of tokens × columns goes through in the backward of a boundary.

A program's tiles are one tuple: du, y, x' (N), x (N), then N mixed and N added cotangents.
"""
# ruff: noqa: RUF005 (Triton has no starred tuples)

import triton
import triton.language as tl


@triton.jit
def hc_streams(tiles, ptr, offs, mask, width, N: tl.constexpr):
    """tiles and the N tiles at ptr."""
    for stream in tl.static_range(N):
        tiles = tiles + (tl.load(ptr + offs + stream * width, mask=mask, other=0.0),)
    return tiles


@triton.jit
def hc_boundary_tiles(
    ptrs,
    first,
    stop,
    c_offs,
    width,
    N: tl.constexpr,
    MIX: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Every tile that BLOCK_T tokens need: du, y, x' (N), x (N), mixed (N) and added (N)."""
    next_ptr, du_ptr, x_ptr, y_ptr, mix_ptr, add_ptr = ptrs
    t_offs = first + tl.arange(0, BLOCK_T).to(tl.int64)
    mask = (t_offs < stop)[:, None] & (c_offs < width)[None, :]
    rows = t_offs[:, None] * (N * width) + c_offs[None, :]
    row = t_offs[:, None] * width + c_offs[None, :]
    tiles = (tl.load(du_ptr + row, mask=mask, other=0.0),)
    tiles = tiles + (tl.load(y_ptr + row, mask=mask, other=0.0),)
    tiles = hc_streams(tiles, next_ptr, rows, mask, width, N)
    tiles = hc_streams(tiles, x_ptr, rows, mask, width, N)
    if MIX:
        tiles = hc_streams(tiles, mix_ptr, rows, mask, width, N)
    if ADD:
        tiles = hc_streams(tiles, add_ptr, rows, mask, width, N)
    return tiles


@triton.jit
def hc_dphi_parts(dphi, x_tile, dp, PARTS: tl.constexpr, DOT: tl.constexpr):
    """dφᵀ + xᵀdp of one tile of tokens; dp as 1 to 3 bf16 parts of 8 bits, or as fp32.

    The product leaves the tensor cores, which truncate as they add, before it joins the sum.
    """
    if PARTS == 0:
        product = tl.dot(tl.trans(x_tile.to(tl.float32)), dp, input_precision=DOT)
    else:
        turned = tl.trans(x_tile)
        high = dp.to(tl.bfloat16)
        product = tl.dot(turned, high)
        if PARTS > 1:
            rest = dp - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            product += tl.dot(turned, middle)
        if PARTS > 2:  # scaled, so that it is no accumulator of the dot before it
            low = ((rest - middle.to(tl.float32)) * 65536.0).to(tl.bfloat16)
            product += tl.dot(turned, low) * (1.0 / 65536.0)
    return dphi + product


@triton.jit
def hc_scaled(ptr, t_offs, t_mask, tile, STRIDE: tl.constexpr, INDEX: tl.constexpr):
    """One coefficient of each token times the token's row of the tile."""
    scale = tl.load(ptr + t_offs * STRIDE + INDEX, mask=t_mask, other=0.0)
    return scale[:, None] * tile.to(tl.float32)


@triton.jit
def hc_through_phi(dp, phi, DOT: tl.constexpr):
    """dp φᵀ of one stream, [BLOCK_T, BLOCK_C].

    The few tokens go turned into the tensor cores; the gather then gives each warp whole rows, in
    which every sum over columns stays.
    """
    product = tl.trans(tl.dot(phi, tl.trans(dp), input_precision=DOT))
    columns = tl.broadcast_to(tl.arange(0, phi.shape[0])[None, :], product.shape)
    return tl.gather(product, columns, 1)


@triton.jit
def hc_boundary_totals(
    totals, tiles, ptrs, t_offs, t_mask, N: tl.constexpr, MIX: tl.constexpr, ADD: tl.constexpr
):
    """∂x': totals = φᵀdp, and the shares of Σx'², du, the mixed and the added cotangent.

    Tile by tile over all streams, so that each is widened to fp32 once and then forgotten.
    """
    pre_ptr, res_ptr, dss_ptr = ptrs
    for i in tl.static_range(N if MIX else 0):
        mixed = tiles[2 + 2 * N + i].to(tl.float32)
        grown = ()
        for j in tl.static_range(N):
            share = hc_scaled(res_ptr, t_offs, t_mask, mixed, N * N, i * N + j)
            grown = grown + (totals[j] + share,)
        totals = grown
    du = tiles[0].to(tl.float32)
    grown = ()
    for j in tl.static_range(N):
        total = totals[j] + hc_scaled(pre_ptr, t_offs, t_mask, du, N, j)
        total += 2.0 * hc_scaled(dss_ptr, t_offs, t_mask, tiles[2 + j].to(tl.float32), 1, 0)
        if ADD:
            total += tiles[2 + (3 if MIX else 2) * N + j].to(tl.float32)
        grown = grown + (total,)
    return grown


@triton.jit
def hc_boundary_dots(totals, tiles, KINDS: tl.constexpr, N: tl.constexpr):
    """[BLOCK_T, KINDS] with ⟨total_j, x_i⟩ in column j·n + i and ⟨total_j, y⟩ in column n² + j."""
    kinds = tl.arange(0, KINDS)[None, :]
    dots = tl.zeros([totals[0].shape[0], KINDS], tl.float32)
    for i in tl.static_range(N + 1):
        other = (tiles[1] if i == N else tiles[2 + N + i]).to(tl.float32)
        for j in tl.static_range(N):
            dot = tl.sum(totals[j] * other, axis=1)
            dots = tl.where(kinds == (N * N + j if i == N else j * N + i), dot[:, None], dots)
    return dots


@triton.jit
def hc_boundary_mix(totals, ptr, t_offs, t_mask, INDEX: tl.constexpr, STRIDE: tl.constexpr):
    """Σ_j coefficient_j total_j, with coefficient_j in column INDEX + j·n of n·STRIDE."""
    N: tl.constexpr = len(totals)
    mix = hc_scaled(ptr, t_offs, t_mask, totals[0], N * STRIDE, INDEX)
    for j in tl.static_range(1, N):
        mix += hc_scaled(ptr, t_offs, t_mask, totals[j], N * STRIDE, INDEX + j * STRIDE)
    return mix
