"""res, pre and 2·dss of a tile of tokens side by side, for kernels that walk many tiles."""

from math import prod

import torch
import triton
import triton.language as tl

from custom_ops.kernels.launch import cdiv, launch


@triton.jit(do_not_specialize=["tokens"])
def hc_pre_mix(
    pre_ptr,
    dss_ptr,
    res_ptr,
    mix_ptr,
    tokens,
    N: tl.constexpr,
    V: tl.constexpr,
    G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_K rows of one tile of `packed_mix`."""
    MIXED: tl.constexpr = G * N
    COUNT: tl.constexpr = MIXED + V * N + 1
    t_offs = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    t_mask = (t_offs < tokens)[:, None]
    k_offs = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    dss = 2.0 * tl.load(dss_ptr + t_offs, mask=t_offs < tokens, other=0.0)
    mix = tl.where(k_offs == COUNT - 1, dss[:, None], 0.0)
    if G > 0:
        res_ptrs = res_ptr + t_offs[:, None] * MIXED + k_offs
        mix += tl.load(res_ptrs, mask=t_mask & (k_offs < MIXED), other=0.0)
    if V > 0:
        pre_ptrs = pre_ptr + t_offs[:, None] * (V * N) + k_offs - MIXED
        inside = (k_offs >= MIXED) & (k_offs < COUNT - 1)
        mix += tl.load(pre_ptrs, mask=t_mask & inside, other=0.0)
    tile_ptr = mix_ptr + tl.program_id(0).to(tl.int64) * (COUNT * BLOCK_T)
    mix_offs = k_offs * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    tl.store(tile_ptr + mix_offs, mix, mask=k_offs < COUNT)


def packed_mix(
    pre: torch.Tensor,
    dss: torch.Tensor,
    res: torch.Tensor,
    streams: int,
    views: int,
    rows: int,
    block_t: int,
) -> torch.Tensor:
    """[tiles, R·n + V·n + 1, block_t], flat: R rows of res, pre, 2·dss; 0 for tokens beyond T."""
    tokens = prod(dss.shape)
    count = (rows + views) * streams + 1
    tiles = cdiv(tokens, block_t)
    mix = dss.new_empty(tiles * count * block_t)  # flat: `tiles` alone would be guarded on
    launch(
        hc_pre_mix,
        (tiles, cdiv(count, 32)),
        *(pre, dss, res, mix, tokens),
        N=streams,
        V=views,
        G=rows,
        BLOCK_T=block_t,
        BLOCK_K=32,
        num_warps=4,
    )
    return mix
