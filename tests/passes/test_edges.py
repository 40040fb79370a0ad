"""Where graphs end at every block, the carried state makes the seam one op in the next graph."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import hc_compile as hc
from tests.passes.harness import assert_equal, op_counts, results, with_passes
from tests.passes.test_pipeline import net_and_input

FUSED = {"pre": 1, "post_pre": 2, "post": 1}


class Block(nn.Module):
    """A unit of FSDP, of checkpointing or of a pipeline: state in, state out."""

    def __init__(self, connection, branch):
        super().__init__()
        self.connection, self.branch = connection, branch

    def forward(self, state):
        u, add_residual = self.connection(state)
        return add_residual(self.branch(u))


@pytest.fixture
def parts():
    net, h = net_and_input("mhc", 4)
    pairs = zip(net.connections, net.branches, strict=True)
    return net, h, [Block(*pair) for pair in pairs]


def through(net, blocks, h):
    state = hc.StreamState(net.expand(h))
    for block in blocks:
        state = block(state)
    return net.norm(net.reduce(state))


def test_eager_code_fuses_the_seam(parts):
    net, h, blocks = parts
    assert op_counts(lambda: through(net, blocks, h)) == FUSED
    assert_equal(results(lambda h: through(net, blocks, h), net, h), results(net, net, h))


def test_blocks_compiled_one_by_one(parts):
    net, h, blocks = parts
    counts = {}
    compiled = [with_passes(block, counts=counts) for block in blocks]
    ours = results(lambda h: through(net, compiled, h), net, h)
    assert_equal(ours, results(net, net, h))
    assert counts == {"pre": 1, "post_pre": 2}


def test_one_graph_serves_every_later_block(parts):
    """Regional compilation: one graph for the first block, one for all with a pending write."""
    net, h, blocks = parts
    graphs = []

    def backend(gm, inputs):
        graphs.append(gm)
        return gm

    compiled = torch.compile(Block.forward, backend=backend, fullgraph=True)
    regions = [partial(compiled, block) for block in blocks]
    ours = results(lambda h: through(net, regions, h), net, h)
    assert_equal(ours, results(net, net, h))
    assert len(graphs) == 2


@pytest.mark.parametrize("compiled", [False, True])
def test_checkpoint_around_every_block(parts, compiled):
    net, h, blocks = parts

    def function(h):
        def again(block):
            return lambda state: checkpoint(block, state, use_reentrant=False)

        return through(net, [again(block) for block in blocks], h)

    run = with_passes(function, counts=(counts := {})) if compiled else function
    assert_equal(results(run, net, h), results(net, net, h))
    assert not compiled or counts["post_pre"] == 2


def test_pipeline_stages(parts):
    """Between stages travel plain tensors, here through a copy without its graph."""
    net, h, blocks = parts
    first = with_passes(lambda h: blocks[0](hc.StreamState(net.expand(h))))
    counts = {}
    second = with_passes(
        lambda state: net.norm(net.reduce(blocks[2](blocks[1](state)))), counts=counts
    )
    leaves, form = pytree.tree_flatten(first(h))
    sent = [t for t in leaves if t is not None]
    received = [t.detach().requires_grad_() for t in sent]
    arrived = iter(received)
    state = pytree.tree_unflatten([t if t is None else next(arrived) for t in leaves], form)
    out = second(state)
    cotangent = torch.ones_like(out).cumsum(0)
    grads = torch.autograd.grad(out, received, cotangent)
    assert len(sent) == 4  # x, y, post, res
    (dh,) = torch.autograd.grad(sent, h, grads)
    expected = net(h)
    assert_equal([out, dh], [expected, *torch.autograd.grad(expected, h, cotangent)])
    assert counts["post_pre"] == 2
