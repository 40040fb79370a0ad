"""The paths that a training step can take, and one of them measured."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config

import hc_compile as hc
from hc_compile.passes import without_pipeline
from profiles import op_floor
from profiles.capture import capture
from profiles.compilation import Compilation, compilation
from profiles.dense_net import cold_caches, timed_steps
from profiles.memory import memory_curve
from profiles.timing import synchronize
from profiles.trace import Trace
from profiles.workload import (
    Forward,
    TrainingStep,
    Workload,
    compile_blocks,
    configurations,
    implementation,
    uncompile,
)


def without_passes(model: nn.Module) -> Forward:
    """torch.compile without the hc:: graph passes, installed or not."""
    then = without_pipeline(inductor_config.pre_grad_custom_pass)
    return torch.compile(model, options={"pre_grad_custom_pass": then})


@dataclass(frozen=True)
class PathKind:
    """One way to run a model.

    Attributes:
        what: for the report, {plain} standing for the code that "plain" gives.
        implementation: of its hyper-connections, "plain" or "ops".
        compile: model -> forward.
        ops: which hc:: calls it makes: "none", "as written", "after passes", or "unknown".
    """

    what: str
    implementation: str
    compile: Callable[[nn.Module], Forward]
    ops: str = "none"

    def describe(self, model: nn.Module) -> str:
        """What runs; without an HCConfig there is nothing to switch to plain functions."""
        found = configurations(model)
        return self.what.format(plain="the plain functions" if found else "the model as it is")


PATHS = {
    "eager": PathKind("{plain}, no compiler", "plain", lambda model: model),
    "compiled": PathKind("torch.compile of {plain}, block by block", "plain", compile_blocks),
    "custom-op": PathKind(
        "torch.compile of the hc:: ops, no graph passes", "ops", without_passes, "as written"
    ),
    "fused": PathKind("hc.compile: hc:: ops and graph passes", "ops", hc.compile, "after passes"),
    "fused-recompute": PathKind(
        'hc.compile(recompute="streams")',
        "ops",
        partial(hc.compile, recompute="streams"),
        "unknown",
    ),
}


def available(names: Sequence[str], has_ops: bool) -> tuple[list[str], list[str]]:
    """The paths of `names` that can run here, and a sentence for each that is left out.

    Raises:
        ValueError: on an unknown name, or none.
    """
    unknown = [name for name in names if name not in PATHS]
    if unknown or not names:
        raise ValueError(f"paths must be some of {', '.join(PATHS)}, got {list(names)}")
    kept, notes = [], []
    for name in dict.fromkeys(names):
        if PATHS[name].implementation == "ops" and not has_ops:
            notes.append(f"{name} is left out: the model calls no hc:: op")
        else:
            kept.append(name)
    return kept, notes


@dataclass
class Outcome:
    """One path, measured."""

    trace: Trace
    record: dict[str, Any]
    values: tuple[list[Tensor], list[Tensor]]


def run_path(name: str, workload: Workload, steps: int, traced: int, out: Path) -> Outcome:
    """Compile from cold caches, time, measure memory and trace one path."""
    path, device = PATHS[name], workload.device
    fresh(workload.model, device)
    with implementation(workload.model, path.implementation), cold_caches():
        with compilation() as compiled:
            step = TrainingStep(workload, path.compile(workload.model))
            began = time.perf_counter()
            values = step.gradients()
            synchronize(device)
            first = time.perf_counter() - began
            times = timed_steps(step, device, steps)
            peak = cuda_peak(step) if device == "cuda" else None
            trace = capture(step, out / name, steps=traced)
        growth = trace.peak_bytes
        if peak is None and growth is not None:
            peak = step.resident_bytes() + growth
        step_ms = typical_ms(times, device)
        record = {
            "what": path.describe(workload.model),
            "step_ms": step_ms,
            "steps_ms": [round(ms, 4) for ms in times],
            "peak_bytes": peak,
            "resident_bytes": step.resident_bytes(),
            "compile": compile_record(compiled, first - step_ms / 1e3),
            "memory_curve": memory_curve(trace.path, trace.device),
            **time_record(trace, step_ms),
            "trace": trace.to_json(),
        }
    uncompile(workload.model)
    return Outcome(trace, record, values)


def typical_ms(times: list[float], device: str) -> float:
    """The median on a GPU; the fastest on a CPU, where whatever else runs only adds time."""
    return statistics.median(times) if device == "cuda" else min(times)


def fresh(model: nn.Module, device: str) -> None:
    """Forget what was compiled and free what earlier paths left."""
    torch.compiler.reset()
    uncompile(model)
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def cuda_peak(step: TrainingStep) -> int:
    """Highest allocation during a step."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def compile_record(compiled: Compilation, beyond: float) -> dict[str, Any]:
    """Compilation as plain data; seconds of the first call beyond a step, None if no graph."""
    return {"seconds": max(beyond, 0.0) if compiled.graphs else None} | compiled.to_json()


def time_record(trace: Trace, step_ms: float) -> dict[str, Any]:
    """Milliseconds of a step by category with the idle rest, and our own time by op.

    Kernel times of a GPU are its own, so the step without the profiler holds them; operators on a
    CPU carry the profiler's cost, so there the traced step does.
    """
    whole = step_ms if trace.device == "cuda" else trace.step_micros / 1e3
    busy = trace.busy_micros / 1e3
    split = [{"name": k, "calls": c, "ms": us / 1e3} for k, (c, us) in trace.by_category().items()]
    idle = max(whole - busy, 0.0)
    ours: dict[str, list[float]] = {}
    for kernel in trace.kernels.values():
        if kernel.category == "hyper-connection":
            total = ours.setdefault(kernel.name.partition(" > ")[0], [0.0, 0.0])
            total[0] += kernel.calls / trace.steps
            total[1] += kernel.micros / trace.steps / 1e3
    return {
        "launches": trace.launches,
        "busy_ms": busy,
        "categories": [*split, {"name": "idle", "calls": None, "ms": idle}],
        "ours": [
            {"op": op, "calls": calls, "ms": ms}
            for op, (calls, ms) in sorted(ours.items(), key=lambda item: -item[1][1])
        ],
    }


def floor_record(name: str, workload: Workload, trace: Trace, bandwidth: float) -> dict[str, Any]:
    """The path's hc:: ops against their floors; no rows where it has or shows none."""
    shown = PATHS[name].ops
    if shown not in ("as written", "after passes"):
        return {"ops": [], "floor": None}
    fresh(workload.model, workload.device)
    with implementation(workload.model, "ops"):
        calls = op_floor.record_ops(workload, passes=shown == "after passes")
    rows = op_floor.op_rows(calls, workload.device, bandwidth)
    op_floor.share_trace(rows, trace, bandwidth)
    return {"ops": rows, "floor": dict(op_floor.summary(rows, trace, bandwidth)) if rows else None}
