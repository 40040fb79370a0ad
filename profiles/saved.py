"""What a compiled graph keeps between forward and backward, read from its partition."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from functorch.compile import min_cut_rematerialization_partition, nop
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch.fx import GraphModule, Node

from hc_compile.passes import PASSES, PassPipeline
from hc_compile.passes.recompute import Recompute, annotate
from hc_compile.recompute import Policy


@dataclass
class Saved:
    """Bytes that forward graphs keep for their backward ones, and the backward's calls by name.

    streams: of tensors [..., n, C]. coefficients: of those with a few numbers a token.
    branches: all others, among them what branches read and return. Inputs of a graph (parameters
    and x of a block that is a graph of its own) are not counted.
    """

    streams: int = 0
    coefficients: int = 0
    branches: int = 0
    backward: Counter[str] = field(default_factory=Counter)


def saved_by(function: Callable, policy: Policy, streams: Tensor) -> tuple[Callable, Saved]:
    """`function` compiled as `hc.compile(function, recompute=policy)` partitions it.

    Its graphs run as they are, without Inductor's code; the second result is filled at the first
    call. `streams` is like the x of a sublayer.
    """
    found = Saved()
    torch.compiler.reset()
    return torch.compile(function, backend=traced_backend(policy, streams, found)), found


def traced_backend(policy: Policy, streams: Tensor, found: Saved) -> Callable:
    """A Dynamo backend that stops before Inductor and notes in `found` what graphs keep."""

    def partition(joint, inputs, **kwargs):
        Recompute(policy)(joint.graph)
        forward, backward = min_cut_rematerialization_partition(joint, inputs, **kwargs)
        _count(forward, backward, kwargs["num_fwd_outputs"], streams, found)
        return forward, backward

    inner = aot_autograd(
        fw_compiler=nop,
        bw_compiler=nop,
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )

    def backend(gm, inputs):
        PassPipeline((*PASSES, annotate))(gm.graph)
        gm.recompile()
        return inner(gm, inputs)

    return backend


def _count(
    forward: GraphModule, backward: GraphModule, outputs: int, streams: Tensor, found: Saved
) -> None:
    kept = forward.graph.find_nodes(op="output")[0].args[0][outputs:]
    tokens = streams.shape[:-2].numel()
    bases = {_base(node): node for node in kept if isinstance(node, Node)}
    for base in bases:
        value = base.meta.get("val")
        if base.op == "placeholder" or not isinstance(value, Tensor):
            continue
        shape = [s if isinstance(s, int) else s.node.hint for s in value.shape]  # no guards
        count = math.prod(shape)
        size = count * value.element_size()
        if shape[-2:] == list(streams.shape[-2:]):
            found.streams += size
        elif count % tokens == 0 and count // tokens < streams.shape[-1]:
            found.coefficients += size
        else:
            found.branches += size
    calls = backward.graph.nodes
    found.backward.update(str(node.target) for node in calls if node.op == "call_function")


def _base(node: Node) -> Node:
    """What a view looks at."""
    while isinstance(node.target, torch._ops.OpOverload) and node.target.is_view:
        source = node.args[0]
        assert isinstance(source, Node)
        node = source
    return node
