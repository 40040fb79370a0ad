"""x'_i = Σ_j res_ij x_j + Σ_w post_wi y_w and its backward: the branch written to the streams."""
# ruff: noqa: RUF005 (Triton has no starred tuples)

import torch
import triton
import triton.language as tl

from custom_ops.kernels.aggregate import weighted_sum
from custom_ops.kernels.launch import cdiv, launch, plane_tile, plural, row_tile, tokens_of
from custom_ops.kernels.pre_backward import aggregate_dots

FUSED_STREAMS = 8  # beyond these the n² sums of post_backward leave the registers


@triton.jit(do_not_specialize=["tokens"])
def hc_post(
    x_ptr,
    y_ptr,
    post_ptr,
    res_ptr,
    out_ptr,
    tokens,
    width,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    W: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One tile of BLOCK_T tokens × BLOCK_C columns of every stream."""
    column_tiles = tl.cdiv(width, BLOCK_C)
    tile = tl.program_id(0)
    token_offs = (tile // column_tiles).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column_offs = (tile % column_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    token_mask = token_offs < tokens
    mask = token_mask[:, None] & (column_offs < width)[None, :]
    x_rows = x_ptr + token_offs[:, None] * (IN * width) + column_offs[None, :]
    out_rows = out_ptr + token_offs[:, None] * (OUT * width) + column_offs[None, :]
    y_rows = y_ptr + token_offs[:, None] * (W * width) + column_offs[None, :]
    x_tiles = ()
    y_tiles = ()
    for stream in tl.static_range(IN):
        x_tiles = x_tiles + (tl.load(x_rows + stream * width, mask=mask, other=0.0),)
    for branch in tl.static_range(W):
        y_tiles = y_tiles + (tl.load(y_rows + branch * width, mask=mask, other=0.0),)
    for i in tl.static_range(OUT):
        total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        for j in tl.static_range(IN):
            res = tl.load(
                res_ptr + token_offs * (OUT * IN) + i * IN + j, mask=token_mask, other=0.0
            )
            total += res[:, None] * x_tiles[j].to(tl.float32)
        for branch in tl.static_range(W):
            post_rows = post_ptr + token_offs * (W * OUT) + branch * OUT
            post = tl.load(post_rows + i, mask=token_mask, other=0.0)
            total += post[:, None] * y_tiles[branch].to(tl.float32)
        tl.store(out_rows + i * width, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def hc_post_backward(
    g_ptr,
    x_ptr,
    y_ptr,
    post_ptr,
    res_ptr,
    dx_ptr,
    dy_ptr,
    dpost_ptr,
    dres_ptr,
    tokens,
    width,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    NEED_DX: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One token of one branch output; the OUT · (IN + 1) inner products stay in registers.

    The last tokens come first: of those L2 still holds g, which `pre_dx` wrote.
    """
    token = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    column_offs = tl.arange(0, BLOCK_C)
    LANES: tl.constexpr = BLOCK_C // GROUP
    dots = ()
    for _ in tl.static_range(OUT * (IN + 1)):
        dots = dots + (tl.zeros([LANES], tl.float32),)
    for start in range(0, width, BLOCK_C):
        mask = start + column_offs < width
        g_rows = token * (OUT * width) + start + column_offs
        x_rows = token * (IN * width) + start + column_offs
        y_offs = token * width + start + column_offs
        y_tile = tl.load(y_ptr + y_offs, mask=mask, other=0.0).to(tl.float32)
        g_tiles = ()
        x_tiles = ()
        for i in tl.static_range(OUT):
            g_tiles = g_tiles + (tl.load(g_ptr + g_rows + i * width, mask=mask, other=0.0),)
        for j in tl.static_range(IN):
            x_tiles = x_tiles + (tl.load(x_ptr + x_rows + j * width, mask=mask, other=0.0),)
        dy = tl.zeros([BLOCK_C], tl.float32)
        sums = ()
        for i in tl.static_range(OUT):
            g_tile = g_tiles[i].to(tl.float32)
            dy += tl.load(post_ptr + token * OUT + i) * g_tile
            for j in tl.static_range(IN):
                product = tl.reshape(g_tile * x_tiles[j].to(tl.float32), [LANES, GROUP])
                sums = sums + (dots[i * (IN + 1) + j] + tl.sum(product, axis=1),)
            product = tl.reshape(g_tile * y_tile, [LANES, GROUP])
            sums = sums + (dots[i * (IN + 1) + IN] + tl.sum(product, axis=1),)
        dots = sums
        tl.store(dy_ptr + y_offs, dy.to(dy_ptr.dtype.element_ty), mask=mask)
        if NEED_DX:
            for j in tl.static_range(IN):
                dx = tl.zeros([BLOCK_C], tl.float32)
                for i in tl.static_range(OUT):
                    res = tl.load(res_ptr + token * (OUT * IN) + i * IN + j)
                    dx += res * g_tiles[i].to(tl.float32)
                tl.store(dx_ptr + x_rows + j * width, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    for i in tl.static_range(OUT):
        for j in tl.static_range(IN):
            dres = tl.sum(dots[i * (IN + 1) + j], axis=0)
            tl.store(dres_ptr + token * (OUT * IN) + i * IN + j, dres)
        tl.store(dpost_ptr + token * OUT + i, tl.sum(dots[i * (IN + 1) + IN], axis=0))


def post(x: torch.Tensor, y: torch.Tensor, post: torch.Tensor, res: torch.Tensor) -> torch.Tensor:
    """x'_i = Σ_j res_ij x_j + Σ_w post_wi y_w.

    Args: x [T, n, C] and y [T, W, C] float, post [T, W, n'] and res [T, n', n] fp32; contiguous;
    one branch is y [T, C] and post [T, n'], too.
    Returns: x' [T, n', C] in x's dtype.
    Moves: n + n' + W.
    """
    tokens, (streams, width) = tokens_of(x), x.shape[-2:]
    out = x.new_empty(*x.shape[:-2], res.shape[-2], width)
    tile = plane_tile(width)
    launch(
        hc_post,
        (tokens * cdiv(width, tile["BLOCK_C"]),),
        x,
        y,
        post,
        res,
        out,
        tokens,
        width,
        IN=streams,
        OUT=res.shape[-2],
        W=plural(y, x),
        **tile,
    )
    return out


def post_backward(
    g: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    post: torch.Tensor,
    res: torch.Tensor,
    need_dx: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dy_w = Σ_i post_wi g_i, dpost_wi = ⟨g_i, y_w⟩, dres_ij = ⟨g_i, x_j⟩, dx_j = Σ_i res_ij g_i.

    Args: g [T, n', C] float, the others as in `post`; need_dx says whether to form dx.
    Returns: dx [T, n, C] in x's dtype or None, dy in y's dtype, dpost and dres fp32.
    Moves: n + n' + 2, and n more with dx; with several branches or more than 8 streams
    5n + 4W - 1 and 2n more.
    """
    tokens, (streams, width) = tokens_of(x), x.shape[-2:]
    dx = torch.empty_like(x) if need_dx else None
    dy = torch.empty_like(y)
    if plural(y, x) != 1 or max(streams, res.shape[-2]) > FUSED_STREAMS:
        weighted_sum(g, post, dy)
        if dx is not None:
            weighted_sum(g, res, dx, transposed=True)
        return dx, dy, aggregate_dots(y, g), aggregate_dots(g, x)
    dpost = torch.empty_like(post)
    dres = torch.empty_like(res)
    launch(
        hc_post_backward,
        (tokens,),
        g,
        x,
        y,
        post,
        res,
        g if dx is None else dx,
        dy,
        dpost,
        dres,
        tokens,
        width,
        IN=streams,
        OUT=res.shape[-2],
        NEED_DX=need_dx,
        **row_tile(width, 256),
    )
    return dx, dy, dpost, dres
