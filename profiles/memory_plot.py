"""Allocated memory over a training step, from the profiler's memory events, as a plot."""

from __future__ import annotations

import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path

from profiles.capture import capture
from profiles.trace import load_events

Line = list[tuple[float, float]]  # (milliseconds since the step began, MB above its start)


def memory_over_step(step: Callable[[], object], device: str) -> Line:
    """What is allocated during one call of a warm `step`."""
    with tempfile.TemporaryDirectory() as folder:
        capture(step, folder, steps=1)
        return memory_line(load_events(folder), 1 if device.startswith("cuda") else 0)


def memory_line(events: list[dict], device_type: int) -> Line:
    """The memory events of a trace's first step, of one device type."""
    marks = sorted(
        (event["ts"], event["args"]["Total Allocated"])
        for event in events
        if event.get("name") == "[memory]" and event["args"].get("Device Type") == device_type
    )
    steps = [
        e for e in events if str(e.get("name", "")).startswith("ProfilerStep#") and "dur" in e
    ]
    began, took = steps[0]["ts"], steps[0]["dur"]
    inside = [(ts, total) for ts, total in marks if 0 <= ts - began <= took]
    if not inside:
        return []
    level = next((total for ts, total in reversed(marks) if ts < began), inside[0][1])
    return [((ts - began) / 1e3, (total - level) / 1e6) for ts, total in inside]


def plot_memory(lines: dict[str, Line], title: str, file: Path) -> Path | None:
    """One step line a way; None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.2, 4), layout="constrained")
    for name, line in lines.items():
        if line:
            axis.plot(*zip(*line, strict=True), drawstyle="steps-post", label=name, linewidth=1)
    axis.set(xlabel="ms of a step under the profiler", ylabel="MB above its start")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.suptitle("\n".join(textwrap.wrap(title, 100)), fontsize=9)
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return file
