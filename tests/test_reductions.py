"""No sum over the tokens lands in a slice of a cat: Inductor may drop it (see backend.py)."""

import pytest
import torch

import hc_compile as hc
from hc_compile.passes import PASSES
from tests.passes.harness import lowered_graphs
from tests.test_presets import DIM, PRESETS, Net, draw

TOKENS = 40
THROUGH = ("view", "reshape", "squeeze", "unsqueeze", "expand", "permute", "alias", "slice")
THROUGH += ("select", "convert_element_type", "clone", "mul", "neg")


def op_name(node):
    return str(getattr(node.target, "_opname", node.target))


def lost_tokens(node):
    """Widths of the sums over the tokens that this input of a cat consists of."""
    nodes, found = [node], []
    while nodes:
        node = nodes.pop()
        if node.op != "call_function":
            continue
        if op_name(node) in THROUGH:
            nodes += node.all_input_nodes
        elif op_name(node) in ("sum", "mean", "mm"):
            source, result = (n.meta["val"].shape for n in (node.all_input_nodes[0], node))
            if TOKENS in source and TOKENS not in result:
                found.append(source.numel() // TOKENS)
    return found


def backward_graph(net, passes):
    """The backward with ops decomposed: more than a GPU shows Inductor."""
    return lowered_graphs(net, draw(TOKENS, DIM), passes)[1]


@pytest.mark.parametrize("name", PRESETS)
def test_no_large_sum_over_tokens_lands_in_a_cat(name):
    """The static preset has sums of 1 to n² columns; at risk are 1280 and more at 4096 tokens."""
    net = Net(hc.HCConfig(DIM, 4, name), layers=3)
    cats = [node for node in backward_graph(net, PASSES).nodes if op_name(node) == "cat"]
    widths = {w for cat in cats for item in cat.all_input_nodes for w in lost_tokens(item)}
    assert widths <= ({1, 4, 16} if name == "shc" else set())


def test_the_search_finds_one():
    class Table(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.ones(2 * DIM))

        def forward(self, x):
            scale, shift = self.table.chunk(2)
            return x * scale + shift

    cats = [node for node in backward_graph(Table(), ()).nodes if op_name(node) == "cat"]
    assert {w for cat in cats for item in cat.all_input_nodes for w in lost_tokens(item)} == {DIM}
