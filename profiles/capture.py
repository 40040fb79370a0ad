"""Trace a callable with torch.profiler into a file that TensorBoard opens.

python -m profiles.capture package.module:function --out profiles/out/mine
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler

from profiles.compare import kernel_table
from profiles.trace import TRACE_GLOB, Trace, read_trace


def capture(
    step: Callable[[], object],
    out: Path | str,
    *,
    steps: int = 3,
    warmup: int = 1,
    memory: bool = True,
) -> Trace:
    """Run `step` under the profiler and leave one gzipped trace in a folder.

    Args:
        step: one unit of work, compiled and warm before the call.
        out: folder; traces that an earlier capture left there are removed.
        steps: traced calls, ≥ 1.
        warmup: calls under the profiler that are not kept, ≥ 0.
        memory: record allocations too.
    Returns: the trace's summary.
    Raises:
        ValueError: when steps or warmup is out of range.
    """
    if steps < 1 or warmup < 0:
        raise ValueError(f"steps must be >= 1 and warmup >= 0, got {steps} and {warmup}")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob(TRACE_GLOB):
        old.unlink()
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(
        activities=activities,
        schedule=schedule(wait=0, warmup=warmup, active=steps, repeat=1),
        on_trace_ready=tensorboard_trace_handler(str(out), use_gzip=True),
        profile_memory=memory,
        acc_events=True,
    ) as profiler:
        for _ in range(warmup + steps):
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            profiler.step()
    return read_trace(out)


def named_kernels_on_cpu() -> None:
    """Make Inductor's C++ kernels show up in traces by name; call before compiling."""
    import torch._inductor.config as inductor_config

    inductor_config.cpp.enable_kernel_profile = True


def resolve(target: str) -> Callable[[], object]:
    """The callable that "package.module:function" names.

    Raises:
        ValueError: when the form is wrong.
    """
    module, _, name = target.partition(":")
    if not module or not name:
        raise ValueError(f"target must be package.module:function, got {target!r}")
    return getattr(importlib.import_module(module), name)


def main(argv: list[str] | None = None) -> None:
    """Command line: trace `target` and print its longest kernels."""
    parser = argparse.ArgumentParser(description="Trace a callable without arguments.")
    parser.add_argument("target", help="package.module:function")
    parser.add_argument("--out", type=Path, default=Path("profiles/out/capture"))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=2)
    args = parser.parse_args(argv)
    named_kernels_on_cpu()
    step = resolve(args.target)
    step()
    trace = capture(step, args.out, steps=args.steps, warmup=args.warmup)
    print(kernel_table(trace))
    print(f"{trace.launches:.0f} launches a step, trace in {os.path.relpath(trace.path)}")


if __name__ == "__main__":
    main()
