"""What the passes leave beside hc:: ops: nothing of a stream's size that the twin does not have.

Interpreted ops are opaque, so the traced graphs show the glue between them alone.
"""

import pytest
import torch

import hc_compile as hc
from hc_compile.models import Transformer, TransformerConfig
from hc_compile.passes import PASSES
from hc_compile.passes.fold_norm import fold_norm
from tests.passes.harness import lowered_graphs

COPIES = ("clone", "cat", "stack", "convert_element_type", "_to_copy", "copy")


def traced(preset, passes):
    """Forward and backward graph of four sublayers, bf16 streams."""
    cfg = hc.HCConfig(16, preset=preset, iterations=2)
    torch.manual_seed(0)
    net = Transformer(
        TransformerConfig(
            vocab_size=8,
            dim=16,
            layers=2,
            heads=2,
            ffn_dim=16,
            hc=cfg,
            stream_dtype=torch.bfloat16,
        )
    )
    return lowered_graphs(net, torch.arange(4)[None], passes)


def copies(graph):
    """How many nodes copy or cast a tensor."""
    nodes = (node for node in graph.nodes if node.op == "call_function")
    names = (str(getattr(node.target, "_opname", node.target)) for node in nodes)
    return sum(name in COPIES for name in names)


@pytest.mark.interpreter
def test_no_copies_or_casts_beyond_the_twins():
    """Two more forward and three backward for the first read, left to Inductor as its norm is.

    One more backward, and small: the gradient of the φ that was summed over the streams. A norm
    that is part of its read takes its casts along.
    """
    forward, backward = (copies(graph) for graph in traced("residual", PASSES))
    unfolded = tuple(run for run in PASSES if run is not fold_norm)
    assert [copies(graph) for graph in traced("mhc", unfolded)] == [forward + 2, backward + 4]
    folded = [copies(graph) for graph in traced("mhc", PASSES)]
    assert folded[0] < forward and folded[1] < backward
