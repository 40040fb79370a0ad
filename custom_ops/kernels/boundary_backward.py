"""The backward of a boundary in one walk along the rows, x' made again in registers.

x' = res x + post y was written by the forward. Given g, the cotangent of the next streams, and du:

    dx'_i = Σ_k mix_ki g_k + pre_i du + (φᵀdp)_i + 2·dss·x'_i
    dy = Σ_i post_i dx'_i     dpost_i = ⟨dx'_i, y⟩     dres_ij = ⟨dx'_i, x_j⟩     ⟨du, x'_i⟩

A token's mixes are products of its 4 × 4 matrix and its 4 rows. Four tokens together are a block:
a block-diagonal [16, 16] and 16 rows that lie side by side in memory; the inner products are the
blocks on the diagonal of [16, C] × [C, 16]. What is not of a token enters its sums times zero:
exactly nothing, but of four tokens one that is not finite takes the others along.

Rows of a block are in the order in which a thread of a product holds two streams of a token: row
r is stream 2 (r // 8) + r % 2 of token r % 8 // 2. Weights enter as two bf16 halves (16 bits);
y and du of the 4 tokens are 8 rows, taken twice, so that both halves are in one product.

dφ = Σ_t dp_t ⊗ x'_t sums over tokens where all this sums over columns, so it is a pass over x' of
its own (pre_packed.py).
"""

import torch
import triton
import triton.language as tl

from custom_ops.kernels.launch import INTERPRETED, cdiv, launch, tokens_of
from custom_ops.kernels.post_pre import hc_narrow_pairs
from custom_ops.kernels.pre_pack import coefficient_blocks, pack_dp, pack_phi
from custom_ops.kernels.pre_packed import packed_dphi
from custom_ops.kernels.shares import hc_long
from custom_ops.kernels.slots import hc_in_order
from custom_ops.registration import flat

STREAMS = 4
TILE = {"BLOCKS": 4, "BLOCK_C": 64, "STAGES": 3, "num_warps": 4}
PIECES = 10  # of BLOCK_C columns, about, that a program takes
EXACT = tl.constexpr(INTERPRETED)  # the interpreter has no products in bf16, only its rounding


@triton.jit
def hc_short(wide):
    """wide rounded to bf16."""
    if EXACT:
        return wide.to(tl.bfloat16).to(tl.float32)
    else:
        return hc_narrow_pairs(wide)


@triton.jit
def hc_operand(tile):
    """A loaded tile as an operand of a product."""
    return tile.to(tl.float32) if EXACT else tile


@triton.jit
def hc_halves(weight):
    """hi, lo: two operands whose sum is weight to 16 bits."""
    high = weight.to(tl.bfloat16)
    low = (weight - high.to(tl.float32)).to(tl.bfloat16)
    return hc_operand(high), hc_operand(low)


@triton.jit
def hc_place(index):
    """Of a block's row the token (0 to 3) and the stream."""
    return index % 8 // 2, index // 8 * 2 + index % 2


@triton.jit
def hc_beside(weight_ptr, first, left, HALF: tl.constexpr, BLOCKS: tl.constexpr):
    """[BLOCKS, 16, 16]: weights [T, 4] of y (HALF 0) or du (HALF 1), as the lines above say.

    Loaded turned, where pairs lie side by side: only so do products find them in order.
    """
    b = tl.arange(0, BLOCKS)[:, None, None]
    k = tl.arange(0, 16)[None, :, None]
    token, stream = hc_place(tl.arange(0, 16)[None, None, :])
    inside = (b * 4 + token < left) & (k % 8 == token + 4 * HALF)
    offs = tl.max_contiguous((first + b * 4 + token) * 4 + stream, (1, 1, 2)) + k * 0
    high, low = hc_halves(tl.load(weight_ptr + offs, mask=inside, other=0.0))
    return tl.trans(tl.where(k < 8, high, low), (0, 2, 1))


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
    DOTS: tl.constexpr,
    ROWS: tl.constexpr,
    SPANS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """4 · BLOCKS tokens, every SPANS-th piece of BLOCK_C columns: programs side by side read so.

    share [SPANS, 20 or 24 · T] gets a span's share of dres, dpost and (DOTS) ⟨du, x'⟩.
    """
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
    res_offs = (token + own) * 16 + stream * 4 + k % 4
    res = tl.load(res_ptr + res_offs, mask=kept & (k // 4 == place), other=0.0)
    res_high, res_low = hc_halves(res)
    across, across_stream = hc_place(k)  # turned, as in hc_beside
    mix_offs = (token + b * 4 + across) * 16 + r % 4 * 4 + across_stream
    mix_mask = (b * 4 + across < left) & (r // 4 == across)
    mix_ptrs = mix_ptr + tl.max_contiguous(mix_offs, (1, 1, 2))
    mix = tl.trans(tl.load(mix_ptrs, mask=mix_mask, other=0.0), (0, 2, 1))
    mix_high, mix_low = hc_halves(mix)
    post_pair = hc_beside(post_ptr, token, left, 0, BLOCKS)
    pre_pair = hc_beside(pre_ptr, token, left, 1, BLOCKS)
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
    x_ptrs = x_ptr + rows
    g_ptrs = g_ptr + rows
    # r % 8 is 0 to 3 of y, 4 to 7 of du
    y_du_ptrs = tl.where(r % 8 < 4, y_ptr, du_ptr) + token * width + (b * 4 + r % 4) * width + c
    y_du_mask = b * 4 + r % 4 < left
    column = tl.arange(0, 4 * BLOCK_C)
    phi_offs = column // BLOCK_C * width + column % BLOCK_C
    phi_ptrs = phi_ptr + m[:, None].to(tl.int64) * depth + phi_offs[None, :]
    dx_ptrs = dx_ptr + token * depth + (own * 4 + stream) * width + c
    four = b * 4 + tl.arange(0, 4)[None, :, None]
    dy_ptrs = dy_ptr + token * width + four * width + c
    dres = tl.zeros([BLOCKS, 16, 16], tl.float32)
    dots = tl.zeros([BLOCKS, 16, 16], tl.float32)
    for piece in tl.range(span, pieces, SPANS, num_stages=STAGES):
        start = piece * BLOCK_C
        x = hc_operand(tl.load(x_ptrs + start, mask=inside, other=0.0))
        g = hc_operand(tl.load(g_ptrs + start, mask=inside, other=0.0))
        y_du = hc_operand(tl.load(y_du_ptrs + start, mask=y_du_mask, other=0.0))
        phi = hc_operand(tl.load(phi_ptrs + start))
        scale = half_scale * tl.load(phi_scale_ptr + stream * pieces + piece)
        wide = tl.dot(res_low, x, tl.dot(res_high, x))
        again = hc_short(tl.dot(post_pair, y_du, wide))
        turned = tl.reshape(tl.dot(half, phi), [BLOCKS, 4, 2, 2, BLOCK_C])
        turned = tl.reshape(tl.trans(turned, (0, 2, 1, 3, 4)), [BLOCKS, 16, BLOCK_C])
        wide = turned * scale + dss * again.to(tl.float32)
        wide = tl.dot(mix_low, g, tl.dot(mix_high, g, wide))
        wide = tl.dot(pre_pair, y_du, wide)
        done = hc_short(wide)
        tl.store(dx_ptrs + start, done.to(dx_ptr.dtype.element_ty), mask=kept)
        y_du = tl.trans(y_du, (0, 2, 1))
        beside = tl.dot(done, y_du)
        if DOTS:
            beside = tl.where(k < 4, beside, tl.dot(again, y_du))
        dots += beside
        dres += tl.dot(done, tl.trans(x, (0, 2, 1)))
        dy = tl.sum(tl.reshape(wide * post, [BLOCKS, 2, 4, 2, BLOCK_C]), axis=1)
        dy = tl.sum(dy, axis=2)
        tl.store(dy_ptrs + start, dy.to(dy_ptr.dtype.element_ty), mask=four < left)
    share_ptr += hc_long(span) * tokens * (20 + 4 * DOTS)
    dres = tl.where(k // 4 == place, dres, 0.0)
    dres = tl.sum(tl.reshape(dres, [BLOCKS, 16, 4, 4]), axis=2)
    quad = tl.arange(0, 4)[None, None, :]
    tl.store(share_ptr + ((token + own) * 4 + stream) * 4 + quad, dres, mask=kept)
    blocks = tl.arange(0, BLOCKS)[:, None] * 4
    place_of, stream_of = hc_place(tl.arange(0, 16)[None, :])
    share_ptrs = share_ptr + hc_long(tokens) * 16 + (token + blocks + place_of) * 4 + stream_of
    dpost = tl.sum(tl.where(k == place, dots, 0.0), axis=2)
    tl.store(share_ptrs, dpost, mask=blocks + place_of < left)
    if DOTS:
        dots = tl.sum(tl.where(k == place + 4, dots, 0.0), axis=2)
        tl.store(share_ptrs + hc_long(tokens) * 4, dots, mask=blocks + place_of < left)


@triton.jit(do_not_specialize=["tokens", "spans"])
def hc_boundary_sum(
    share_ptr,
    dres_ptr,
    dpost_ptr,
    dots_ptr,
    tokens,
    spans,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dres [T, 4, 4], dpost and dots [T, 4]: the spans' shares, in ascending order."""
    total = hc_long(tokens)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < total * COUNT
    value = hc_in_order(share_ptr + offs, mask, total * COUNT, spans)
    ptrs = tl.where(offs < total * 16, dres_ptr + offs, dpost_ptr + (offs - total * 16))
    if dots_ptr is not None:
        ptrs = tl.where(offs < total * 20, ptrs, dots_ptr + (offs - total * 20))
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
) -> tuple[torch.Tensor, ...]:
    """∂x' [T, 4, C] bf16, dy [T, C], dpost [T, 4], dres [T, 4, 4], dφ [M, 4·C], ⟨du, x'⟩ or None.

    Args: x, streams (x') and g [T, 4, C], y and du [T, C] bf16; post, pre [T, 4], res, mix
    [T, 4, 4], phi [M, 4·C], dp [T, M], dss [T] fp32; contiguous; M ≤ 32, C a multiple of 64.
    Moves: 3n + 3, and n for dφ.
    """
    tokens, width = tokens_of(x), x.shape[-1]
    parts, half, half_scale = pack_dp(flat(dp, 1))
    phi_half, phi_scale = pack_phi(phi, STREAMS, TILE["BLOCK_C"])
    spans = max(1, width // (PIECES * TILE["BLOCK_C"]))
    count = 24 if with_dots else 20
    shares = dp.new_empty(spans * count * tokens)
    dx, dy = torch.empty_like(x), torch.empty_like(y)
    dpost, dres = torch.empty_like(post), torch.empty_like(res)
    dots = torch.empty_like(pre) if with_dots else None
    launch(
        hc_boundary_backward,
        (cdiv(tokens, 4 * TILE["BLOCKS"]) * spans,),
        *(x, y, du, g, post, res, pre, mix, phi_half, phi_scale, half, half_scale, dss),
        *(dx, dy, shares, tokens, width),
        DOTS=with_dots,
        ROWS=sum(coefficient_blocks(phi.shape[0])),
        SPANS=spans,
        **TILE,
    )
    grid = (cdiv(count * tokens, 128),)
    sums = (shares, dres, dpost, dots, tokens, spans)
    launch(hc_boundary_sum, grid, *sums, COUNT=count, BLOCK=128, num_warps=4)
    return dx, dy, dpost, dres, packed_dphi(flat(streams, 2), parts, phi), dots
