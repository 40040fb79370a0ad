"""Profile one training step in several paths: eager, compiled, custom-op, fused.

    from profiles.paths import profile
    record = profile(model, inputs, out="profiles/out/mine")   # report.html, png, json, traces

`scripts/profile_paths.py` is the command; `profiles/README.md` says how to read the report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule

from profiles import op_floor
from profiles.capture import named_kernels_on_cpu
from profiles.dense_net import warm_compiler
from profiles.machine import describe
from profiles.path_run import PATHS, Outcome, available, floor_record, fresh, run_path
from profiles.timing import copy_bandwidth
from profiles.workload import (
    Workload,
    as_workload,
    configurations,
    implementation,
    input_tensors,
)

KIND = "profile_paths"


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
        ValueError: when steps, traced or paths is out of range, or the model is compiled.
    """
    if steps < 1 or traced < 1:
        raise ValueError(f"steps and traced must be >= 1, got {steps} and {traced}")
    require_uncompiled(workload.model)
    named_kernels_on_cpu()
    kept, notes = available(paths, has_ops(workload))
    notes += remarks(workload.model, kept)
    for note in notes:
        say(note)
    bandwidth = copy_bandwidth(workload.device)
    measured = measure_paths(workload, kept, Path(out), steps, traced, bandwidth, say)
    return {
        "kind": KIND,
        "machine": describe(workload.device),
        "workload": about(workload),
        "settings": {"steps": steps, "traced": traced, "threads": torch.get_num_threads()},
        "copy_gb_per_s": bandwidth / 1e9,
        "notes": notes,
        "paths": measured,
    }


def require_uncompiled(model: nn.Module) -> None:
    """Refuse a model that would stay compiled in the eager path."""
    for name, module in model.named_modules():
        if isinstance(module, OptimizedModule) or module._compiled_call_impl is not None:
            raise ValueError(
                f"model must not be compiled, got a compiled {name or type(module).__name__}"
            )


def remarks(model: nn.Module, kept: Sequence[str]) -> list[str]:
    """What a reader must know about the paths that run."""
    found = [
        f"{name}: its hc:: ops are not listed against their floor, as what is recomputed shows "
        "only after autograd"
        for name in kept
        if PATHS[name].ops == "unknown"
    ]
    if not configurations(model):
        found.append("no HCConfig in the model: eager and compiled run it as it is")
    return found


def measure_paths(
    workload: Workload,
    names: Sequence[str],
    out: Path,
    steps: int,
    traced: int,
    bandwidth: float,
    say: Callable[[str], object],
) -> dict[str, Any]:
    """The record of every path, each from the model's weights, which are put back at the end."""
    model, device = workload.model, workload.device
    initial = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
    if any(name != "eager" for name in names):
        warm_compiler(device)
    records: dict[str, Any] = {}
    base: Outcome | None = None
    for name in names:
        say(f"{name}: {PATHS[name].describe(model)}")
        outcome = run_path(name, workload, steps, traced, out)
        model.load_state_dict(initial)
        base = base or outcome
        records[name] = (
            outcome.record
            | {
                "output_difference": largest(outcome.values[0], base.values[0]),
                "gradient_difference": largest(outcome.values[1], base.values[1]),
            }
            | floor_record(name, workload, outcome.trace, bandwidth)
        )
    fresh(model, device)
    return records


def about(workload: Workload) -> dict[str, Any]:
    """What was run, in words and numbers; two runs compare when these agree."""
    inputs = input_tensors(workload)
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
        model: on its device, not compiled; its weights stay, gradients are cleared.
        inputs: a tuple of positional inputs, a dict of keyword inputs, or one input.
        out: folder for everything.
        **options: of `profile_workload` (paths, steps, traced, say).
    Returns: the record, as plain data.
    """
    from profiles.report import write

    record = profile_workload(as_workload((model, inputs)), out, **options)
    write(record, Path(out))
    return record
