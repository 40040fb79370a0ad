"""Reads and writes of a lazily written chain are linked; nothing else is, and results stay."""

import pytest
import torch

import hc_compile as hc
from hc_compile.passes.graph import arguments, is_op
from hc_compile.passes.link_ghosts import link_ghosts
from tests.passes.harness import assert_equal, lowered_graphs, results, with_passes
from tests.passes.test_pipeline import net_and_input

OPS = ("pre", "post_pre", "post")


def lazily(net, layers=3):
    """The net with the write left to the next layer."""

    def function(h):
        x = net.expand(h)
        x = x if net.connections[0].cfg.row.delayed else hc.StreamState(x)
        for k in range(layers):
            u, add_residual = net.connections[k](x)
            x = add_residual(net.branches[k](u))
        return net.norm(net.reduce(x))

    return function


def linked(function, net, *inputs):
    """(op, gives a ghost, takes a ghost) of every call; results must stay what they were."""
    found = []

    def look(graph):
        for node in graph.nodes:
            for op in OPS:
                if is_op(node, op):
                    given = arguments(node, op)
                    found.append((op, given.get("with_ghost"), given.get("ghost") is not None))
        return False

    ours = results(with_passes(function, [link_ghosts, look]), net, *inputs)
    assert_equal(ours, results(function, net, *inputs))
    return found


@pytest.mark.parametrize("n", [2, 3, 4, 8])
@pytest.mark.parametrize("name", ["mhc", "mhc-v4.1", "dhc", "shc", "ihc"])
def test_every_seam_of_a_chain_is_linked(name, n):
    net, h = net_and_input(name, n)
    assert linked(lazily(net), net, h) == [
        ("pre", True, False),
        ("post_pre", True, True),
        ("post_pre", True, True),
        ("post", None, True),
    ]


def test_streams_that_others_read_get_those_gradients_too():
    net, h = net_and_input("mhc-v4.1", 4, layers=2)

    def function(h):
        x = net.expand(h)
        u, add_residual = net.connections[0](x)
        first = add_residual(net.branches[0](u))
        u, add_residual = net.connections[1](first)
        last = add_residual(net.branches[1](u))
        return net.reduce(last) + x.mean(-2) + last.x.sum(-2)

    assert [row[2] for row in linked(function, net, h)] == [False, True, True]


def test_two_writes_of_the_same_streams_stay():
    net, h = net_and_input("mhc", 4, layers=2)

    def function(h):
        x = hc.StreamState(net.expand(h))
        u, add_residual = net.connections[0](x)
        return hc.resolve(add_residual(torch.tanh(u))) + hc.resolve(add_residual(u))

    assert not any(row[2] for row in linked(function, net, h))


def test_streams_written_in_place_stay():
    """Eager autograd refuses this, a compiler that makes the graph functional does not."""
    net, h = net_and_input("mhc", 4, layers=1)
    found = []

    def function(h):
        x = net.expand(h).clone()
        u, add_residual = net.connections[0](hc.StreamState(x))
        x.mul_(h.unsqueeze(-2))
        return hc.resolve(add_residual(u))

    def look(graph):
        found.extend(arguments(n, "pre")["with_ghost"] for n in graph.nodes if is_op(n, "pre"))
        return False

    with_passes(function, [link_ghosts, look])(h)
    assert found == [False]


def test_without_gradients_nothing_is_linked():
    net, h = net_and_input("mhc-v4.1", 4)
    found = []

    def look(graph):
        found.extend(n for n in graph.nodes if is_op(n, "post_pre"))
        assert not any(arguments(n, "post_pre")["with_ghost"] for n in found)
        return False

    with torch.no_grad():
        compiled = with_passes(lazily(net), [link_ghosts, look])
        assert_equal([compiled(h)], [lazily(net)(h)])
    assert len(found) == 2


def test_the_backward_no_longer_adds_streams():
    """Tensors of the streams' size that the backward adds: none where the ghosts are linked."""

    def sums(passes):
        net, h = net_and_input("mhc-v4.1", 3)
        _, backward = lowered_graphs(lazily(net), h, passes)
        return len(backward.nodes)

    assert sums([link_ghosts]) < sums([])
