"""u_v = Σ_i pre_vi x_i and its backward: the branch inputs read from the streams."""
# ruff: noqa: RUF005 (Triton has no starred tuples)

import torch
import triton
import triton.language as tl

from custom_ops.kernels.launch import cdiv, launch, plane_tile, plural, row_tile, tokens_of
from custom_ops.kernels.pre_backward import aggregate_dots


@triton.jit(do_not_specialize=["tokens"])
def hc_aggregate(
    x_ptr,
    weight_ptr,
    u_ptr,
    tokens,
    width,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """u_o = Σ_i weight_oi x_i (weight_io if TRANSPOSED) on BLOCK_T tokens × BLOCK_C columns.

    The last tokens come first: where x was just written, L2 still holds them.
    """
    column_tiles = tl.cdiv(width, BLOCK_C)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    token_offs = (tile // column_tiles).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column_offs = (tile % column_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    token_mask = token_offs < tokens
    mask = token_mask[:, None] & (column_offs < width)[None, :]
    x_rows = x_ptr + token_offs[:, None] * (IN * width) + column_offs[None, :]
    u_rows = u_ptr + token_offs[:, None] * (OUT * width) + column_offs[None, :]
    weights = weight_ptr + token_offs * (OUT * IN)
    x_tiles = ()
    for stream in tl.static_range(IN):
        x_tiles = x_tiles + (tl.load(x_rows + stream * width, mask=mask, other=0.0),)
    for view in tl.static_range(OUT):
        total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        for stream in tl.static_range(IN):
            index = stream * OUT + view if TRANSPOSED else view * IN + stream
            weight = tl.load(weights + index, mask=token_mask, other=0.0)
            total += weight[:, None] * x_tiles[stream].to(tl.float32)
        tl.store(u_rows + view * width, total.to(u_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def hc_aggregate_backward(
    du_ptr,
    x_ptr,
    pre_ptr,
    dx_ptr,
    dpre_ptr,
    tokens,
    width,
    N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One token of one view: dx_i = pre_i du and dpre_i = ⟨du, x_i⟩."""
    token = tl.program_id(0).to(tl.int64)
    column_offs = tl.arange(0, BLOCK_C)
    weights = ()
    dots = ()
    for stream in tl.static_range(N):
        weights = weights + (tl.load(pre_ptr + token * N + stream),)
        dots = dots + (tl.zeros([BLOCK_C // GROUP], tl.float32),)
    for start in range(0, width, BLOCK_C):
        mask = start + column_offs < width
        du = tl.load(du_ptr + token * width + start + column_offs, mask=mask, other=0.0)
        du = du.to(tl.float32)
        rows = token * (N * width) + start + column_offs
        sums = ()
        for stream in tl.static_range(N):
            x_tile = tl.load(x_ptr + rows + stream * width, mask=mask, other=0.0).to(tl.float32)
            product = tl.reshape(du * x_tile, [BLOCK_C // GROUP, GROUP])
            sums = sums + (dots[stream] + tl.sum(product, axis=1),)
            dx = weights[stream] * du
            tl.store(dx_ptr + rows + stream * width, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dots = sums
    for stream in tl.static_range(N):
        tl.store(dpre_ptr + token * N + stream, tl.sum(dots[stream], axis=0))


def weighted_sum(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, transposed=False):
    """out_o = Σ_i weight_oi x_i, or Σ_i weight_io x_i if `transposed`.

    Args: x [T, I, C] float, weight [T, O, I] fp32 ([T, I, O] if transposed), out [T, O, C].
    Moves: I + O.
    """
    tokens, (inputs, width) = tokens_of(x), x.shape[-2:]
    tile = plane_tile(width)
    launch(
        hc_aggregate,
        (tokens * cdiv(width, tile["BLOCK_C"]),),
        x,
        weight,
        out,
        tokens,
        width,
        IN=inputs,
        OUT=plural(out, x),
        TRANSPOSED=transposed,
        **tile,
    )
    return out


def aggregate(x: torch.Tensor, pre: torch.Tensor) -> torch.Tensor:
    """u_v = Σ_i pre_vi x_i.

    Args: x [T, n, C] float, pre [T, V, n] or [T, n] fp32; both contiguous.
    Returns: u [T, V, C] or [T, C] in x's dtype.
    Moves: n + V.
    """
    return weighted_sum(x, pre, x.new_empty(*pre.shape[:-1], x.shape[-1]))


def aggregate_backward(
    du: torch.Tensor, x: torch.Tensor, pre: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx_i = Σ_v pre_vi du_v and dpre_vi = ⟨du_v, x_i⟩.

    Args: du [T, V, C] float, x [T, n, C] float, pre [T, V, n] fp32.
    Returns: dx [T, n, C] in x's dtype, dpre [T, V, n] fp32.
    Moves: 2n + 1 at V = 1, 2n + 2V otherwise.
    """
    tokens, (streams, width) = tokens_of(x), x.shape[-2:]
    dx = torch.empty_like(x)
    if plural(pre, x) != 1:
        return weighted_sum(du, pre, dx, transposed=True), aggregate_dots(du, x)
    dpre = torch.empty_like(pre)
    launch(
        hc_aggregate_backward,
        (tokens,),
        du,
        x,
        pre,
        dx,
        dpre,
        tokens,
        width,
        N=streams,
        **row_tile(width, 1024),
    )
    return dx, dpre
