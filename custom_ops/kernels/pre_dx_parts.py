"""The pieces of pre_dx: φ's columns, φᵀdp, dφ of a tile of tokens, and streams mixed into dx."""
# ruff: noqa: RUF005 (Triton has no starred tuples)

import triton
import triton.language as tl

from custom_ops.kernels.pre_wide import hc_round_tf32
from custom_ops.kernels.together import hc_apart


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
def hc_phi_together(phi_ptr, c_first, width, m_offs, M: tl.constexpr, N: tl.constexpr,
                    PAD_N: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """C columns of φ of N streams, padded to PAD_N, as [PAD_N·C, BLOCK_M], half a slice in turn.

    A product with them is PAD_N tiles [T, C] whose registers lie as those of one such product.
    """
    HALF: tl.constexpr = C // 2
    offs = tl.arange(0, PAD_N * C)
    streams = offs // HALF % PAD_N
    c_offs = c_first + offs // (PAD_N * HALF) * HALF + offs % HALF
    mask = ((streams < N) & (c_offs < width))[:, None] & (m_offs < M)[None, :]
    rows = m_offs[None, :].to(tl.int64) * (N * width)
    phi = tl.load(phi_ptr + rows + (streams * width + c_offs)[:, None], mask=mask, other=0.0)
    return hc_round_tf32(phi) if DOT == "tf32" else phi


@triton.jit
def hc_turn_back(dp, phi, PAD_N: tl.constexpr, DOT: tl.constexpr):
    """φᵀdp of PAD_N streams, a tile [T, C] each, from `hc_phi_together`."""
    HALF: tl.constexpr = phi.shape[0] // (2 * PAD_N)
    product = tl.dot(dp, tl.trans(phi), input_precision=DOT)
    product = tl.reshape(product, [dp.shape[0], 2, PAD_N, HALF])
    product = tl.trans(product, (0, 1, 3, 2))
    return hc_apart(tl.reshape(product, [dp.shape[0], 2 * HALF, PAD_N]))


@triton.jit
def hc_add_mixed(dx, tile, rows_ptr, t_offs, t_mask, stride: tl.constexpr, N: tl.constexpr,
                 PAD_N: tl.constexpr):  # fmt: skip
    """dx_j + w_j · tile for every stream j; a token's N weights w lie side by side."""
    n_offs = tl.arange(0, PAD_N)
    mask = t_mask[:, None] if PAD_N == N else t_mask[:, None] & (n_offs < N)[None, :]
    row_ptrs = rows_ptr + t_offs[:, None] * stride + n_offs[None, :]
    weights = hc_apart(tl.load(row_ptrs, mask=mask, other=0.0))
    out = ()
    for j in tl.static_range(N):
        out = out + (dx[j] + weights[j][:, None] * tile,)
    return out
