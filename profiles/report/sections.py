"""The sections of the page, each from the record alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from html import escape
from statistics import median, quantiles
from typing import Any

from profiles.compare import shorten
from profiles.compilation import PHASES
from profiles.report import charts
from profiles.report.facts import (
    CATEGORIES,
    category_order,
    method,
    milliseconds,
    on_gpu,
)
from profiles.report.kernel_sections import changes, floors, kernels
from profiles.report.parts import (
    Cell,
    items,
    mib,
    number,
    paragraph,
    section,
    table,
)

Record = Mapping[str, Any]
VERDICTS = ("regressed", "improved", "same")
UNSTEADY = 0.15
TRACED = "Bars are traced steps: on a CPU the profiler makes each operator, and idle, take longer."


def overview(record: Record) -> str:
    """Paths side by side."""
    first = next(iter(record["paths"].values()))
    beside, other = ("fastest", min) if on_gpu(record) else ("median", median)
    rows: list[list[Cell]] = []
    for name, path in record["paths"].items():
        compiled = path["compile"]
        idle = milliseconds(path, "idle")
        row: list[Cell] = [name, path["step_ms"], f"{path['step_ms'] / first['step_ms']:.2f}"]
        row += [other(path["steps_ms"]), path["launches"], mib(path["peak_bytes"])]
        row += [f"{idle / ((path['busy_ms'] + idle) or 1) * 100:.0f} %", compiled["seconds"]]
        row += [compiled["graphs"], compiled["graph_breaks"], compiled["recompiles"]]
        row += [scientific(path[f"{what}_difference"]) for what in ("output", "gradient")]
        rows.append(row)
    noun = "launches" if on_gpu(record) else "operator calls"
    header = ["path", "step ms", "× first", f"{beside} ms", noun, "peak MiB", "idle", "compile s"]
    header += ["graphs", "breaks", "recompiles", "Δ outputs", "Δ gradients"]
    what = [f"{name}: {path['what']}" for name, path in record["paths"].items()]
    return section(
        "paths",
        "Paths side by side",
        table("One training step, per path", header, rows),
        items([*what, *record["notes"], *unsteady(record)]),
    )


def unsteady(record: Record) -> Iterator[str]:
    """Paths whose step times spread so far that they say little."""
    for name, path in record["paths"].items():
        if len(path["steps_ms"]) < 4:
            continue
        low, middle, high = quantiles(path["steps_ms"], n=4)
        if high - low > UNSTEADY * middle:
            yield (
                f"{name}: half of its steps lie outside {number(low)} to {number(high)} ms, as "
                "the machine was busy; run again before comparing small differences"
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
        for c in sorted(found["checks"], key=lambda c: VERDICTS.index(c["verdict"]))
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
        "" if on_gpu(record) else paragraph(TRACED, "note"),
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
