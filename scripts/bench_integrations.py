"""Time models of transformers before and after `apply` or `hc.convert`.

    python -m scripts.bench_integrations [--models M ...] [--ways WAY ...] [--json PATH]
    python -m scripts.bench_integrations --render PATH   # the table of a recorded run

A training step (forward, loss, backward) of DeepSeek-V4, GLM-5-next's text trunk and HY-V4 with
their own hyper-connections and with ours, and of a Llama that `hc.convert` makes
hyper-connected. On a CPU the models are tiny and only show that everything runs. The last line of
stdout is the run as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict
from importlib import metadata

from profiles import tables
from profiles.integration_bench import MODELS, TITLES, WAYS, Batch, measure_model, release
from scripts import recorded
from scripts.bench_ops import note

BATCH, CPU_BATCH = Batch(4, 1024, 8192), Batch(2, 16, 64)


def run(args: argparse.Namespace, argv: list[str]) -> dict:
    """Measure every model and way; the file grows as they do."""
    ends = time.perf_counter() + args.seconds
    cuda = args.device.startswith("cuda")
    batch = BATCH if cuda else CPU_BATCH
    data = recorded.header("bench_integrations", args, argv) | {
        "transformers": metadata.version("transformers"),
        "batch": asdict(batch),
        "failed": {},
        "integrations": [],
    }
    for model in args.models:
        try:
            records = measure_model(
                model, args.ways, args.layers, batch, args.device, args.repeats
            )
            for record in records:
                note("{model}, {way}: ".format(**record) + record.get("failed", "measured"))
                data["integrations"].append(record)
                if args.json:
                    args.json.write_text(json.dumps(data, indent=1) + "\n")
                if time.perf_counter() > ends:
                    data["failed"][f"what follows {model}, {record['way']}"] = "out of time"
                    return data
        except (ImportError, AttributeError, RuntimeError) as error:  # too old a transformers
            note(f"FAILED: {model}: {error}")
            data["failed"][model] = str(error)[:300]
        release(args.device)
    return data


def table(data: dict) -> str:
    """One line a model and way; speed-up over the same model's eager original."""
    found = data["integrations"]
    eager = {r["model"]: r.get("step_ms") for r in found if r["way"] == "original, eager"}
    rows = []
    for record in (r for r in found if "failed" not in r):
        base = eager.get(record["model"])
        cells = [f"{TITLES[record['model']]}, {record['layers']} × {record['width']}"]
        cells += [record["way"], tables.number(record["step_ms"], 2)]
        cells += [tables.number(base and base / record["step_ms"], 2)]
        cells += [tables.number(record["peak_gb"], 2), tables.number(record["first_seconds"], 1)]
        cells += [str(record["graphs"]), f"{record['difference']:.1e}"]
        rows.append([*cells, f"{record['worst_difference']:.1e}"])
    header = ["model, layers × C", "way", "step ms", "speed-up", "peak GB", "first call s"]
    header += ["graphs", "Δlogits, median token", "worst token"]
    return tables.markdown(header, rows)


def render(data: dict) -> str:
    """What a recorded run says."""
    batch = data["batch"]
    parts = [
        f"Measured on {tables.machine_line(data)}, transformers {data['transformers']}, "
        f"{batch['batch']}×{batch['length']} tokens: `{data['command']}`.",
        table(data),
    ]
    parts += [
        f"Not measured: {TITLES[r['model']]}, {r['way']} ({r['failed']})."
        for r in data["integrations"]
        if "failed" in r
    ]
    parts += [f"Not measured: {name} ({error})." for name, error in data["failed"].items()]
    return "\n\n".join(parts)


def parse(argv: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="Time transformers' models with ours in place.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--layers", type=int, help="default: 2, of Llama 4")
    parser.add_argument("--repeats", type=int, default=10, help="timed steps")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="start nothing new after this long"
    )
    return recorded.parse(parser, argv)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    recorded.main(argv, parse, run, render)


if __name__ == "__main__":
    main()
