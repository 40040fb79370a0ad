"""What torch finds out about a kernel is asked once, and is what it would have found again."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

import triton

from custom_ops.kernels.aggregate import hc_aggregate
from custom_ops.kernels.analysis import Remembered
from custom_ops.kernels.post import hc_post


class Analysis:
    def __init__(self):
        self.calls = 0

    def __call__(self, kernel, kwargs, tma):
        self.calls += 1
        return [self.calls]


def arguments(dtype=torch.float32, streams=4, tokens=48):
    return {"x_ptr": torch.empty(2, dtype=dtype), "IN": streams, "tokens": tokens, "y_ptr": None}


def test_equal_questions_are_asked_once():
    analysis = Analysis()
    remembered = Remembered(analysis)
    different = [
        arguments(),
        arguments(dtype=torch.bfloat16),
        arguments(streams=3),
        arguments(tokens=1),
        arguments(tokens=50),
        arguments() | {"y_ptr": torch.empty(1)},
    ]
    first = [remembered(hc_post, kwargs, {}) for kwargs in different]
    again = [remembered(hc_post, dict(kwargs), {}) for kwargs in different]
    assert first == again == [[k + 1] for k in range(len(different))]
    assert remembered(hc_post, arguments(tokens=64), {}) == first[0]  # another multiple of 16
    assert remembered(hc_aggregate, arguments(), {}) not in first


def test_tracing_and_lowering_ask_the_same_question():
    """Tracing asks about an Autotuner of one empty config, lowering about the kernel itself."""
    remembered = Remembered(Analysis())
    wrapped = triton.autotune([triton.Config({})], key=[])(hc_post)
    assert remembered(wrapped, arguments(), {}) == remembered(hc_post, arguments(), {})
    chosen = triton.autotune([triton.Config({"BLOCK_C": 64})], key=[])(hc_post)
    assert remembered(chosen, arguments(), {}) != remembered(hc_post, arguments(), {})


def test_other_kernels_are_asked_every_time():
    def foreign():
        pass

    remembered = Remembered(Analysis())
    assert remembered(foreign, arguments(), {}) != remembered(foreign, arguments(), {})
    assert remembered(hc_post, arguments(), {"x": 1}) != remembered(hc_post, arguments(), {"x": 1})


TRACE = """
import torch, triton
from torch._higher_order_ops import triton_kernel_wrap as wrap
from torch._subclasses.fake_tensor import FakeTensorMode
from functorch.compile import aot_function, nop
from tests.ahead_of_time import Driver
import hc_compile as hc
from custom_ops.kernels import launch
from custom_ops.kernels.analysis import ANALYSES

triton.runtime.driver.set_active(Driver(90))
torch.cuda.get_device_capability = lambda device=None: (9, 0)
c = hc.HCConfig(64, 4).constraint

def function(x, phi, alpha, bias):
    for _ in range(2):
        u, _, post, res, _, _, _ = torch.ops.hc.pre(x, phi, alpha, bias, c.spec)
        x = torch.ops.hc.post(x, u, post, res)
    return x

def trace():
    graphs = []
    def keep(gm, inputs):
        graphs.append(gm)
        return nop(gm, inputs)
    with FakeTensorMode():
        shapes = ((32, 4, 64), (c.total, 256), (3,), (c.total,))
        aot_function(function, keep, keep)(*(torch.empty(s, device="cuda") for s in shapes))
    wrapped = [n for n in graphs[0].graph.nodes if "triton_kernel_wrapper" in str(n.target)]
    return [sorted(n.kwargs["tensors_to_clone"]) for n in wrapped]

usual, launch.remember = launch.remember, lambda: None
plain = trace()
assert not any(hasattr(getattr(wrap, name, None), "answers") for name in ANALYSES)
launch.remember = usual
kept = trace()
assert plain == kept and len(kept) == 10, (plain, kept)
(found,) = [getattr(wrap, name) for name in ANALYSES if hasattr(wrap, name)]
assert len(found.answers) == 5, len(found.answers)
"""


@pytest.mark.compile
def test_traced_graphs_are_the_same():
    """Fake CUDA tensors and a stand-in for the driver: no device is needed to trace."""
    subprocess.run([sys.executable, "-c", TRACE], check=True, timeout=300)
