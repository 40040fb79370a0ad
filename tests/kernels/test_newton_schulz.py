"""Newton–Schulz kernels against float64 autograd of the reference."""

import pytest
import torch

from custom_ops import reference
from custom_ops.constraint import NEWTON_SCHULZ_SCHEDULE
from custom_ops.kernels.newton_schulz import newton_schulz, newton_schulz_backward
from tests.kernels.cases import DEVICE, INTERPRETED, anywhere, check, normal

pytestmark = anywhere
SHORT = ((3.0, -3.2, 1.2),) * 5


def exact(matrix, cotangent, schedule, dtype):
    leaf = matrix.to(dtype).requires_grad_()
    out = reference.newton_schulz(leaf, schedule)
    (grad,) = torch.autograd.grad(out, leaf, cotangent.to(dtype))
    return out.detach(), grad


def compare(matrix, schedule):
    cotangent = normal(*matrix.shape, seed=1)
    value = (newton_schulz(matrix, schedule), newton_schulz_backward(cotangent, matrix, schedule))
    wide = exact(matrix, cotangent, schedule, torch.float64)
    eager = exact(matrix, cotangent, schedule, torch.float32)
    for v, w, e in zip(value, wide, eager, strict=True):
        # n = 1: the gradient is 0 but for rounding, which is measured against 0.01
        check(v, w, e, slack=5e-6 if matrix.shape[-1] > 1 else 5e-3)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("schedule", [SHORT[:1] if INTERPRETED else SHORT, SHORT[:3]])
def test_small(n, schedule):
    # Far from singular, where rounding would be amplified without bound.
    compare(normal(3 if INTERPRETED else 501, n, n) * 0.1 + torch.eye(n, device=DEVICE), schedule)


@pytest.mark.parametrize("n", [3, 4])
def test_full_schedule(n):
    matrix = normal(3 if INTERPRETED else 501, n, n) * 0.1 + torch.eye(n, device=DEVICE)
    compare(matrix, NEWTON_SCHULZ_SCHEDULE)


def test_zero_matrix_has_a_finite_gradient():
    matrix = normal(2, 4, 4) * 0
    grad = newton_schulz_backward(normal(2, 4, 4, seed=1), matrix, SHORT)
    assert grad.isfinite().all()


@pytest.mark.parametrize("n", [9, 40] if INTERPRETED else [9, 16, 33, 64, 100, 128])
def test_tiled(n):
    eye = torch.eye(n, device=DEVICE)
    compare(normal(2, n, n) * 0.5 / n**0.5 + eye, SHORT)
