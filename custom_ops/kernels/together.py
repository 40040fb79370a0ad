"""Tiles side by side and apart again: only names of registers change, nothing moves."""

import triton
import triton.language as tl


@triton.jit
def hc_apart(rows):
    """The 1, 2 or 4 tiles [...] of rows [..., N], as a tuple; of one or two axes each."""
    N: tl.constexpr = rows.shape[len(rows.shape) - 1]
    if N == 1:
        tiles = (tl.sum(rows, axis=len(rows.shape) - 1),)
    elif N == 2:
        tiles = tl.split(rows)
    else:
        if len(rows.shape) == 2:
            even, odd = tl.split(tl.reshape(rows, [rows.shape[0], 2, 2]))
        else:
            even, odd = tl.split(tl.reshape(rows, [rows.shape[0], rows.shape[1], 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        tiles = (first, second, third, fourth)
    return tiles


@triton.jit
def hc_together(tiles, N: tl.constexpr):
    """N tiles [...] as [..., N], padded with zeros to a power of two; N ≤ 4."""
    if N == 1:
        rows = tl.expand_dims(tiles[0], len(tiles[0].shape))
    elif N == 2:
        rows = tl.join(tiles[0], tiles[1])
    else:
        if N == 3:
            fourth = tl.zeros_like(tiles[0])
        else:
            fourth = tiles[3]
        pairs = tl.join(tl.join(tiles[0], tiles[2]), tl.join(tiles[1], fourth))
        if len(pairs.shape) == 3:
            rows = tl.reshape(pairs, [pairs.shape[0], 4])
        else:
            rows = tl.reshape(pairs, [pairs.shape[0], pairs.shape[1], 4])
    return rows


@triton.jit
def hc_side_by_side(tiles, N: tl.constexpr):
    """N tiles [A, B] as [A, N·B], padded with zeros to a power of two; N ≤ 4."""
    if N == 1:
        row = tiles[0]
    else:
        rows = tl.trans(hc_together(tiles, N), (0, 2, 1))
        row = tl.reshape(rows, [rows.shape[0], rows.shape[1] * rows.shape[2]])
    return row
