"""HyperConnection and its neighbours: wrapping, state, n = 1, errors."""

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import hc_compile as hc
from tests.test_presets import DIM, PRESETS, Net, draw

CFG = hc.HCConfig(DIM, 4)


def test_readme_story():
    layer = hc.HyperConnection(CFG, layer_index=0)
    mlp = nn.Linear(DIM, DIM)
    x = hc.expand_streams(draw(2, 3, DIM), CFG)
    u, add_residual = layer(x)
    assert u.shape == (2, 3, DIM)
    x = add_residual(mlp(u))
    wrapped = hc.HyperConnection(CFG, layer_index=1, branch=mlp)(x)
    assert wrapped.shape == (2, 3, 4, DIM)
    assert hc.reduce_streams(wrapped, CFG).shape == (2, 3, DIM)


def test_branch_arguments_and_extra_outputs_pass_through():
    def branch(u, scale, *, shift):
        return u * scale + shift, "cache", 7

    layer = hc.HyperConnection(CFG, branch=branch)
    x = hc.expand_streams(draw(3, DIM), CFG)
    out, cache, number = layer(x, 2.0, shift=1.0)
    u, add_residual = hc.HyperConnection(CFG)(x)
    assert torch.equal(out, add_residual(u * 2.0 + 1.0))
    assert (cache, number) == ("cache", 7)


def test_add_residual_used_twice_late_or_never():
    layer = hc.HyperConnection(CFG, 1)
    x = draw(3, 4, DIM).requires_grad_()
    u, add_residual = layer(x)
    first, second = add_residual(u), add_residual(2 * u)
    assert not torch.equal(first, second)
    (gradient,) = torch.autograd.grad(first.sum() + (second * second).sum(), x)
    assert gradient.abs().max() > 0
    u, _ = layer(x)
    (gradient,) = torch.autograd.grad((u * draw(3, DIM)).sum(), x)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", list(hc.PRESETS))
def test_one_stream_is_an_exact_residual(name):
    cfg = hc.HCConfig(DIM, 1, name, fractions=1)
    layer = hc.HyperConnection(cfg, branch=torch.tanh)
    assert not list(layer.parameters())
    h = draw(2, 3, DIM)
    x = layer(hc.expand_streams(h, cfg))
    assert torch.equal(hc.StreamReduce(cfg)(x), h + torch.tanh(h))


@pytest.mark.parametrize("name", ["residual", *PRESETS])
def test_lazy_state_equals_eager_writes(name):
    """The carried state gives the same network, with one op a seam."""
    cfg = hc.HCConfig(DIM, 1 if name == "residual" else 4, name)
    net = Net(cfg)
    h, cot = draw(2, 5, DIM), draw(2, 5, DIM, seed=1)

    def lazy(h):
        state = hc.StreamState(net.expand(h))
        for connection, branch in zip(net.connections, net.branches, strict=True):
            u, add_residual = connection(state)
            state = add_residual(branch(u))
        return net.norm(net.reduce(state))

    results = []
    for function in (net, lazy):
        net.zero_grad()
        out = function(h)
        out.backward(cot)
        results.append([out, *(p.grad.clone() for p in net.parameters())])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max() + 1e-6


def test_state_is_a_pytree():
    state = hc.StreamState(draw(2, 4, 3), (draw(2, 3), draw(2, 4), draw(2, 4, 4)))
    leaves, spec = pytree.tree_flatten(state)
    assert leaves[0] is state.x
    assert isinstance(pytree.tree_unflatten(leaves, spec), hc.StreamState)
    assert hc.resolve(state).shape == (2, 4, 3)


def test_state_crosses_a_checkpoint():
    from torch.utils.checkpoint import checkpoint

    net = Net(CFG)
    h = draw(2, 5, DIM)

    def block(state, k):
        u, add_residual = net.connections[k](state)
        return add_residual(net.branches[k](u))

    def run(wrap):
        state = hc.StreamState(net.expand(h))
        for k in range(len(net.branches)):
            state = checkpoint(block, state, k, use_reentrant=False) if wrap else block(state, k)
        out = net.reduce(state)
        net.zero_grad()
        out.backward(draw(2, 5, DIM, seed=1))
        return [out, *(p.grad.clone() for p in net.parameters() if p.grad is not None)]

    for a, b in zip(run(False), run(True), strict=True):
        assert torch.equal(a, b)


def test_stream_embedding_starts_as_repeat():
    cfg = hc.HCConfig(DIM, 4, expand="embedding")
    module = hc.StreamExpand(cfg)
    h = draw(3, DIM)
    assert torch.equal(module(h), hc.expand_streams(h, CFG))
    assert module.embedding.weight.shape == (4, DIM)


def test_parameter_groups_follow_the_papers():
    net = Net(hc.HCConfig(DIM, 4, "dhc"))
    decay, keep = hc.parameter_groups(net, 0.1)
    assert decay["weight_decay"] == 0.1 and keep["weight_decay"] == 0.0
    assert {id(p) for p in decay["params"]} | {id(p) for p in keep["params"]} == {
        id(p) for p in net.parameters()
    }
    kept = {id(p) for p in keep["params"]}
    coefficients = net.connections[0].coefficients
    assert id(coefficients.bias) in kept and id(coefficients.alpha) in kept
    assert id(coefficients.phi) not in kept
    embedding = hc.StreamExpand(hc.HCConfig(DIM, 4, expand="embedding"))
    assert hc.parameter_groups(embedding)[0]["params"] == []
    torch.optim.AdamW(hc.parameter_groups(net))


BAD_CONFIG = [
    ({"dim": 0}, ValueError, "dim must be >= 1, got 0"),
    ({"dim": 8.0}, TypeError, "dim must be an int, got float"),
    ({"streams": 0}, ValueError, "streams must be >= 1, got 0"),
    ({"streams": -2}, ValueError, "streams must be >= 1, got -2"),
    ({"preset": "nope"}, ValueError, "preset must be one of .*got 'nope'"),
    ({"preset": "mhc-lite", "streams": 6}, ValueError, "streams must be <= 5"),
    ({"preset": "residual", "streams": 2}, ValueError, "streams must be <= 1"),
    ({"iterations": -1}, ValueError, "iterations must be >= 0, got -1"),
    ({"iterations": 2.5}, TypeError, "iterations must be an int, got float"),
    ({"reduce": "max"}, ValueError, "reduce must be one of .*got 'max'"),
    ({"expand": "x"}, ValueError, "expand must be one of"),
    ({"fractions": 3}, ValueError, "dim must be divisible by fractions = 3, got 8"),
    ({"fractions": 2, "preset": "mhc-lite"}, ValueError, r"streams \* fractions must be <= 5"),
    ({"views": 0}, ValueError, "views must be >= 1, got 0"),
    ({"branches": 2, "streams": 1}, ValueError, "branches must be 1 with one stream, got 2"),
    ({"proposals": 2, "preset": "shc"}, ValueError, "must be left alone for the static preset"),
    ({"norm": "batch"}, ValueError, "norm must be one of .*got 'batch'"),
    ({"norm": "layer", "preset": "shc"}, ValueError, "must be left alone for the static preset"),
    ({"mix_before_norm": 1}, TypeError, "mix_before_norm must be a bool, got int"),
    ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
    ({"precision": "fp8"}, ValueError, "precision must be one of .*got 'fp8'"),
    ({"implementation": "cuda"}, ValueError, "implementation must be one of"),
]


@pytest.mark.parametrize(("change", "error", "text"), BAD_CONFIG)
def test_bad_configuration(change, error, text):
    with pytest.raises(error, match=text):
        hc.HCConfig(**({"dim": 8} | change))


BAD_INPUT = [
    (torch.zeros(4), ValueError, r"x must be \[\.\.\., n, C\] = \[\.\.\., 4, 16\]"),
    (torch.zeros(2, 3, 16), ValueError, r"got \[2, 3, 16\]"),
    (torch.zeros(2, 4, 8), ValueError, r"got \[2, 4, 8\]"),
    (torch.zeros(2, 4, 16, dtype=torch.int64), TypeError, "x must be a floating-point tensor"),
    (torch.zeros(2, 4, 16, device="meta"), ValueError, "must be on meta"),
]


@pytest.mark.parametrize("implementation", ["ops", "plain"])
@pytest.mark.parametrize(("x", "error", "text"), BAD_INPUT)
def test_bad_streams(x, error, text, implementation):
    layer = hc.HyperConnection(hc.HCConfig(DIM, 4, implementation=implementation))
    with pytest.raises(error, match=text):
        layer(x)


@pytest.mark.parametrize("implementation", ["ops", "plain"])
def test_bad_branch_output_and_arguments(implementation):
    layer = hc.HyperConnection(hc.HCConfig(DIM, 4, implementation=implementation))
    _, add_residual = layer(draw(3, 4, DIM))
    with pytest.raises(ValueError, match=r"y must be \[\.\.\., C\] = \[3, 16\], got \[3, 8\]"):
        add_residual(draw(3, 8))
    with pytest.raises(TypeError, match="y must be a floating-point tensor"):
        add_residual(torch.zeros(3, DIM, dtype=torch.int32))
    with pytest.raises(TypeError, match="args and kwargs"):
        layer(draw(3, 4, DIM), 1)
    with pytest.raises(ValueError, match="layer_index"):
        hc.HyperConnection(CFG, -1)
    with pytest.raises(TypeError, match="cfg must be an HCConfig"):
        hc.HyperConnection({"dim": 3})


def test_expand_and_reduce_refuse_what_needs_parameters():
    with pytest.raises(ValueError, match="StreamExpand"):
        hc.expand_streams(draw(3, DIM), hc.HCConfig(DIM, 4, expand="embedding"))
    with pytest.raises(ValueError, match="StreamReduce"):
        hc.reduce_streams(draw(3, 4, DIM), hc.HCConfig(DIM, 4, "mhc-v4"))
    with pytest.raises(
        ValueError, match=r"h must be \[\.\.\., C\] = \[\.\.\., 16\], got \[3, 5\]"
    ):
        hc.expand_streams(draw(3, 5), CFG)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stream_dtype_is_kept_and_branch_dtype_may_differ(dtype):
    layer = hc.HyperConnection(CFG, 1)
    x = draw(3, 4, DIM).to(dtype)
    u, add_residual = layer(x)
    assert u.dtype == dtype
    assert add_residual(u.float()).dtype == dtype
    assert hc.reduce_streams(x, CFG).dtype == dtype


def test_autocast_leaves_coefficients_in_float32():
    layer = hc.HyperConnection(hc.HCConfig(DIM, 4, "mhc-v4"), 1)
    x = draw(3, 4, DIM)
    expected = layer(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        u, add_residual = layer(x)
        out = add_residual(u.to(torch.bfloat16))
    assert torch.equal(u, expected) and out.dtype == torch.float32
