"""Few tokens take more programs, and nothing is guarded on how many tokens there are."""

import subprocess
import sys

import pytest

pytest.importorskip("triton")

DYNAMIC = """
import torch
from torch._dynamo.utils import counters
from custom_ops.constraint import Constraint
from profiles.stand_in import kernels_without_device

launched = kernels_without_device()
n, width = 4, 512
c = Constraint(n)
parameters = (torch.randn(c.total, n * width), torch.ones(3), torch.zeros(c.total))
parameters = [p.requires_grad_() for p in parameters]

def function(x, y, post, res):
    x, u, *_ = torch.ops.hc.post_pre(x, y, post, res, *parameters, c.spec)
    return u, torch.ops.hc.pre(x, *parameters, c.spec)[0]

compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
grids = {}
for tokens in (3, 3000, 512, 513, 2, 1, 128):
    inputs = [torch.rand(tokens, *own) for own in ((n, width), (width,), (n,), (n, n))]
    inputs = [t.bfloat16() if t.shape[-1] == width else t for t in inputs]
    for t in inputs:
        if tokens > 1:
            torch._dynamo.mark_dynamic(t, 0)
    launched.clear()
    compiled(*inputs)
    grids[tokens] = [grid[0] for grid in launched]
    assert counters["stats"]["unique_graphs"] == (2 if 1 in grids else 1), tokens
# split, post_project, sum_turns, constrain, aggregate; split, project, sum_turns, ...
assert grids[512][1:3] == [16 * 2 * 4, 200] and grids[513][1:3] == [17 * 2, 0], grids
assert grids[512][6:8] == [8 * 2 * 8, 200] and grids[513][6:8] == [9 * 2, 0], grids
assert len({len(found) for found in grids.values()}) == 1, grids
"""


@pytest.mark.compile
def test_a_dynamic_compile_guards_on_nothing_but_one_token():
    """Forward and backward are traced together; kernels are compiled and not run."""
    subprocess.run([sys.executable, "-c", DYNAMIC], check=True, timeout=300)
