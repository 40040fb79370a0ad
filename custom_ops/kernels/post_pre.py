"""The boundary's write: the new streams written and projected in one pass."""
# ruff: noqa: RUF005 (Triton has no starred tuples)

import torch
import triton
import triton.language as tl

from custom_ops.constraint import Constraint
from custom_ops.kernels.constrain import constrain
from custom_ops.kernels.launch import cdiv, generation, launch, tokens_of
from custom_ops.kernels.project import project_operand
from custom_ops.kernels.slots import sum_turns, turns_apart
from custom_ops.kernels.tile import padded
from custom_ops.kernels.together import hc_side_by_side


@triton.jit
def hc_columns_of(ptr, t_offs, t_mask, COUNT: tl.constexpr):
    """COUNT coefficients of each token, [BLOCK_T, 1] each."""
    columns = ()
    for index in tl.static_range(COUNT):
        column = tl.load(ptr + t_offs * COUNT + index, mask=t_mask, other=0.0)
        columns = columns + (column[:, None],)
    return columns


@triton.jit
def hc_narrow_pairs(wide):
    """wide rounded to bf16, two at an instruction: Triton's own conversion takes one each here."""
    return tl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [wide], tl.bfloat16, is_pure=True, pack=2
    )


@triton.jit(do_not_specialize=["tokens", "slots"])
def hc_post_project(
    x_ptr,
    y_ptr,
    post_ptr,
    res_ptr,
    phi_ptr,
    carried_ptr,
    out_ptr,
    u_ptr,
    p_ptr,
    ss_ptr,
    tokens,
    width,
    slots,
    IN: tl.constexpr,
    N: tl.constexpr,
    PAD_N: tl.constexpr,
    M: tl.constexpr,
    HALVES: tl.constexpr,
    DOT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x' of BLOCK_T tokens over a slot of one of SPLITS spans of C, and its share of p and Σx'².

    A span is every SPLITS-th block of columns, so that programs side by side read side by side;
    it has one slot or one for each of its turns (see slots.py). With `carried` also
    u = Σ_i carried_i x'_i, so that x' is never read again. A turn has one product, of all streams
    side by side: several that add up make Triton change their layout in between.
    """
    place = tl.program_id(0) % (slots * SPLITS)
    t_offs = (tl.program_id(0) // (slots * SPLITS)).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    t_mask = t_offs < tokens
    c_offs = tl.arange(0, BLOCK_C)
    # Rows of φ: eights of hi and lo alternate, so that both products of a row are in one lane.
    row_offs = tl.arange(0, BLOCK_M * HALVES)
    m_rows = row_offs // (8 * HALVES) * 8 + row_offs % 8
    row_mask = m_rows < M
    row_offs = m_rows * HALVES + row_offs // 8 % HALVES
    k_streams = tl.arange(0, PAD_N * BLOCK_C) // BLOCK_C
    k_offs = tl.arange(0, PAD_N * BLOCK_C) % BLOCK_C
    phi_rows = phi_ptr + row_offs[:, None].to(tl.int64) * (N * width)
    phi_rows += (k_streams * width + k_offs)[None, :]
    x_rows = t_offs[:, None] * (IN * width) + c_offs[None, :]
    rows = t_offs[:, None] * (N * width) + c_offs[None, :]
    y_rows = y_ptr + t_offs[:, None] * width + c_offs[None, :]
    post = hc_columns_of(post_ptr, t_offs, t_mask, N)
    res = hc_columns_of(res_ptr, t_offs, t_mask, N * IN)
    if carried_ptr is not None:
        carried = hc_columns_of(carried_ptr, t_offs, t_mask, N)
    p = tl.zeros([BLOCK_M, BLOCK_T], tl.float32)
    squares = tl.zeros([BLOCK_T], tl.float32)
    turns = tl.cdiv(width, SPLITS * BLOCK_C)  # of a span
    start = place * BLOCK_C
    end = tl.minimum(start + turns // slots * (SPLITS * BLOCK_C), width)
    for c in tl.range(start, end, SPLITS * BLOCK_C, num_stages=STAGES):
        c_mask = c + c_offs < width
        mask = t_mask[:, None] & c_mask[None, :]
        y_tile = tl.load(y_rows + c, mask=mask, other=0.0)
        x_tiles = ()
        for j in tl.static_range(IN):
            x_tile = tl.load(x_ptr + x_rows + (j * width + c), mask=mask, other=0.0)
            x_tiles = x_tiles + (x_tile,)
        turn_squares = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        phi_mask = row_mask[:, None] & ((k_streams < N) & (c + k_offs < width))[None, :]
        phi = tl.load(phi_rows + c, mask=phi_mask, other=0.0)
        tiles = ()
        u = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        for i in tl.static_range(N):
            wide = post[i] * y_tile.to(tl.float32)
            for j in tl.static_range(IN):
                wide += res[i * IN + j] * x_tiles[j].to(tl.float32)
            if phi.dtype == tl.bfloat16:
                written = hc_narrow_pairs(wide)
            else:
                written = wide.to(out_ptr.dtype.element_ty)
            tiles = tiles + (written,)
            tl.store(out_ptr + rows + (i * width + c), written, mask=mask)
            wide = written.to(tl.float32)
            turn_squares += wide * wide
            if carried_ptr is not None:
                u += carried[i] * wide
        turned = tl.trans(hc_side_by_side(tiles, N).to(phi.dtype))
        product = tl.dot(phi, turned, input_precision=DOT)  # φ on the left: x' goes in as it lies
        if carried_ptr is not None:
            u_rows = u_ptr + t_offs[:, None] * width + c_offs[None, :]
            tl.store(u_rows + c, u.to(u_ptr.dtype.element_ty), mask=mask)
        if HALVES == 2:  # finished here: the tensor cores are done with this turn's buffers
            product = tl.sum(tl.reshape(product, [BLOCK_M // 8, 2, 8, BLOCK_T]), axis=1)
            product = tl.reshape(product, [BLOCK_M, BLOCK_T])
        p += product
        squares += tl.sum(turn_squares, axis=1)
    slot = place.to(tl.int64) * tokens + t_offs
    m_offs = tl.arange(0, BLOCK_M)
    mask = t_mask[None, :] & (m_offs < M)[:, None]
    tl.store(p_ptr + slot[None, :] * M + m_offs[:, None], p, mask=mask)
    tl.store(ss_ptr + slot, squares, mask=t_mask)


def post_project(
    x: torch.Tensor,
    y: torch.Tensor,
    post: torch.Tensor,
    res: torch.Tensor,
    phi: torch.Tensor,
    carried: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, int]:
    """x'_i = Σ_j res_ij x_j + post_i y, u = Σ_i carried_i x'_i if asked, and the split-K partials
    of p = x' φᵀ and ss = Σx'², in the first S slots.

    Args: x [T, n', C], y [T, C] float, post and carried [T, n], res [T, n, n'], phi [M, n·C] fp32;
    contiguous, n' and n ≤ 4, M ≤ 32.
    Returns: x' [T, n, C] and u [T, C] in x's dtype, p [≥ S, T, M] and ss [≥ S, T] fp32, S.
    Moves: n' + n + 1, with u one more. A token's result does not depend on the others.
    """
    tokens, (before, width) = tokens_of(x), x.shape[-2:]
    count, coefficients = res.shape[-2], phi.shape[0]
    operand, halves, dot = project_operand(phi, x.dtype, "bf16x2")
    tile = post_project_tile(x, coefficients, operand.dtype)
    splits = max(1, min(4 if count * width < 16_384 else 8, count * width // 1024))
    out = x.new_empty(*x.shape[:-2], count, width)
    u = None if carried is None else torch.empty_like(y, dtype=x.dtype)
    turns = cdiv(width, splits * tile["BLOCK_C"]) if splits > 1 else 1
    slots, few = turns_apart(turns, tokens, coefficients)
    p = phi.new_empty(slots * splits, tokens, coefficients)
    ss = phi.new_empty(slots * splits, tokens)
    launch(
        hc_post_project,
        (cdiv(tokens, tile["BLOCK_T"]) * splits * slots,),
        x,
        y,
        post,
        res,
        operand,
        carried,
        out,
        u,
        p,
        ss,
        tokens,
        width,
        slots,
        IN=before,
        N=count,
        PAD_N=padded(count),
        M=coefficients,
        HALVES=halves,
        DOT=dot,
        SPLITS=splits,
        **tile,
    )
    sum_turns(p, ss, splits, slots, few)
    return out, u, p, ss, splits


def post_project_tile(x: torch.Tensor, coefficients: int, operand: torch.dtype) -> dict:
    """Tile of `post_project`, from M and the type its operands have in the tensor cores.

    H100, bf16, n = 4, µs with `carried` at 8192×2560, 16384×4096, 4096×7168, 600×7168: 162, 484,
    228, 51; with 4 spans at all widths 162, 500, 233, 47. With 64 tokens, 8 warps, 3 stages and 4
    spans 163, 512, 240, 68, and 8 spans 161, 500, 230, 41.
    """
    half, old = operand == torch.bfloat16, generation(x.device) < 9
    return {
        "BLOCK_M": max(16, padded(coefficients)),
        "BLOCK_T": 32,
        "BLOCK_C": 64 if half else 32,
        "STAGES": 2 if not half else 3 if old else 4,  # 104 or 209 KB
        "num_warps": 8 if half and old else 4,
    }


def post_pre(
    x: torch.Tensor,
    y: torch.Tensor,
    post: torch.Tensor,
    res: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    carried: torch.Tensor | None,
    c: Constraint,
) -> tuple:
    """x', u or None, pre' and post' [T, n], res' [T, n, n], p [T, M] and ss [T].

    Args: as `post_project`; alpha [3], bias [M] fp32. Moves: as `post_project`.
    """
    streams, u, p, ss, splits = post_project(x, y, post, res, phi, carried)
    width, lead = c.norm_width(x.shape[-1]), x.shape[:-2]
    if splits > 1:
        made = constrain(p, ss, alpha, bias, width, c, splits, lead)
    else:
        p, ss = p[0].reshape(*lead, -1), ss[0].reshape(lead)
        made = (*constrain(p, ss, alpha, bias, width, c), p, ss)
    return streams, u, *made
