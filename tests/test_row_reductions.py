"""Norms over rows as wide as a model's read each row once under hc.compile."""

import json
import subprocess
import sys

import pytest
import torch
from torch._inductor.choices import InductorChoices
from torch._inductor.virtualized import V

import hc_compile as hc
from hc_compile.layers import rms_norm
from hc_compile.row_reductions import LONGEST, RowsOnChip, with_rows_on_chip

# The code that Inductor writes for a GPU, which need not be there: nothing is built or run.
GENERATED = """
import json, sys, torch
from torch._inductor import config
from torch._inductor.utils import run_and_get_code
import hc_compile as hc
from hc_compile.layers import rms_norm
from profiles.stand_in import kernels_without_device

kernels_without_device(build=False)
found = {}
for name, compile in {"Inductor": torch.compile, "hc.compile": hc.compile}.items():
    for width in map(int, sys.argv[1:]):
        torch.compiler.reset()
        x, w = (torch.randn(*size, width, requires_grad=True) for size in ((64,), ()))
        norm = compile(lambda x, w: rms_norm(x, w).sum())
        with config.patch(cpu_backend="triton", force_disable_caches=True):
            _, code = run_and_get_code(lambda: norm(x, w).backward())
        lines = "".join(code).splitlines()
        loops = [line for line in lines if line.startswith("@triton_heuristics.reduction(")]
        found[f"{name} {width}"] = len(loops)
print(json.dumps(found))
"""


@pytest.mark.compile
def test_rows_stay_on_chip_forward_and_backward():
    command = [sys.executable, "-c", GENERATED, str(LONGEST), str(2 * LONGEST)]
    done = subprocess.run(command, check=True, timeout=300, stdout=subprocess.PIPE)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found[f"hc.compile {LONGEST}"] == 0 < found[f"Inductor {LONGEST}"]
    assert found[f"hc.compile {2 * LONGEST}"] == found[f"Inductor {2 * LONGEST}"] > 0


def test_a_users_own_choices_stay():
    class Own(InductorChoices):
        pass

    seen = with_rows_on_chip(lambda: type(V.choices))
    assert seen() is RowsOnChip
    with V.set_choices_handler(Own()):
        assert seen() is Own
    assert type(V.choices) is InductorChoices


@pytest.mark.gpu
@pytest.mark.parametrize("width", [2560, 4096, 5000])
def test_norm_against_float64(width):
    x, w, dy = (torch.randn(*size, width, device="cuda") for size in ((300,), (), (300,)))
    inputs = [x.bfloat16().requires_grad_(), w.requires_grad_()]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    out, expected = hc.compile(rms_norm)(*inputs), rms_norm(*wide)
    grads = torch.autograd.grad(out, inputs, dy.bfloat16())
    truths = torch.autograd.grad(expected, wide, dy.bfloat16().double())
    for found, truth in zip((out, *grads), (expected, *truths), strict=True):
        assert (found - truth).abs().max() <= 2**-8 * truth.abs().max()
