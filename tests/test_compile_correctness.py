"""torch.compile on every preset: fullgraph, static and dynamic T, few graphs, equal results.

Tiers: aot_eager over presets × T mode × n (pairwise); Inductor (C++ code) where code generation
itself is the question, marked `compile`.
"""

import subprocess
import sys

import pytest
import torch

import hc_compile as hc
from hc_compile.passes.graph import arguments, is_op
from tests.passes.test_fuse_post_pre import assert_close, run
from tests.test_presets import DIM, PRESETS, Net, draw, takes

WHOLLY_DYNAMIC = ("mhc", "mhc-v4.1", "dhc")  # marked lengths, below, cover every preset
PAIRS = [
    *((name, 2 + k % 3, False) for k, name in enumerate(PRESETS)),
    *(
        pytest.param(p, 4, True, marks=() if p in WHOLLY_DYNAMIC else pytest.mark.full)
        for p in PRESETS
    ),
]


@pytest.mark.parametrize(("name", "n", "dynamic"), PAIRS)
def test_aot_eager_fullgraph(name, n, dynamic):
    net = Net(hc.HCConfig(DIM, n, name), layers=2)
    h = draw(2, 5, DIM)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    assert_close(run(net, net, h), run(compiled, net, h))


@pytest.mark.parametrize("name", PRESETS)
def test_at_most_two_graphs_over_many_lengths(name):
    """T marked dynamic: one graph for T >= 2, at most one more for T = 1, with backward."""
    from torch._dynamo.testing import CompileCounterWithBackend

    net = Net(hc.HCConfig(DIM, 4, name), layers=1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for tokens in (300, 1, 2, 3, 17, 64, 299):
        h = draw(tokens, DIM)
        if tokens > 1:
            torch._dynamo.mark_dynamic(h, 0)
        assert_close(run(net, net, h), run(compiled, net, h))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", ["mhc", "dhc"])
def test_one_graph_for_unbacked_lengths(name):
    from torch._dynamo.testing import CompileCounterWithBackend

    net = Net(hc.HCConfig(DIM, 4, name), layers=2)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for tokens in (5, 1, 2, 300, 0):
        h = draw(tokens, DIM)
        torch._dynamo.decorators.mark_unbacked(h, 0)
        with torch.no_grad():
            assert torch.allclose(compiled(h), net(h), atol=1e-6)
    assert counter.frame_count == 1


WITH_INDUCTOR = ("mhc", "mhc-v4.1", "dhc")  # aot_eager covers all here, Inductor on a device


@pytest.mark.compile
@pytest.mark.parametrize(
    "name",
    [pytest.param(p, marks=() if p in WITH_INDUCTOR else pytest.mark.full) for p in PRESETS],
)
def test_inductor_paths_agree(name):
    """eager ≡ plain functions compiled ≡ ops compiled ≡ ops fused, outputs and gradients."""
    net = Net(hc.HCConfig(DIM, 3 if takes(name, 3) else 4, name), layers=2)
    h = draw(2, 5, DIM)
    eager = run(net, net, h)
    assert_close(eager, run(torch.compile(net, fullgraph=True), net, h))
    torch.compiler.reset()
    assert_close(eager, run(hc.compile(net, fullgraph=True), net, h))


@pytest.mark.compile
def test_inductor_plain_functions():
    plain = Net(hc.HCConfig(DIM, 4, "mhc", iterations=3, implementation="plain"), layers=2)
    h = draw(2, 5, DIM)
    assert_close(run(plain, plain, h), run(torch.compile(plain, fullgraph=True), plain, h))


@pytest.mark.compile
def test_inductor_dynamic_and_bfloat16():
    net = Net(hc.HCConfig(DIM, 4, "mhc"), layers=2)
    for branch in net.branches:
        branch.to(torch.bfloat16)
    net.norm.to(torch.bfloat16)
    compiled = hc.compile(net, fullgraph=True, dynamic=True)
    for tokens in (4, 9):
        h = draw(2, tokens, DIM).to(torch.bfloat16)
        out, expected = compiled(h), net(h)
        assert out.dtype == torch.bfloat16
        assert (out.float() - expected.float()).abs().max() < 0.05


SUBPROCESS = """
import torch, {imports}
from torch import nn
torch.manual_seed(0)
{body}
"""


@pytest.mark.compile
def test_backend_is_found_by_name_without_an_import():
    """The entry point alone: this process never imports hc_compile before compiling."""
    body = """
f = torch.compile(lambda x: torch.relu(x) * 2, backend="hc_inductor", mode="default")
x = torch.randn(8)
assert torch.equal(f(x), torch.relu(x) * 2)
assert "hc_compile.backend" in sys.modules
assert "hc_inductor" in torch._dynamo.list_backends()
"""
    code = SUBPROCESS.format(imports="sys", body=body)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.compile
def test_options_mode_and_a_users_own_pass():
    seen = []

    def own(graph):
        seen.append(sum("post_pre" in str(node.target) for node in graph.nodes))

    net = Net(hc.HCConfig(DIM, 2, "shc"), layers=2)
    h = draw(3, DIM)
    options = {"pre_grad_custom_pass": own, "epilogue_fusion": True}
    compiled = torch.compile(net, backend="hc_inductor", options=options)
    assert_close(run(net, net, h), run(compiled, net, h))
    assert seen == [1]
    with pytest.raises(Exception, match="no_such_option"):
        torch.compile(net, backend="hc_inductor", options={"no_such_option": 1})(h[:2])
    with pytest.raises(TypeError, match="backend must not be given"):
        hc.compile(net, backend="inductor")


@pytest.mark.compile
def test_compiled_blocks_with_carried_state():
    """Per-block compilation: the seam is still one op, in the next block's graph."""
    net = Net(hc.HCConfig(DIM, 3, "mhc"), layers=3)

    def block(state, k):
        u, add_residual = net.connections[k](state)
        return add_residual(net.branches[k](u))

    compiled = hc.compile(block, fullgraph=True)

    def function(h):
        state = hc.StreamState(net.expand(h))
        for k in range(3):
            state = compiled(state, k)
        return net.norm(net.reduce(state))

    h = draw(2, 5, DIM)
    assert_close(run(net, net, h), run(function, net, h))


@pytest.mark.parametrize("training", [True, False])
def test_one_pass_forms_the_gradient_of_the_streams(training):
    """Compiled for training, pre makes a ghost and post takes it; otherwise there is none."""
    graphs = []

    def backend(gm, inputs):
        graphs.append(gm.graph)
        return gm

    layer = hc.HyperConnection(hc.HCConfig(DIM, 4, "mhc"), 1, branch=torch.tanh)
    with torch.set_grad_enabled(training):
        torch.compile(layer, backend=backend, fullgraph=True)(draw(3, 4, DIM))
    (pre,) = (node for node in graphs[0].nodes if is_op(node, "pre"))
    (post,) = (node for node in graphs[0].nodes if is_op(node, "post"))
    assert arguments(pre, "pre")["with_ghost"] is training
    assert (arguments(post, "post")["ghost"] is not None) is training


def test_export_keeps_the_ops_and_decomposes():
    net = Net(hc.HCConfig(DIM, 4, "mhc"), layers=2)
    h = draw(6, DIM)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    with torch.no_grad():
        program = torch.export.export(net, (h,), dynamic_shapes=({0: tokens},))
    names = [str(node.target) for node in program.graph.nodes]
    assert sum("hc.pre" in name for name in names) == 2
    for length in (2, 6, 31):
        other = draw(length, DIM)
        assert torch.allclose(program.module()(other), net(other), atol=1e-5)


def test_functorch_compile_counts_ops():
    """With the bundled functorch.compile: one fused backward op a seam, nothing recomputed."""
    from functorch.compile import aot_function, min_cut_rematerialization_partition, nop

    graphs = []
    c = hc.HCConfig(DIM, 4, "mhc").constraint

    def function(x, *parameters):
        u, _, post, res = hc.functional.pre(x, *parameters, c)
        x, u, _, post, res = hc.functional.post_pre(x, u.tanh(), post, res, *parameters, c)
        return hc.functional.post(x, u.tanh(), post, res)

    def keep(gm, inputs):
        graphs.append(gm)
        return nop(gm, inputs)

    shapes = ((3, 4, DIM), (c.rows, 4 * DIM), (3,), (c.total,))
    inputs = [draw(*shape, seed=k).requires_grad_() for k, shape in enumerate(shapes)]
    partition = min_cut_rematerialization_partition
    compiled = aot_function(function, keep, keep, partition_fn=partition)
    results = []
    for call in (compiled, function):
        out = call(*inputs)
        cot = draw(3, 4, DIM, seed=9)
        results.append([out, *torch.autograd.grad(out, inputs, cot)])
    assert_close(*results)
    loops = [sum("sinkhorn_loop" in str(node.target) for node in gm.graph.nodes) for gm in graphs]
    assert loops == [2, 2]
