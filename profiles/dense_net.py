"""The dense transformer trunk whose training step bench_model times, in every way to compile it.

    h [B, S, C] ─ expand ─ block … block ─ reduce ─ norm ─ [B, S, C];  loss = ⟨out, random⟩

Embedding, head and optimiser are left out: they cost every way the same. Weights of branches and
norms are in the streams' dtype; those of hyper-connections stay fp32.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

import hc_compile as hc
from hc_compile.models import Transformer, TransformerConfig
from hc_compile.passes import PASSES, PassPipeline
from profiles.sublayer import draw_coefficients
from profiles.timing import peak_growth, synchronize


@dataclass(frozen=True)
class Net:
    """Sizes of the trunk and of its batch."""

    width: int
    heads: int
    ffn: int
    layers: int = 2
    batch: int = 4
    length: int = 2048
    streams: int = 4
    iterations: int = 20
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class ModelWay:
    """A preset, an implementation and a compiler (None leaves the trunk eager)."""

    preset: str
    implementation: str
    compile: Callable | None


def _with_passes(count: int) -> Callable:
    """torch.compile with the first `count` graph passes alone."""
    pipeline = PassPipeline(PASSES[:count])
    return partial(torch.compile, dynamic=False, options={"pre_grad_custom_pass": pipeline})


PLAIN = partial(torch.compile, dynamic=False)
WAYS: dict[str, ModelWay] = {
    "residual": ModelWay("residual", "ops", PLAIN),
    "compiled PyTorch": ModelWay("mhc", "plain", PLAIN),
    "ours, torch.compile": ModelWay("mhc", "ops", PLAIN),
    "ours, hc.compile": ModelWay("mhc", "ops", partial(hc.compile, dynamic=False)),
    "ours, v4.1, hc.compile": ModelWay("mhc-v4.1", "ops", partial(hc.compile, dynamic=False)),
}
PER_PASS: dict[str, ModelWay] = {
    f"ours, passes up to {run.__name__}": ModelWay("mhc", "ops", _with_passes(count))
    for count, run in enumerate(PASSES, start=1)
    if count != len(PASSES)
}
RECOMPUTE: dict[str, ModelWay] = {
    f"ours, {name}recompute={policy}": ModelWay(
        preset, "ops", partial(hc.compile, dynamic=False, recompute=policy)
    )
    for name, preset, policy in (
        ("", "mhc", "coefficients"),
        ("", "mhc", "streams"),
        ("v4.1, ", "mhc-v4.1", "streams"),
    )
}


class Trunk(nn.Module):
    """Expand, blocks, reduce and norm of a Transformer."""

    cos: Tensor
    sin: Tensor

    def __init__(self, net: Net, way: ModelWay, device: str):
        super().__init__()
        residual = way.preset == "residual"
        connection = hc.HCConfig(
            net.width,
            1 if residual else net.streams,
            way.preset,
            iterations=net.iterations,
            implementation=way.implementation,
        )
        config = TransformerConfig(
            vocab_size=1,
            dim=net.width,
            layers=net.layers,
            heads=net.heads,
            ffn_dim=net.ffn,
            max_seq_len=net.length,
            hc=connection,
        )
        whole = Transformer(config, device=device)
        self.expand, self.blocks = whole.expand, whole.blocks
        self.reduce, self.norm = whole.reduce, whole.norm
        self.register_buffer("cos", whole.cos)
        self.register_buffer("sin", whole.sin)
        self.apply(draw_coefficients)
        for name, parameter in self.named_parameters():
            if ".hc_" not in name:
                parameter.data = parameter.data.to(net.dtype)

    def forward(self, h: Tensor) -> Tensor:
        """[B, S, C] -> [B, S, C]."""
        x = self.expand(h)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.norm(self.reduce(x))


@dataclass
class Runner:
    """One way, compiled and warm: its step, and what compiling cost."""

    step: Callable[[], object]
    compile_seconds: float
    resident_bytes: int


@contextmanager
def cold_caches() -> Iterator[None]:
    """Empty Inductor and Triton caches, so that compile times compare."""
    import torch._inductor.utils as utils

    fresh = getattr(utils, "fresh_cache", None) or utils.fresh_inductor_cache
    with fresh():
        yield


def warm_compiler(device: str) -> None:
    """Start the compiler's workers, which only the first compilation of a process waits for."""
    values = torch.randn(64, device=device)
    torch.compile(lambda t: t.sin() + 1)(values)


def prepare(net: Net, way: ModelWay, device: str) -> Runner:
    """Build, compile and run the first step of one way; the trunk is the same for all."""
    torch.manual_seed(0)
    trunk = Trunk(net, way, device)
    forward = trunk if way.compile is None else way.compile(trunk)
    size = (net.batch, net.length, net.width)
    h = torch.randn(size, device=device).to(net.dtype).requires_grad_()
    cotangent = torch.randn(size, device=device).to(net.dtype)
    leaves = [h, *trunk.parameters()]

    def step() -> object:
        return torch.autograd.grad(forward(h), leaves, cotangent)

    began = time.perf_counter()
    with cold_caches():
        step()
        synchronize(device)
    first = time.perf_counter() - began
    again = time.perf_counter()
    step()
    synchronize(device)
    resident = sum(t.numel() * t.element_size() for t in (*leaves, cotangent))
    return Runner(step, max(first - (time.perf_counter() - again), 0.0), resident)


def interleaved_ms(
    runners: dict[str, Runner], device: str, rounds: int, repeats: int
) -> dict[str, list[float]]:
    """Milliseconds of every step; the ways take turns, so that a drift of clocks hits them all."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    for runner in runners.values():
        runner.step()
    for _ in range(rounds):
        for name, runner in runners.items():
            times[name] += timed_steps(runner.step, device, repeats)
    return times


def timed_steps(step: Callable[[], object], device: str, repeats: int) -> list[float]:
    """Milliseconds of each of a few steps in a row, the first one not counted."""
    step()
    if not device.startswith("cuda"):
        marks = [time.perf_counter()]
        for _ in range(repeats):
            step()
            marks.append(time.perf_counter())
        return [(b - a) * 1e3 for a, b in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(events)]


def summary(runner: Runner, times: list[float], base: list[float], device: str) -> dict:
    """A way's medians and memory as plain data; `base` is the residual twin's times."""
    growth = peak_growth(runner.step, device)
    median = statistics.median(times)
    return {
        "step_ms": median,
        "fastest_ms": min(times),
        "overhead_percent": (median / statistics.median(base) - 1) * 100,
        "peak_gb": None if growth is None else (growth + runner.resident_bytes) / 1e9,
        "compile_seconds": runner.compile_seconds,
    }
