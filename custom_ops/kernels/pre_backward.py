"""Backward of the reading side: ⟨du, x⟩, then dx and dφ formed once for the whole sublayer."""
# ruff: noqa: RUF005 (Triton has no starred tuples)

import torch
import triton
import triton.language as tl

from custom_ops.kernels.launch import launch, row_tile


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
