"""pre, post and res of every token from its projection (mHC eq. 7 and 8), and their backward.

One program takes a block of tokens and makes the three parts one after the other, each a tile
[A, B, tokens]: pre [V, n], post [W, n], res [n, n] (or logits [1, n!], [1, log2 n]). Split-K
partials of p and ss are summed in fixed order while they are loaded. dalpha and dbias go to one
slot a program and a second kernel adds the slots in fixed order.

Compile-time tuples: a part is (a, b, A, B, column, stride_a, stride_b, bias, stream_axis, ...),
where PRE and POST go on (kind, scale, eps) and RES (manifold, temperature, stride_i, stride_j);
NORM = (form, eps, width, squash); RULE is Sinkhorn's rule or the Newton–Schulz schedule.
"""

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.constraint import Constraint
from custom_ops.kernels.constrain_choices import BACKWARD, CHUNK, FORWARD, choices_of, tile_of
from custom_ops.kernels.constrain_parts import (
    hc_activate,
    hc_activate_backward,
    hc_logits,
    hc_logits_backward,
    hc_mix,
    hc_mix_backward,
    hc_total,
)
from custom_ops.kernels.kronecker import hc_kronecker_backward, hc_kronecker_store
from custom_ops.kernels.launch import cdiv, launch
from custom_ops.kernels.permutation import hc_permutation_backward, hc_permutation_store
from custom_ops.kernels.tile import hc_offsets, hc_tokens, hc_valid, padded


@triton.jit(do_not_specialize=["T"])
def hc_constrain_kernel(
    p_ptr,
    ss_ptr,
    alpha_ptr,
    bias_ptr,
    pre_ptr,
    post_ptr,
    res_ptr,
    p_sum_ptr,
    ss_sum_ptr,
    T,
    n: tl.constexpr,
    M: tl.constexpr,
    BT: tl.constexpr,
    SPLITS: tl.constexpr,
    NORM: tl.constexpr,
    PRE: tl.constexpr,
    POST: tl.constexpr,
    RES: tl.constexpr,
    RULE: tl.constexpr,
):
    tokens = hc_tokens(BT)
    inputs = (p_ptr, ss_ptr, alpha_ptr, bias_ptr)
    if PRE[0] > 0:
        z, _s, _p = hc_logits(inputs, p_sum_ptr, tokens, T, 0, n, M, SPLITS, PRE, NORM)
        places = hc_offsets(tokens, PRE[0] * n, n, 1, PRE[2], PRE[3], BT)
        valid = hc_valid(tokens, T, PRE[0], n, PRE[2], PRE[3])
        tl.store(pre_ptr + places, hc_activate(z, n, PRE), mask=valid)
    if POST[0] > 0:
        z, _s, _p = hc_logits(inputs, p_sum_ptr, tokens, T, 1, n, M, SPLITS, POST, NORM)
        places = hc_offsets(tokens, POST[0] * n, n, 1, POST[2], POST[3], BT)
        valid = hc_valid(tokens, T, POST[0], n, POST[2], POST[3])
        tl.store(post_ptr + places, hc_activate(z, n, POST), mask=valid)
    if RES[0] > 0:
        z, _s, _p = hc_logits(inputs, p_sum_ptr, tokens, T, 2, n, M, SPLITS, RES, NORM)
        z = z / RES[10]
        if RES[9] == "permutation":
            hc_permutation_store(z, res_ptr, tokens, T, n, RES[11], RES[12])
        elif RES[9] == "kronecker":
            hc_kronecker_store(z, res_ptr, tokens, T, n, RES[1])
        else:
            places = hc_offsets(tokens, n * n, RES[11], RES[12], RES[2], RES[3], BT)
            valid = hc_valid(tokens, T, n, n, RES[2], RES[3])
            tl.store(res_ptr + places, hc_mix(z, n, RES, RULE), mask=valid)
    if SPLITS > 1:
        rows: tl.constexpr = n if PRE[8] >= 0 else 1
        ROWS: tl.constexpr = PRE[3] if PRE[8] >= 0 else 1
        places = hc_offsets(tokens, rows, 0, 1, 1, ROWS, BT)
        valid = hc_valid(tokens, T, 1, rows, 1, ROWS)
        ss = hc_total(ss_ptr, places, valid, tl.full((), rows, tl.int64) * T, SPLITS)
        tl.store(ss_sum_ptr + places, ss, mask=valid)


@triton.jit
def hc_load_part(
    ptr, tokens, T, n: tl.constexpr, stride_a: tl.constexpr, stride_b: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """Tile of a gradient [T, a, n]."""
    A: tl.constexpr = PART[2]
    B: tl.constexpr = PART[3]
    places = hc_offsets(tokens, PART[0] * n, stride_a, stride_b, A, B, tokens.shape[0])
    valid = hc_valid(tokens, T, PART[0], n, A, B)
    return tl.load(ptr + places, mask=valid, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T"])
def hc_constrain_backward_kernel(
    dpre_ptr,
    dpost_ptr,
    dres_ptr,
    p_ptr,
    ss_ptr,
    alpha_ptr,
    bias_ptr,
    dp_ptr,
    dss_ptr,
    partial_ptr,
    T,
    n: tl.constexpr,
    M: tl.constexpr,
    BT: tl.constexpr,
    CHUNK: tl.constexpr,
    NORM: tl.constexpr,
    PRE: tl.constexpr,
    POST: tl.constexpr,
    RES: tl.constexpr,
    RULE: tl.constexpr,
):
    tokens = hc_tokens(BT)
    inputs = (p_ptr, ss_ptr, alpha_ptr, bias_ptr)
    rows: tl.constexpr = n if PRE[8] >= 0 else 1
    ROWS: tl.constexpr = PRE[3] if PRE[8] >= 0 else 1
    dss = tl.zeros((1, ROWS, BT), tl.float32)
    if PRE[0] > 0:
        z, hidden, p = hc_logits(inputs, None, tokens, T, 0, n, M, 1, PRE, NORM)
        grad = hc_load_part(dpre_ptr, tokens, T, n, n, 1, PRE)
        dz = hc_activate_backward(grad, z, n, PRE)
        dss += hc_logits_backward(
            dz, hidden, p, inputs, dp_ptr, partial_ptr, tokens, T, 0, n, M, PRE, NORM
        )
    if POST[0] > 0:
        z, hidden, p = hc_logits(inputs, None, tokens, T, 1, n, M, 1, POST, NORM)
        grad = hc_load_part(dpost_ptr, tokens, T, n, n, 1, POST)
        dz = hc_activate_backward(grad, z, n, POST)
        dss += hc_logits_backward(
            dz, hidden, p, inputs, dp_ptr, partial_ptr, tokens, T, 1, n, M, POST, NORM
        )
    if RES[0] > 0:
        z, hidden, p = hc_logits(inputs, None, tokens, T, 2, n, M, 1, RES, NORM)
        z = z / RES[10]
        if RES[9] == "permutation":
            dz = hc_permutation_backward(z, dres_ptr, tokens, T, n, RES[11], RES[12])
        elif RES[9] == "kronecker":
            dz = hc_kronecker_backward(z, dres_ptr, tokens, T, n, RES[1])
        else:
            grad = hc_load_part(dres_ptr, tokens, T, n, RES[11], RES[12], RES)
            dz = hc_mix_backward(grad, z, n, CHUNK, RES, RULE)
        dz = dz / RES[10]
        z, hidden, p = hc_logits(inputs, None, tokens, T, 2, n, M, 1, RES, NORM)
        dss += hc_logits_backward(
            dz, hidden, p, inputs, dp_ptr, partial_ptr, tokens, T, 2, n, M, RES, NORM
        )
    places = hc_offsets(tokens, rows, 0, 1, 1, ROWS, BT)
    tl.store(dss_ptr + places, dss, mask=hc_valid(tokens, T, 1, rows, 1, ROWS))


@triton.jit(do_not_specialize=["slots"])
def hc_constrain_slots_kernel(
    partial_ptr,
    dalpha_ptr,
    dbias_ptr,
    slots,
    M: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Add the slots [slots, M + 3] of the backward, lane by lane and then in a tree."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, slots, ROWS):
        row = first + tl.arange(0, ROWS)
        places = row.to(tl.int64)[:, None] * (M + 3) + column[None, :]
        valid = (row < slots)[:, None] & (column < M + 3)[None, :]
        total += tl.load(partial_ptr + places, mask=valid, other=0.0)
    summed = tl.sum(total, 0)
    tl.store(dbias_ptr + column, summed, mask=column < M)
    tl.store(dalpha_ptr + column - M, summed, mask=(column >= M) & (column < M + 3))


def constant_parts(p: Tensor, lead, c: Constraint) -> tuple[Tensor, Tensor, Tensor]:
    """pre, post and res as `constrain` returns them; constants are filled in."""
    n = c.streams
    own = ((count, n) if count > 1 else (n,) for count in (c.views, c.branches))
    pre, post = (p.new_empty((*lead, *shape), dtype=torch.float32) for shape in own)
    res = p.new_empty((*lead, n, n), dtype=torch.float32)
    if c.pre == "none":
        pre.fill_(1.0)
    if c.post == "none":
        post.fill_(1.0)
    if not c.sizes[2]:
        res.copy_(torch.eye(n, dtype=res.dtype, device=res.device).expand_as(res))
    return pre, post, res


def constrain(
    p: Tensor,
    ss: Tensor,
    alpha: Tensor,
    bias: Tensor,
    width: int,
    c: Constraint,
    splits: int = 1,
    lead=None,
) -> tuple[Tensor, ...]:
    """pre, post and res [T, n, n] of every token; with split-K partials also their sums.

    Args:
        p: [T, M] or one row a stream [T, n, M/n]; with splits > 1 [≥ S, T, ...].
        ss: [T] or [T, n]; with splits > 1 [≥ S, T, ...].
        alpha: [3].
        bias: [M].
        width: number of elements under the norm.
        splits: S, the partials of p and ss, added in their order.
        lead: leading dimensions of the results, if not those of p.
    Returns: pre [T, n], or [T, V, n] for several views, post [T, n] or [T, W, n], res [T, n, n],
        and with splits > 1 also p and ss summed.
    """
    own = 1 + (c.projection == "stream")  # dimensions of a token's p
    if lead is None:
        lead = p.shape[int(splits > 1) : p.dim() - own]
    tokens = prod(lead)
    pre, post, res = constant_parts(p, lead, c)
    shape = (*lead, *p.shape[p.dim() - own :])
    sums = (p.new_empty(shape), ss.new_empty(shape[:-1])) if splits > 1 else ()
    block, warps = tile_of(FORWARD, c)
    launch(
        hc_constrain_kernel, (cdiv(tokens, block),),
        p, ss, alpha, bias, pre, post, res, *(sums or (None, None)), tokens,
        BT=block, SPLITS=splits, **choices_of(c, width), num_warps=warps,
    )  # fmt: skip
    return pre, post, res, *sums


def constrain_backward(
    dpre: Tensor,
    dpost: Tensor,
    dres: Tensor,
    p: Tensor,
    ss: Tensor,
    alpha: Tensor,
    bias: Tensor,
    width: int,
    c: Constraint,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of p, ss, alpha [3] and bias [M] from those of pre, post and res."""
    tokens = prod(p.shape[: p.dim() - 1 - (c.projection == "stream")])
    dp, dss = torch.empty_like(p), torch.empty_like(ss)
    dalpha = alpha.new_empty((3,), dtype=torch.float32)
    dbias = bias.new_empty((c.total,), dtype=torch.float32)
    block, warps = tile_of(BACKWARD, c)
    slots = cdiv(tokens, block)
    absent = 0 in c.sizes
    size = slots * (c.total + 3)  # flat: a dimension of `slots` would be guarded on
    partial = p.new_zeros(size) if absent else p.new_empty(size)
    launch(
        hc_constrain_backward_kernel, (slots,),
        dpre, dpost, dres, p, ss, alpha, bias, dp, dss, partial, tokens,
        BT=block, CHUNK=CHUNK[padded(c.streams)], **choices_of(c, width), num_warps=warps,
    )  # fmt: skip
    columns = 8
    launch(
        hc_constrain_slots_kernel, (cdiv(c.total + 3, columns),),
        partial, dalpha, dbias, slots,
        M=c.total, COLUMNS=columns, ROWS=128, num_warps=4,
    )  # fmt: skip
    return dp, dss, dalpha, dbias
