"""hc.compile_blocks: blocks share graphs, seams fuse across their edges, results are equal."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import hc_compile as hc
from hc_compile.blocks import blocks_of, compile_each
from hc_compile.models import Transformer, TransformerConfig
from hc_compile.passes import PASSES, PassPipeline
from tests.conftest import worst
from tests.passes.harness import count, results

DIM, LAYERS = 16, 5
GRAPHS = {"residual": 1, "mhc": 3, "mhc-v4": 3, "mhc-v4.1": 3, "shc": 3, "dhc": 3, "ihc": 3}


def network(preset):
    """A transformer whose coefficients differ from token to token."""
    torch.manual_seed(0)
    connection = hc.HCConfig(DIM, 1 if preset == "residual" else 3, preset)
    sizes = {"dim": DIM, "layers": LAYERS, "heads": 2, "ffn_dim": 24, "max_seq_len": 8}
    net = Transformer(TransformerConfig(vocab_size=11, hc=connection, **sizes))
    for name, parameter in net.named_parameters():
        if ".hc_" in name:
            nn.init.normal_(parameter, std=0.3)
    return net


def batch(seed=0):
    return torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(seed))


def assert_same(ours, plain, tolerance):
    for k, (a, b) in enumerate(zip(ours, plain, strict=True)):
        assert worst(a, b) <= tolerance, (k, worst(a, b))


@pytest.mark.parametrize("preset", GRAPHS)
def test_blocks_share_graphs(preset):
    """At most two graphs of blocks and one of the reduction, and none at the next step."""
    net = network(preset)
    plain = results(net, net, batch())
    counters.clear()
    compile_each(net, blocks_of(net), "aot_eager", fullgraph=True)
    ours = results(net, net, batch())
    assert counters["stats"]["unique_graphs"] == GRAPHS[preset]
    assert_same(ours, plain, 2e-5)
    with torch.compiler.set_stance("fail_on_recompile"):
        results(net, net, batch(1))


def test_seams_fuse_across_the_edges_of_blocks():
    """In the blocks' graphs there is no write alone, and the reduction makes no streams."""
    net, graphs = network("mhc"), []

    def backend(gm, inputs):
        PassPipeline(PASSES)(gm.graph)
        count(gm, graphs.append({}) or graphs[-1])
        gm.recompile()
        return gm

    compile_each(net, blocks_of(net), backend)
    net(batch())
    assert graphs[:2] == [{"pre": 1, "post_pre": 1}, {"post_pre": 2}]
    assert len(graphs) == 3 and not {"pre", "post_pre"} & set(graphs[2])


@pytest.mark.compile
@pytest.mark.parametrize(
    "recompute", ["none", pytest.param("coefficients", marks=pytest.mark.full)]
)
def test_inductor(recompute):
    net = network("shc")
    plain, keys = results(net, net, batch()), list(net.state_dict())
    counters.clear()
    assert hc.compile_blocks(net, recompute=recompute, fullgraph=True) is net
    assert_same(results(net, net, batch()), plain, 2e-5)
    assert counters["stats"]["unique_graphs"] == 3 and list(net.state_dict()) == keys


def test_which_modules_are_blocks():
    cfg = hc.HCConfig(DIM, 2, "shc")
    sites = [hc.HyperConnection(cfg, k, nn.Linear(DIM, DIM)) for k in range(3)]
    stack = nn.Sequential(hc.StreamExpand(cfg), *sites, hc.StreamReduce(cfg))
    assert blocks_of(nn.ModuleDict({"stack": stack})) == sites
    nested = nn.ModuleList([nn.ModuleList(sites[:1]), nn.ModuleList(sites[1:])])
    assert blocks_of(nested) == sites
    bare = nn.ModuleList([hc.HyperConnection(cfg)])  # its branch is called elsewhere
    with pytest.raises(ValueError, match="blocks must be given"):
        hc.compile_blocks(bare)
    h = torch.randn(4, DIM, requires_grad=True)
    plain = stack(h)
    counters.clear()
    compile_each(stack, sites[1:], "eager")
    torch.testing.assert_close(stack(h), plain)
    assert counters["stats"]["unique_graphs"] == 2


def test_refusals():
    net = network("shc")
    with pytest.raises(TypeError, match="backend must not be given"):
        hc.compile_blocks(net, backend="inductor")
    with pytest.raises(ValueError, match="recompute must be"):
        hc.compile_blocks(net, recompute="all")
    assert not net.expand.lazy
