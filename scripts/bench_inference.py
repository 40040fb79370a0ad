"""Tokens a second of prefill and decode, hyper-connections against their plain residual twin.

    python -m scripts.bench_inference [--presets P ...] [--prompts T ...] [--batches B ...]
    python -m scripts.bench_inference --render PATH   # the table of a recorded run

Each preset runs eagerly, under hc.compile and with mode="reduce-overhead"; on a GPU the first two
are timed as CUDA graphs. On a CPU the net is tiny and nothing compiles unless --ways asks for it.
The last line of stdout is the run as JSON.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace

import hc_compile as hc
from profiles import tables
from profiles.dense_net import Net
from profiles.inference import WAYS, measure_preset, phases
from profiles.timing import Effort, measuring
from scripts import recorded
from scripts.bench_ops import note

NETS = {
    2560: Net(2560, heads=20, ffn=6912, layers=8, length=8192),
    4096: Net(4096, heads=32, ffn=11008, layers=8, length=8192),
}
CPU_NET = Net(32, heads=2, ffn=64, layers=1, length=32)


def run(args: argparse.Namespace, argv: list[str]) -> dict:
    """Measure every preset; the file grows as they do."""
    cuda = args.device.startswith("cuda")
    net = replace(NETS[args.width], layers=args.layers) if cuda else CPU_NET
    every = phases(args.prompts or ([128, 1024, 8192] if cuda else [8, 32]), args.batches)
    ways = args.ways or (list(WAYS) if cuda else ["eager"])
    effort = Effort(5, 20) if args.quick else Effort()
    data = recorded.header("bench_inference", args, argv) | {
        "net": {**asdict(net), "dtype": str(net.dtype)},
        "inference": [],
    }
    with measuring(args.device):
        for preset in args.presets:
            for record in measure_preset(net, preset, ways, every, args.device, effort):
                note("{preset}, {way}, {phase}: {tokens_per_s:.0f} tokens/s".format(**record))
                data["inference"].append(record)
                if args.json:
                    args.json.write_text(json.dumps(data, indent=1) + "\n")
    return data


def table(data: dict) -> str:
    """One line a preset and way, one column a phase: tokens a second and the loss to residual."""
    records = {(r["preset"], r["way"], r["phase"]): r for r in data["inference"]}
    labels = list(dict.fromkeys(phase for *_, phase in records))
    rows = []
    for preset, way in dict.fromkeys((preset, way) for preset, way, _ in records):
        cells = [preset, way]
        for phase in labels:
            ours = records.get((preset, way, phase))
            if ours is None:  # a run that was cut off
                cells.append(tables.number(None))
                continue
            base = records.get(("residual", way, phase))
            text = tables.number(ours["tokens_per_s"], 0)
            if base is not None and preset != "residual":
                slower = tables.best_ms(ours) / tables.best_ms(base) - 1
                text += f" ({slower * 100:+.1f} % time)"
            cells.append(text)
        rows.append(cells)
    return tables.markdown(["preset", "way", *(f"{phase}, tokens/s" for phase in labels)], rows)


def render(data: dict) -> str:
    """What a recorded run says."""
    return f"Measured on {tables.machine_line(data)}: `{data['command']}`.\n\n{table(data)}"


def parse(argv: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="Time prefill and decode through the cache.")
    parser.add_argument("--quick", action="store_true", help="few repeats")
    parser.add_argument("--presets", nargs="+", choices=list(hc.PRESETS), metavar="P",
                        default=["residual", "mhc"], help=", ".join(hc.PRESETS))  # fmt: skip
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), help="on a CPU: eager")
    parser.add_argument("--prompts", type=int, nargs="+", help="lengths of prompts")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--width", type=int, choices=list(NETS), default=2560)
    parser.add_argument("--layers", type=int, default=8)
    return recorded.parse(parser, argv)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    recorded.main(argv, parse, run, render)


if __name__ == "__main__":
    main()
