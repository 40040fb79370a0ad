"""What one eager call of an op costs the host, in microseconds, and how many kernels it launches.

    python -m scripts.bench_host [--tokens T] [--width C] [--ops OP ...] [--calls N]
    python -m scripts.bench_host --ops post_pre --profile   # where the time goes

Calls follow each other without waiting for the device, so its work is not in the figure as long
as the queue does not fill. Without a GPU the kernels are compiled and not run
(profiles/stand_in.py): then the launch itself, in the driver, is missing from the figure. The
last line of stdout is the run as JSON.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable
from functools import partial

import torch

from custom_ops.catalog import CATALOG
from profiles import tables
from profiles.catalog_bench import calls, device_inputs, variant_of
from profiles.stand_in import kernels_without_device
from profiles.sublayer import Shape
from profiles.timing import synchronize
from scripts import recorded

OPS = ("aggregate", "post", "project", "pre", "post_pre")
BURST = 10  # calls in a row, far fewer than a queue of launches holds


def host_us(call: Callable, device: str, count: int) -> float:
    """Least host time of a call over many short bursts."""
    best = float("inf")
    for _ in range(max(1, count // BURST)):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(BURST):
            call()
        best = min(best, (time.perf_counter() - began) / BURST)
    return best * 1e6


def directions(op: str, args: argparse.Namespace):
    """Names and calls: without gradients, with, and the backward."""
    row, shape = CATALOG[op], Shape(args.tokens, args.width)
    inputs = device_inputs(row, shape, torch.bfloat16, args.device)
    function = partial(row.call, variant_of(row))
    yield "no grad", torch.no_grad()(partial(function, *inputs))
    yield from calls(function, inputs)


def launches(call: Callable, launched: list | None) -> int | None:
    """Grids with programs in them."""
    if launched is None:
        return None
    launched.clear()
    call()
    return sum(0 not in grid for grid in launched)


def run(args: argparse.Namespace, argv: list[str]) -> dict:
    """Measure the ops."""
    launched = None if args.device.startswith("cuda") else kernels_without_device()
    data = recorded.header("bench_host", args, argv) | {"host": []}
    for op in args.ops:
        for direction, call in directions(op, args):
            for _ in range(3):
                call()
            record = {"op": op, "direction": direction, "launches": launches(call, launched)}
            data["host"].append(record | {"us": host_us(call, args.device, args.calls)})
            if args.profile:
                with cProfile.Profile() as profile:
                    for _ in range(args.calls):
                        call()
                pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    return data


def render(data: dict) -> str:
    """One line an op and direction."""
    rows = [
        [r["op"], r["direction"], str(r["launches"] or ""), tables.number(r["us"], 0)]
        for r in data["host"]
    ]
    head = f"Measured on {tables.machine_line(data)}: `{data['command']}`."
    return head + "\n\n" + tables.markdown(["op", "direction", "launches", "host µs"], rows)


def parse(argv: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="Time what an eager call costs the host.")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), metavar="OP")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--width", type=int, default=2560)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--profile", action="store_true", help="print cProfile's table of each")
    return recorded.parse(parser, argv)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    recorded.main(argv, parse, run, render)


if __name__ == "__main__":
    main()
