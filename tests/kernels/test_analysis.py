"""Torch's search for what a kernel writes is made once for each kernel and kind of arguments."""

import types

import pytest
import torch
import torch._higher_order_ops.triton_kernel_wrap as wrap

from custom_ops.kernels import analysis


def kernel(name, **constants):
    """As much of a kernel as the analysis is asked about; with constants, in its own tuner."""
    function = types.SimpleNamespace(__name__=name)
    if not constants:
        return types.SimpleNamespace(fn=function, __name__=name)
    config = types.SimpleNamespace(kwargs=constants)
    return types.SimpleNamespace(
        fn=types.SimpleNamespace(fn=function, __name__=name), configs=[config]
    )


@pytest.fixture
def counted(monkeypatch):
    monkeypatch.setattr(analysis, "_found", {})
    calls = []

    def analyse(kernel, kwargs, tma_descriptor_metadata):
        calls.append(kwargs)
        return [name for name in kwargs if name.startswith("out")]

    return analysis._remembering(analyse), calls


def arguments(dtype=torch.bfloat16, tokens=7, **more):
    return {
        "x_ptr": torch.empty(3, dtype=dtype),
        "out_ptr": torch.empty(5),
        "tokens": tokens,
        **more,
    }


def test_each_kind_of_launch_is_analysed_once(counted):
    remembered, calls = counted
    for _ in range(3):
        assert remembered(kernel("hc_post"), arguments(), {}) == ["out_ptr"]
        assert remembered(kernel("hc_post", N=4), arguments(), {}) == ["out_ptr"]
    assert len(calls) == 2


@pytest.mark.parametrize(
    "other",
    [
        (kernel("hc_pre", N=4), arguments(), {}),
        (kernel("hc_post", N=2), arguments(), {}),
        (kernel("hc_post", N=4), arguments(torch.float32), {}),
        (kernel("hc_post", N=4), arguments(tokens=1), {}),
        (kernel("hc_post", N=4), arguments(tokens=None), {}),
        (kernel("hc_post", N=4), arguments(extra=True), {}),
    ],
)
def test_what_may_differ_is_analysed_again(counted, other):
    remembered, calls = counted
    remembered(kernel("hc_post", N=4), arguments(), {})
    remembered(*other)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "other", [(kernel("theirs"), arguments(), {}), (kernel("hc_post"), arguments(), {"x_ptr": 1})]
)
def test_nothing_is_remembered_for_others(counted, other):
    remembered, calls = counted
    remembered(*other)
    remembered(*other)
    assert len(calls) == 2


def test_torch_still_has_an_analysis_to_remember():
    """If torch renames it, tracing still works, but compiling takes minutes again."""
    analysis.remember()
    found = [getattr(wrap, name) for name in analysis.ANALYSES if hasattr(wrap, name)]
    assert found and all(hasattr(analyse, "__wrapped__") for analyse in found)
