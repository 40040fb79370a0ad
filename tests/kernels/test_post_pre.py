"""hc::post_pre where its fused kernel runs, against float64, forward and backward."""

import pytest
import torch

from custom_ops import post_pre as op
from custom_ops import reference
from custom_ops.constraint import Constraint
from custom_ops.kernels import slots
from tests.conftest import worst
from tests.kernels.cases import DEVICE, INTERPRETED, anywhere, normal

pytestmark = anywhere

SHAPES = [(5, 4, 70), (37, 3, 33), (1, 2, 64), (3, 4, 300)]
SHAPES += [] if INTERPRETED else [(203, 4, 640), (65, 4, 2560), (77, 2, 5129), (300, 3, 1280)]
LIMIT = 1.6e-2  # two units of bf16 in the last place


@pytest.fixture(autouse=True)
def _fused(monkeypatch):
    monkeypatch.setattr(op, "FUSED_ALIGNMENT", 1)  # the kernels take any width


def boundary(tokens, n, width, delayed=False):
    """x, y, post, res, φ, α and b of one boundary, and the carried pre where there is one."""
    c = Constraint(n, iterations=3)
    depth = n * width
    return [
        normal(tokens, n, width, seed=1).bfloat16(),
        normal(tokens, width, seed=2).bfloat16(),
        normal(tokens, n, seed=3),
        torch.softmax(normal(tokens, n, n, seed=4), -1),
        normal(c.total, depth, seed=5) / depth**0.5,
        1 + 0.1 * normal(3, seed=6),
        normal(c.total, seed=7),
        *([normal(tokens, n, seed=8)] if delayed else []),
    ], c


def composite(x, y, post, res, phi, alpha, bias, c, carried=None):
    return reference.post_pre(x, y, post, res, phi, alpha, bias, c, carried=carried)


def fused(
    x, y, post, res, phi, alpha, bias, c, carried=None, ghost=None, with_ghost=False, weighed=False
):
    options = (c.spec, ghost, with_ghost, None, None, carried, weighed)
    return torch.ops.hc.post_pre(x, y, post, res, phi, alpha, bias, *options)


def close(ours, eager, exact):
    """Twice the error of plain torch, and rounding; the interpreter truncates to bf16."""
    factor = 4 if INTERPRETED else 2
    for a, e, b in zip(ours, eager, exact, strict=True):
        a, e, b = a.detach(), e.detach(), b.detach()
        assert a.shape == b.shape and worst(a, b) <= factor * worst(e, b) + LIMIT


def gradients(outputs, inputs, cotangents):
    live = [(o, g.to(o)) for o, g in zip(outputs, cotangents, strict=True) if g is not None]
    return torch.autograd.grad([o for o, _ in live], inputs, [g for _, g in live])


@pytest.mark.parametrize("delayed", [False, True], ids=["", "delayed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_ghost(shape, delayed):
    inputs, c = boundary(*shape, delayed)
    assert op.fits(*inputs[:4], c)
    wide = [t.double().requires_grad_() for t in inputs]
    leaves = [t.requires_grad_() for t in inputs]
    exact = composite(*wide[:7], c, *wide[7:])
    outputs = fused(*leaves[:7], c, *leaves[7:])[:5]
    cotangents = [normal(*o.shape, seed=8 + i).to(o.dtype) for i, o in enumerate(outputs)]
    ours = [*outputs, *gradients(outputs, leaves, cotangents)]
    true = [*exact, *gradients(exact, wide, cotangents)]
    plain = composite(*leaves[:7], c, *leaves[7:])
    close(ours, [*plain, *gradients(plain, leaves, cotangents)], true)


def test_of_one_stream():
    """The seam after a network's first sublayer, whose streams are copies."""
    inputs, c = boundary(37, 4, 96)
    inputs[0], inputs[3] = inputs[0][:, :1].contiguous(), inputs[3].sum(-1, keepdim=True)
    assert op.fits(*inputs[:4], c)
    wide = [t.double().requires_grad_() for t in inputs]
    leaves = [t.requires_grad_() for t in inputs]
    exact, plain = composite(*wide, c), composite(*leaves, c)
    outputs = fused(*leaves, c)[:5]
    cotangents = [normal(*o.shape, seed=8 + i).to(o.dtype) for i, o in enumerate(outputs)]
    results = [
        [*made, *gradients(made, given, cotangents)]
        for made, given in ((outputs, leaves), (plain, leaves), (exact, wide))
    ]
    close(*results)


@pytest.mark.parametrize("width", [96, 128])  # of these the second has its backward at once
@pytest.mark.parametrize("weighed", [False, True], ids=["summed", "weighed"])
def test_of_streams_of_which_one_is_left(weighed, width):
    """The last post makes one stream: the ghost brings its cotangent back for all of them."""
    inputs, c = boundary(37, 4, width)
    y, weights = normal(37, width, seed=40).bfloat16(), normal(37, 4, seed=41)
    leaves = [t.requires_grad_() for t in (*inputs, y, weights)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    cotangent = normal(37, 1, width, seed=42).bfloat16()

    def plain(x, y0, post0, res0, phi, alpha, bias, y, weights):
        streams, u, pre, _, res = composite(x, y0, post0, res0, phi, alpha, bias, c)
        left = reference.post(streams, y + u, weights * pre, res)
        return (pre[..., None] * left if weighed else left).sum(-2, keepdim=True)

    def ours(x, y0, post0, res0, phi, alpha, bias, y, weights):
        streams, u, pre, _, res, _, _, ghost = fused(
            x, y0, post0, res0, phi, alpha, bias, c, with_ghost=True, weighed=weighed
        )
        assert ghost.shape[-2] == (1 if weighed else 4)
        write, mix = weights * pre, res
        if weighed:
            write, mix = pre * write, pre[..., None] * mix
        write, mix = write.sum(-1, keepdim=True), mix.sum(-2, keepdim=True)
        return torch.ops.hc.post(streams.detach(), y + u, write, mix, ghost)

    results = []
    for function, given in ((ours, leaves), (plain, leaves), (plain, wide)):
        made = function(*given)
        results.append([made, *torch.autograd.grad(made, given, cotangent.to(made.dtype))])
    close(*results)


@pytest.mark.parametrize("extra", [False, True], ids=["alone", "with another user of x'"])
@pytest.mark.parametrize("delayed", [False, True], ids=["", "delayed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_with_ghosts(shape, delayed, extra):
    """The cotangent of the streams two posts later comes in, that of x' goes out."""
    inputs, c = boundary(*shape, delayed)
    leaves = [t.requires_grad_() for t in inputs]
    ghost = torch.zeros_like(inputs[0], requires_grad=True)
    carried = leaves[7] if delayed else None
    outputs = fused(inputs[0].detach(), *leaves[1:7], c, carried, ghost, True)
    streams, u, *coefficients, _, _, next_ghost = outputs
    later = normal(*inputs[0].shape, seed=20).bfloat16()
    cots = [normal(*u.shape, seed=21).bfloat16()]
    cots += [normal(*t.shape, seed=22 + i) for i, t in enumerate(coefficients)]
    mine = normal(*streams.shape, seed=30).bfloat16() if extra else None
    found = gradients(
        [u, *coefficients, next_ghost, streams], [*leaves[1:], ghost], [*cots, later, mine]
    )

    def expected(precision):
        tensors = [t.detach().to(precision or t.dtype).requires_grad_() for t in inputs]
        written = reference.post(*tensors[:4])
        read, *made = reference.pre(written, *tensors[4:7], c, None, None, *tensors[7:])
        total = torch.einsum("tij,tic->tjc", made[2].detach(), later.to(made[2].dtype))
        total = total if mine is None else total + mine
        return gradients([read, *made, written], [*tensors[1:], written], [*cots, total])

    close(found, expected(None), expected(torch.float64))


@pytest.mark.parametrize("delayed", [False, True], ids=["", "delayed"])
@pytest.mark.parametrize("width", [96, 520] if INTERPRETED else [96, 520, 2560, 7168])
def test_a_token_does_not_see_the_others(width, delayed, monkeypatch):
    """Few tokens take the turns of the loop apart (slots.py), and add them to the same bits."""
    if INTERPRETED:
        monkeypatch.setattr(slots, "few_tokens", lambda coefficients: 16)
    few = slots.few_tokens(24)
    most = few + (6 if INTERPRETED else 130)
    inputs, c = boundary(most, 4, width, delayed)

    def first(tokens):
        some = [t[:tokens].contiguous() for t in (*inputs[:4], *inputs[7:])]
        return fused(*some[:4], *inputs[4:7], c, *some[4:])[:7]

    whole = first(most)
    for tokens in (1, 5, few):
        for a, b in zip(whole, first(tokens), strict=True):
            assert torch.equal(a[:tokens], b)


def test_what_does_not_fit_takes_the_composite(monkeypatch):
    monkeypatch.setattr(op, "FUSED_ALIGNMENT", 16)
    (x, y, post, res, *_), c = boundary(3, 4, 32)
    assert op.fits(x, y, post, res, c)
    assert not op.fits(x[..., 1:], y, post, res, c)
    assert not op.fits(x, y, post[0], res[0], c)
    assert not op.fits(x, y, post, res, Constraint(4, views=2))
    assert not op.fits(x, y[:, None], post[:, None], res, c)
    assert not op.fits(x.half(), y, post, res, c)
    assert not op.fits(x, y, post, res, Constraint(4, precision="ieee"))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="a race shows on a device only")
def test_bitwise_repeatable():
    inputs, c = boundary(300, 4, 640)
    leaves = [t.requires_grad_() for t in inputs]

    def results():
        outputs = torch.ops.hc.post_pre(*leaves, c.spec)[:5]
        cotangents = [normal(*o.shape, seed=8 + i).to(o.dtype) for i, o in enumerate(outputs)]
        return [*outputs, *gradients(outputs, leaves, cotangents)]

    first = results()
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, results(), strict=True))
