"""Partial sums in slots of their own, added in a fixed order.

A product over C is split into spans, and a span into the turns of a loop. With many tokens one
program adds a span's turns in registers. With few it would be almost alone on the device, so
every turn gets a program and a slot, and the slots are added as the registers would have been:
the same additions, so a token's result does not depend on how many tokens there are.
"""

import torch
import triton
import triton.language as tl

from custom_ops.kernels.launch import cdiv, launch


@triton.jit
def hc_in_order(ptrs, mask, step, count):
    """Σ of `count` tiles, `step` elements apart, from 0 in ascending order; loads run ahead."""
    AHEAD: tl.constexpr = 8
    total = tl.zeros(ptrs.shape, tl.float32)
    for first in range(0, count, AHEAD):
        for k in tl.static_range(AHEAD):
            inside = mask & (first + k < count)
            total += tl.load(ptrs + (first + k) * step, mask=inside, other=0.0)
    return total


@triton.jit
def hc_places(p_ptr, ss_ptr, rows, M: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers into p [rows, M] and ss [rows] as one row of M + 1, their mask, a slot's step."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row_offs, m_offs = offs // (M + 1), offs % (M + 1)
    of_p = m_offs < M
    ptrs = tl.where(of_p, p_ptr + row_offs * M + m_offs, ss_ptr + row_offs)
    return ptrs, row_offs < rows, tl.where(of_p, M, 1) * (tl.full((), 1, tl.int64) * rows)


@triton.jit(do_not_specialize=["rows", "count"])
def hc_sum_turns(p_ptr, ss_ptr, rows, count, M: tl.constexpr, BLOCK: tl.constexpr):
    """The first of `count` slots of p [rows, M] and of ss [rows] becomes the sum of all."""
    ptrs, mask, step = hc_places(p_ptr, ss_ptr, rows, M, BLOCK)
    tl.store(ptrs, hc_in_order(ptrs, mask, step, count), mask=mask)


@triton.jit(do_not_specialize=["total", "splits"])
def hc_sum_slots(part_ptr, out_ptr, total, splits, BLOCK: tl.constexpr):
    """out = Σ_s part_s in ascending s."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < total
    value = hc_in_order(part_ptr + offs, mask, tl.full((), 1, tl.int64) * total, splits)
    tl.store(out_ptr + offs, value, mask=mask)


def few_tokens(coefficients: int) -> int:
    """Up to how many tokens every turn is a program: more coefficients a token fill more memory.

    n = 4, µs on an H100 at 64, 512, 1024 tokens (post_project in tiles of 64), turns in a program
    each | spans: post_pre 2560 wide 21, 37, 56 | 48, 51, 55; 7168 wide 24, 74, 128 | 109, 116,
    130. n = 8, pre, 2560 wide, 64, 256, 512: 34, 56, 96 | 86, 88, 91.
    """
    return min(512, 24_576 // coefficients)


def turns_apart(turns: int, tokens, coefficients: int) -> tuple:
    """(programs and slots of a span of `turns` turns, 1 where tokens are few and else 0).

    Arithmetic on `tokens`, no branch: under a dynamic compile it is a symbol that must not be
    guarded on.
    """
    if turns == 1:
        return 1, 0
    few = torch.sym_max(0, torch.sym_min(1, few_tokens(coefficients) + 1 - tokens))
    return 1 + (turns - 1) * few, few


def sum_turns(p: torch.Tensor, ss: torch.Tensor, spans: int, turns, few) -> None:
    """Add the slots of p [turns·S, T, M] and ss [turns·S, T], turn by turn, into the first S.

    Without slots to add (`few` = 0) the grid is empty, which launches nothing.
    """
    if isinstance(few, int) and not few:
        return  # a symbol is not asked: that would be a guard
    rows, coefficients = spans * p.shape[-2], p.shape[-1]
    grid = (cdiv(rows * (coefficients + 1), 128) * few,)
    launch(hc_sum_turns, grid, p, ss, rows, turns, M=coefficients, BLOCK=128, num_warps=4)


def sum_slots(parts: torch.Tensor) -> torch.Tensor:
    """Σ_s parts_s, in a fixed order."""
    out = torch.empty_like(parts[0])
    total = out.numel()
    grid = (cdiv(total, 128),)
    launch(hc_sum_slots, grid, parts, out, total, parts.shape[0], BLOCK=128, num_warps=4)
    return out
