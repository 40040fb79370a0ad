"""The 4 × 4 matrices of four tokens as one block-diagonal [16, 16], as tensor cores take them.

Rows of a block are in the order in which a thread of a product holds two streams of a token: row
r is stream 2 (r // 8) + r % 2 of token r % 8 // 2. Columns of res and mixᵀ are (token, stream);
post has token t in column t, pre in column 4 + t. Weights are two bf16 halves (16 bits).
"""

from math import prod

import torch
import triton
import triton.language as tl

from custom_ops.kernels.launch import INTERPRETED, cdiv, launch

KINDS = 8  # hi and lo of res, post, mixᵀ and pre


@triton.jit(do_not_specialize=["tokens"])
def hc_pack_blocks(post_ptr, res_ptr, pre_ptr, mix_ptr, out_ptr, tokens, BLOCKS: tl.constexpr):
    """[T / 4, KINDS, 16, 16]: of every four tokens hi and lo of res, post, mixᵀ and pre."""
    first = tl.program_id(0) * BLOCKS
    block = first + tl.arange(0, BLOCKS)[:, None, None]
    row = tl.arange(0, 16)[None, :, None]
    column = tl.arange(0, 16)[None, None, :]
    place = row % 8 // 2
    stream = row // 8 * 2 + row % 2
    token = block.to(tl.int64) * 4 + place
    own = (column // 4 == place) & (token < tokens)
    inside = block * 4 < tokens + column * 0
    out = out_ptr + block.to(tl.int64) * 2048 + row * 16 + column
    for kind in tl.static_range(4):
        if kind == 0:
            weight = tl.load(res_ptr + token * 16 + stream * 4 + column % 4, mask=own, other=0.0)
        elif kind == 1:
            here = (column == place) & (token < tokens)
            weight = tl.load(post_ptr + token * 4 + stream + column * 0, mask=here, other=0.0)
        elif kind == 2:
            weight = tl.load(mix_ptr + token * 16 + column % 4 * 4 + stream, mask=own, other=0.0)
        else:
            here = (column == 4 + place) & (token < tokens)
            weight = tl.load(pre_ptr + token * 4 + stream + column * 0, mask=here, other=0.0)
        high = weight.to(tl.bfloat16).to(tl.float32)
        tl.store(out + kind * 512, high.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(
            out + (kind * 512 + 256), (weight - high).to(out_ptr.dtype.element_ty), mask=inside
        )


def pack_blocks(
    post: torch.Tensor, res: torch.Tensor, pre: torch.Tensor, mix: torch.Tensor
) -> torch.Tensor:
    """[T / 4, 8, 16, 16] bf16, of post and pre [T, 4], res and mix [T, 4, 4] fp32.

    fp32 with as few bits if interpreted: there are no products in bf16.
    """
    tokens = prod(post.shape[:-1])
    kind = torch.float32 if INTERPRETED else torch.bfloat16
    out = post.new_empty(cdiv(tokens, 4), KINDS, 16, 16, dtype=kind)
    grid = (cdiv(tokens, 32),)
    launch(hc_pack_blocks, grid, post, res, pre, mix, out, tokens, BLOCKS=8, num_warps=4)
    return out
