"""Boundary fusion: op counts, equal outputs and gradients, and where it must not act."""

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import hc_compile as hc
from hc_compile.passes import PassPipeline
from hc_compile.passes.fuse_post_pre import fuse_post_pre
from tests.passes.harness import count
from tests.test_presets import DIM, PRESETS, Net, draw


class Counter:
    """A backend that runs the passes, counts the hc:: calls left and compiles with aot_eager."""

    def __init__(self, passes=(fuse_post_pre,)):
        self.pipeline = PassPipeline(passes)
        self.calls = {}

    def __call__(self, gm, inputs):
        self.pipeline(gm.graph)
        gm.recompile()
        count(gm, self.calls)
        return aot_autograd(fw_compiler=lambda g, _: g, bw_compiler=lambda g, _: g)(gm, inputs)


def run(function, net, *args):
    net.zero_grad()
    out = function(*args)
    out.backward(draw(*out.shape, seed=1))
    grads = [p.grad.clone() if p.grad is not None else None for p in net.parameters()]
    return [out.detach(), *grads]


def assert_close(a, b):
    for p, q in zip(a, b, strict=True):
        assert (p is None) == (q is None)
        if p is not None:
            assert (p - q).abs().max() <= 2e-5 * p.abs().max() + 1e-6


@pytest.mark.parametrize("name", PRESETS)
def test_counts_and_equality_on_four_sublayers(name):
    net = Net(hc.HCConfig(DIM, 4, name), layers=4)
    h = draw(2, 5, DIM)
    eager = run(net, net, h)
    counter = Counter()
    fused = run(torch.compile(net, backend=counter, fullgraph=True), net, h)
    assert_close(eager, fused)
    head = (
        1 if name == "mhc-v4" else 0
    )  # the learned head is one more pre, fused with the last post
    expected = {"pre": 1, "post_pre": 3 + head} | ({"post": 1} if not head else {})
    before = {"pre": 4 + head, "post": 4}
    if name == "mhc-v4.1":  # the state that its layers hand on fuses without a pass
        expected |= {"aggregate": 1}
        before = expected
    assert counter.calls == expected
    torch.compiler.reset()
    plain = Counter(passes=())
    unfused = run(torch.compile(net, backend=plain, fullgraph=True), net, h)
    assert_close(eager, unfused)
    assert plain.calls == before


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_other_stream_counts(n):
    net = Net(hc.HCConfig(DIM, n, "mhc"), layers=3)
    h = draw(3, DIM)
    counter = Counter()
    fused = run(torch.compile(net, backend=counter, fullgraph=True), net, h)
    assert_close(run(net, net, h), fused)
    assert counter.calls == {"pre": 1, "post_pre": 2, "post": 1}


class Shape(nn.Module):
    """Two sublayers whose seam is used in some particular way."""

    def __init__(self, kind):
        super().__init__()
        cfg = hc.HCConfig(DIM, 4, "mhc-v4")
        torch.manual_seed(0)
        self.first, self.second = (hc.HyperConnection(cfg, k) for k in range(2))
        self.branch = nn.Linear(DIM, DIM)
        self.kind = kind

    def forward(self, x):
        u, add_residual = self.first(x)
        y = self.branch(u)
        seam = add_residual(y)
        early = seam.square().mean() if self.kind == "used before" else 0.0
        if self.kind == "never":
            return u.sum(-1) * y.sum(-1)
        v, add_second = self.second(seam)
        if self.kind == "several users":
            return add_second(v) + seam.flip(-2)
        if self.kind == "twice":
            return add_second(v) + add_residual(2 * v)
        if self.kind == "two readers":
            w, add_third = self.first(seam)
            return add_second(v) * add_third(w)
        if self.kind == "late":
            return add_second(v) + self.first(x)[1](v)
        if self.kind == "dropout":
            return add_second(nn.functional.dropout(seam, 0.0).mean(-2) + v)
        return add_second(v) + early


@pytest.mark.parametrize(
    ("kind", "fused"),
    [
        ("plain", 1),
        ("several users", 1),
        ("used before", 1),
        ("twice", 1),
        ("two readers", 1),
        ("late", 1),
        ("dropout", 1),
        ("never", 0),
    ],
)
def test_seams_of_every_shape(kind, fused):
    net = Shape(kind)
    x = draw(3, 4, DIM).requires_grad_()
    counter = Counter()
    eager = run(net, net, x)
    grad, x.grad = x.grad, None
    compiled = run(torch.compile(net, backend=counter, fullgraph=True), net, x)
    assert_close([*eager, grad], [*compiled, x.grad])
    assert counter.calls.get("post_pre", 0) == fused


def test_shared_module_in_a_loop():
    cfg = hc.HCConfig(DIM, 4, "mhc")
    layer, branch = hc.HyperConnection(cfg, 1), nn.Linear(DIM, DIM)
    net = nn.ModuleList([layer, branch])

    def function(x):
        for _ in range(3):
            u, add_residual = layer(x)
            x = add_residual(branch(u))
        return x

    x = draw(3, 4, DIM)
    counter = Counter()
    fused = run(torch.compile(function, backend=counter, fullgraph=True), net, x)
    assert_close(run(function, net, x), fused)
    assert counter.calls == {"pre": 1, "post_pre": 2, "post": 1}


def test_graphs_without_hc_ops_are_untouched():
    def function(x):
        return torch.relu(x) + 1

    seen = []

    def backend(gm, inputs):
        code = gm.code
        PassPipeline()(gm.graph)
        gm.recompile()
        seen.append(code == gm.code)
        return gm

    torch.compile(function, backend=backend)(draw(3))
    assert seen == [True]


def test_lazy_state_needs_no_pass():
    """The carried state emits the fused op itself, also in graphs that end at every block."""
    net = Net(hc.HCConfig(DIM, 4, "mhc"), layers=3)

    def function(h):
        state = hc.StreamState(net.expand(h))
        for connection, branch in zip(net.connections, net.branches, strict=True):
            u, add_residual = connection(state)
            state = add_residual(branch(u))
        return net.norm(net.reduce(state))

    counter = Counter(passes=())
    h = draw(3, DIM)
    out = run(torch.compile(function, backend=counter, fullgraph=True), net, h)
    assert_close(run(net, net, h), out)
    assert counter.calls == {"pre": 1, "post_pre": 2, "post": 1}


def test_pipeline_identity_for_the_compile_cache():
    """Same passes, same uuid; another pass or an anonymous user pass, another or none."""
    assert PassPipeline().uuid() == PassPipeline().uuid()
    assert PassPipeline(passes=()).uuid() != PassPipeline().uuid()
    assert PassPipeline(then=lambda graph: None).uuid() is None
    assert PassPipeline(then=PassPipeline()).uuid() not in (None, PassPipeline().uuid())
