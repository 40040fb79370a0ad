"""A quick look at what compiling the layers' functions brings on this machine.

`python -m scripts.bench_layers` is the full measurement: backward, launches, peers, memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from hc_compile.layers.functions import (
    fused_qk_norm,
    fused_rms_norm,
    fused_rope,
    fused_swiglu,
    rope_tables,
)

TITLES = {"rope": "RoPE", "qk_norm": "QK norm", "swiglu": "SwiGLU", "rms_norm": "RMSNorm"}


def benchmark_kernels(
    batch_size: int = 4,
    seq_len: int = 512,
    dim: int = 768,
    n_heads: int = 12,
    warmup: int = 10,
    iterations: int = 100,
) -> dict[str, Any]:
    """Time the forward of fused_rope, fused_qk_norm, fused_swiglu and fused_rms_norm.

    Args:
        batch_size, seq_len, dim, n_heads: sizes; bfloat16 on a GPU, float32 on a CPU.
        warmup, iterations: calls before and while the clock runs.
    Returns: {"config": …, "device": …, name: {"pytorch_ms", "compiled_ms", "speedup"}}; compiled
        is torch.compile's code, which on a GPU is generated Triton.
    Raises: ValueError when n_heads does not divide dim.
    """
    if n_heads < 1 or dim % n_heads:
        raise ValueError(f"n_heads must divide dim = {dim}, got {n_heads}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    heads = (batch_size, n_heads, seq_len, dim // n_heads)
    tables = (table.to(device) for table in rope_tables(seq_len, heads[-1]))
    hidden = (batch_size, seq_len, 4 * dim)
    calls: dict[str, tuple[Callable, tuple]] = {
        "rope": (fused_rope, (randn(*heads), *tables)),
        "qk_norm": (fused_qk_norm, (randn(*heads), randn(*heads), heads[-1] ** 0.5)),
        "swiglu": (fused_swiglu, (randn(*hidden), randn(*hidden))),
        "rms_norm": (fused_rms_norm, (randn(batch_size, seq_len, dim), randn(dim))),
    }
    sizes = {"batch_size": batch_size, "seq_len": seq_len, "dim": dim, "n_heads": n_heads}
    results: dict[str, Any] = {"config": sizes, "device": device}
    for name, (function, arguments) in calls.items():
        plain = _milliseconds(function, arguments, warmup, iterations)
        compiled = torch.compile(function, dynamic=False)
        fused = _milliseconds(compiled, arguments, warmup, iterations)
        results[name] = {"pytorch_ms": plain, "compiled_ms": fused, "speedup": plain / fused}
    return results


def _milliseconds(call: Callable, arguments: tuple, warmup: int, iterations: int) -> float:
    for _ in range(max(warmup, 1)):
        call(*arguments)
    timer = Timer("call(*arguments)", globals={"call": call, "arguments": arguments})
    return timer.timeit(iterations).mean * 1e3


def print_benchmark_results(results: dict[str, Any]) -> None:
    """Print what `benchmark_kernels` returned."""
    sizes = ", ".join(f"{name} {value}" for name, value in results["config"].items())
    print(f"{results['device']}: {sizes}")
    for name, title in TITLES.items():
        times = results[name]
        print(f"{title}:")
        print(f"  PyTorch:  {times['pytorch_ms']:.3f} ms")
        print(f"  Compiled: {times['compiled_ms']:.3f} ms")
        print(f"  Speedup:  {times['speedup']:.2f}x")
