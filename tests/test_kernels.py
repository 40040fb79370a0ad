"""The kill switch and what get_kernel_status says."""

import os
import subprocess
import sys

import pytest
import torch

from custom_ops.registration import use_triton
from hc_compile.kernels import get_kernel_status, set_use_triton_kernels


def test_status_names_what_runs_here():
    import triton

    status = get_kernel_status()
    assert status["triton_version"] == triton.__version__
    assert status["cuda_available"] == torch.cuda.is_available()
    assert status["use_triton_kernels"] == torch.cuda.is_available()
    assert status["ops"] == ("ops, Triton" if torch.cuda.is_available() else "ops, decomposed")


@pytest.mark.interpreter
def test_switch_turns_the_kernels_off_and_on():
    """Interpreted kernels and plain torch differ in rounding, so the switch shows in the bits."""
    x = torch.randn(64, 4, 257)
    pre = torch.randn(64, 4)
    assert use_triton(x) and not use_triton(x.double())
    with_kernels = torch.ops.hc.aggregate(x, pre)
    try:
        set_use_triton_kernels(False)
        assert not use_triton(x)
        assert not get_kernel_status()["use_triton_kernels"]
        without = torch.ops.hc.aggregate(x, pre)
    finally:
        set_use_triton_kernels(True)
    assert use_triton(x)
    assert torch.allclose(with_kernels, without, atol=1e-5)
    with pytest.raises(TypeError, match="enabled must be a bool, got int"):
        set_use_triton_kernels(1)


@pytest.mark.parametrize(("value", "expected"), [("1", False), ("0", True), ("", True)])
def test_environment_switch(value, expected):
    code = "from custom_ops.registration import triton_enabled; print(triton_enabled())"
    environment = os.environ | {"HC_DISABLE_TRITON": value}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == str(expected)


def test_compiled_code_keeps_what_it_was_compiled_with():
    """The switch is read when code is compiled; flipping it later changes nothing that runs."""
    compiled = torch.compile(torch.ops.hc.aggregate, backend="aot_eager")
    x, pre = torch.randn(3, 4, 5), torch.randn(3, 4)
    before = compiled(x, pre)
    try:
        set_use_triton_kernels(False)
        assert torch.equal(compiled(x, pre), before)
    finally:
        set_use_triton_kernels(True)
