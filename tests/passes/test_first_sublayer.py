"""The first sublayer reads one stream: what is rewritten, what is not, and its rounding."""

import pytest
import torch

import hc_compile as hc
from hc_compile.passes.first_sublayer import first_sublayer
from tests.conftest import worst
from tests.passes.harness import assert_equal, results, with_passes
from tests.passes.test_pipeline import block_of, net_and_input
from tests.test_presets import DIM, Net, draw

ONE_READ = {"project": 1, "constrain": 1, "post": 1}


@pytest.mark.parametrize("name", ["mhc", "dhc", "ihc", "mhc-v4"])
def test_the_streams_are_never_made(name):
    net, h = net_and_input(name, 4, layers=1)
    compiled = with_passes(
        lambda h: block_of(net, 0, net.expand(h)), [first_sublayer], counts=(counts := {})
    )
    eager = results(lambda h: block_of(net, 0, net.expand(h)), net.connections, h)
    assert_equal(results(compiled, net.connections, h), eager)
    assert counts == ONE_READ
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape), lambda t: t):
        compiled(h)
    assert (*h.shape[:-1], 4, DIM) not in saved


@pytest.mark.parametrize("name, head", [("mhc", {}), ("mhc-v4.1", {"aggregate": 1})])
def test_carried_state_reads_one_stream_too(name, head):
    net, h = net_and_input(name, 4)

    def function(h):
        state = hc.StreamState(net.expand(h))
        for k in range(3):
            state = block_of(net, k, state)
        return net.reduce(state)

    compiled = with_passes(function, [first_sublayer], counts=(counts := {}))
    assert_equal(results(compiled, net, h), results(function, net, h))
    assert counts == ONE_READ | {"pre": 1, "post": 2, "post_pre": 1} | head


def test_several_reads_of_the_same_copies():
    net, h = net_and_input("mhc", 4)

    def function(h):
        x = net.expand(h)
        return net.reduce(block_of(net, 0, x)) * net.reduce(block_of(net, 1, x))

    compiled = with_passes(function, [first_sublayer], counts=(counts := {}))
    assert_equal(results(compiled, net, h), results(function, net, h))
    assert counts == {name: 2 for name in ONE_READ}


def copies_have_another_user(net, h):
    x = net.expand(h)
    return block_of(net, 0, x) + x.flip(-2)


def streams_differ(net, h):
    return block_of(net, 0, net.expand(h) + torch.arange(4).to(h)[:, None])


def copies_over_tokens(net, h):
    """An expand over the tokens is none over the streams."""
    x = h[0, :4].unsqueeze(0).expand(3, 4, DIM).contiguous()
    return block_of(net, 0, x)


@pytest.mark.parametrize(
    "function", [copies_have_another_user, streams_differ, copies_over_tokens]
)
def test_what_is_left_alone(function):
    net, h = net_and_input("mhc", 4)
    compiled = with_passes(lambda h: function(net, h), [first_sublayer], counts=(counts := {}))
    assert_equal(results(compiled, net, h), results(lambda h: function(net, h), net, h))
    assert counts == {"pre": 1, "post": 1}


def test_static_constraints_are_left_alone():
    net, h = net_and_input("shc", 4, layers=1)
    compiled = with_passes(net, [first_sublayer], counts=(counts := {}))
    assert_equal(results(compiled, net, h), results(net, net, h))
    assert counts == {"pre": 1, "post": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounds_no_more_than_the_unrewritten_graph(dtype):
    """Against float64 on the same (rounded) input: at most twice the plain graph's error."""
    exact, _ = net_and_input("mhc", 4, layers=2)
    net = Net(hc.HCConfig(DIM, 4, "mhc"), layers=2)
    net.load_state_dict(exact.state_dict())
    exact.load_state_dict(net.state_dict())
    for module in (net.branches, net.norm):
        module.to(dtype)
    exact.branches.load_state_dict(net.branches.state_dict())
    h = draw(6, 7, DIM).to(dtype).requires_grad_()
    truth = results(exact, exact, h.detach().double().requires_grad_())
    plain = results(with_passes(net, []), net, h)
    ours = results(with_passes(net, [first_sublayer]), net, h)
    unit = torch.finfo(dtype).eps
    for a, b, t in zip(ours, plain, truth, strict=True):
        assert worst(a, t) <= 2 * worst(b, t) + 2 * unit


def test_dynamic_tokens():
    net, h = net_and_input("mhc", 4)
    torch._dynamo.mark_dynamic(h, 1)
    compiled = with_passes(net, [first_sublayer], counts=(counts := {}))
    for tokens in (5, 9):
        h = draw(2, tokens, DIM, dtype=torch.float64).requires_grad_()
        torch._dynamo.mark_dynamic(h, 1)
        assert_equal(results(compiled, net, h), results(net, net, h))
    assert counts["project"] == 1
