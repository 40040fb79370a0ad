"""The sections of the page, each from the record alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any

from profiles.compare import Difference, difference, shorten
from profiles.compilation import PHASES
from profiles.report import charts
from profiles.report.facts import (
    CATEGORIES,
    category_order,
    method,
    milliseconds,
    on_gpu,
)
from profiles.report.parts import (
    Cell,
    escape,
    items,
    mib,
    number,
    paragraph,
    section,
    table,
)
from profiles.trace import Kernel, Trace

Record = Mapping[str, Any]
TOP = 12


def overview(record: Record) -> str:
    """Paths side by side."""
    first = next(iter(record["paths"].values()))
    rows: list[list[Cell]] = []
    for name, path in record["paths"].items():
        compiled = path["compile"]
        idle = milliseconds(path, "idle")
        row: list[Cell] = [name, path["step_ms"], f"{path['step_ms'] / first['step_ms']:.2f}"]
        row += [path["launches"], mib(path["peak_bytes"])]
        row += [f"{idle / ((path['busy_ms'] + idle) or 1) * 100:.0f} %", compiled["seconds"]]
        row += [compiled["graphs"], compiled["graph_breaks"], compiled["recompiles"]]
        row += [scientific(path[f"{what}_difference"]) for what in ("output", "gradient")]
        rows.append(row)
    noun = "launches" if on_gpu(record) else "operator calls"
    header = ["path", "step ms", "× first", noun, "peak MiB", "idle", "compile s"]
    header += ["graphs", "breaks", "recompiles", "Δ outputs", "Δ gradients"]
    what = [f"{name}: {path['what']}" for name, path in record["paths"].items()]
    return section(
        "paths",
        "Paths side by side",
        table("One training step, per path", header, rows),
        items([*what, *record["notes"]]),
    )


def scientific(value: float | None) -> str:
    """A small difference."""
    return "–" if value is None else "0" if value == 0 else f"{value:.0e}"


def comparison(record: Record) -> str:
    """Against an earlier run, nothing where there was none."""
    found = record.get("comparison")
    if not found:
        return ""
    rows: list[list[Cell]] = [
        [c["path"], c["measure"], c["old"], c["new"], f"{c['change'] * 100:+.0f} %", c["verdict"]]
        for c in found["checks"]
    ]
    header = ["path", "measure", "before", "now", "change", "verdict"]
    return section(
        "comparison",
        f"Against {found['against']}",
        paragraph(found["basis"]),
        table(found["result"], header, rows, text_columns=2),
        items(found["notes"]),
    )


def categories(record: Record) -> str:
    """Stacked bars of time by category, in ms and as shares, with the table of both."""
    paths, order = record["paths"], category_order(record["paths"])
    bars = [
        (
            name,
            f"{number(path['busy_ms'] + milliseconds(path, 'idle'))} ms",
            [(*CATEGORIES[c][:2], milliseconds(path, c)) for c in order],
        )
        for name, path in paths.items()
    ]
    rows: list[list[Cell]] = [
        [CATEGORIES[c][1], *(milliseconds(path, c) for path in paths.values())] for c in order
    ]
    rows.append(["all kernels", *(path["busy_ms"] for path in paths.values())])
    title = "Time of a step by category"
    return section(
        "time",
        "Where the time of a step goes",
        '<input type="radio" name="scale" id="in-ms" checked><label for="in-ms">milliseconds'
        '</label><input type="radio" name="scale" id="in-share"><label for="in-share">share of '
        "the step</label>",
        charts.legend([CATEGORIES[c][:2] for c in order]),
        f'<div class="as-ms">{charts.stacked(title, bars, "ms")}</div>',
        f'<div class="as-share">{charts.stacked(title + ", shares", bars, "ms", True)}</div>',
        table("Milliseconds a step by category", ["category", *paths], rows),
        ours(record),
    )


def ours(record: Record) -> str:
    """Our own time by op, nothing where no path has any."""
    names = {o["op"]: None for path in record["paths"].values() for o in path["ours"]}
    if not names:
        return ""
    found = {
        name: {o["op"]: o for o in path["ours"]}
        for name, path in record["paths"].items()
        if path["ours"]
    }
    rows = []
    for op in names:
        cells = [path.get(op) for path in found.values()]
        shown = [f"{number(c['ms'])} ({c['calls']:.0f})" if c else "–" for c in cells]
        rows.append([shorten(op, 48), *shown])
    return table("Ours by op: ms (calls) a step in the trace", ["op", *found], rows)


def memory(record: Record) -> str:
    """One line per path."""
    curves = [(name, path["memory_curve"]) for name, path in record["paths"].items()]
    if not any(curve for _, curve in curves):
        return section("memory", "Memory over a step", paragraph("No allocations in the traces."))
    return section(
        "memory",
        "Memory over a step",
        paragraph("MiB above the level at the step's start; each path over its own step."),
        charts.lines("Allocated memory over one step of each path", curves),
    )


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
        lines += table(caption, ["kernel", "category", "calls", "ms"], rows, text_columns=2)
    rows = []
    for old, new in change.changed[:TOP]:
        name, kind, *was = kernel_cells(old, before)
        now = kernel_cells(new, after)[2:]
        rows.append([name, kind, was[0], now[0], was[1], now[1]])
    header = ["kernel", "category", f"calls, {a}", f"calls, {b}", f"ms, {a}", f"ms, {b}"]
    caption = f"In both, called more or less often: {len(change.changed)} names"
    return lines + table(caption + more(len(change.changed)), header, rows, text_columns=2)


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
    header = ["op", "calls", "T × n × C", "C-units", "MiB", "ms alone", "GB/s", "× floor"]
    rows: list[list[Cell]] = []
    for op in ops:
        shape = " × ".join(map(str, op["shape"])) if op["shape"] else "–"
        mark = "" if op["bytes_from"] == "catalog" else "~"
        row: list[Cell] = [op["op"], op["calls"], shape, op["units"], mark + mib(op["bytes"])]
        row += [op["ms"], op["gb_per_s"], op["x_floor"]]
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


def compilation(record: Record) -> str:
    """Where compile time went, graph breaks and recompilations with their reasons."""
    found = {k: p["compile"] for k, p in record["paths"].items() if p["compile"]["graphs"]}
    if not found:
        return ""
    bars = [
        (
            name,
            f"{number(sum(c['phases'].values()))} s",
            [(f"p-{phase}", phase, c["phases"][phase]) for phase in PHASES],
        )
        for name, c in found.items()
    ]
    rows: list[list[Cell]] = [
        [f"{phase}: {what}", *(c["phases"][phase] for c in found.values())]
        for phase, what in PHASES.items()
    ]
    reasons = [
        f"{name}, graph break ({times}×): {why}"
        for name, c in found.items()
        for why, times in c["graph_break_reasons"].items()
    ]
    reasons += [
        f"{name}, recompiled: {why}" for name, c in found.items() for why in c["recompile_reasons"]
    ]
    return section(
        "compile",
        "Compilation",
        charts.legend([(f"p-{phase}", phase) for phase in PHASES]),
        charts.stacked("Compile time by phase", bars, "s"),
        table("Seconds of each phase, forward and backward together", ["phase", *found], rows),
        items(reasons) or paragraph("No graph break and no recompilation."),
    )


def environment(record: Record) -> str:
    """The machine, versions, command and method."""
    machine = record["machine"]
    facts = {
        "hardware": machine["hardware"],
        "system": machine["system"],
        **machine["versions"],
        "cuda": machine["cuda"],
        "CPU threads": record["settings"]["threads"],
        "copy bandwidth": f"{number(record['copy_gb_per_s'])} GB/s",
        "date": machine["date"],
        "commit": machine["git_commit"],
        "command": record.get("command"),
        **{k: v for k, v in record["workload"].items() if k != "inputs"},
        "inputs": ", ".join(record["workload"]["inputs"]),
    }
    rows = "".join(
        f"<div><dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd></div>"
        for k, v in facts.items()
        if v is not None
    )
    return section(
        "environment", "Environment and method", f"<dl>{rows}</dl>", items(method(record))
    )


SECTIONS: tuple[Callable[[Record], str], ...] = (
    overview,
    comparison,
    categories,
    memory,
    changes,
    floors,
    kernels,
    compilation,
    environment,
)
