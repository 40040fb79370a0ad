"""The kill switch, what get_kernel_status says, and the quick benchmark."""

import os
import subprocess
import sys

import pytest
import torch

from custom_ops.registration import use_triton
from hc_compile import kernels, layers
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


@pytest.mark.parametrize("name", ["HC_DISABLE_TRITON", "HYDRA_DISABLE_TRITON"])
@pytest.mark.parametrize(("value", "expected"), [("1", False), ("0", True), ("", True)])
def test_environment_switch(name, value, expected):
    code = "from custom_ops.registration import triton_enabled; print(triton_enabled())"
    environment = os.environ | {name: value}
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


def test_status_and_flags():
    from importlib.util import find_spec

    status = kernels.get_kernel_status()
    assert kernels.FUSED_KERNELS_AVAILABLE == status["triton_available"]
    assert status["flash_attn_available"] == kernels.FLASH_ATTN_AVAILABLE
    assert kernels.FLASH_ATTN_AVAILABLE == (find_spec("flash_attn") is not None)
    assert kernels.XFORMERS_AVAILABLE == (find_spec("xformers") is not None)
    assert kernels.fused_rope is layers.fused_rope


@pytest.mark.compile
def test_quick_benchmark_prints_what_it_measured(capsys):
    results = kernels.benchmark_kernels(1, 8, 16, 2, warmup=1, iterations=2)
    assert results["config"] == {"batch_size": 1, "seq_len": 8, "dim": 16, "n_heads": 2}
    kernels.print_benchmark_results(results)
    printed = capsys.readouterr().out
    for name, title in (("rope", "RoPE"), ("swiglu", "SwiGLU"), ("rms_norm", "RMSNorm")):
        times = results[name]
        assert times["speedup"] == pytest.approx(times["pytorch_ms"] / times["compiled_ms"])
        assert f"{title}:\n  PyTorch:  {times['pytorch_ms']:.3f} ms" in printed


def test_quick_benchmark_refuses_heads_that_do_not_fit():
    with pytest.raises(ValueError, match="n_heads must divide dim = 10, got 3"):
        kernels.benchmark_kernels(dim=10, n_heads=3)
