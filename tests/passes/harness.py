"""What the pass tests share: run a net with some passes, eagerly, and count the ops that ran."""

import torch
from functorch.compile import min_cut_rematerialization_partition, nop
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch.profiler import ProfilerActivity, profile

from hc_compile.passes import PASSES, PassPipeline
from tests.conftest import cotangents, worst


def with_passes(function, passes=PASSES, fullgraph=True, counts=None, compiler=None):
    """`function` as Dynamo sees it, nested regions too, after the passes.

    counts: a dict that gets the number of calls of each hc:: op in the graphs.
    compiler: a Dynamo backend for the rewritten graph, which otherwise runs as it is.
    """
    from torch._inductor import config
    from torch._inductor.compile_fx import _recursive_pre_grad_passes

    def backend(gm, inputs):
        with config.patch(pre_grad_custom_pass=PassPipeline(passes), pattern_matcher=False):
            gm = _recursive_pre_grad_passes(gm, inputs)
        for module in gm.modules() if counts is not None else ():
            count(module, counts)
        return gm if compiler is None else compiler(gm, inputs)

    torch.compiler.reset()
    return torch.compile(function, backend=backend, fullgraph=fullgraph)


def count(gm, into):
    """Add the hc:: calls of a graph module to `into`, by name."""
    for node in gm.graph.nodes if isinstance(gm, torch.fx.GraphModule) else ():
        name = str(node.target)
        if node.op == "call_function" and name.startswith("hc."):
            key = name.removeprefix("hc.").removesuffix(".default")
            into[key] = into.get(key, 0) + 1


def results(function, net, *inputs):
    """Outputs, then the gradients of the inputs that need one and of the parameters of `net`."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = [t for t in (*inputs, *net.parameters()) if t.requires_grad]
    live = [(o, c) for o, c in zip(outputs, cotangents(outputs), strict=True) if o.requires_grad]
    for leaf in leaves:
        leaf.grad = None
    torch.autograd.backward([o for o, _ in live], [c for _, c in live])
    return [*outputs, *(leaf.grad for leaf in leaves)]


def assert_equal(ours, plain, tolerance=1e-11):
    """The same results; in float64 a different order of the same sums is all that may differ."""
    for k, (a, b) in enumerate(zip(ours, plain, strict=True)):
        assert (a is None) == (b is None), k
        if a is not None:
            assert a.dtype == b.dtype and a.shape == b.shape, k
            assert worst(a, b) <= tolerance, (k, worst(a, b))


def op_counts(call):
    """How often each hc:: op ran, forward and backward, without the loops inside them."""
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        call()
    names = {e.key.removeprefix("hc::"): e.count for e in prof.key_averages() if "hc::" in e.key}
    return {name: n for name, n in names.items() if "_loop" not in name}


def lowered_graphs(net, h, passes):
    """The forward and backward graphs that Inductor would be given, ops decomposed."""
    graphs = []

    def keep(gm, inputs):
        graphs.append(gm.graph)
        return nop(gm, inputs)

    inner = aot_autograd(
        fw_compiler=keep,
        bw_compiler=keep,
        decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )

    def backend(gm, inputs):
        PassPipeline(passes)(gm.graph)
        gm.recompile()
        return inner(gm, inputs)

    torch.compiler.reset()
    torch.compile(net, backend=backend, fullgraph=True)(h).sum().backward()
    return graphs
