"""Time calls on a device, measure the machine's copy bandwidth, and count a step's memory.

Run everything inside `measuring(device)`: CUDA graphs can't be captured on the default stream, and
autograd replays a backward on the stream of its forward.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Call = Callable[[], object]
COPY_BYTES = 2**30  # far larger than any L2
GRAPH_MS = 2.0  # a graph repeats a call that is shorter, so that its own start is not counted
GRAPH_CALLS = 20  # at most
CPU_REPEATS = 5


@dataclass(frozen=True)
class Effort:
    """How long to measure one call: milliseconds of warm-up and of timed repeats."""

    warmup: int = 20
    repeat: int = 80


@dataclass(frozen=True)
class Cost:
    """Median milliseconds of a call: launched call by call, and replayed as a CUDA graph.

    first_seconds is the first call, with all the compiling that it caused.
    """

    ms: float
    graph_ms: float | None
    first_seconds: float

    @property
    def best_ms(self) -> float:
        """Without launch gaps where that was measured."""
        return self.ms if self.graph_ms is None else self.graph_ms


@contextlib.contextmanager
def measuring(device: str) -> Iterator[None]:
    """A side stream on a GPU, so that what runs here can be captured."""
    if not device.startswith("cuda"):
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream()):
        yield
    torch.cuda.synchronize()


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def median_ms(call: Call, device: str, effort: Effort = Effort()) -> float:
    """Median of many calls: device events with L2 flushed in between; the wall clock on a CPU."""
    if device.startswith("cuda"):
        from triton.testing import do_bench

        return float(do_bench(call, warmup=effort.warmup, rep=effort.repeat, return_mode="median"))
    samples = []
    for _ in range(CPU_REPEATS):
        began = time.perf_counter()
        call()
        samples.append((time.perf_counter() - began) * 1e3)
    return statistics.median(samples)


def capture_graph(call: Call, calls: int = 1, warmup: int = 3) -> torch.cuda.CUDAGraph:
    """`call`, `calls` times, as a CUDA graph, captured on the current stream: not the default."""
    for _ in range(warmup):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(calls):
            call()
    return graph


def graph_ms(call: Call, device: str, effort: Effort = Effort()) -> float:
    """Median of a call within a CUDA graph, as it runs within a model's.

    The start of a graph takes some microseconds, so a short call is repeated in it; what fits L2
    is then found there by all but the first.
    """
    once = median_ms(capture_graph(call).replay, device, effort)
    calls = repeats(once)
    if calls == 1:
        return once
    return median_ms(capture_graph(call, calls, warmup=0).replay, device, effort) / calls


def repeats(ms: float) -> int:
    """How many calls of so many milliseconds a graph holds."""
    return max(1, min(GRAPH_CALLS, math.ceil(GRAPH_MS / ms)))


def measure(call: Call, device: str, effort: Effort = Effort(), graph: bool = True) -> Cost:
    """First call, then medians without and (on a GPU, if `graph`) with a CUDA graph."""
    began = time.perf_counter()
    call()
    synchronize(device)
    first = time.perf_counter() - began
    ms = median_ms(call, device, effort)
    if not (graph and device.startswith("cuda")):
        return Cost(ms, None, first)
    return Cost(ms, graph_ms(call, device, effort), first)


def copy_bandwidth(device: str, size: int = COPY_BYTES) -> float:
    """Bytes a second of a device-to-device copy, read plus written."""
    if not device.startswith("cuda"):
        size = 2**24
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / (median_ms(lambda: target.copy_(source), device) / 1e3)


def peak_growth(call: Call, device: str) -> int | None:
    """Highest allocation during a call above the level before it; None on a CPU."""
    if not device.startswith("cuda"):
        return None
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


def saved_bytes(forward: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Bytes that a forward keeps for its backward, each storage once, parameters left out."""
    owned = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    total = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in owned)
    del out
    return total


def floor_ms(units: float, tokens: int, width: int, itemsize: int, bandwidth: float) -> float:
    """Time to move `units` × T·C elements once at the given bytes a second."""
    return units * tokens * width * itemsize / bandwidth * 1e3
