"""Profile one training step in several paths and write one page that opens anywhere.

    python -m scripts.profile_paths [--preset P] [--paths eager,fused] [--out DIR] [--device D]
    python -m scripts.profile_paths --model package.module:function     # a model of your own
    python -m scripts.profile_paths --compare old.json                  # exit code 1 if worse

eager      the plain functions, no compiler
compiled   torch.compile of the plain functions, block by block
custom-op  torch.compile of the hc:: ops, without the graph passes
fused      hc.compile: ops and graph passes (fused-recompute: with recompute="streams")

The function of --model takes no arguments and returns (model, inputs), inputs being a tuple, a
dict of keywords or one tensor; the step is then ⟨outputs, fixed random⟩ and its backward. It may
return a `profiles.workload.Workload` instead, which also has a loss and an optimizer.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import hc_compile as hc
from profiles.capture import resolve
from profiles.compare import category_table, format_table
from profiles.machine import recorded_command
from profiles.path_run import PATHS
from profiles.paths import KIND, profile_workload
from profiles.regression import compare
from profiles.report import write
from profiles.report.facts import headline
from profiles.report.parts import mib, number
from profiles.trace import Trace
from profiles.workload import Workload, as_workload
from scripts.quickstart import CPU_SIZE, GPU_SIZE, Size, build
from scripts.train import connection_config
from scripts.training import cross_entropy

SIZES = ("dim", "layers", "heads", "batch", "length")


def parse(argv: list[str]) -> argparse.Namespace:
    """The options, with the device chosen."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="mhc", choices=sorted(hc.PRESETS))
    parser.add_argument("--streams", type=int, help="default: the preset's")
    parser.add_argument("--iterations", type=int, help="of Sinkhorn; default: the preset's")
    for name in SIZES:
        parser.add_argument(f"--{name}", type=int, help="default: by device")
    parser.add_argument("--model", help="package.module:function, instead of the options above")
    parser.add_argument("--paths", default=",".join(PATHS), help=f"default: {','.join(PATHS)}")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each path")
    parser.add_argument("--traced", type=int, default=3, help="steps in each trace")
    parser.add_argument("--device", help="default: cuda when there is one")
    parser.add_argument("--out", type=Path, default=Path("profiles/out/paths"))
    parser.add_argument("--name", default="report", help="of the page, plot and JSON")
    parser.add_argument("--compare", type=Path, help="an older JSON; exit code 1 if worse")
    parser.add_argument("--threshold", type=float, default=0.1, help="growth that is worse")
    parser.add_argument("--render", type=Path, help="make the page of this JSON, run nothing")
    parser.add_argument("--commit", help="to record where the code lies outside git")
    parser.add_argument("--json", action="store_true", help="print the record as the last line")
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    given = [n for n in (*SIZES, "streams", "iterations") if getattr(args, n) is not None]
    if args.model and given:
        parser.error(f"--model brings its own sizes, got --{', --'.join(given)} too")
    if not args.threshold > 0:
        parser.error(f"--threshold must be > 0, got {args.threshold}")
    if args.compare and not args.compare.is_file():
        parser.error(f"--compare must be a file, got {args.compare}")
    return args


def transformer(args: argparse.Namespace) -> Workload:
    """The quickstart's model: next-byte loss on random bytes, AdamW."""
    size: Size = GPU_SIZE if args.device.startswith("cuda") else CPU_SIZE
    size = replace(size, **{n: getattr(args, n) for n in SIZES if getattr(args, n) is not None})
    connection = connection_config(args, size.dim)
    model = build(size, connection, args.device, seed=0)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(256, (2, size.batch, size.length), generator=generator)
    tokens, targets = drawn.to(args.device)
    known = {k: v for k, v in asdict(size).items() if k not in ("steps", "stream_dtype")}
    return Workload(
        model,
        (tokens,),
        loss=lambda logits: cross_entropy(logits, targets),
        optimizer=lambda m: torch.optim.AdamW(hc.parameter_groups(m), fused=True),
        about={
            "preset": connection.row.name,
            "streams": connection.n,
            "iterations": connection.constraint.iterations,
            **known,
            "stream_dtype": str(size.stream_dtype or torch.float32).removeprefix("torch."),
        },
    )


def run(args: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """Measure, and place the numbers."""
    if args.model:
        workload = as_workload(resolve(args.model)()).to(args.device)
    else:
        workload = transformer(args)
    record = profile_workload(
        workload, args.out, paths=args.paths.split(","), steps=args.steps, traced=args.traced
    )
    record["command"] = recorded_command(f"scripts.{KIND}", argv)
    if args.commit:
        record["machine"]["git_commit"] = args.commit
    return record


def show(record: dict[str, Any]) -> str:
    """The paths and their categories as text."""
    rows = []
    for name, path in record["paths"].items():
        compiled = path["compile"]
        cells = [path["step_ms"], path["launches"], compiled["seconds"]]
        counts = [compiled[key] for key in ("graphs", "graph_breaks", "recompiles")]
        rows.append([name, *map(number, cells), mib(path["peak_bytes"]), *map(str, counts)])
    header = ["path", "step ms", "launches", "compile s", "peak MiB", "graphs", "breaks"]
    traces = {name: Trace.from_json(path["trace"]) for name, path in record["paths"].items()}
    lines = [*headline(record), format_table([*header, "recompiles"], rows)]
    return "\n\n".join([*lines, category_table(traces)])


def compared(record: dict[str, Any], args: argparse.Namespace) -> int:
    """Add the comparison to the record and print it; the exit code."""
    old = json.loads(args.compare.read_text())
    try:
        found = compare(old, record, args.compare.name, args.threshold)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    record["comparison"] = found
    print(f"\n{found['basis']} {found['result']}.")
    for check in found["checks"]:
        if check["verdict"] == "regressed":
            values = f"{number(check['old'])} → {number(check['new'])}"
            print(f"  {check['path']}: {check['measure']} {values}")
    return 1 if found["regressed"] else 0


def main(argv: list[str] | None = None) -> int:
    """Run or render, compare, write; the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    record = json.loads(args.render.read_text()) if args.render else run(args, argv)
    record.pop("comparison", None)
    print("\n" + show(record))
    code = compared(record, args) if args.compare else 0
    files = write(record, args.out, args.name)
    print("\nwrote " + ", ".join(os.path.relpath(file) for file in files))
    if not args.render:
        print(f"TensorBoard: python -m profiles.view --logdir {os.path.relpath(args.out)}")
    if args.json:
        print(json.dumps(record))
    return code


if __name__ == "__main__":
    sys.exit(main())
