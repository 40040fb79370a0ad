"""Time the cold first forward and backward of a deep mHC network against its residual twin.

    python -m scripts.bench_compile_time [--layers N] [--traced] [--kernels] [--ways WAY ...]
    python -m scripts.bench_compile_time --render PATH

Whole-network graphs, and one graph a block with the streams' carried state, each in a fresh
process with empty caches of Inductor and Triton. `--traced` stops before Inductor, which leaves
what Python does: Dynamo, the graph passes, AOTAutograd and its partition. `--kernels` gives
graphs on a CPU the launches that they have on a GPU. The last line of stdout is the run as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile

from profiles import tables
from profiles.compile_time import WAYS
from profiles.machine import ROOT
from scripts import recorded
from scripts.bench_ops import note

PARTS = ("seconds", "cpu_seconds", "dynamo", "aot", "inductor", "build")


def bench_way(way: str, args: argparse.Namespace) -> dict:
    """One way in a process and with caches of its own."""
    note(f"{way}, {args.layers} layers")
    options = [name for name in ("traced", "kernels") if getattr(args, name)]
    command = [sys.executable, "-m", "profiles.compile_time", way, str(args.layers), args.device]
    with tempfile.TemporaryDirectory() as folder:
        caches = {f"{name}_CACHE_DIR": folder for name in ("TORCHINDUCTOR", "TRITON")}
        done = subprocess.run(
            [*command, *options],
            cwd=ROOT,
            env=os.environ | caches,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return json.loads(done.stdout.splitlines()[-1])


def run(args: argparse.Namespace, argv: list[str]) -> dict:
    """Every way in turn."""
    data = recorded.header("bench_compile_time", args, argv) | {"compile": []}
    for way in args.ways:
        data["compile"].append(bench_way(way, args))
        if args.json:
            args.json.write_text(json.dumps(data, indent=1) + "\n")
    return data


def table(data: dict) -> str:
    """The table: seconds of each part, and how many times the twin's the whole is."""
    twin = {r["layers"]: r["seconds"] for r in data["compile"] if r["way"] == "residual"}
    rows = []
    for record in data["compile"]:
        base = twin.get(record["layers"])
        times = tables.number(base and record["seconds"] / base, 2)
        cells = [tables.number(record[part], 1) for part in PARTS]
        counts = [str(record["layers"]), str(record.get("graphs", ""))]
        rows.append([record["way"], *counts, *cells, times])
    header = ["network", "layers", "graphs", "first step s", "own CPU s", *PARTS[2:], "÷ residual"]
    return tables.markdown(header, rows)


def render(data: dict) -> str:
    """What a recorded run says."""
    return f"Measured on {tables.machine_line(data)}: `{data['command']}`.\n\n{table(data)}"


def parse(argv: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="Time the compilation of a deep network.")
    parser.add_argument("--layers", type=int, default=32, help="blocks of two sublayers")
    parser.add_argument("--traced", action="store_true", help="stop before Inductor")
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="on a CPU: let hc:: ops take their Triton kernels, which are neither built nor run",
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    return recorded.parse(parser, argv)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    recorded.main(argv, parse, run, render)


if __name__ == "__main__":
    main()
