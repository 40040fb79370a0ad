"""The read with its norm, forward and backward, against float64."""

import pytest
import torch

from custom_ops.kernels.aggregate_norm import MOST_STREAMS, aggregate_norm, aggregate_norm_backward
from tests.kernels.cases import DTYPES, SHAPES, anywhere, on_gpu, random, worst

pytestmark = anywhere

LIMITS = {torch.bfloat16: 1.6e-2, torch.float16: 2e-3, torch.float32: 1e-5}
EPS = 1e-5


def case(tokens, streams, width, dtype):
    """x, pre, weight, shift and the cotangent of the normed read."""
    return (
        random(tokens, streams, width, dtype=dtype, seed=1),
        random(tokens, streams, seed=2),
        random(width, dtype=dtype, seed=3),
        random(width, seed=4),
        random(tokens, width, dtype=dtype, seed=5),
    )


def plain(x, pre, weight, shift, dv, centred, precision):
    """v, du, ⟨du, x_i⟩, dweight and dshift in plain torch; below float64, u and du are rounded."""
    dtype = x.dtype if precision != torch.float64 else precision
    x, pre, weight, shift, dv = (t.to(precision) for t in (x, pre, weight, shift, dv))
    u = torch.einsum("tn,tnc->tc", pre, x).to(dtype).to(precision).requires_grad_()
    weight, shift = weight.requires_grad_(), shift.requires_grad_()
    d = u - u.mean(-1, keepdim=True) if centred else u
    v = d * torch.rsqrt(d.square().mean(-1, keepdim=True) + EPS) * weight + shift
    du, dweight, dshift = torch.autograd.grad(v, [u, weight, shift], dv)
    v, du = v.to(dtype).to(precision), du.to(dtype).to(precision)
    return [t.detach() for t in (v, du, torch.einsum("tc,tnc->tn", du, x), dweight, dshift)]


def ours(x, pre, weight, shift, dv, centred):
    v = aggregate_norm(x, pre, weight, shift, centred, EPS)
    return [v, *aggregate_norm_backward(dv, x, pre, weight, True, centred, EPS)]


# A norm hides the scale of its input: with one stream or one column ⟨du, x⟩ is rounding alone.
NORMED = [s for s in SHAPES if 1 < s[1] <= MOST_STREAMS and s[2] > 1]


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", NORMED, ids=str)
def test_read_and_its_norm(shape, dtype, centred):
    inputs = case(*shape, dtype)
    exact = plain(*inputs, centred, torch.float64)
    narrow = plain(*inputs, centred, torch.float32)
    for mine, single, true in zip(ours(*inputs, centred), narrow, exact, strict=True):
        assert mine.shape == true.shape
        assert worst(mine, true) <= 2 * worst(single, true) + LIMITS[dtype]


def test_without_shift():
    x, pre, weight, shift, dv = case(5, 4, 70, torch.float32)
    zero = torch.zeros_like(shift)
    assert torch.equal(
        aggregate_norm(x, pre, weight, None, False, EPS),
        aggregate_norm(x, pre, weight, zero, False, EPS),
    )
    without = aggregate_norm_backward(dv, x, pre, weight, False, False, EPS)
    whole = aggregate_norm_backward(dv, x, pre, weight, True, False, EPS)
    assert without[3].numel() == 0
    assert all(torch.equal(a, b) for a, b in zip(without[:3], whole[:3], strict=True))


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens):
    x, pre, weight, shift, dv = case(tokens, 2, 33, torch.float32)
    v, du, dots, dweight, _ = ours(x, pre, weight, shift, dv, False)
    assert v.shape == du.shape == (tokens, 33) and dots.shape == (tokens, 2)
    assert tokens or not dweight.any()


def test_a_token_does_not_see_the_others():
    x, pre, weight, shift, dv = case(6, 4, 70, torch.float32)
    before = ours(x, pre, weight, shift, dv, True)[:3]
    x[3:] += 1.0
    dv[3:] = float("nan")
    after = ours(x, pre, weight, shift, dv, True)[:3]
    assert all(torch.equal(a[:3], b[:3]) for a, b in zip(before, after, strict=True))


@on_gpu
def test_bitwise_repeatable():
    inputs = case(1000, 4, 2560, torch.bfloat16)
    first = ours(*inputs, True)
    for _ in range(200):
        assert all(torch.equal(a, b) for a, b in zip(first, ours(*inputs, True), strict=True))
