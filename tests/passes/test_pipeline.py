"""All passes together: every preset and n, op counts both ways, nested regions, other passes."""

import pytest
import torch
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch.utils.checkpoint import checkpoint

import hc_compile as hc
from hc_compile.passes import PASSES, PassPipeline
from tests.passes.harness import assert_equal, op_counts, results, with_passes
from tests.test_presets import DIM, PRESETS, Net, draw, takes

STREAMS = [(name, n) for name in PRESETS for n in range(1, 9) if takes(name, n)]


def net_and_input(name, n, layers=3):
    net = Net(hc.HCConfig(DIM, n, name), layers, dtype=torch.float64)
    with torch.no_grad():
        for connection in net.connections:
            for p in connection.parameters():  # away from the symmetric start
                p.add_(0.3 * draw(*p.shape, seed=p.numel(), dtype=p.dtype))
    return net, draw(2, 5, DIM, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize(("name", "n"), STREAMS)
def test_all_passes_change_nothing(name, n):
    net, h = net_and_input(name, n)
    assert_equal(results(with_passes(net), net, h), results(net, net, h))


@pytest.mark.parametrize("run", PASSES, ids=lambda run: run.__name__)
@pytest.mark.parametrize("name", PRESETS)
def test_each_pass_alone_changes_nothing(name, run):
    net, h = net_and_input(name, 4)
    assert_equal(results(with_passes(net, [run]), net, h), results(net, net, h))


BEFORE = {"pre": 4, "post": 4, "pre_backward": 4, "post_backward": 4}
AFTER = {
    "project": 1,
    "constrain": 1,
    "post": 1,
    "post_pre": 3,
}


@pytest.mark.parametrize(("passes", "expected"), [((), BEFORE), (PASSES, AFTER)])
def test_op_counts_of_four_sublayers_forward_and_backward(passes, expected):
    """The first reads one stream, every seam is one op, the last makes no streams."""
    net, h = net_and_input("mhc", 4, layers=4)
    compiled = with_passes(net, passes)
    results(compiled, net, h)
    if passes:
        expected = expected | {f"{name}_backward": n for name, n in expected.items()}
    assert op_counts(lambda: results(compiled, net, h)) == expected


def block_of(net, k, x):
    u, add_residual = net.connections[k](x)
    return add_residual(net.branches[k](u))


def checkpointed(net, h):
    x = net.expand(h)
    x = block_of(net, 0, x)
    x = checkpoint(lambda s: block_of(net, 2, block_of(net, 1, s)), x, use_reentrant=False)
    return net.norm(net.reduce(block_of(net, 3, x)))


@torch.compiler.nested_compile_region
def region(net, x):
    return block_of(net, 2, block_of(net, 1, x))


def nested(net, h):
    x = block_of(net, 0, net.expand(h))
    return net.norm(net.reduce(block_of(net, 3, region(net, region(net, x)))))


def second_streams(net, h):
    """Streams whose post is square: the first sublayer's is not, and never fuses."""
    return block_of(net, 1, block_of(net, 0, net.expand(h)))


def no_grad_monitor(net, h):
    x = second_streams(net, h)
    with torch.no_grad():
        u = net.connections[2](x)[0]
    return net.norm(net.reduce(block_of(net, 2, x))), u


def autocast_branch(net, h):
    x = second_streams(net, h)
    with torch.autocast("cpu", torch.bfloat16):
        u, add_residual = net.connections[2](x)
    return net.norm(net.reduce(add_residual(u.tanh())))


@pytest.mark.parametrize(
    ("function", "fused"),
    [(checkpointed, 1), (nested, 1), (no_grad_monitor, 1), (autocast_branch, 1)],
)
def test_edges_of_regions(function, fused):
    """A seam inside a region fuses; across an edge the lone post and the lone pre stay right."""
    net, h = net_and_input("mhc", 4, layers=4)
    compiled = with_passes(
        lambda h: function(net, h), counts=(counts := {}), compiler=lookup_backend("aot_eager")
    )
    assert_equal(results(compiled, net, h), results(lambda h: function(net, h), net, h))
    assert counts.get("post_pre", 0) == fused


def test_reentrant_checkpoint_stays_correct():
    """Dynamo leaves it to eager: no seam across it, nothing lost."""
    net, h = net_and_input("mhc", 4)

    def function(h):
        x = net.expand(h)
        for k in range(3):
            x = checkpoint(lambda s, k=k: block_of(net, k, s), x, use_reentrant=True)
        return net.norm(net.reduce(x))

    compiled = with_passes(function, fullgraph=False)
    assert_equal(results(compiled, net, h), results(function, net, h))


def written_through_a_view(net, h):
    x = second_streams(net, h)
    x[..., 0, :].add_(1)
    return net.norm(net.reduce(block_of(net, 2, x)))


def written_before_the_last(net, h):
    x = second_streams(net, h)
    x.mul_(2)
    return net.reduce(x)


def copies_written(net, h):
    x = net.expand(h)
    x[..., 1, :].mul_(0.5)
    return net.norm(net.reduce(block_of(net, 1, block_of(net, 0, x))))


@pytest.mark.parametrize(
    "function", [written_through_a_view, written_before_the_last, copies_written]
)
def test_writing_in_place_is_respected(function):
    net, h = net_and_input("mhc", 4)
    with torch.no_grad():
        ours = with_passes(lambda h: function(net, h))(h)
        assert_equal([ours], [function(net, h)])


class Pair(nn.Module):
    """A branch with two outputs: what it writes and an auxiliary one."""

    def __init__(self, branch):
        super().__init__()
        self.branch = branch

    def forward(self, u):
        y = self.branch(u)
        return y, y.square().mean()


def test_branches_with_extra_outputs():
    net, h = net_and_input("mhc", 4)
    for connection, branch in zip(net.connections, net.branches, strict=True):
        connection.branch = Pair(branch)

    def function(h):
        x, losses = net.expand(h), 0.0
        for connection in net.connections:
            x, loss = connection(x)
            losses = losses + loss
        return net.norm(net.reduce(x)), losses

    compiled = with_passes(function, counts=(counts := {}))
    assert_equal(results(compiled, net, h), results(function, net, h))
    assert counts["post_pre"] == 2


def test_shared_module_over_every_sublayer():
    net, h = net_and_input("mhc", 4)

    def function(h):
        x = net.expand(h)
        for _ in range(4):
            x = block_of(net, 0, x)
        return net.norm(net.reduce(x))

    compiled = with_passes(function, counts=(counts := {}))
    assert_equal(results(compiled, net, h), results(function, net, h))
    assert counts["post_pre"] == 3


def test_dropout_draws_the_same_numbers():
    net, h = net_and_input("mhc", 4)
    net.branches.append(nn.Dropout(0.5))

    def function(h):
        torch.manual_seed(3)
        x = net.expand(h)
        for k in range(3):
            u, add_residual = net.connections[k](x)
            x = add_residual(net.branches[3](net.branches[k](u)))
            x = net.branches[3](x) if k == 1 else x
        return net.norm(net.reduce(x))

    assert_equal(
        results(with_passes(function, fullgraph=False), net, h), results(function, net, h)
    )


def test_a_users_pass_comes_after_ours_and_its_changes_stay():
    seen = []

    def double_tanh(graph):
        seen.append(sum(str(node.target).startswith("hc.post_pre") for node in graph.nodes))
        for node in graph.nodes:
            if node.target == "tanh" or getattr(node.target, "__name__", "") == "tanh":
                with graph.inserting_after(node):
                    twice = graph.call_function(torch.mul, (node, 2))
                node.replace_all_uses_with(twice, delete_user_cb=lambda n, t=twice: n is not t)

    def backend(gm, inputs):
        PassPipeline(then=double_tanh)(gm.graph)
        gm.recompile()
        return gm

    net, h = net_and_input("mhc", 4)
    ours = torch.compile(net, backend=backend, fullgraph=True)(h)
    for branch in net.branches:
        branch.append(Twice())
    assert_equal([ours], [net(h)])
    assert seen == [2]


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("function", [torch.relu, lambda x: nn.functional.dropout(x, 0.5)])
def test_graphs_without_hc_ops_are_untouched(function):
    def changes(graph):
        raise AssertionError("a pass was shown a graph without hc:: ops")

    compiled = with_passes(function, [changes])
    x = draw(5)
    torch.manual_seed(0)
    ours = compiled(x)
    torch.manual_seed(0)
    assert torch.equal(ours, function(x))
