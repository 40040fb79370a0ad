"""The backward of a boundary in one walk along the rows, x' made again in registers.

x' = res x + post y was written by the forward. Given g, the cotangent of the next streams, and du:

    dx'_i = Σ_k mix_ki g_k + pre_i du + (φᵀdp)_i + 2·dss·x'_i
    dy = Σ_i post_i dx'_i     dpost_i = ⟨dx'_i, y⟩     dres_ij = ⟨dx'_i, x_j⟩     ⟨du, x'_i⟩

Where x has a ghost dx' leaves the kernel, for the ghost; else dx_j = Σ_i res_ij dx'_i does. At the
first boundary of a network x may be one stream, at the last g, the same for all.

The mixing is left to the tensor cores, four tokens at a time (boundary_blocks.py). What has one
row a token is read together, 4 rows of each: y, du, x if it is one stream, and g if it is. Of y
and du alone there are two copies (`PAIRS`): both halves of their weights are in one product.

dφ = Σ_t dp_t ⊗ x'_t sums over tokens where all this sums over columns, so it is a pass over x' of
its own (pre_packed.py).
"""

import torch
import triton
import triton.language as tl

from custom_ops.kernels.boundary_blocks import (
    hc_add,
    hc_beside,
    hc_halves,
    hc_operand,
    hc_operands,
    hc_over_streams,
    hc_place,
    hc_short,
    hc_turned,
)
from custom_ops.kernels.launch import cdiv, launch, tokens_of
from custom_ops.kernels.pre_pack import coefficient_blocks, pack_dp, pack_phi
from custom_ops.kernels.pre_packed import packed_dphi
from custom_ops.kernels.shares import hc_long
from custom_ops.kernels.slots import hc_in_order
from custom_ops.kernels.tile import padded
from custom_ops.registration import flat

STREAMS = 4
TILE = {"BLOCKS": 4, "BLOCK_C": 64, "STAGES": 3, "num_warps": 4}


@triton.jit(do_not_specialize=["tokens"])
def hc_boundary_backward(
    x_ptr,
    y_ptr,
    du_ptr,
    g_ptr,
    post_ptr,
    res_ptr,
    pre_ptr,
    mix_ptr,
    phi_ptr,
    phi_scale_ptr,
    half_ptr,
    half_scale_ptr,
    dss_ptr,
    dx_ptr,
    dy_ptr,
    share_ptr,
    tokens,
    width,
    IN: tl.constexpr,
    G: tl.constexpr,
    GHOST: tl.constexpr,
    DOTS: tl.constexpr,
    ROWS: tl.constexpr,
    SPANS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """4 · BLOCKS tokens, every SPANS-th piece of BLOCK_C columns: programs side by side read so.

    share [SPANS, (4 · IN + 4 or 8) · T] gets a span's of dres, dpost and (DOTS) ⟨du, x'⟩.
    """
    PAIRS: tl.constexpr = IN == 4 and G == 4
    tile = tl.program_id(0) // SPANS
    span = tl.program_id(0) % SPANS
    pieces = width // BLOCK_C
    token = hc_long(tile) * (4 * BLOCKS)
    left = tokens - tile * (4 * BLOCKS)
    depth = 4 * width
    b = tl.arange(0, BLOCKS)[:, None, None]
    r = tl.arange(0, 16)[None, :, None]
    k = tl.arange(0, 16)[None, None, :]
    c = tl.arange(0, BLOCK_C)[None, None, :]
    place, stream = hc_place(r)
    own = b * 4 + place
    kept = own < left
    # The weights, for all columns.
    write = hc_beside(post_ptr, token, left, 0, PAIRS, BLOCKS)
    read = hc_beside(pre_ptr, token, left, 1, PAIRS, BLOCKS)
    if IN == 4:
        res_offs = (token + own) * 16 + stream * 4 + k % 4
        res_mask = kept & (k // 4 == place)
        res_high, res_low = hc_halves(tl.load(res_ptr + res_offs, mask=res_mask, other=0.0))
        if not GHOST:
            back = hc_operands(hc_turned(res_ptr, token, left, False, BLOCKS), False)
    else:
        write += hc_beside(res_ptr, token, left, 2, PAIRS, BLOCKS)
        res = tl.load(res_ptr + (token + own) * 4 + stream, mask=kept, other=0.0)
    if G == 4:
        mix = hc_operands(hc_turned(mix_ptr, token, left, True, BLOCKS), False)
    else:
        read += hc_beside(mix_ptr, token, left, 3, PAIRS, BLOCKS)
    write = hc_operands(write, PAIRS)
    read = hc_operands(read, PAIRS)
    post = tl.load(post_ptr + (token + own) * 4 + stream, mask=kept, other=0.0)
    dss = 2.0 * tl.load(dss_ptr + token + own, mask=kept, other=0.0)
    half_scale = tl.load(half_scale_ptr + token + own, mask=kept, other=0.0)
    m = tl.arange(0, ROWS)
    t = tl.arange(0, 4 * BLOCKS)
    half_ptrs = half_ptr + (token + t[:, None]) * ROWS + m[None, :]
    half = hc_operand(tl.load(half_ptrs, mask=(t < left)[:, None], other=0.0))
    # What is read and written of every piece.
    rows = token * depth + (b * 16 + r) * width + c
    inside = b * 4 + r // 4 < left
    part = r // 4
    thin_ptrs = tl.where(part % 2 == 0, y_ptr, du_ptr)
    thin_mask = b * 4 + r % 4 < left
    if not PAIRS:
        if IN == 1:
            thin_ptrs = tl.where(part == 2, x_ptr, thin_ptrs)
        else:
            thin_mask = thin_mask & (part != 2)
        if G == 1:
            thin_ptrs = tl.where(part == 3, g_ptr, thin_ptrs)
        else:
            thin_mask = thin_mask & (part != 3)
    thin_ptrs += token * width + (b * 4 + r % 4) * width + c
    column = tl.arange(0, 4 * BLOCK_C)
    phi_offs = column // BLOCK_C * width + column % BLOCK_C
    phi_ptrs = phi_ptr + m[:, None].to(tl.int64) * depth + phi_offs[None, :]
    dx_ptrs = dx_ptr + token * depth + (own * 4 + stream) * width + c
    four = b * 4 + tl.arange(0, 4)[None, :, None]
    four_offs = token * width + four * width + c
    dres = tl.zeros([BLOCKS, 16, 16], tl.float32)
    dots = tl.zeros([BLOCKS, 16, 16], tl.float32)
    for piece in tl.range(span, pieces, SPANS, num_stages=STAGES):
        start = piece * BLOCK_C
        thin = hc_operand(tl.load(thin_ptrs + start, mask=thin_mask, other=0.0))
        phi = hc_operand(tl.load(phi_ptrs + start))
        scale = half_scale * tl.load(phi_scale_ptr + stream * pieces + piece)
        wide = tl.zeros([BLOCKS, 16, BLOCK_C], tl.float32)
        if IN == 4:
            x = hc_operand(tl.load(x_ptr + rows + start, mask=inside, other=0.0))
            wide = tl.dot(res_low, x, tl.dot(res_high, x))
        again = hc_short(hc_add(wide, write, thin, PAIRS))
        turned = tl.reshape(tl.dot(half, phi), [BLOCKS, 4, 2, 2, BLOCK_C])
        turned = tl.reshape(tl.trans(turned, (0, 2, 1, 3, 4)), [BLOCKS, 16, BLOCK_C])
        wide = turned * scale + dss * again.to(tl.float32)
        if G == 4:
            g = hc_operand(tl.load(g_ptr + rows + start, mask=inside, other=0.0))
            wide = hc_add(wide, mix, g, False)
        wide = hc_add(wide, read, thin, PAIRS)
        done = hc_short(wide)
        thin = tl.trans(thin, (0, 2, 1))
        beside = tl.dot(done, thin)
        if DOTS:
            beside = tl.where(k // 4 == 1, tl.dot(again, thin), beside)
        dots += beside
        if IN == 4:
            dx = done if GHOST else hc_short(tl.dot(back[1], done, tl.dot(back[0], done)))
            tl.store(dx_ptrs + start, dx.to(dx_ptr.dtype.element_ty), mask=kept)
            dres += tl.dot(done, tl.trans(x, (0, 2, 1)))
        else:
            dx = hc_over_streams(wide * res, BLOCKS).to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + four_offs + start, dx, mask=four < left)
        dy = hc_over_streams(wide * post, BLOCKS).to(dy_ptr.dtype.element_ty)
        tl.store(dy_ptr + four_offs + start, dy, mask=four < left)
    share_ptr += hc_long(span) * tokens * (4 * IN + 4 + 4 * DOTS)
    if IN == 4:
        dres = tl.where(k // 4 == place, dres, 0.0)
        dres = tl.sum(tl.reshape(dres, [BLOCKS, 16, 4, 4]), axis=2)
        quad = tl.arange(0, 4)[None, None, :]
        tl.store(share_ptr + ((token + own) * 4 + stream) * 4 + quad, dres, mask=kept)
    blocks = tl.arange(0, BLOCKS)[:, None] * 4
    place_of, stream_of = hc_place(tl.arange(0, 16)[None, :])
    share_ptrs = share_ptr + (token + blocks + place_of) * 4 + stream_of
    in_share = blocks + place_of < left
    if IN == 1:
        dres = tl.sum(tl.where(k == place + 8, dots, 0.0), axis=2)
        tl.store(share_ptrs, dres, mask=in_share)
    share_ptrs += hc_long(tokens) * (4 * IN)
    dpost = tl.sum(tl.where(k == place, dots, 0.0), axis=2)
    tl.store(share_ptrs, dpost, mask=in_share)
    if DOTS:
        dots = tl.sum(tl.where(k == place + 4, dots, 0.0), axis=2)
        tl.store(share_ptrs + hc_long(tokens) * 4, dots, mask=in_share)


@triton.jit(do_not_specialize=["tokens", "spans"])
def hc_boundary_sum(
    share_ptr,
    dres_ptr,
    dpost_ptr,
    dots_ptr,
    tokens,
    spans,
    IN: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dres [T, 4, IN], dpost and dots [T, 4]: the spans' shares, in ascending order."""
    total = hc_long(tokens)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < total * COUNT
    value = hc_in_order(share_ptr + offs, mask, total * COUNT, spans)
    post_offs = offs - total * (4 * IN)
    ptrs = tl.where(post_offs < 0, dres_ptr + offs, dpost_ptr + post_offs)
    if dots_ptr is not None:
        dots_offs = post_offs - total * 4
        ptrs = tl.where(dots_offs < 0, ptrs, dots_ptr + dots_offs)
    tl.store(ptrs, value, mask=mask)


def boundary_backward(
    x: torch.Tensor,
    y: torch.Tensor,
    post: torch.Tensor,
    res: torch.Tensor,
    streams: torch.Tensor,
    du: torch.Tensor,
    g: torch.Tensor,
    pre: torch.Tensor,
    mix: torch.Tensor,
    phi: torch.Tensor,
    dp: torch.Tensor,
    dss: torch.Tensor,
    with_dots: bool,
    ghost: bool,
) -> tuple[torch.Tensor, ...]:
    """∂x' (with a ghost) or ∂x [T, n, C], dy [T, C] bf16; dpost [T, 4], dres [T, 4, n],
    dφ [M, 4·C], ⟨du, x'⟩ [T, 4] or None fp32.

    Args: x [T, n, C], streams (x') [T, 4, C], g [T, n', C], y and du [T, C] bf16; post, pre
    [T, 4], res [T, 4, n], mix [T, n', 4], phi [M, 4·C], dp [T, M], dss [T] fp32; contiguous; n and
    n' are 1 or 4, M ≤ 32, C a multiple of 64; a ghost with n = 4 only.
    Moves: n + n' + 7 (n = 4) or n' + 5, and 4 for dφ.
    """
    tokens, (incoming, width) = tokens_of(x), x.shape[-2:]
    parts, half, half_scale = pack_dp(flat(dp, 1))
    phi_half, phi_scale = pack_phi(phi, STREAMS, TILE["BLOCK_C"])
    spans = min(8, padded(width // 640))
    count = 4 * incoming + (8 if with_dots else 4)
    shares = dp.new_empty(spans * count * tokens)
    dx, dy = torch.empty_like(x), torch.empty_like(y)
    dpost, dres = torch.empty_like(post), torch.empty_like(res)
    dots = torch.empty_like(pre) if with_dots else None
    launch(
        hc_boundary_backward,
        (cdiv(tokens, 4 * TILE["BLOCKS"]) * spans,),
        *(x, y, du, g, post, res, pre, mix, phi_half, phi_scale, half, half_scale, dss),
        *(dx, dy, shares, tokens, width),
        IN=incoming,
        G=g.shape[-2],
        GHOST=ghost,
        DOTS=with_dots,
        ROWS=sum(coefficient_blocks(phi.shape[0])),
        SPANS=spans,
        **TILE,
    )
    grid = (cdiv(count * tokens, 128),)
    sums = (shares, dres, dpost, dots, tokens, spans)
    launch(hc_boundary_sum, grid, *sums, IN=incoming, COUNT=count, BLOCK=128, num_warps=4)
    return dx, dy, dpost, dres, packed_dphi(flat(streams, 2), parts, phi), dots
