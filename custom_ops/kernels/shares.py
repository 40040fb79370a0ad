"""Slices of columns × tiles of tokens, dealt out evenly to one program a multiprocessor.

A program keeps to a slice while it walks tokens. As many whole lanes of programs as the device
holds, a program a slice, take turns at the first tiles; neighbours are then at the same tokens and
read whole rows of memory. Where many programs are left over, they are helpers and share the last
tiles, slice by slice:

             slice 0   slice 1   slice 2
    tile 0   lane 0    lane 0    lane 0
    tile 1   lane 1    lane 1    lane 1
    tile 2   lane 0    lane 0    lane 0
    tile 3   helper 0  helper 0  helper 1   ◀ hc_lane_tiles
    tile 4   helper 0  helper 1  helper 1

Which program takes what depends on the shape alone. `pre_dx` on an H100, bf16, n = 4, with helpers
and without: 4096×7168 (20 helpers) 290 and 306 µs, 8192×2560 (12) 221 and 217, 32768×1280 (12) 433
and 415, so few of them are left idle.
"""

import triton
import triton.language as tl

from custom_ops.registration import INTERPRETED

CHANGE = tl.constexpr(3)  # tiles of 64 × 64; fitted to pre_dx with helpers and without
PROGRAMS = 5 if INTERPRETED else 132  # at most: the streaming multiprocessors of an H100


@triton.jit
def hc_long(value):
    """value as int64, also where it is a number of the interpreter's."""
    return tl.full((), 0, tl.int64) + value


@triton.jit
def hc_lane_tiles(tiles, slices, lanes, helpers):
    """Tiles that the lanes take; coming to another slice costs a helper CHANGE tiles."""
    even = hc_long(tiles) * slices + CHANGE * (slices + helpers)
    share = lanes * even // (lanes * slices + helpers)
    return tl.minimum(share, tiles).to(tl.int32)


@triton.jit
def hc_share(index, work, programs):
    """First of the `work` pieces that program `index` of some takes."""
    count = tl.minimum(work, programs)
    return (hc_long(tl.minimum(index, count)) * work // tl.maximum(count, 1)).to(tl.int32)


@triton.jit
def hc_owner(piece, work, helpers):
    """The helper that a piece belongs to: the last whose share starts at or before it."""
    last = (hc_long(piece) + 1) * tl.minimum(work, helpers) - 1
    return (last // tl.maximum(work, 1)).to(tl.int32)


@triton.jit
def hc_mine(tiles, slices, lanes, helpers):
    """This program's slices, from the first value to before the second, and what falls to it.

    The rest is for hc_walk and hc_slot: whether it is in a lane, which lane or helper it is, the
    tiles of the lanes, those of the helpers (twice, once at least 1), and its own of the helpers'
    of all slices, one slice after another, from the last value but one to before the last.
    """
    lane = tl.program_id(0) // slices
    helper = tl.program_id(0) - lanes * slices
    early = hc_lane_tiles(tiles, slices, lanes, helpers)
    late = tiles - early
    begin = hc_share(helper, late * slices, helpers)
    end = hc_share(helper + 1, late * slices, helpers)
    span = tl.maximum(late, 1)
    in_lane = helper < 0
    first = tl.where(in_lane, tl.program_id(0) % slices, begin // span)
    stop = tl.where(begin < end, tl.cdiv(end, span), 0)
    stop = tl.where(in_lane, first + 1, stop)
    return first, stop, in_lane, lane, helper, early, late, span, begin, end


@triton.jit
def hc_walk(mine, piece, lanes):
    """The tiles of a slice: from the first to before the second, by steps of the third.

    That the step is not known when compiling also saves registers: fixed, it spills.
    """
    _, _, in_lane, lane, _, early, _, span, begin, end = mine
    first = early + tl.maximum(begin - piece * span, 0)
    last = early + tl.minimum(end - piece * span, span)
    first = tl.where(in_lane, lane, first)
    last = tl.where(in_lane, early, last)
    step = tl.where(in_lane, lanes, 1)
    return first, last, step


@triton.jit
def hc_slot(mine, piece, slices, lanes, helpers):
    """The slot for this program's sums of a slice: the lanes' first, then those of its helpers."""
    _, _, in_lane, lane, helper, _, late, span, _, _ = mine
    slot = lanes + helper - hc_owner(piece * span, late * slices, helpers)
    return tl.where(in_lane, lane, slot)


def lanes_and_helpers(slices):
    """How many lanes and helpers there are for so many slices."""
    lanes = PROGRAMS // slices
    helpers = PROGRAMS - lanes * slices
    return lanes, helpers if helpers * 8 > PROGRAMS else 0
