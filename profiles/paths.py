"""Profile one training step in several paths: eager, compiled, custom-op, fused.

    from profiles.paths import profile
    record = profile(model, inputs, out="profiles/out/mine")   # report.html, png, json, traces

`scripts/profile_paths.py` is the command; `profiles/README.md` says how to read the report.
"""

from __future__ import annotations

import gc
import inspect
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
from hc_compile import backend
from hc_compile.passes import without_pipeline
from profiles import op_floor
from profiles.capture import capture, named_kernels_on_cpu
from profiles.compilation import Compilation, compilation
from profiles.dense_net import cold_caches, timed_steps, warm_compiler
from profiles.machine import describe
from profiles.memory import memory_curve
from profiles.timing import copy_bandwidth, synchronize
from profiles.trace import Trace
from profiles.workload import (
    Forward,
    TrainingStep,
    Workload,
    as_workload,
    compile_blocks,
    configurations,
    implementation,
    uncompile,
)

KIND = "profile_paths"


def without_passes(model: nn.Module) -> Forward:
    """torch.compile without the hc:: graph passes, installed or not."""
    then = without_pipeline(inductor_config.pre_grad_custom_pass)
    return torch.compile(model, options={"pre_grad_custom_pass": then})


@dataclass(frozen=True)
class PathKind:
    """One way to run a model.

    Attributes:
        what: for the report.
        implementation: of its hyper-connections, "plain" or "ops".
        compile: model -> forward.
        ops: which hc:: calls it makes: "none", "as written", "after passes", or "unknown".
    """

    what: str
    implementation: str
    compile: Callable[[nn.Module], Forward]
    ops: str = "none"


PATHS = {
    "eager": PathKind("plain functions, no compiler", "plain", lambda model: model),
    "compiled": PathKind(
        "torch.compile of the plain functions, block by block", "plain", compile_blocks
    ),
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


def recompute_available() -> bool:
    """Whether `hc.compile` takes `recompute`."""
    return "recompute" in inspect.signature(backend.compile).parameters


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
        if name == "fused-recompute" and not recompute_available():
            notes.append(f"{name} is left out: this hc.compile has no recompute=")
        elif PATHS[name].implementation == "ops" and not has_ops:
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
        median = statistics.median(times)
        record = {
            "what": path.what,
            "step_ms": median,
            "steps_ms": [round(ms, 4) for ms in times],
            "peak_bytes": peak,
            "resident_bytes": step.resident_bytes(),
            "compile": compile_record(compiled, first - median / 1e3),
            "memory_curve": memory_curve(trace.path, trace.device),
            **time_record(trace, median),
            "trace": trace.to_json(),
        }
    uncompile(workload.model)
    return Outcome(trace, record, values)


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


def largest(values: list[Tensor], base: list[Tensor]) -> float | None:
    """Largest difference over the largest element of the first path, None if shapes differ."""
    if [v.shape for v in values] != [b.shape for b in base]:
        return None
    pairs = [(v, b) for v, b in zip(values, base, strict=True) if b.numel()]
    scale = max((float(b.abs().max()) for _, b in pairs), default=0.0)
    worst = max((float((v - b).abs().max()) for v, b in pairs), default=0.0)
    return worst / scale if scale else worst


def has_ops(workload: Workload) -> bool:
    """Whether a step of the model calls any hc:: op."""
    with implementation(workload.model, "ops"):
        return bool(op_floor.record_ops(workload, passes=False))


def profile_workload(
    workload: Workload,
    out: Path | str,
    *,
    paths: Sequence[str] = tuple(PATHS),
    steps: int = 20,
    traced: int = 3,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Measure a workload in several paths; traces go to `out`/PATH.

    Args:
        workload: model and inputs, on the device to profile.
        out: folder of the traces.
        paths: names of PATHS; those that can't run here are left out and named in the record.
        steps: timed steps of each path, >= 1.
        traced: steps in the trace, >= 1.
        say: told what is running and what is left out.
    Returns: the record, as plain data.
    Raises:
        ValueError: when steps, traced or paths is out of range.
    """
    if steps < 1 or traced < 1:
        raise ValueError(f"steps and traced must be >= 1, got {steps} and {traced}")
    device, out = workload.device, Path(out)
    named_kernels_on_cpu()
    kept, notes = available(paths, has_ops(workload))
    if not configurations(workload.model):
        notes.append("no HCConfig in the model: eager and compiled run it as it is")
    for note in notes:
        say(note)
    initial = {k: v.detach().cpu().clone() for k, v in workload.model.state_dict().items()}
    bandwidth = copy_bandwidth(device)
    if any(name != "eager" for name in kept):
        warm_compiler(device)
    records: dict[str, Any] = {}
    base: Outcome | None = None
    for name in kept:
        say(f"{name}: {PATHS[name].what}")
        workload.model.load_state_dict(initial)
        outcome = run_path(name, workload, steps, traced, out)
        base = base or outcome
        outcome.record["output_difference"] = largest(outcome.values[0], base.values[0])
        outcome.record["gradient_difference"] = largest(outcome.values[1], base.values[1])
        workload.model.load_state_dict(initial)
        outcome.record |= floor_record(name, workload, outcome.trace, bandwidth)
        records[name] = outcome.record
    fresh(workload.model, device)
    return {
        "kind": KIND,
        "machine": describe(device),
        "workload": about(workload),
        "settings": {"steps": steps, "traced": traced},
        "copy_gb_per_s": bandwidth / 1e9,
        "notes": notes,
        "paths": records,
    }


def about(workload: Workload) -> dict[str, Any]:
    """What was run, in words and numbers; two runs compare when these agree."""
    inputs = [t for t in (*workload.args, *workload.kwargs.values()) if isinstance(t, Tensor)]
    return {
        "model": type(workload.model).__name__,
        **workload.about,
        "parameters": sum(p.numel() for p in workload.model.parameters()),
        "inputs": [f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in inputs],
        "loss": "given" if workload.loss else "⟨output, fixed random⟩",
        "optimizer": "given" if workload.optimizer else "none",
    }


def profile(
    model: nn.Module, inputs: Any = (), *, out: Path | str = "profiles/out/paths", **options: Any
) -> dict[str, Any]:
    """Profile a model of your own and write report.html, report.png, report.json and traces.

    Args:
        model: on its device.
        inputs: a tuple of positional inputs, a dict of keyword inputs, or one input.
        out: folder for everything.
        **options: of `profile_workload` (paths, steps, traced, say).
    Returns: the record, as plain data.
    """
    from profiles.report import write

    record = profile_workload(as_workload((model, inputs)), out, **options)
    write(record, Path(out))
    return record
