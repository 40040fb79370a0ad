"""Memory over one traced step, from the trace's allocation events."""

from __future__ import annotations

from pathlib import Path

from profiles.trace import allocations, load_events, profiler_steps

POINTS = 160


def memory_curve(path: Path | str, device: str, points: int = POINTS) -> list[list[float]]:
    """Allocated bytes over the last traced step, above the level at its start.

    Args:
        path: a trace, or a folder whose newest trace is read.
        device: "cuda" or "cpu", whose allocations count.
        points: time is cut into this many bins; each gives its highest level, so peaks stay.
    Returns: [share of the step in percent, bytes] in order of time; empty when the trace has no
        step or was taken without profile_memory.
    """
    events = load_events(path)
    marks = allocations(events, 1 if device == "cuda" else 0)
    steps = profiler_steps(events)
    if not steps or not marks:
        return []
    step = max(steps, key=lambda event: event["ts"])
    start, length = step["ts"], step["dur"]
    level = next((total for ts, total in reversed(marks) if ts < start), 0)
    inside = [((ts - start) / length, total - level) for ts, total in marks]
    inside = [(at, total) for at, total in inside if 0 <= at <= 1]
    curve, current, position = [[0.0, 0.0]], 0, 0
    for number in range(points):
        highest = current
        while position < len(inside) and inside[position][0] <= (number + 1) / points:
            current = inside[position][1]
            highest = max(highest, current)
            position += 1
        curve.append([round((number + 1) / points * 100, 2), float(highest)])
    return curve
