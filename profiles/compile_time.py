"""Seconds of a network's first forward and backward, and the compiler's parts of them.

Run as a program by scripts/bench_compile_time.py, each way in a process and caches of its own:
`python -m profiles.compile_time WAY LAYERS DEVICE [traced] [kernels]` prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch._dynamo.utils import counters, cumulative_time_spent_ns

import hc_compile as hc
from hc_compile.blocks import blocks_of, compile_each
from profiles.dense_net import ModelWay, Net, Trunk, cold_caches, warm_compiler
from profiles.saved import Saved, saved_by, traced_backend
from profiles.stand_in import kernels_without_device
from profiles.timing import synchronize

GPU_NET = Net(2560, heads=20, ffn=6912, batch=1)
CPU_NET = Net(32, heads=2, ffn=64, batch=2, length=16)
WAYS = ("residual", "mHC", "residual, regional", "mHC, regional", "mHC, recompute=streams")
TIMERS = (  # torch's own; the first two hold the forward's part of the last two
    "entire_frame_compile",
    "backend_compile",
    "entire_backward_compile",
    "inductor_compile",
    "async_compile.wait",
)


def measure(way: str, layers: int, device: str, traced: bool = False) -> dict:
    """Build one way, run its first step, and say where the seconds went.

    traced: stop before Inductor; the partitioned graphs run as they are.
    """
    net = replace(GPU_NET if device.startswith("cuda") else CPU_NET, layers=layers)
    torch.manual_seed(0)
    preset = "residual" if way.startswith("residual") else "mhc"
    trunk = Trunk(net, ModelWay(preset, "ops", None), device)
    h = torch.randn(net.batch, net.length, net.width, device=device).to(net.dtype)
    leaves = [h.requires_grad_(), *trunk.parameters()]
    forward = _compiled(trunk, way, trunk.expand(h.detach()) if traced else None)
    if not traced:
        warm_compiler(device)
    cumulative_time_spent_ns.clear()
    counters.clear()
    with cold_caches():
        began, own = time.perf_counter(), time.process_time()
        torch.autograd.grad(forward(h), leaves, torch.ones_like(h))
        synchronize(device)
        whole, own = time.perf_counter() - began, time.process_time() - own
    graphs = counters["stats"]["unique_graphs"]
    row = {"way": way, "layers": layers, "graphs": graphs, "seconds": whole, "cpu_seconds": own}
    return row | _parts()


def _compiled(trunk: Trunk, way: str, streams: Tensor | None) -> Callable:
    """The trunk as `way` compiles it; with `streams`, like its x, without Inductor."""
    policy = "streams" if "streams" in way else "none"
    options = {"dynamic": False, "fullgraph": True}
    if "regional" in way:
        if streams is None:
            return hc.compile_blocks(trunk, **options)
        backend = traced_backend(policy, streams, Saved())
        compile_each(trunk, blocks_of(trunk), backend, **options)
        return trunk
    if streams is None:
        return hc.compile(trunk, recompute=policy, **options)
    return saved_by(trunk, policy, streams)[0]


def _parts() -> dict[str, float]:
    """Seconds in Dynamo, in AOTAutograd with the graph passes, in Inductor, in building code."""
    spent = {name: nanoseconds / 1e9 for name, nanoseconds in cumulative_time_spent_ns.items()}
    frames, backend, backward, inductor, build = (spent.get(name, 0.0) for name in TIMERS)
    return {
        "dynamo": frames - backend,
        "aot": backend + backward - inductor,
        "inductor": inductor - build,
        "build": build,
    }


if __name__ == "__main__":
    way, layers, device, *options = sys.argv[1:]
    if "kernels" in options:
        kernels_without_device(build=False)
    print(json.dumps(measure(way, int(layers), device, "traced" in options)))
