"""Time the drop-ins against the packages they replace, and against what those claim.

    python -m scripts.bench_compat [--tables triton package] [--json PATH]
    python -m scripts.bench_compat --render PATH      # the tables of a recorded run

Table "triton": mHC-Triton's Sinkhorn, stream mix and whole step, at its published shape, and that
package itself where `import mhc` finds it. Table "package": layers of hyper-connections where it
can be imported (its wheels in a folder will do: PYTHONPATH=folder), forward, training step,
memory. The last line of stdout is the run as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator

import torch

from profiles import tables
from profiles.compat_cases import (
    CLAIMED,
    Case,
    Size,
    matrix_cases,
    mix_cases,
    package_cases,
    step_cases,
)
from profiles.timing import (
    Effort,
    copy_bandwidth,
    floor_ms,
    measure,
    measuring,
    peak_growth,
    saved_bytes,
)
from scripts import recorded

TABLES = ("package", "triton")  # a capture that fails in mHC-Triton's step spoils what follows
PUBLISHED, PACKAGE, TINY = Size(8, 2048, 4096), Size(8, 2048, 1024), Size(2, 8, 16)
MEGA = 2**20


def cases(name: str, device: str, size: Size | None) -> Iterator[Case]:
    """The cases of one table, built one after the other so that they don't share memory."""
    usual = {"package": PACKAGE, "triton": PUBLISHED}[name] if device.startswith("cuda") else TINY
    size = usual if size is None else size
    if name == "package":
        yield from package_cases(size, device)
        return
    for make in (matrix_cases, mix_cases, step_cases):
        yield from make(size, device)


def record(case: Case, device: str, effort: Effort, bandwidth: float) -> dict:
    """Measure one case: forward without grad, training step, memory."""
    torch.compiler.reset()
    outputs = case.function(*case.inputs)
    cotangents = [torch.randn_like(o) for o in outputs]
    leaves = [t for t in (*case.inputs, *case.parameters) if t.requires_grad]
    del outputs

    def train() -> object:
        return torch.autograd.grad(
            case.function(*case.inputs), leaves, cotangents, allow_unused=True
        )

    step = measure(train, device, effort)
    forward = measure(torch.no_grad()(lambda: case.function(*case.inputs)), device, effort)
    known = [*case.inputs, *case.parameters]
    peak = peak_growth(train, device)
    x = case.inputs[0]
    streams = x.numel() // x.shape[-1]  # T·n rows of C
    tokens = streams // x.shape[-2] if case.units else streams
    floor = None
    if case.units is not None:
        floor = floor_ms(case.units, tokens, x.shape[-1], x.dtype.itemsize, bandwidth)
    return {
        "table": case.table,
        "op": case.op,
        "way": case.way,
        "shape": list(x.shape),
        "forward_ms": forward.ms,
        "forward_graph_ms": forward.graph_ms,
        "train_ms": step.ms,
        "train_graph_ms": step.graph_ms,
        "forward_floor_ms": floor,
        "saved_mb": saved_bytes(lambda: case.function(*case.inputs), known) / MEGA,
        "peak_mb": None if peak is None else peak / MEGA,
        "first_seconds": step.first_seconds,
    }


def run(args: argparse.Namespace, argv: list[str]) -> dict:
    """Measure the chosen tables, saving after every case."""
    ends = time.perf_counter() + args.seconds
    effort = Effort(5, 20) if args.quick else Effort()
    data = recorded.header("bench_compat", args, argv) | {
        "claimed": CLAIMED,
        "failed": {},
        "records": [],
    }
    with measuring(args.device):
        bandwidth = copy_bandwidth(args.device)
        data["copy_gb_per_s"] = bandwidth / 1e9
        for name in args.tables:
            for case in cases(name, args.device, args.size):
                if args.eager and "compile" in case.way:
                    continue
                if args.ops and case.op not in args.ops:
                    continue
                if time.perf_counter() > ends:
                    data["failed"][f"{case.op}, {case.way} and what follows"] = "out of time"
                    break
                print(f"{case.op}, {case.way}", file=sys.stderr, flush=True)
                try:
                    data["records"].append(record(case, args.device, effort, bandwidth))
                except Exception as error:  # another project's kernel must not end a long run
                    if "ours" in case.way and not isinstance(error, RuntimeError):
                        raise
                    data["failed"][f"{case.op}, {case.way}"] = str(error)[:200]
                if args.json:
                    args.json.write_text(json.dumps(data, indent=1) + "\n")
    return data


def table(data: dict, name: str) -> str:
    """One line a case and way; in table "triton" with what that package claims."""
    keys = {"forward_ms": 3, "forward_graph_ms": 3, "train_ms": 3, "train_graph_ms": 3}
    keys |= {"forward_floor_ms": 3, "saved_mb": 2, "peak_mb": 1}
    header = ["forward ms", "forward, CUDA graph ms", "train ms", "train, CUDA graph ms"]
    header += ["forward floor ms", "saved MiB", "peak MiB"]
    header += ["claimed, PyTorch → Triton"] if name == "triton" else []
    lines = []
    for one in (r for r in data["records"] if r["table"] == name):
        cells = [one["op"], one["way"], "×".join(map(str, one["shape"]))]
        cells += [tables.number(one[key], digits) for key, digits in keys.items()]
        if name == "triton":
            claimed = data["claimed"].get(one["op"])
            cells.append("–" if claimed is None else f"{claimed[0]} → {claimed[1]}")
        lines.append(cells)
    return tables.markdown(["case", "way", "shape", *header], lines)


def render(data: dict) -> str:
    """The tables as markdown, claims beside ours."""
    parts = [f"Measured on {tables.machine_line(data)}: `{data['command']}`."]
    measured = {record["table"] for record in data["records"]}
    parts += [table(data, name) for name in TABLES if name in measured]
    parts += [f"Not measured: {name} ({error})." for name, error in data["failed"].items()]
    return "\n\n".join(parts)


def parse(argv: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="Time the drop-ins against their originals.")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--ops", nargs="+", metavar="OP", help="only these, as tables name them")
    parser.add_argument(
        "--size", type=int, nargs=3, metavar=("B", "S", "D"), help="default: tiny on a CPU"
    )
    parser.add_argument("--quick", action="store_true", help="a quarter of the repeats")
    parser.add_argument("--eager", action="store_true", help="leave out what is compiled")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="start nothing new after this long"
    )
    args = recorded.parse(parser, argv)
    args.size = None if args.size is None else Size(*args.size)
    return args


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    recorded.main(argv, parse, run, render)


if __name__ == "__main__":
    main()
