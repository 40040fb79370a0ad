"""Recompute in eager code: recipes for saved tensors, and a policy for checkpoint."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import hc_compile as hc
from tests.passes.harness import assert_equal, results
from tests.passes.test_edges import Block, through
from tests.passes.test_pipeline import block_of, net_and_input

ONE = 2 * 5 * 4 * 16 * 8


class Written(TorchDispatchMode):
    """The storages of all streams that hc:: ops write."""

    def __init__(self):
        super().__init__()
        self.storages = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if str(func) in ("hc.post.default", "hc.post_pre.default"):
            streams = out if isinstance(out, torch.Tensor) else out[0]
            self.storages.append(StorageWeakRef(streams.untyped_storage()))
        return out

    def alive(self):
        return sum(not storage.expired() for storage in self.storages)


def recomputed(function, policy, sublayers=None):
    def run(*inputs):
        with hc.recomputing(policy, sublayers):
            return function(*inputs)

    return run


@pytest.mark.parametrize("name", ["mhc", "mhc-v4.1", "shc", "dhc", "fhc"])
@pytest.mark.parametrize("policy", ["none", "coefficients", "streams", 2 * ONE])
def test_nothing_changes(name, policy):
    net, h = net_and_input(name, 4, layers=5)
    ours = results(recomputed(net, policy, 5), net, h)
    for a, b in zip(ours, results(net, net, h), strict=True):
        assert torch.equal(a, b)


def test_a_carried_state():
    net, h = net_and_input("mhc", 4, layers=5)
    blocks = [Block(*pair) for pair in zip(net.connections, net.branches, strict=True)]
    ours = recomputed(lambda h: through(net, blocks, h), "streams", 5)
    assert_equal(results(ours, net, h), results(net, net, h))


def test_64_sublayers_keep_a_fifth_and_branches_run_once():
    sublayers = 64
    net, h = net_and_input("mhc", 4, sublayers)
    runs = []
    for branch in net.branches:
        branch.register_forward_hook(lambda *_: runs.append(1))
    written = Written()
    with written:
        out = net(h)
    assert written.alive() >= sublayers - 1
    del out
    runs.clear()
    written = Written()
    with written:
        out = recomputed(net, "streams", sublayers)(h)
    assert 0 < written.alive() <= 0.2 * sublayers
    out.square().sum().backward()
    assert len(runs) == sublayers
    assert written.alive() == 0


def test_streams_are_freed_as_the_backward_proceeds():
    net, h = net_and_input("mhc", 4, layers=6)
    out = recomputed(net, "streams", 6)(h)
    out.sum().backward(retain_graph=True)
    first = h.grad.clone()
    h.grad = None
    out.sum().backward()
    assert torch.equal(first, h.grad)


def test_double_backward():
    net, h = net_and_input("mhc", 4)

    def second(function):
        (grad,) = torch.autograd.grad(function(h).square().sum(), h, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), h)

    assert_equal(second(recomputed(net, "streams", 3)), second(net))


def test_a_parameter_modified_since_is_refused():
    net, h = net_and_input("mhc", 4)
    out = recomputed(net, "coefficients")(h)
    with torch.no_grad():
        net.connections[1].coefficients.bias.add_(1)
    with pytest.raises(RuntimeError, match="modified"):
        out.sum().backward()


def test_streams_written_in_place_are_not_mistaken():
    net, h = net_and_input("mhc", 4)

    def function(h):
        x = block_of(net, 0, net.expand(h))
        x = x * 1.5
        x[..., 0, :].mul_(0.5)
        return net.norm(net.reduce(block_of(net, 2, block_of(net, 1, x))))

    assert_equal(results(recomputed(function, "streams", 3), net, h), results(function, net, h))


@pytest.mark.parametrize("policy", ["streams", 10**9])
@pytest.mark.parametrize("sublayers", [None, 0, True, 2.0])
def test_sublayers_must_be_given(policy, sublayers):
    with pytest.raises(ValueError, match="sublayers must be an int >= 1"):
        with hc.recomputing(policy, sublayers):
            pass


def in_segments(net, policy, size=2):
    def segment(first):
        def run(x):
            for k in range(first, first + size):
                x = block_of(net, k, x)
            return x

        return run

    def function(h):
        x = net.expand(h)
        for first in range(0, len(net.branches), size):
            context = hc.recompute_policy(policy)
            x = checkpoint(segment(first), x, use_reentrant=False, context_fn=context)
        return net.norm(net.reduce(x))

    return function


@pytest.mark.parametrize("policy, writes", [("coefficients", 4), ("streams", 8)])
def test_checkpoint_runs_what_the_policy_names_again(policy, writes):
    net, h = net_and_input("mhc", 4, layers=4)
    function = in_segments(net, policy)
    for a, b in zip(results(function, net, h), results(net, net, h), strict=True):
        assert torch.equal(a, b)
    with Written() as written:
        results(function, net, h)
    assert len(written.storages) == writes


@pytest.mark.parametrize("policy", ["coefficients", "streams"])
def test_checkpoint_under_compile(policy):
    net, h = net_and_input("mhc", 4, layers=4)
    compiled = torch.compile(in_segments(net, policy), backend="aot_eager")
    assert_equal(results(compiled, net, h), results(net, net, h))


def test_checkpoint_policies_have_two_names():
    with pytest.raises(ValueError, match=r"recompute must be one of .* got 'none'"):
        hc.recompute_policy("none")
