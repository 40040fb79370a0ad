"""Tiles put side by side are where they were, and come apart again."""
# ruff: noqa: RUF005 (Triton has no starred tuples)

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from custom_ops.kernels.launch import INTERPRETED  # noqa: E402
from custom_ops.kernels.together import hc_apart, hc_side_by_side, hc_together  # noqa: E402

pytestmark = pytest.mark.interpreter
A, B = 4, 8


@triton.jit
def place(source_ptr, row_ptr, back_ptr, N: tl.constexpr, PAD: tl.constexpr, A: tl.constexpr,
          B: tl.constexpr):  # fmt: skip
    """N tiles [A, B] one after another -> a row [A, PAD·B], and each tile times its number + 1."""
    offs = tl.arange(0, A)[:, None] * B + tl.arange(0, B)[None, :]
    tiles = ()
    for i in tl.static_range(N):
        tiles = tiles + (tl.load(source_ptr + i * (A * B) + offs),)
    row_offs = tl.arange(0, A)[:, None] * (PAD * B) + tl.arange(0, PAD * B)[None, :]
    tl.store(row_ptr + row_offs, hc_side_by_side(tiles, N))
    parts = hc_apart(hc_together(tiles, N))
    for i in tl.static_range(N):
        tl.store(back_ptr + i * (A * B) + offs, parts[i] * (i + 1))


@triton.jit
def place_lines(source_ptr, rows_ptr, back_ptr, N: tl.constexpr, PAD: tl.constexpr,
                A: tl.constexpr):  # fmt: skip
    """The same of lines [A]: rows [A, PAD]."""
    offs = tl.arange(0, A)
    lines = ()
    for i in tl.static_range(N):
        lines = lines + (tl.load(source_ptr + i * A + offs),)
    rows = hc_together(lines, N)
    tl.store(rows_ptr + offs[:, None] * PAD + tl.arange(0, PAD)[None, :], rows)
    parts = hc_apart(rows)
    for i in tl.static_range(N):
        tl.store(back_ptr + i * A + offs, parts[i] * (i + 1))


@pytest.mark.skipif(not INTERPRETED, reason="runs on CPU tensors")
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_tiles(n):
    source = torch.randn(n, A, B)
    pad = 4 if n == 3 else n
    row, back = torch.full((A, pad, B), torch.nan), torch.full((n, A, B), torch.nan)
    place[(1,)](source, row, back, n, pad, A, B)
    want = torch.zeros(A, pad, B)
    want[:, :n] = source.transpose(0, 1)
    assert torch.equal(row, want)
    assert torch.equal(back, source * torch.arange(1, n + 1)[:, None, None])


@pytest.mark.skipif(not INTERPRETED, reason="runs on CPU tensors")
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_lines(n):
    source = torch.randn(n, A)
    pad = 4 if n == 3 else n
    rows, back = torch.full((A, pad), torch.nan), torch.full((n, A), torch.nan)
    place_lines[(1,)](source, rows, back, n, pad, A)
    want = torch.zeros(A, pad)
    want[:, :n] = source.T
    assert torch.equal(rows, want)
    assert torch.equal(back, source * torch.arange(1, n + 1)[:, None])
