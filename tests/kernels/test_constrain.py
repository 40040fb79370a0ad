"""Constrain kernels, every kind, against float64 autograd of the reference."""

import pytest
import torch

from custom_ops import reference
from custom_ops.constraint import Constraint
from custom_ops.kernels.constrain import constrain, constrain_backward
from tests.kernels.cases import DEVICE, INTERPRETED, anywhere, check, normal

pytestmark = anywhere
WIDTH = 640
V4 = {"start": "softmax", "first": "row", "denominator": "add", "eps": 1e-6, "pre_eps": 1e-6}
KINDS = {
    "mhc": {"streams": 4},
    "mhc-8": {"streams": 8, "iterations": 6},
    "one": {"streams": 1},
    "v4": {"streams": 4, "transpose": True, **V4},
    "odd": {"streams": 3, "views": 2, "branches": 3, "pre": "sigmoid-sum", "pre_eps": 1e-6},
    "outside": {"streams": 2, "norm_form": "outside", "iterations": 2},
    "softmax": {"streams": 5, "pre": "softmax", "post": "softmax", "start": "log"},
    "temperature": {"streams": 4, "temperature": 0.5, "start": "exp-rowmax", "iterations": 2},
    "dhc": {
        "streams": 4, "projection": "stream", "manifold": "linear", "squash": "tanh",
        "pre": "linear", "post": "linear", "views": 2,
    },
    "dhc-odd": {
        "streams": 3, "projection": "stream", "manifold": "linear", "norm_form": "outside",
        "branches": 2, "transpose": True,
    },
    "dhc-identity": {"streams": 5, "projection": "stream", "manifold": "identity"},
    "ortho": {"streams": 4, "manifold": "newton-schulz"},
    "ortho-8": {"streams": 8, "manifold": "newton-schulz", "schedule": ((3.0, -3.2, 1.2),) * 2},
    "ortho-odd": {"streams": 3, "manifold": "newton-schulz", "transpose": True},
    "lite": {"streams": 4, "manifold": "permutation", "transpose": True},
    "lite-3": {"streams": 3, "manifold": "permutation", "temperature": 2.0},
    "lite-5": {"streams": 5, "manifold": "permutation"},
    "kron": {"streams": 4, "manifold": "kronecker", "temperature": 0.5},
    "kron-8": {"streams": 8, "manifold": "kronecker"},
    "kron-16": {"streams": 16, "manifold": "kronecker"},
    "kron-2": {"streams": 2, "manifold": "kronecker", "transpose": True},
    "ihc": {"streams": 4, "manifold": "identity", "pre_eps": 1e-6, "post_eps": 1e-6},
    "no-pre": {"streams": 4, "manifold": "none", "pre": "none"},
    "no-post": {"streams": 2, "manifold": "linear", "post": "none", "squash": "tanh"},
    "sixteen": {"streams": 16, "manifold": "linear"},
}  # fmt: skip


def inputs(c: Constraint, tokens: int):
    """p, ss, alpha, bias and the cotangents of pre, post and res."""
    n = c.streams
    stream = c.projection == "stream"
    p = normal(tokens, n, c.rows) if stream else normal(tokens, c.total)
    squares = normal(tokens, n, seed=1) if stream else normal(tokens, seed=1)
    ss = (squares.abs() + 0.1) * WIDTH
    alpha = torch.tensor([0.7, 1.3, 1.9], device=DEVICE)
    bias = normal(c.total, seed=2)
    if c.manifold == "newton-schulz":  # far from singular, see test_newton_schulz
        alpha[2] = 0.1
        bias[-n * n :] = torch.eye(n, device=DEVICE).flatten() + 0.1 * bias[-n * n :]
    shapes = [(count, n) if count > 1 else (n,) for count in (c.views, c.branches)] + [(n, n)]
    cotangents = [normal(tokens, *shape, seed=3 + i) for i, shape in enumerate(shapes)]
    return (p, ss, alpha, bias), cotangents


def autograd(args, cotangents, c, dtype):
    leaves = [a.to(dtype).requires_grad_() for a in args]
    outs = reference.constrain(*leaves, WIDTH, c)
    live = [(o, g.to(dtype)) for o, g in zip(outs, cotangents, strict=True) if o.requires_grad]
    grads = torch.autograd.grad(
        [o for o, _ in live], leaves, [g for _, g in live], materialize_grads=True
    )
    return [o.detach() for o in outs] + list(grads)


def compare(c: Constraint, tokens: int):
    args, cotangents = inputs(c, tokens)
    value = [*constrain(*args, WIDTH, c), *constrain_backward(*cotangents, *args, WIDTH, c)]
    wide = autograd(args, cotangents, c, torch.float64)
    eager = autograd(args, cotangents, c, torch.float32)
    for v, w, e in zip(value, wide, eager, strict=True):
        check(v, w, e, slack=1e-5 if c.manifold == "newton-schulz" else 2e-6)


@pytest.mark.parametrize("name", KINDS)
def test_kinds(name):
    compare(Constraint(**KINDS[name]), 5 if INTERPRETED else 999)


@pytest.mark.parametrize("tokens", [1, 2, 70] if INTERPRETED else [1, 2, 65_536])
def test_reductions_over_tokens(tokens):
    compare(Constraint(streams=4, iterations=2), tokens)


@pytest.mark.parametrize("name", ["mhc", "odd", "dhc", "dhc-odd", "lite"])
def test_split_partials(name):
    c = Constraint(**KINDS[name])
    args, _ = inputs(c, 5)
    shares = (0.5, 0.25, 0.125, 0.125)
    p, ss = (torch.stack([a * share for share in shares]) for a in args[:2])
    split = constrain(p, ss, *args[2:], WIDTH, c, len(shares))
    whole = [*constrain(*args, WIDTH, c), *args[:2]]
    for s, w in zip(split, whole, strict=True):
        torch.testing.assert_close(s, w, rtol=1e-5, atol=1e-5)


def test_runs_agree_bitwise():
    c = Constraint(streams=4, iterations=3)
    args, cotangents = inputs(c, 70 if INTERPRETED else 16_384)
    first = constrain_backward(*cotangents, *args, WIDTH, c)
    for _ in range(1 if INTERPRETED else 200):
        again = constrain_backward(*cotangents, *args, WIDTH, c)
        assert all(torch.equal(f, a) for f, a in zip(first, again, strict=True))


def test_a_token_does_not_see_the_batch():
    c = Constraint(streams=4, iterations=3)
    (p, ss, alpha, bias), _ = inputs(c, 37)
    whole = constrain(p, ss, alpha, bias, WIDTH, c)
    part = constrain(p[-3:].contiguous(), ss[-3:].contiguous(), alpha, bias, WIDTH, c)
    assert all(torch.equal(w[-3:], q) for w, q in zip(whole, part, strict=True))
