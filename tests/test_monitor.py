"""Monitors against written-out figures, compiled, recomputed, and off."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import hc_compile as hc
from hc_compile import monitor
from hc_compile.fractions import split
from tests.test_presets import DIM, PRESETS, Net, draw


def net_of(name="mhc", n=4):
    net = Net(hc.HCConfig(DIM, n, name))
    with torch.no_grad():
        for k, connection in enumerate(net.connections):
            for p in connection.parameters():
                p.copy_(draw(*p.shape, seed=k))
    return net


def matrices(net, h):
    """res and streams of every sublayer, found without the monitor."""
    x, found = net.expand(h), []
    for connection, branch in zip(net.connections, net.branches, strict=True):
        c = connection.cfg.constraint
        parts = split(hc.resolve(x), connection.cfg.fractions)
        res = hc.functional.coefficients(parts, *connection.coefficients(), c)[2]
        found.append((res.double().expand(*parts.shape[:-1], c.streams), parts.double()))
        u, add_residual = connection(x)
        x = add_residual(branch(u))
    return found


@pytest.mark.parametrize("name", PRESETS)
def test_figures_are_those_of_the_matrices(name):
    net, h = net_of(name), draw(2, 5, DIM)
    monitor.watch(net, tokens=10)
    net(h)
    found = monitor.report(net)
    assert list(found) == [f"connections.{k}" for k in range(4)] + ["composite"]
    n = net.connections[0].cfg.constraint.streams
    composite, ones = torch.eye(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
    for k, (res, x) in enumerate(matrices(net, h)):
        composite = res @ composite
        own = found[f"connections.{k}"]
        spectral = torch.linalg.svdvals(res)[..., 0].mean().item()
        assert own["spectral"] == pytest.approx(spectral, rel=1e-5)
        assert own["log_amax"] == pytest.approx(math.log(spectral), abs=1e-5)
        row = (res @ ones).abs().amax(-1).mean().item()
        column = (res.mT @ ones).abs().amax(-1).mean().item()
        assert own["row_gain"] == pytest.approx(row, rel=1e-5)
        assert own["column_gain"] == pytest.approx(column, rel=1e-5)
        pairs = [
            torch.cosine_similarity(x[..., i, :], x[..., j, :], dim=-1).mean()
            for i in range(n)
            for j in range(n)
            if i != j
        ]
        assert own["similarity"] == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-5)
    expected = torch.linalg.svdvals(composite)[..., 0].mean().item()
    assert found["composite"]["spectral"] == pytest.approx(expected, rel=1e-4)


def test_manifold_keeps_what_linear_mixes_let_grow():
    """Twice the identity grows as 2^L, and a doubly stochastic composite stays at 1."""
    doubled, bound = net_of("shc"), net_of("mhc")
    with torch.no_grad():
        for connection in doubled.connections:
            connection.coefficients.bias[8:] = 2 * torch.eye(4).flatten()
    for net in (doubled, bound):
        monitor.watch(net)
        net(draw(2, 5, DIM))
    assert monitor.report(doubled)["composite"]["spectral"] == pytest.approx(16.0)
    assert monitor.report(doubled)["connections.2"]["log_amax"] == pytest.approx(math.log(2))
    assert monitor.report(bound)["composite"]["row_gain"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("tokens", [3, 10, 64])
def test_looks_at_evenly_spaced_tokens(tokens):
    net, h = net_of(), draw(2, 5, DIM)
    monitor.watch(net, tokens=tokens)
    net(h)
    res = matrices(net, h)[1][0].flatten(0, 1)
    rows = [k * 10 // tokens for k in range(tokens)]
    torch.testing.assert_close(net.connections[1].monitor.matrices(), res[rows])


def test_off_unless_asked():
    net, h = net_of(), draw(2, 5, DIM)
    plain, keys = net(h), list(net.state_dict())
    assert monitor.report(net) == {}
    monitor.watch(net)
    assert monitor.report(net) == {} and net.connections[0].monitor.log_amax() is None
    assert torch.equal(net(h), plain)
    assert list(net.state_dict()) == keys and len(monitor.report(net)) == 5
    monitor.unwatch(net)
    assert monitor.report(net) == {} and torch.equal(net(h), plain)


def test_blanket_bfloat16_does_not_round_the_figures():
    net = net_of().to(torch.bfloat16)
    monitor.watch(net)
    net.to(torch.bfloat16)
    assert net.connections[0].monitor.res.dtype == torch.float32


class Checkpointed(nn.Module):
    """A net whose sublayers are recomputed in the backward."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def sublayer(self, x, k):
        u, add_residual = self.net.connections[k](x)
        return add_residual(self.net.branches[k](u))

    def forward(self, h):
        x = self.net.expand(h)
        for k in range(len(self.net.branches)):
            x = checkpoint(self.sublayer, x, k, use_reentrant=False)
        return self.net.norm(self.net.reduce(x))


def compiled(backend):
    def wrap(model):
        return torch.compile(model, fullgraph=True, backend=backend)

    return wrap


WAYS = {
    "eager": lambda net: net,
    "aot_eager": compiled("aot_eager"),
    "checkpoint": Checkpointed,
    "compiled checkpoint": lambda net: compiled("aot_eager")(Checkpointed(net)),
}


@pytest.mark.parametrize("name", ["mhc", "shc"])
@pytest.mark.parametrize("way", WAYS)
def test_same_figures_compiled_and_recomputed(way, name):
    check(WAYS[way], name)


@pytest.mark.compile
def test_same_figures_under_inductor_with_passes():
    check(lambda net: hc.compile(Checkpointed(net), fullgraph=True), "mhc")


def check(wrap, name):
    """Figures after forward, after backward, and after a second batch; gradients untouched."""
    plain, net = net_of(name), net_of(name)
    monitor.watch(plain)
    monitor.watch(net)
    run = wrap(net)
    for seed in (1, 2):
        h, cot = draw(2, 5, DIM, seed=seed), draw(2, 5, DIM, seed=9)
        plain(h).backward(cot)
        expected = monitor.report(plain)
        out = run(h)
        assert_close(monitor.report(net), expected)
        out.backward(cot)
        assert_close(monitor.report(net), expected)
    for p, q in zip(plain.parameters(), net.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= 1e-4 * p.grad.abs().max() + 1e-6


def assert_close(found, expected):
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-4, abs=1e-6), name


def test_compiles_for_any_number_of_tokens():
    net = net_of()
    monitor.watch(net, tokens=8)
    run = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (3, 7, 30):
        h = draw(2, length, DIM)
        run(h)
        found = monitor.report(net)
        net(h)
        assert_close(monitor.report(net), found)


def test_errors_and_one_stream():
    with pytest.raises(ValueError, match="model must contain a HyperConnection with n > 1"):
        monitor.watch(Net(hc.HCConfig(DIM, 1)))
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        monitor.watch(net_of(), tokens=0)


def test_no_tokens_leave_it_as_it_was():
    net = net_of()
    monitor.watch(net)
    net(draw(0, 5, DIM))
    assert net.connections[0].monitor.log_amax() is None
