"""Time every op of the catalog and one whole sublayer against plain PyTorch and other kernels.

    python -m scripts.bench_ops [--quick | --full] [--json PATH] [--plot PATH] [--check BASELINE]
    python -m scripts.bench_ops --render PATH     # the README's tables from a recorded run

Four tables: ops that move streams (ms, GB/s of mandatory bytes, × floor), ops on small matrices, a
sublayer with an opaque branch in every way to run it, and the seam of two sublayers at few tokens.
× floor is time over mandatory bytes divided by the copy bandwidth of the same run. The last line
of stdout is the run as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch

import hc_compile as hc
from profiles import catalog_bench, peers, tables
from profiles.sublayer import WAYS, Shape, SublayerCost, Way, measure_sublayer, units
from profiles.timing import Effort, copy_bandwidth, floor_ms, measuring
from scripts import recorded

TABLES = ("small", "seam", "sublayer", "ops")
FOUR = (Shape(8192, 2560), Shape(16384, 4096), Shape(4096, 7168), Shape(32768, 1280))
SMALL = Shape(16384, 16)
SEAM = tuple(Shape(tokens, width) for width in (2560, 4096, 7168) for tokens in (1, 8, 64))
SLOW_AT = FOUR[0]  # what takes long to compile is measured at one shape
QUICK_WAYS = ("eager PyTorch", "ours, eager", "ours, hc.compile, chain of 4")
FULL_ONLY = (
    "compiled PyTorch",
    "ours, torch.compile, chain of 4",
    "ours, hc.compile, chain of 8",
)


@dataclass(frozen=True)
class Plan:
    """What a run measures."""

    shapes: tuple[Shape, ...]
    extra: tuple[Shape, ...]  # sublayer only: other numbers of streams
    small: Shape
    effort: Effort
    compile_budget: float  # seconds for compiled references, 0 for none
    iterations: int = 20
    peers: bool = True
    ways: tuple[str, ...] = tuple(WAYS)


PLANS = {
    "quick": Plan(FOUR[:1], (), SMALL, Effort(5, 20), 0.0, 20, False, QUICK_WAYS),
    "default": Plan(FOUR, (Shape(8192, 2560, 2), Shape(8192, 2560, 8)), SMALL, Effort(), 0.0),
    "full": Plan(FOUR, (Shape(8192, 2560, 2), Shape(8192, 2560, 8)), SMALL, Effort(), 90.0),
    "cpu": Plan((Shape(32, 16),), (), Shape(32, 16), Effort(), 0.0, iterations=2, peers=False),
}


def choose(args: argparse.Namespace) -> Plan:
    """The plan that the options name; a CPU gets tiny shapes."""
    if not args.device.startswith("cuda"):
        return PLANS["cpu"]
    plan = PLANS["quick" if args.quick else "full" if args.full else "default"]
    if args.compile_budget is not None:
        plan = replace(plan, compile_budget=args.compile_budget)
    if args.shapes:
        plan = replace(plan, shapes=tuple(args.shapes), extra=())
    return plan


def shape(text: str) -> Shape:
    """TxC or TxCxn as a shape."""
    return Shape(*map(int, text.lower().split("x")))


def ways_of(plan: Plan, chosen: list[str] | None) -> dict[str, Way]:
    """The ways to run a sublayer: ours, plain PyTorch's and installed peers', or those chosen."""
    others = {peers.LABELS[name]: Way(name) for name in peers.installed()}
    if chosen:
        return {name: way for name, way in (WAYS | others).items() if name in chosen}
    slow = plan.compile_budget > 0
    own = {name: WAYS[name] for name in plan.ways if slow or name not in FULL_ONLY}
    return own | (others if plan.peers else {})


def bench_ops(plan: Plan, device: str, bandwidth: float) -> Iterator[list[dict]]:
    """Streaming ops at every shape."""
    for shape in plan.shapes:
        budget = catalog_bench.Budget(plan.compile_budget if shape == SLOW_AT else 0)
        for row in catalog_bench.streaming_rows():
            note(f"{row.name} at {shape.label}")
            yield catalog_bench.measure_row(
                row, shape, torch.bfloat16, device, plan.effort, bandwidth, budget
            )


def bench_small(plan: Plan, device: str, bandwidth: float) -> Iterator[list[dict]]:
    """Sinkhorn, Newton–Schulz and the coefficients alone."""
    budget = catalog_bench.Budget(plan.compile_budget)
    for row in catalog_bench.small_rows():
        note(f"{row.name} at T = {plan.small.tokens}")
        yield catalog_bench.measure_row(
            row, plan.small, torch.float32, device, plan.effort, bandwidth, budget
        )


def bench_seam(plan: Plan, device: str) -> Iterator[list[dict]]:
    """The boundary of two sublayers as decoding runs it: few tokens, no gradients."""
    for shape in SEAM if device.startswith("cuda") else plan.shapes:
        note(f"seam at {shape.label}")
        yield [catalog_bench.measure_seam(shape, torch.bfloat16, device, plan.effort)]


def bench_sublayer(
    plan: Plan, device: str, bandwidth: float, ways: dict[str, Way], failed: dict[str, str]
) -> Iterator[list[dict]]:
    """The whole sublayer, every way at every shape, peers last; one that fails is left out."""
    own = {name: way for name, way in ways.items() if name in WAYS}
    for some in (own, {name: way for name, way in ways.items() if name not in own}):
        for shape, (name, way) in product(plan.shapes + plan.extra, some.items()):
            if name in FULL_ONLY and shape != SLOW_AT and device.startswith("cuda"):
                continue
            note(f"sublayer, {name}, {shape.label}, n = {shape.streams}")
            try:
                cost = measure_sublayer(
                    way, shape, torch.bfloat16, plan.iterations, device, plan.effort
                )
            except Exception as error:  # another project's kernel must not end a long run
                if name in own:
                    raise
                note(f"FAILED: {error}")
                failed[f"{name}, {shape.label}, n = {shape.streams}"] = str(error)[:300]
                continue
            record = sublayer_record(name, shape, cost, bandwidth)
            note(f"    train {record['train_ms']:.3f} ms, {record['x_floor']:.2f} × floor")
            yield [record]


def sublayer_record(name: str, shape: Shape, cost: SublayerCost, bandwidth: float) -> dict:
    """One line of the sublayer table as plain data."""
    delayed = name in WAYS and hc.PRESETS[WAYS[name].preset].delayed
    moved = units(shape.streams, delayed)[1]
    floor = floor_ms(moved, shape.tokens, shape.width, 2, bandwidth)
    return {
        "way": name,
        "tokens": shape.tokens,
        "width": shape.width,
        "streams": shape.streams,
        "forward_ms": cost.forward.ms,
        "train_ms": cost.train.ms,
        "forward_graph_ms": cost.forward.graph_ms,
        "train_graph_ms": cost.train.graph_ms,
        "x_floor": cost.train.best_ms / floor,
        "peak_streams": cost.peak_streams,
        "saved_streams": cost.saved_streams,
        "first_seconds": cost.train.first_seconds,
    }


def note(text: str) -> None:
    """Progress, kept out of stdout."""
    print(text, file=sys.stderr, flush=True)


def run(args: argparse.Namespace, argv: list[str]) -> dict:
    """Measure the chosen tables, saving after every step: a run that is cut off leaves them."""
    ends = time.perf_counter() + args.seconds
    plan = choose(args)
    ways = ways_of(plan, args.ways)
    data = header(args, argv, plan)
    with measuring(args.device):
        bandwidth = copy_bandwidth(args.device)
        data["copy_gb_per_s"] = bandwidth / 1e9
        benches = {
            "small": bench_small(plan, args.device, bandwidth),
            "seam": bench_seam(plan, args.device),
            "ops": bench_ops(plan, args.device, bandwidth),
            "sublayer": bench_sublayer(plan, args.device, bandwidth, ways, data["failed"]),
        }
        for name in args.tables:
            for records in benches[name]:
                data[name] += records
                late = time.perf_counter() > ends
                if late:
                    data["failed"][f"what follows in table {name}"] = "out of time"
                if args.json:
                    args.json.write_text(json.dumps(data, indent=1) + "\n")
                if late:
                    break
    return data


def header(args: argparse.Namespace, argv: list[str], plan: Plan) -> dict:
    """What a record says before any figure."""
    return recorded.header("bench_ops", args, argv) | {
        "peers": peers.installed() if plan.peers else {},
        "dtype": "bfloat16",
        "iterations": plan.iterations,
        "failed": {},
        **{name: [] for name in TABLES},
    }


def plot(data: dict, file: Path) -> Path | None:
    """Train time of a sublayer, one panel a shape."""
    panels: dict[str, dict[str, float]] = {}
    for record in data["sublayer"]:
        value = record["train_graph_ms"] or record["train_ms"]
        panels.setdefault(tables.place(record), {})[record["way"]] = value
    title = f"One sublayer, forward and backward, CUDA graph; {tables.machine_line(data)}"
    return tables.bars(panels, title, "ms", file) if panels else None


def parse(argv: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="Time the ops and a whole sublayer.")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="one shape, no peers, under a minute")
    size.add_argument("--full", action="store_true", help="compiled references and chains too")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--ways", nargs="+", help="of the sublayer table; default: all")
    parser.add_argument("--shapes", nargs="+", type=shape, help="TxC or TxCxn; default: four")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="start nothing new after this long"
    )
    parser.add_argument("--compile-budget", type=float, help="seconds for compiled references")
    parser.add_argument("--plot", type=Path, help="write a PNG here")
    parser.add_argument("--check", type=Path, help="exit 1 if ratios grew over this recorded run")
    parser.add_argument("--tolerance", type=float, default=0.15, help="of --check")
    return recorded.parse(parser, argv)


def finish(args: argparse.Namespace, data: dict) -> int:
    """Print tables and JSON, compare with the baseline; the exit status."""
    print(tables.render(data))
    status = 0
    if args.check:
        worse = tables.regressions(data, json.loads(args.check.read_text()), args.tolerance)
        print("\n".join(f"REGRESSION {line}" for line in worse) or f"no worse than {args.check}")
        status = int(bool(worse))
    print(json.dumps(data))
    return status


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.render:
        print(tables.render(json.loads(args.render.read_text())))
        return 0
    data = run(args, argv)
    if args.plot:
        plot(data, args.plot)
    return finish(args, data)


if __name__ == "__main__":
    sys.exit(main())
