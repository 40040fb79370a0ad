"""Sections about single kernels and ops: changes between paths, floors, the longest."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from itertools import combinations
from typing import Any

from profiles.compare import Difference, difference, shorten
from profiles.report.facts import CATEGORIES, on_gpu
from profiles.report.parts import Cell, mib, number, paragraph, section, table
from profiles.trace import Kernel, Trace

Record = Mapping[str, Any]
TOP = 12


def changes(record: Record) -> str:
    """What differs between any two paths; a menu shows one pair at a time."""
    traces = {name: Trace.from_json(path["trace"]) for name, path in record["paths"].items()}
    pairs = list(combinations(traces, 2))
    if not pairs:
        return ""
    start = (pairs[0][0], list(traces)[-1])
    options, parts = [], []
    for k, (a, b) in enumerate(pairs):
        chosen = (a, b) == start
        label = escape(f"{a} → {b}")
        options.append(f'<option value="pair-{k}"{" selected" * chosen}>{label}</option>')
        change = difference(traces[a], traces[b])
        body = changed_tables(a, b, traces[a], traces[b], change)
        parts.append(
            f'<div class="pair" id="pair-{k}"{"" if chosen else " hidden"}><h3>{label}</h3>'
            f"{body}</div>"
        )
    menu = f'<label class="menu">Compare <select id="pairs">{"".join(options)}</select></label>'
    return section("changes", "What changed between two paths", menu, *parts)


def changed_tables(a: str, b: str, before: Trace, after: Trace, change: Difference) -> str:
    """Vanished, appeared, and called more or less often."""
    launched = f"{number(before.launches)} → {number(after.launches)}"
    busy = f"{number(before.busy_micros / 1e3)} → {number(after.busy_micros / 1e3)} ms"
    lines = paragraph(f"Calls a step {launched}, busy {busy}.")
    for verb, kernels, trace in (
        (f"Vanished: in {a} only", change.vanished, before),
        (f"Appeared: in {b} only", change.appeared, after),
    ):
        rows = [kernel_cells(kernel, trace) for kernel in kernels[:TOP]]
        caption = verb + counted(kernels, trace)
        lines += named_table(caption, ["kernel", "category", "calls", "ms"], rows)
    rows = []
    for old, new in change.changed[:TOP]:
        name, kind, *was = kernel_cells(old, before)
        now = kernel_cells(new, after)[2:]
        rows.append([name, kind, was[0], now[0], was[1], now[1]])
    header = ["kernel", "category", f"calls, {a}", f"calls, {b}", f"ms, {a}", f"ms, {b}"]
    caption = f"In both, called more or less often: {len(change.changed)} names"
    return lines + named_table(caption + more(len(change.changed)), header, rows)


def named_table(caption: str, header: list[str], rows: list[list[Cell]]) -> str:
    """A table of kernels and their categories; without rows its caption alone."""
    return table(caption, header, rows, text_columns=2) if rows else paragraph(caption + ".")


def counted(kernels: list[Kernel], trace: Trace) -> str:
    """How many names, calls and milliseconds a list holds."""
    calls = sum(kernel.calls for kernel in kernels) / trace.steps
    ms = sum(kernel.micros for kernel in kernels) / trace.steps / 1e3
    names = f": {len(kernels)} names, {number(calls)} calls, {number(ms)} ms a step"
    return names + more(len(kernels))


def more(size: int) -> str:
    """That a table is cut."""
    return f"; the {TOP} longest" if size > TOP else ""


def kernel_cells(kernel: Kernel, trace: Trace) -> list[Cell]:
    """Name, category, calls and ms a step."""
    kind = CATEGORIES[kernel.category][1]
    per_step = [kernel.calls / trace.steps, kernel.micros / trace.steps / 1e3]
    return [shorten(kernel.name), kind, *per_step]


def floors(record: Record) -> str:
    """Every hc:: op of every path against its floor."""
    gpu, parts = on_gpu(record), []
    for name, path in record["paths"].items():
        if not path["ops"]:
            continue
        total = path["floor"]
        said = (
            f"{name}: the mandatory bytes of a step take {number(total['floor_ms'])} ms; its ops "
            f"alone take {number(total['alone_ms'])} ms, {number(total['alone_x_floor'])} × floor"
        )
        if total["trace_ms"] is not None:
            said += (
                f", and all hc_ kernels of its trace {number(total['trace_ms'])} ms, "
                f"{number(total['trace_x_floor'])} × floor"
            )
        parts += [paragraph(said + "."), floor_table(name, path["ops"], gpu)]
    if not parts:
        return ""
    return section(
        "floors", "hc:: ops against their floor", *map(paragraph, basis(record)), *parts
    )


def basis(record: Record) -> list[str]:
    """How floors are made, and what is estimated."""
    lines = [
        f"Floor: mandatory bytes at the {number(record['copy_gb_per_s'])} GB/s that a copy "
        "reached in this run (bytes read plus written). Bytes are the catalog's C-units (T·C "
        "elements moved once); rows marked ~ have no such count and use their tensors in and "
        "out, each once. Times are of the op alone, with this model's tensors."
    ]
    if on_gpu(record):
        lines.append(
            "In the trace: the time of hc_ kernels; a kernel of several ops is shared out by "
            "their time alone (estimated)."
        )
    else:
        lines.append(
            "Without a GPU an op alone is plain torch, one operator at a time. A compiled graph "
            "has it fused into Inductor's kernels, where it can't be told apart, so these rows "
            "say how far plain torch is from the floor, not the path."
        )
    return lines


def floor_table(name: str, ops: list[dict[str, Any]], gpu: bool) -> str:
    """One row an op and shape."""
    header = ["op", "calls", "× floor", "ms alone", "GB/s", "MiB", "C-units", "T × n × C"]
    rows: list[list[Cell]] = []
    for op in ops:
        shape = " × ".join(map(str, op["shape"])) if op["shape"] else "–"
        mark = "" if op["bytes_from"] == "catalog" else "~"
        row: list[Cell] = [op["op"], op["calls"], op["x_floor"], op["ms"], op["gb_per_s"]]
        row += [mark + mib(op["bytes"]), op["units"], shape]
        if gpu:
            row += [op["trace_ms"], op["trace_x_floor"], ", ".join(op["kernels"]) or "–"]
        rows.append(row)
    header += ["ms in trace", "× floor in trace", "kernels"] if gpu else []
    return table(f"{name}: hc:: ops of a step, per call", header, rows)


def kernels(record: Record) -> str:
    """The longest kernels of every path, folded away but for the last."""
    parts = []
    last = list(record["paths"])[-1]
    for name, path in record["paths"].items():
        trace = Trace.from_json(path["trace"])
        order = sorted(trace.kernels.values(), key=lambda kernel: -kernel.micros)[:TOP]
        rows = [kernel_cells(kernel, trace) for kernel in order]
        body = table(f"{name}, per step", ["kernel", "category", "calls", "ms"], rows, 2)
        opened = " open" if name == last else ""
        parts.append(f"<details{opened}><summary>{escape(name)}</summary>{body}</details>")
    what = "kernels" if on_gpu(record) else "operators"
    return section("kernels", f"Longest {what} of each path", *parts)
