"""The norm of what a branch reads is folded into the read, or left alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hc_compile as hc
from hc_compile.layers import rms_norm
from hc_compile.passes import PASSES
from hc_compile.passes.fold_norm import fold_norm
from hc_compile.passes.graph import arguments, is_op
from tests.conftest import worst
from tests.passes.harness import assert_equal, results, with_passes
from tests.test_presets import DIM, draw, takes


class Llama(nn.Module):
    """As transformers writes it: narrowed before the weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(DIM))

    def forward(self, h):
        dtype = h.dtype
        h = h.to(torch.float64)
        variance = h.pow(2).mean(-1, keepdim=True)
        h = h * torch.rsqrt(variance + 1e-6)
        return self.weight * h.to(dtype)


class Called(nn.Module):
    """A function of h, weight and shift as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(DIM))
        self.shift = nn.Parameter(torch.zeros(DIM))

    def forward(self, h):
        return self.function(h, self.weight, self.shift)


FOLDED = {
    "RMSNorm": lambda: nn.RMSNorm(DIM, eps=1e-5),
    "LayerNorm": lambda: nn.LayerNorm(DIM),
    "LayerNorm without bias": lambda: nn.LayerNorm(DIM, bias=False),
    "rms_norm": lambda: Called(lambda h, w, b: F.rms_norm(h, (DIM,), w, 1e-6)),
    "layer_norm": lambda: Called(lambda h, w, b: F.layer_norm(h, (DIM,), w, b, eps=1e-3)),
    "ours": lambda: Called(lambda h, w, b: rms_norm(h, w, 1e-6)),
    "Llama's": Llama,
}
LEFT_ALONE = {
    "no weight": lambda: Called(lambda h, w, b: F.rms_norm(h, (DIM,), None, 1e-6) * w * b),
    "no eps": lambda: nn.RMSNorm(DIM),
    "another user": lambda: Called(lambda h, w, b: F.rms_norm(h, (DIM,), w, 1e-6) + h * b),
    "one more use inside": lambda: Called(lambda h, w, b: twice(h) * w + b),
    "over two dimensions": lambda: Called(lambda h, w, b: F.layer_norm(h, h.shape[-2:]) * w + b),
    "weight made later": lambda: Called(lambda h, w, b: F.rms_norm(h, (DIM,), w * 2 + b, 1e-6)),
    "another mean": lambda: Called(lambda h, w, b: other(h) * w + b),
}


def twice(h):
    scale = torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)
    return h * scale + scale


def other(h):
    return h * torch.rsqrt(h.square().mean(-2, keepdim=True) + 1e-6)


class Net(nn.Module):
    """Two sublayers with a norm each: a lone read, then a boundary."""

    def __init__(self, cfg, norm):
        super().__init__()
        self.norms = nn.ModuleList(norm() for _ in range(2))
        self.layers = nn.ModuleList(
            hc.HyperConnection(cfg, k, dtype=torch.float64) for k in range(2)
        )

    def forward(self, x):
        for norm, layer in zip(self.norms, self.layers, strict=True):
            u, add = layer(x)
            x = add(torch.tanh(norm(u)))
        return hc.resolve(x)


def run(name, norm, n=4, dtype=torch.float64, passes=PASSES):
    """Norms folded into pre and post_pre, our results and those without passes."""
    torch.manual_seed(0)
    cfg = hc.HCConfig(DIM, n, name)
    net = Net(cfg, norm)
    for k, p in enumerate(net.parameters()):
        p.data = (p + 0.3 * draw(*p.shape, seed=k)).detach()
    x = draw(2, 5, n, DIM).to(dtype).requires_grad_()
    folded = {}

    def look(graph):
        for node in graph.nodes:
            for op in ("pre", "post_pre"):
                if is_op(node, op):
                    folded[op] = arguments(node, op)["weight"] is not None
        return False

    net.norms.to(dtype)
    ours = results(with_passes(net, [*passes, look]), net, x)
    return folded, ours, results(net, net, x)


@pytest.mark.parametrize("norm", FOLDED)
def test_norms_are_folded(norm):
    folded, ours, plain = run("mhc", FOLDED[norm])
    assert folded == {"pre": True, "post_pre": True}
    assert_equal(ours, plain)


@pytest.mark.parametrize("norm", LEFT_ALONE)
def test_norms_that_are_left_alone(norm):
    folded, ours, plain = run("mhc", LEFT_ALONE[norm])
    assert folded == {"pre": False, "post_pre": False}
    assert_equal(ours, plain)


@pytest.mark.parametrize("name", [p for p in hc.PRESETS if p != "residual"])
def test_every_preset(name):
    """Fractions are several views, whose norm is over all of them: left alone.

    So is a boundary with delayed pre, which makes u in the pass that writes x'.
    """
    folded, ours, plain = run(name, FOLDED["RMSNorm"], n=3 if takes(name, 3) else 4)
    assert folded == {"pre": name != "fhc", "post_pre": name not in ("fhc", "mhc-v4.1")}
    assert_equal(ours, plain)


@pytest.mark.parametrize("norm", ["RMSNorm", "LayerNorm", "ours"])
def test_bfloat16_streams(norm):
    """The folded norm rounds no more often than the one it replaces."""
    folded, ours, plain = run("mhc", FOLDED[norm], dtype=torch.bfloat16)
    assert folded == {"pre": True, "post_pre": True}
    *_, exact = run("mhc", FOLDED[norm], passes=())
    for a, b, c in zip(ours, plain, exact, strict=True):
        if a is None:  # the shift that an RMSNorm has no use for
            assert b is None
            continue
        assert a.dtype == b.dtype and worst(a, c) <= 1.5 * worst(b, c) + 8e-3


def test_alone_before_boundary_fusion():
    """The pass does not depend on the others: a lone read is enough."""
    folded, ours, plain = run("mhc", FOLDED["RMSNorm"], passes=[fold_norm])
    assert folded == {"pre": True}
    assert_equal(ours, plain)
