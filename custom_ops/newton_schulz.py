"""hc::newton_schulz: the polar factor of each [..., n, n] matrix, batched.

X <- aX + (bA + cA²)X with A = XXᵀ, from X = L/(‖L‖_F + eps), per matrix (the orthostochastic
variant of mHC squares the result). Moves: 2n² floats a matrix forward, 3n² backward.
"""

import torch
from torch import Tensor

from custom_ops import reference
from custom_ops.registration import (
    define,
    define_opaque,
    double_backward,
    flat,
    matmul,
    use_triton,
)


def steps(schedule: list[float]) -> list[tuple[float, float, float]]:
    """(a, b, c) of each step from the flat list that the op takes."""
    return [(schedule[i], schedule[i + 1], schedule[i + 2]) for i in range(0, len(schedule), 3)]


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.float64 if t.dtype == torch.float64 else torch.float32)


def _loop(matrix: Tensor, schedule: list[float], eps: float) -> Tensor:
    x = _wide(matrix)
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + eps)
    for a, b, c in steps(schedule):
        gram = matmul(x, x.mT)
        x = a * x + matmul(b * gram + c * matmul(gram, gram), x)
    return x.contiguous()


def _loop_backward(grad: Tensor, matrix: Tensor, schedule: list[float], eps: float) -> Tensor:
    wide, grad = _wide(matrix), _wide(grad)
    norm = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True)
    x = wide / (norm + eps)
    history = []
    for a, b, c in steps(schedule):
        gram = matmul(x, x.mT)
        history.append((x, gram))
        x = a * x + matmul(b * gram + c * matmul(gram, gram), x)
    for (x, gram), (a, b, c) in zip(reversed(history), reversed(steps(schedule)), strict=True):
        poly = b * gram + c * matmul(gram, gram)
        dpoly = matmul(grad, x.mT)
        dgram = b * dpoly + c * (matmul(dpoly, gram) + matmul(gram, dpoly))
        grad = a * grad + matmul(poly, grad) + matmul(dgram + dgram.mT, x)
    inner = (grad * wide).sum((-2, -1), keepdim=True)
    slope = torch.where(norm > 0, inner / (norm * (norm + eps).square()), 0)
    return (grad / (norm + eps) - wide * slope).contiguous()


def _loop_fake(matrix, schedule, eps):
    dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    return torch.empty(matrix.shape, dtype=dtype, device=matrix.device)


newton_schulz_loop = define_opaque("newton_schulz_loop", _loop, _loop_fake)
newton_schulz_loop_backward = define_opaque(
    "newton_schulz_loop_backward",
    _loop_backward,
    lambda grad, matrix, schedule, eps: _loop_fake(matrix, schedule, eps),
)


def forward(matrix: Tensor, schedule: list[float], eps: float) -> Tensor:
    if use_triton(matrix):
        from custom_ops.kernels import newton_schulz as kernels

        out = kernels.newton_schulz(flat(matrix, 2), tuple(steps(schedule)), eps)
        return out.reshape(matrix.shape)
    return newton_schulz_loop(matrix, schedule, eps).to(matrix.dtype)


def backward(grad: Tensor, matrix: Tensor, schedule: list[float], eps: float) -> Tensor:
    if use_triton(matrix):
        from custom_ops.kernels import newton_schulz as kernels

        out = kernels.newton_schulz_backward(
            flat(grad, 2), flat(matrix, 2), tuple(steps(schedule)), eps
        )
        return out.reshape(matrix.shape)
    out = newton_schulz_loop_backward(grad, matrix, schedule, eps)
    return out.to(matrix.dtype)


def _fake(matrix, schedule, eps):
    return torch.empty(matrix.shape, dtype=matrix.dtype, device=matrix.device)


newton_schulz = define("newton_schulz", forward, _fake)
newton_schulz_backward = define(
    "newton_schulz_backward",
    backward,
    lambda grad, matrix, schedule, eps: _fake(matrix, schedule, eps),
)


def _setup_context(ctx, inputs, output):
    matrix, *ctx.options = inputs
    ctx.save_for_backward(matrix)


def _autograd(ctx, grad):
    (matrix,) = ctx.saved_tensors
    return torch.ops.hc.newton_schulz_backward(grad, matrix, *ctx.options), None, None


newton_schulz.register_autograd(_autograd, setup_context=_setup_context)
double_backward(
    newton_schulz_backward,
    1,
    1,
    lambda prims, rest: [reference.newton_schulz(prims[0], steps(rest[0]), rest[1])],
)
