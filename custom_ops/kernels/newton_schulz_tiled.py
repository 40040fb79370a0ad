"""Newton–Schulz of matrices too wide for registers (n > 8): tiled batched products.

Every step is a few products out = s·(left @ right) + t·add on the tensor cores, at TF32x3, which
keeps fp32's mantissa. The backward recomputes the steps once and keeps their inputs in memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.kernels.launch import cdiv, launch
from custom_ops.kernels.tile import padded


@triton.jit
def hc_matrix_product_kernel(
    left_ptr,
    right_ptr,
    add_ptr,
    out_ptr,
    product_scale,
    add_scale,
    n: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * (n * n)
    row = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[:, None]
    column = (tl.program_id(2) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inner = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, n, BLOCK_K):
        across = (start + inner)[None, :]
        down = (start + inner)[:, None]
        left_mask = (row < n) & (across < n)
        left = tl.load(left_ptr + first + row * n + across, mask=left_mask, other=0.0)
        places = column * n + down if TRANSPOSED else down * n + column
        right_mask = (down < n) & (column < n)
        right = tl.load(right_ptr + first + places, mask=right_mask, other=0.0)
        total = tl.dot(left, right, total, input_precision="tf32x3")
    total *= product_scale
    places = first + row * n + column
    inside = (row < n) & (column < n)
    if add_ptr is not None:
        total += add_scale * tl.load(add_ptr + places, mask=inside, other=0.0)
    tl.store(out_ptr + places, total, mask=inside)


def product(
    left: Tensor,
    right: Tensor,
    scale: float = 1.0,
    add: Tensor | None = None,
    add_scale: float = 1.0,
    transposed: bool = False,
) -> Tensor:
    """scale·(left @ right) + add_scale·add over [T, n, n] fp32, right transposed if asked."""
    n = left.shape[-1]
    out = torch.empty_like(left)
    block = min(max(padded(n), 16), 64)
    tiles = cdiv(n, block)
    launch(
        hc_matrix_product_kernel, (left.shape[0], tiles, tiles),
        left, right, add, out, float(scale), float(add_scale),
        n=n, TRANSPOSED=transposed, BLOCK=block, BLOCK_K=min(block, 32), num_warps=4,
    )  # fmt: skip
    return out


def normalise(matrix: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The matrices in fp32 divided by their norms + eps, and the norms [T, 1, 1]."""
    matrix = matrix.float()
    norm = matrix.square().sum((-2, -1), keepdim=True).sqrt()
    return (matrix / (norm + eps)).contiguous(), norm


def mixed_of(x: Tensor, b: float, c: float) -> tuple[Tensor, Tensor]:
    """A = XXᵀ and bA + cA²."""
    gram = product(x, x, transposed=True)
    return gram, product(gram, gram, c, gram, b)


def newton_schulz_tiled(matrix: Tensor, schedule: tuple, eps: float) -> Tensor:
    """Polar factor of each matrix [T, n, n]; three products a step."""
    x, _ = normalise(matrix, eps)
    for a, b, c in schedule:
        _, mixed = mixed_of(x, b, c)
        x = product(mixed, x, 1.0, x, a)
    return x.to(matrix.dtype)


def newton_schulz_tiled_backward(
    grad: Tensor, matrix: Tensor, schedule: tuple, eps: float
) -> Tensor:
    """Gradient of the matrices; nine products a step.

    With D = GXᵀ + XGᵀ: dX = aG + (bA + cA²)G + (bD + c(DA + AD))X.
    """
    start, norm = normalise(matrix, eps)
    inputs = [start]
    for a, b, c in schedule[:-1]:
        _, mixed = mixed_of(inputs[-1], b, c)
        inputs.append(product(mixed, inputs[-1], 1.0, inputs[-1], a))
    grad = grad.float().contiguous()
    for (a, b, c), x in zip(reversed(schedule), reversed(inputs), strict=True):
        gram, mixed = mixed_of(x, b, c)
        outer = product(x, grad, 1.0, product(grad, x, transposed=True), 1.0, transposed=True)
        inner = product(gram, outer, c, product(outer, gram, c, outer, b))
        grad = product(inner, x, 1.0, product(mixed, grad, 1.0, grad, a))
    slope = (grad * start).sum((-2, -1), keepdim=True)
    slope = torch.where(norm > 0, slope / norm, 0.0)
    return (grad / (norm + eps) - slope * start).to(matrix.dtype)
