"""The backward of a boundary in one pass over the streams, x' made again in registers.

x' = res x + post y was written by the forward. Given g, the cotangent of the next streams, and du:

    dx'_i = Σ_k mix_ki g_k + pre_i du + (φᵀdp)_i + 2·dss·x'_i      dφ = Σ_t dp_t ⊗ x'_t
    dy = Σ_i post_i dx'_i     dpost_i = ⟨dx'_i, y⟩     dres_ij = ⟨dx'_i, x_j⟩     ⟨du, x'_i⟩

A token's mixes are products of its 4 × 4 matrix and its 4 rows. Four tokens together are a block
(boundary_blocks.py) and 16 rows that lie side by side in memory; the inner products are the blocks
on the diagonal of [16, C] × [C, 16]. What is not of a token enters its sums times zero: exactly
nothing, but of four tokens one that is not finite takes the others along.
"""
# ruff: noqa: RUF005 (Triton has no starred tuples)

import torch
import triton
import triton.language as tl

from custom_ops.kernels.boundary_blocks import pack_blocks
from custom_ops.kernels.launch import cdiv, launch, tokens_of
from custom_ops.kernels.post_pre import hc_narrow_pairs
from custom_ops.kernels.pre_dx import sum_dphi
from custom_ops.kernels.pre_pack import pack_dp, pack_phi
from custom_ops.kernels.shares import hc_long, hc_mine, hc_slot, hc_walk, lanes_and_helpers
from custom_ops.kernels.slots import sum_slots
from custom_ops.registration import flat

STREAMS = 4
TILE = {"BLOCKS": 8, "ROWS": 32, "BLOCK_C": 64, "STAGES": 3, "num_warps": 8}


@triton.jit
def hc_short(wide, ptr):
    """wide as ptr's type; the interpreter has no products in bf16, so there it only loses bits."""
    if ptr.dtype.element_ty == tl.bfloat16:
        return hc_narrow_pairs(wide)
    else:
        return wide.to(tl.bfloat16).to(tl.float32)


@triton.jit
def hc_mixed(blocks, KIND: tl.constexpr, tile, total):
    """total + the blocks of a kind, hi and lo, times tile."""
    total = tl.dot(blocks[2 * KIND], tile, total)
    return tl.dot(blocks[2 * KIND + 1], tile, total)


@triton.jit(do_not_specialize=["tokens", "lanes", "helpers"])
def hc_boundary_backward(
    x_ptr,
    y_ptr,
    du_ptr,
    g_ptr,
    blocks_ptr,
    post_ptr,
    phi_ptr,
    phi_scale_ptr,
    parts_ptr,
    half_ptr,
    half_scale_ptr,
    dss_ptr,
    dx_ptr,
    dy_ptr,
    part_ptr,
    dres_ptr,
    dpost_ptr,
    dots_ptr,
    tokens,
    width,
    lanes,
    helpers,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One slice of BLOCK_C columns at a time, over this program's tiles of 4 · BLOCKS tokens.

    Every slice leaves its share of the inner products; sums of dφ go to slots (see shares.py).
    """
    BLOCK_T: tl.constexpr = 4 * BLOCKS
    tiles = tl.cdiv(tokens, BLOCK_T)
    slices = tl.cdiv(width, BLOCK_C)
    mine = hc_mine(tiles, slices, lanes, helpers)
    b = tl.arange(0, BLOCKS)[:, None, None]
    r = tl.arange(0, 16)[None, :, None]
    k = tl.arange(0, 16)[None, None, :]
    quad = tl.arange(0, 4)[None, None, :]
    place = r % 8 // 2
    stream = r // 8 * 2 + r % 2
    token_of = b * 4 + place
    t = tl.arange(0, BLOCK_T)
    m = tl.arange(0, ROWS)
    column = tl.arange(0, 4 * BLOCK_C)
    # Eights of hi and mid alternate, as rows do in the registers of a product.
    two = tl.arange(0, 2 * ROWS)
    two_offs = two // 8 % 2 * ROWS + two // 16 * 8 + two % 8
    EIGHTS: tl.constexpr = ROWS // 8
    depth = 4 * width
    for piece in range(mine[0], mine[1]):
        c = piece * BLOCK_C + tl.arange(0, BLOCK_C)[None, None, :]
        phi_columns = column // BLOCK_C * width + piece * BLOCK_C + column % BLOCK_C
        phi = tl.load(phi_ptr + m[:, None].to(tl.int64) * depth + phi_columns[None, :])
        phi_scale = tl.load(phi_scale_ptr + stream * slices + piece)
        dphi = tl.zeros([ROWS, 4 * BLOCK_C], tl.float32)
        first, last, step = hc_walk(mine, piece, lanes)
        for tile in tl.range(first, last, step, num_stages=STAGES):
            token = hc_long(tile) * BLOCK_T
            left = tokens - tile * BLOCK_T
            rows = (b * 16 + r) * width + c
            inside = b * 4 + r // 4 < left
            x = tl.load(x_ptr + token * depth + rows, mask=inside, other=0.0)
            g = tl.load(g_ptr + token * depth + rows, mask=inside, other=0.0)
            # rows 0 to 3 of a block are those of y, 4 to 7 those of du
            beside = b * 4 + r % 4
            y_du = tl.where(r < 4, y_ptr + token * width, du_ptr + token * width)
            with_y = (r < 8) & (beside < left)
            y_du = tl.load(y_du + beside * width + c, mask=with_y, other=0.0)
            kept = token_of < left
            in_t = (t < left)[:, None]
            half = tl.load(
                half_ptr + token * ROWS + t[:, None] * ROWS + m[None, :], mask=in_t, other=0.0
            )
            two_ptrs = parts_ptr + token * (2 * ROWS) + t[:, None] * (2 * ROWS) + two_offs[None, :]
            parts = tl.load(two_ptrs, mask=in_t, other=0.0)
            scale = tl.load(half_scale_ptr + token + token_of, mask=kept, other=0.0) * phi_scale
            dss = 2.0 * tl.load(dss_ptr + token + token_of, mask=kept, other=0.0)
            post = tl.load(post_ptr + token * 4 + token_of * 4 + stream, mask=kept, other=0.0)
            block_ptrs = blocks_ptr + token * 512 + (b * 2048 + r * 16 + k)
            in_block = b * 4 + r * 0 < left
            blocks = ()
            for kind in tl.static_range(8):
                block = tl.load(block_ptrs + kind * 256, mask=in_block, other=0.0)
                blocks = blocks + (block,)
            if blocks_ptr.dtype.element_ty != tl.bfloat16:  # interpreted
                x, g, y_du = x.to(tl.float32), g.to(tl.float32), y_du.to(tl.float32)
            wide = tl.zeros([BLOCKS, 16, BLOCK_C], tl.float32)
            wide = hc_mixed(blocks, 0, x, wide)
            wide = hc_mixed(blocks, 1, y_du, wide)
            again = hc_short(wide, blocks_ptr)
            if blocks_ptr.dtype.element_ty == tl.bfloat16:
                turned = tl.dot(half, phi)
            else:
                turned = tl.dot(half.to(tl.float32), phi.to(tl.float32))
            turned = tl.reshape(turned, [BLOCKS, 4, 2, 2, BLOCK_C])
            turned = tl.reshape(tl.trans(turned, (0, 2, 1, 3, 4)), [BLOCKS, 16, BLOCK_C])
            wide = turned * scale + dss * again.to(tl.float32)
            wide = hc_mixed(blocks, 2, g, wide)
            wide = hc_mixed(blocks, 3, y_du, wide)
            done = hc_short(wide, blocks_ptr)
            out_rows = (b * 16 + place * 4 + stream) * width + c
            tl.store(
                dx_ptr + token * depth + out_rows, done.to(dx_ptr.dtype.element_ty), mask=kept
            )
            across = tl.trans(y_du, (0, 2, 1))
            share = hc_long(piece) * tokens + token
            r_flat = tl.arange(0, 16)[None, :]
            flat = (
                tl.arange(0, BLOCKS)[:, None] * 16
                + r_flat % 8 // 2 * 4
                + r_flat // 8 * 2
                + r_flat % 2
            )
            in_flat = flat // 4 < left
            if dots_ptr is not None:
                dots = tl.where(k == 4 + place, tl.dot(again, across), 0.0)
                tl.store(dots_ptr + share * 4 + flat, tl.sum(dots, axis=2), mask=in_flat)
            dpost = tl.where(k == place, tl.dot(done, across), 0.0)
            tl.store(dpost_ptr + share * 4 + flat, tl.sum(dpost, axis=2), mask=in_flat)
            dres = tl.where(k // 4 == place, tl.dot(done, tl.trans(x, (0, 2, 1))), 0.0)
            dres = tl.sum(tl.reshape(dres, [BLOCKS, 16, 4, 4]), axis=2)
            dres_offs = (b * 16 + place * 4 + stream) * 4 + quad
            tl.store(dres_ptr + share * 16 + dres_offs, dres, mask=kept)
            dy = tl.sum(tl.reshape(wide * post, [BLOCKS, 2, 4, 2, BLOCK_C]), axis=1)
            dy = tl.sum(dy, axis=2)
            of = b * 4 + tl.arange(0, 4)[None, :, None]
            dy_ptrs = dy_ptr + token * width + of * width + c
            tl.store(dy_ptrs, dy.to(dy_ptr.dtype.element_ty), mask=of < left)
            again = tl.reshape(again, [BLOCKS, 2, 4, 2, BLOCK_C])
            again = tl.reshape(tl.trans(again, (0, 2, 1, 3, 4)), [BLOCK_T, 4 * BLOCK_C])
            product = tl.dot(tl.trans(parts), again)  # truncated as it adds, so not the long sum
            product = tl.sum(tl.reshape(product, [EIGHTS, 2, 8, 4 * BLOCK_C]), axis=1)
            dphi += tl.reshape(product, [ROWS, 4 * BLOCK_C])
        slot = hc_slot(mine, piece, slices, lanes, helpers)
        slot_ptr = part_ptr + (hc_long(slot) * slices + piece) * (4 * BLOCK_C * ROWS)
        tl.store(slot_ptr + column[None, :] * ROWS + m[:, None], dphi)


def boundary_backward(
    x: torch.Tensor,
    y: torch.Tensor,
    post: torch.Tensor,
    res: torch.Tensor,
    du: torch.Tensor,
    g: torch.Tensor,
    pre: torch.Tensor,
    mix: torch.Tensor,
    phi: torch.Tensor,
    dp: torch.Tensor,
    dss: torch.Tensor,
    with_dots: bool,
) -> tuple[torch.Tensor, ...]:
    """∂x' [T, 4, C] bf16, dy [T, C], dpost [T, 4], dres [T, 4, 4], dφ [M, 4·C], ⟨du, x'⟩ or None.

    Args: x, g [T, 4, C] and y, du [T, C] bf16; post, pre [T, 4], res, mix [T, 4, 4], phi [M, 4·C],
    dp [T, M], dss [T] fp32; contiguous; 16 < M ≤ 32, C a multiple of 64.
    Moves: 3n + 3, and 24 floats a token and slice of 64 columns twice.
    """
    tokens, width = tokens_of(x), x.shape[-1]
    blocks = pack_blocks(post, res, pre, mix)
    parts, half, half_scale = pack_dp(flat(dp, 1))
    phi_half, phi_scale = pack_phi(phi, STREAMS, TILE["BLOCK_C"])
    slices = cdiv(width, TILE["BLOCK_C"])
    lanes, helpers = lanes_and_helpers(slices)
    slot = STREAMS * TILE["BLOCK_C"] * TILE["ROWS"]
    sums = phi.new_empty((lanes + helpers // slices + 2) * slices * slot)
    shares = [phi.new_empty(slices, tokens, count) for count in (16, 4, 4)]
    dots = shares[2] if with_dots else None
    dx, dy = torch.empty_like(x), torch.empty_like(y)
    launch(
        hc_boundary_backward,
        (lanes * slices + helpers,),
        *(x, y, du, g, blocks, post, phi_half, phi_scale, parts, half, half_scale, dss),
        *(dx, dy, sums, shares[0], shares[1], dots, tokens, width, lanes, helpers),
        **TILE,
    )
    tile = {"block_t": 4 * TILE["BLOCKS"], "block_c": TILE["BLOCK_C"], "block_m": TILE["ROWS"]}
    dphi = sum_dphi(sums, phi, tokens, STREAMS, lanes, helpers, rows=TILE["ROWS"], **tile)
    dres, dpost = sum_slots(shares[0]).reshape(res.shape), sum_slots(shares[1]).reshape(post.shape)
    dots = None if dots is None else sum_slots(dots).reshape(pre.shape)
    return dx, dy, dpost, dres, dphi, dots
