"""Compare traces: launches and time by category, and which kernels vanished or appeared.

python -m profiles.compare profiles/out/eager profiles/out/compiled profiles/out/custom-op
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from profiles.trace import Kernel, Trace, read_trace


@dataclass(frozen=True)
class Difference:
    """Kernels of one trace that the other lacks, and those whose number of calls changed."""

    vanished: list[Kernel]
    appeared: list[Kernel]
    changed: list[tuple[Kernel, Kernel]]


def difference(before: Trace, after: Trace) -> Difference:
    """Which kernels a change removed, added or calls more or less often per step.

    Args:
        before, after: two traces of the same work.
    Returns: lists ordered by time, longest first.
    """

    def longest_first(names: set[str], trace: Trace) -> list[Kernel]:
        return sorted((trace.kernels[name] for name in names), key=lambda k: -k.micros)

    old, new = set(before.kernels), set(after.kernels)
    shared = longest_first(old & new, before)
    return Difference(
        vanished=longest_first(old - new, before),
        appeared=longest_first(new - old, after),
        changed=[
            (kernel, after.kernels[kernel.name])
            for kernel in shared
            if kernel.calls * after.steps != after.kernels[kernel.name].calls * before.steps
        ],
    )


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Columns padded to their widest cell; the first is left-, the rest right-aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        padded = [cells[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def category_table(traces: Mapping[str, Trace]) -> str:
    """One row per category, for each trace its calls and milliseconds per step."""
    split = {name: trace.by_category() for name, trace in traces.items()}
    order = {label: None for categories in split.values() for label in categories}
    rows = []
    for label in order:
        cells = [categories.get(label, (0.0, 0.0)) for categories in split.values()]
        rows.append([label, *(f"{calls:.0f} / {us / 1e3:.2f}" for calls, us in cells)])
    total = [f"{t.launches:.0f} / {t.busy_micros / 1e3:.2f}" for t in traces.values()]
    rows.append(["all", *total])
    kind = "kernels" if any(t.device == "cuda" for t in traces.values()) else "operators"
    return format_table([f"{kind} / ms a step", *split], rows)


def kernel_table(trace: Trace, top: int = 12) -> str:
    """The `top` kernels by time: category, calls and milliseconds per step."""
    kernels = sorted(trace.kernels.values(), key=lambda kernel: -kernel.micros)[:top]
    rows = [
        [
            shorten(k.name),
            k.category,
            f"{k.calls / trace.steps:.0f}",
            f"{k.micros / trace.steps / 1e3:.3f}",
        ]
        for k in kernels
    ]
    return format_table(["name", "category", "calls", "ms"], rows)


def shorten(name: str, width: int = 60) -> str:
    """The name cut in the middle to `width` characters."""
    if len(name) <= width:
        return name
    keep = (width - 1) // 2
    return f"{name[:keep]}…{name[-keep:]}"


def describe(before: Trace, after: Trace, top: int = 5) -> str:
    """A few lines: how many kernels vanished and appeared, the longest of each by name."""
    change = difference(before, after)
    lines = []
    for verb, kernels, steps in (
        ("vanished", change.vanished, before.steps),
        ("appeared", change.appeared, after.steps),
    ):
        calls = sum(kernel.calls for kernel in kernels) / steps
        lines.append(f"{verb}: {len(kernels)} names, {calls:.0f} calls a step")
        lines += [
            f"    {kernel.calls / steps:5.0f} × {shorten(kernel.name)}  "
            f"{kernel.micros / steps / 1e3:.3f} ms"
            for kernel in kernels[:top]
        ]
    lines.append(f"called more or less often: {len(change.changed)} names")
    return "\n".join(lines)


def report(traces: Mapping[str, Trace], top: int = 5) -> str:
    """The category table, then every trace against the first."""
    (first, base), *others = traces.items()
    parts = [category_table(traces)]
    parts += [f"{first} → {name}\n{describe(base, trace, top)}" for name, trace in others]
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    """Command line: print the comparison, with --json write it too."""
    parser = argparse.ArgumentParser(description="Compare the kernels of several traces.")
    parser.add_argument("traces", nargs="+", type=Path, help="trace files, or folders of them")
    parser.add_argument("--top", type=int, default=5, help="kernels to name per list")
    parser.add_argument("--kernels", action="store_true", help="also print each kernel table")
    parser.add_argument("--json", type=Path, help="write the summaries here")
    args = parser.parse_args(argv)
    names = [label(path) for path in args.traces]
    if len(set(names)) < len(names):
        names = [str(path) for path in args.traces]
    traces = {name: read_trace(path) for name, path in zip(names, args.traces, strict=True)}
    print(report(traces, args.top))
    if args.kernels:
        for name, trace in traces.items():
            print(f"\n{name}\n{kernel_table(trace, args.top)}")
    if args.json:
        data = {name: trace.to_json() for name, trace in traces.items()}
        args.json.write_text(json.dumps(data, indent=1) + "\n")


def label(path: Path) -> str:
    """A trace's short name: its folder's, or the file's when it lies in no named folder."""
    return path.name if path.is_dir() else (path.parent.name or path.name)


if __name__ == "__main__":
    main()
