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


def lanes_and_helpers(slices):
    """How many lanes and helpers there are for so many slices."""
    lanes = PROGRAMS // slices
    helpers = PROGRAMS - lanes * slices
    return lanes, helpers if helpers * 8 > PROGRAMS else 0
