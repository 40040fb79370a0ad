"""Sinkhorn kernels against float64 autograd of the reference."""

import pytest
import torch

from custom_ops import reference
from custom_ops.kernels.sinkhorn import sinkhorn, sinkhorn_backward
from tests.kernels.cases import DEVICE, INTERPRETED, anywhere, check, normal

pytestmark = anywhere
TOKENS = 5 if INTERPRETED else 1003
RULES = {
    "globalmax": ("exp-globalmax", "column", "max", 1e-30),
    "exp": ("exp", "row", "add", 1e-6),
    "rowmax": ("exp-rowmax", "row", "add", 1e-6),
    "softmax": ("softmax", "row", "add", 1e-6),
    "abs": ("abs", "column", "add", 1e-6),
    "log": ("log", "column", "max", 1e-30),
}


def exact(logits, cotangent, rule, dtype):
    leaf = logits.to(dtype).requires_grad_()
    out = reference.sinkhorn(leaf, *rule)
    (grad,) = torch.autograd.grad(out, leaf, cotangent.to(dtype))
    return out.detach(), grad


def compare(logits, rule):
    cotangent = normal(*logits.shape, seed=1)
    value = (sinkhorn(logits, *rule), sinkhorn_backward(cotangent, logits, *rule))
    wide = exact(logits, cotangent, rule, torch.float64)
    eager = exact(logits, cotangent, rule, torch.float32)
    for v, w, e in zip(value, wide, eager, strict=True):
        check(v, w, e)


@pytest.mark.parametrize("std", [1, 10] if INTERPRETED else [1, 5, 10])
@pytest.mark.parametrize("iterations", [0, 1, 2, 20] if INTERPRETED else [0, 1, 2, 5, 20])
@pytest.mark.parametrize("name", RULES)
def test_truncated_gradient(name, iterations, std):
    compare(normal(TOKENS, 4, 4) * std, (iterations, *RULES[name]))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 7, 8, 16])
@pytest.mark.parametrize("name", ["globalmax", "rowmax", "softmax", "log"])
def test_sizes(name, n):
    compare(normal(3, n, n) * 2, (3 if INTERPRETED else 12, *RULES[name]))


@pytest.mark.parametrize("name", ["globalmax", "rowmax"])
def test_ties_share_the_gradient_of_the_maximum(name):
    compare(normal(TOKENS, 3, 3).round(), (1, *RULES[name][:3], 1e-2))


@pytest.mark.parametrize("tokens", [1, 31, 33])
def test_a_token_does_not_see_the_batch(tokens):
    rule = (20, *RULES["globalmax"])
    logits, cotangent = normal(33, 4, 4), normal(33, 4, 4, seed=1)
    whole = sinkhorn(logits, *rule), sinkhorn_backward(cotangent, logits, *rule)
    part = (
        sinkhorn(logits[-tokens:].contiguous(), *rule),
        sinkhorn_backward(cotangent[-tokens:].contiguous(), logits[-tokens:].contiguous(), *rule),
    )
    assert all(torch.equal(w[-tokens:], p) for w, p in zip(whole, part, strict=True))


@pytest.mark.parametrize("name", ["globalmax", "log"])
def test_a_bad_token_stays_alone(name):
    rule = (20, *RULES[name])
    logits = normal(5, 3, 3)
    good = sinkhorn(logits, *rule)
    logits[2, 1, 1] = float("nan")
    bad = sinkhorn(logits, *rule)
    assert bad[2].isnan().all()
    keep = torch.tensor([0, 1, 3, 4], device=DEVICE)
    assert torch.equal(good[keep], bad[keep])


@pytest.mark.parametrize("value", [0.0, 1e4, -1e4])
def test_extreme_logits_are_finite(value):
    logits = normal(3, 4, 4)
    logits[1] = value
    logits[2, 0, 0] = value
    rule = (20, *RULES["globalmax"])
    assert sinkhorn(logits, *rule).isfinite().all()
    assert sinkhorn_backward(normal(3, 4, 4, seed=1), logits, *rule).isfinite().all()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter truncates to bfloat16")
def test_bfloat16_logits():
    logits = normal(TOKENS, 4, 4).bfloat16()
    rule = (20, *RULES["globalmax"])
    out = sinkhorn(logits, *rule)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, sinkhorn(logits.float(), *rule).bfloat16())
