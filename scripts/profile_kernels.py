"""Count what the hardware does in every hc_ kernel of an op, by Nsight Compute (ncu).

    python -m scripts.profile_kernels [--ops OP ...] [--shapes TxC ...] [--json PATH]
    python -m scripts.profile_kernels --render PATH     # the tables of a recorded run

One table an op and direction: time, bytes that DRAM really moved, how busy DRAM, L2 and the
schedulers were, and what warps waited for; its last line holds the sum against the floor of the
bytes that the op must move. profiles/README.md says how to read it. ncu runs kernels one at a time
and empties the caches before each (--cache-control all): gaps between launches don't show, and no
kernel finds its predecessor's output in L2. Kernels of PyTorch itself (zeros, say) are left out.
The last line of stdout is the run as JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from custom_ops.catalog import CATALOG, Row
from profiles import catalog_bench, counters, tables
from profiles.machine import ROOT
from profiles.sublayer import Shape
from profiles.timing import copy_bandwidth, floor_ms, measuring
from scripts import recorded
from scripts.bench_ops import note, shape

OPS: dict[str, Row] = CATALOG | {catalog_bench.DELAYED.name: catalog_bench.DELAYED}
DEFAULT = ["project", "post_pre", catalog_bench.DELAYED.name]
KEY = ("op", "direction", "tokens", "width", "streams")
COLUMNS = ("kernel", "µs", "DRAM MB read + written", "DRAM GB/s", "DRAM %", "L2 MB read", "L2 %")
COLUMNS += ("issue %", "warps %", "registers", "shared bank conflicts", "largest stalls")
SHOWN_STALLS = 3
NOTE = (
    "ncu runs kernels one at a time, so gaps between launches do not show; it empties the caches "
    "before each, so none finds its predecessor's output in L2. Clocks were left as they are. "
    "Stalls: warps that waited for this reason at each issued instruction."
)


def dtype_of(row: Row) -> torch.dtype:
    """As bench_ops has it: streams in bfloat16, small matrices in float32."""
    return torch.float32 if row.units is None else torch.bfloat16


def child(args: argparse.Namespace) -> None:
    """What runs under ncu: each op once in both directions with the profiler on."""
    torch.autograd.set_multithreading_enabled(False)  # a range holds for its own thread
    for name in args.ops:
        row = OPS[name]
        for at in args.shapes:
            note(f"{name} at {at.label}")
            inputs = catalog_bench.device_inputs(row, at, dtype_of(row), args.device)
            for direction, call in catalog_bench.calls(catalog_bench.call_of(row), inputs):
                counters.count(name, direction, at, call)


def child_command(args: argparse.Namespace) -> list[str]:
    """This script again, as ncu starts it."""
    shapes = [f"{at.tokens}x{at.width}x{at.streams}" for at in args.shapes]
    command = [sys.executable, "-m", "scripts.profile_kernels", "--child", "--device", args.device]
    return [*command, "--ops", *args.ops, "--shapes", *shapes]


def count(args: argparse.Namespace, ncu: str) -> list[dict]:
    """The records of every kernel; ends the program with ncu's words where it counted none."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        command = counters.ncu_command(ncu, log, child_command(args))
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        text = log.read_text() if log.exists() else ""
        if args.csv and text:
            shutil.copy(log, args.csv)
    records = counters.read(text) if done.returncode == 0 else []
    if not records:
        said = "; ".join(counters.errors(text)) or "nothing"
        sys.exit(f"ncu counted no kernel (exit status {done.returncode}); its errors: {said}")
    return records


def per_second(record: dict) -> float | None:
    """GB/s that DRAM achieved over the kernel's time."""
    moved, micros = dram_bytes(record), record["micros"]
    return None if moved is None or not micros else moved / micros / 1e3


def dram_bytes(record: dict) -> float | None:
    """Bytes that DRAM read and wrote."""
    read, written = record["dram_read_bytes"], record["dram_write_bytes"]
    return None if read is None or written is None else read + written


def groups(records: list[dict]) -> dict[tuple, list[dict]]:
    """The records by op, direction and shape."""
    found: dict[tuple, list[dict]] = {}
    for record in records:
        found.setdefault(tuple(record[key] for key in KEY), []).append(record)
    return found


def against_floor(key: tuple, kernels: list[dict], bandwidth: float) -> dict:
    """An op and direction: its kernels' time and the least its mandatory bytes would take."""
    name, direction, tokens, width, streams = key
    row, micros = OPS[name], sum(record["micros"] for record in kernels)
    record = dict(zip(KEY, key, strict=True)) | {"micros": micros}
    if row.units is None:
        return record | {"mandatory_bytes": None, "floor_micros": None, "x_floor": None}
    units = row.units(streams)[catalog_bench.DIRECTIONS.index(direction)]
    size = dtype_of(row).itemsize
    floor = floor_ms(units, tokens, width, size, bandwidth) * 1e3
    moved = units * tokens * width * size
    return record | {"mandatory_bytes": moved, "floor_micros": floor, "x_floor": micros / floor}


def summed(records: list[dict], bandwidth: float) -> dict[str, list[dict]]:
    """The two lists of a record: kernels with share and speed, and ops against their floor."""
    kernels, ops = [], []
    for key, group in groups(records).items():
        op = against_floor(key, group, bandwidth)
        ops.append(op)
        for record in group:
            share = record["micros"] / op["micros"]
            kernels.append(record | {"share": share, "gb_per_s": per_second(record)})
    return {"ops": ops, "kernels": kernels}


def run(args: argparse.Namespace, argv: list[str]) -> dict:
    """Count under ncu first, so that no second process holds the GPU meanwhile."""
    ncu = require(args.device)
    records = count(args, ncu)
    data = recorded.header("profile_kernels", args, argv)
    data["machine"]["versions"]["ncu"] = counters.ncu_version(ncu)
    with measuring(args.device):
        bandwidth = copy_bandwidth(args.device)
    data |= {"copy_gb_per_s": bandwidth / 1e9} | summed(records, bandwidth)
    if args.json:
        args.json.write_text(json.dumps(data, indent=1) + "\n")
    return data


def require(device: str) -> str:
    """Where ncu is; ends the program naming all that this machine lacks."""
    missing, ncu = [], ""
    if not (device.startswith("cuda") and torch.cuda.is_available()):
        missing.append(f"device must be a CUDA GPU that torch sees, got {device}")
    try:
        ncu = counters.find_ncu()
    except FileNotFoundError as error:
        missing.append(str(error))
    if missing:
        sys.exit("profile_kernels: " + "; ".join(missing))
    return ncu


def table(data: dict) -> str:
    """One table an op, direction and shape, each under its name."""
    ops = {tuple(op[key] for key in KEY): op for op in data["ops"]}
    parts = []
    for key, kernels in groups(data["kernels"]).items():
        lines = [line(record) for record in kernels] + [last_line(ops[key], kernels)]
        parts.append(f"{key[0]} {key[1]}, {tables.place(kernels[0])}:")
        parts.append(tables.markdown(list(COLUMNS), lines))
    return "\n\n".join(parts)


def line(record: dict) -> list[str]:
    """A kernel's cells."""
    waits = list(record["stalls"].items())[:SHOWN_STALLS]
    return [
        f"`{record['kernel']}`",
        tables.number(record["micros"], 1),
        f"{megabytes(record['dram_read_bytes'])} + {megabytes(record['dram_write_bytes'])}",
        tables.number(record["gb_per_s"], 0),
        tables.number(record["dram_percent"], 0),
        megabytes(record["l2_read_bytes"]),
        *(tables.number(record[f"{name}_percent"], 0) for name in ("l2", "issue", "warps")),
        tables.number(record["registers"], 0) + (", spills" if record["spills"] else ""),
        "–" if record["shared_conflicts"] is None else f"{record['shared_conflicts']:,.0f}",
        ", ".join(f"{reason} {amount:.1f}" for reason, amount in waits),
    ]


def last_line(op: dict, kernels: list[dict]) -> list[str]:
    """The sum of an op's kernels against its floor."""
    read, written = (
        None if any(r[key] is None for r in kernels) else sum(r[key] for r in kernels)
        for key in ("dram_read_bytes", "dram_write_bytes")
    )
    floor = "no floor: moves no streams"
    if op["floor_micros"] is not None:
        floor = f"{op['x_floor']:.2f} × floor, {op['floor_micros']:.1f} µs for "
        floor += f"{megabytes(op['mandatory_bytes'])} MB"
    cells = ["sum", tables.number(op["micros"], 1), f"{megabytes(read)} + {megabytes(written)}"]
    return [*cells, *[""] * (len(COLUMNS) - len(cells) - 1), floor]


def megabytes(amount: float | None) -> str:
    """Bytes as MB with one decimal."""
    return tables.number(None if amount is None else amount / 1e6, 1)


def render(data: dict) -> str:
    """What stands above the tables, and they."""
    head = f"Counted on {tables.machine_line(data)}: `{data['command']}`."
    return "\n\n".join([head, NOTE, table(data)])


def parse(argv: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="Count what the hardware does in our kernels.")
    names = f"one or several of: {'; '.join(OPS)}"
    parser.add_argument(
        "--ops", nargs="+", choices=list(OPS), default=DEFAULT, metavar="OP", help=names
    )
    parser.add_argument(
        "--shapes", nargs="+", type=shape, default=[Shape(8192, 2560)], help="TxC or TxCxn"
    )
    parser.add_argument("--csv", type=Path, help="keep ncu's own output here")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)  # under ncu
    return recorded.parse(parser, argv)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.child:
        child(args)
        return
    recorded.main(argv, parse, run, render)


if __name__ == "__main__":
    main()
