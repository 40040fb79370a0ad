"""Tables, plots and the regression check of recorded benchmarks."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    """A markdown table, numbers to the right of the first column."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def number(value: float | None, digits: int = 3) -> str:
    """A number with `digits` decimals, or a dash where it was not measured."""
    return "–" if value is None else f"{value:.{digits}f}"


def machine_line(data: Record) -> str:
    """Hardware, versions and the measured copy bandwidth in one sentence."""
    machine = data["machine"]
    parts = [machine["hardware"], *(f"{k} {v}" for k, v in machine["versions"].items())]
    if "copy_gb_per_s" in data:
        parts.append(f"copy bandwidth {data['copy_gb_per_s']:.0f} GB/s")
    return ", ".join(parts) + f", {machine['date'][:10]}"


def place(record: Record) -> str:
    """The record's shape."""
    return f"{record['tokens']}×{record['width']}, n = {record['streams']}"


def ops_table(records: list[Record]) -> str:
    """One line an op, shape and direction: each way, GB/s and × floor of ours."""
    groups: dict[tuple, dict[str, Record]] = {}
    for record in records:
        key = (record["op"], record["direction"], place(record))
        groups.setdefault(key, {})[record["way"]] = record
    rows = []
    for (op, direction, at), ways in groups.items():
        ours = ways["ours"]
        times = [number(ways.get(way, {}).get("ms")) for way in ("eager", "compiled")]
        mine = [number(ours["ms"]), number(ours["graph_ms"])]
        speed = [number(ours["gb_per_s"], 0), number(ours["x_floor"], 2)]
        rows.append([f"{op} {direction}", at, *times, *mine, *speed])
    header = ["op", "T×C", "eager ms", "compiled ms", "ours ms", "ours, CUDA graph ms"]
    return markdown([*header, "GB/s", "× floor"], rows)


def small_table(records: list[Record]) -> str:
    """Ops without streams: our time, and how many times slower the others are."""
    groups: dict[tuple, dict[str, Record]] = {}
    for record in records:
        key = (record["op"], record["direction"], place(record))
        groups.setdefault(key, {})[record["way"]] = record
    rows = []
    for (op, direction, at), ways in groups.items():
        ours = best_ms(ways["ours"])
        cells = [f"{op} {direction}", at, number(ways["ours"]["ms"]), number(ours, 4)]
        for way in ("eager", "compiled"):
            other = ways.get(way)
            cells.append("–" if other is None else f"{best_ms(other) / ours:.1f}")
        rows.append([*cells, number(ways.get("compiled", {}).get("first_seconds"), 1)])
    header = ["op", "T×C", "ours ms", "ours, CUDA graph ms", "eager ÷ ours", "compiled ÷ ours"]
    return markdown([*header, "compile s"], rows)


def sublayer_table(records: list[Record]) -> str:
    """One line a way and shape: forward and train, with launches and as CUDA graphs, memory."""
    keys = {"forward_ms": 3, "train_ms": 3, "forward_graph_ms": 3, "train_graph_ms": 3}
    keys |= {"x_floor": 2, "peak_streams": 2, "saved_streams": 2, "first_seconds": 1}
    places = list(dict.fromkeys(place(record) for record in records))
    rows = [
        [record["way"], place(record), *(number(record[key], n) for key, n in keys.items())]
        for record in sorted(records, key=lambda record: places.index(place(record)))
    ]
    header = ["sublayer", "T×C", "forward ms", "train ms"]
    graph = ["forward, CUDA graph ms", "train, CUDA graph ms", "train × floor"]
    return markdown([*header, *graph, "peak ÷ streams", "saved ÷ streams", "first call s"], rows)


def seam_table(records: list[Record]) -> str:
    """One line a shape: microseconds of a boundary without gradients."""
    rows = [
        [place(record), number(record["us"], 1), number(record["graph_us"], 1)]
        for record in records
    ]
    return markdown(["seam, T×C", "µs", "µs, CUDA graph"], rows)


def model_table(records: list[Record]) -> str:
    """One line a way and width: step, overhead over residual, memory, compile time, launches."""
    rows = []
    for record in records:
        cells = [record["way"], str(record["width"]), number(record["step_ms"], 2)]
        cells += [f"{record['overhead_percent']:+.1f}", number(record["peak_gb"], 2)]
        cells += [number(record["compile_seconds"], 1), number(record["launches"], 0)]
        rows.append(cells)
    header = ["network", "C", "step ms", "over residual %", "peak GB", "compile s", "launches"]
    return markdown(header, rows)


def saved_table(records: list[Record]) -> str:
    """One line a policy and width: what is kept for the backward, in x a sublayer."""
    parts = ("streams", "coefficients", "branches")
    rows = [
        [record["policy"], f"{record['sublayers']} × {record['width']}"]
        + [number(record[name]) for name in parts]
        + [str(record["backward_ops"])]
        for record in records
    ]
    header = ["recompute", "sublayers × C", *(f"{name} ÷ x" for name in parts), "backward nodes"]
    return markdown(header, rows)


def best_ms(record: Record) -> float:
    """The CUDA graph's time where there is one."""
    return record["graph_ms"] or record["ms"]


def render(data: Record) -> str:
    """What the README shows of a recorded run."""
    parts = [f"Measured on {machine_line(data)}: `{data['command']}`."]
    if data["kind"] == "bench_model":
        parts += [saved_table(data["saved"])] if "saved" in data else []
        return "\n\n".join([*parts, model_table(data["model"])])
    if data["sublayer"]:
        parts.append(sublayer_table(data["sublayer"]))
    if data.get("seam"):
        parts.append(seam_table(data["seam"]))
    if data["ops"]:
        parts.append(ops_table(data["ops"]))
    if data["small"]:
        parts.append(small_table(data["small"]))
    parts += [f"Not measured: {name} ({error})." for name, error in data["failed"].items()]
    return "\n\n".join(parts)


def ratios(data: Record) -> dict[str, float]:
    """What a later run is held to, by name: lower is better, the machine's speed divided out."""
    found = {}
    for record in data.get("ops", []):
        if record["way"] == "ours":
            found[f"{record['op']} {record['direction']} {place(record)}: × floor"] = record[
                "x_floor"
            ]
    eager = {
        (r["op"], r["direction"], place(r)): best_ms(r)
        for r in data.get("small", [])
        if r["way"] == "eager"
    }
    for record in data.get("small", []):
        key = (record["op"], record["direction"], place(record))
        if record["way"] == "ours" and key in eager:
            found[f"{' '.join(key)}: ours ÷ eager"] = best_ms(record) / eager[key]
    for record in data.get("sublayer", []):
        if record["way"].startswith("ours"):
            found[f"{record['way']} {place(record)}: × floor"] = record["x_floor"]
    for record in data.get("model", []):
        name = f"{record['way']} C = {record['width']}: step ÷ residual"
        found[name] = 1 + record["overhead_percent"] / 100
    return found


def regressions(data: Record, baseline: Record, tolerance: float) -> list[str]:
    """Ratios that grew by more than `tolerance` over the baseline's, as sentences.

    Raises:
        ValueError: when the two runs share no measurement.
    """
    new, old = ratios(data), ratios(baseline)
    shared = [name for name in old if name in new]
    if not shared:
        raise ValueError("baseline must share at least one measurement with this run, got none")
    return [
        f"{name} {old[name]:.3f} -> {new[name]:.3f}"
        for name in shared
        if new[name] > old[name] * (1 + tolerance)
    ]


def bars(panels: dict[str, dict[str, float]], title: str, unit: str, file: Path) -> Path | None:
    """Horizontal bars, one panel a group; None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tallest = max(len(values) for values in panels.values())
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    size = (5.4 * columns, 0.6 + rows * (0.8 + 0.3 * tallest))
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in grid.flat[len(panels) :]:
        axis.axis("off")
    for axis, (name, values) in zip(grid.flat, panels.items(), strict=False):
        colors = ["#228833" if key.startswith("ours") else "#bbbbbb" for key in values]
        drawn = axis.barh(list(values), list(values.values()), color=colors)
        axis.bar_label(drawn, fmt="%.2f", padding=2)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set(xlabel=unit, title=name)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("\n".join(textwrap.wrap(title, round(size[0] * 15))), fontsize=9)
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return file
