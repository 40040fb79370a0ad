"""Time RMSNorm, QK-norm + RoPE and SwiGLU, and measure what training steps hold.

    python -m scripts.bench_layers [--quick] [--tables layers memory] [--width C ...] [--json PATH]
    python -m scripts.bench_layers --render PATH      # the tables of a recorded run

Forward and forward + backward; eager, under plain torch.compile and hc.compile, and Liger-Kernel
where it is installed. On a CPU sizes are tiny and only show that everything runs. The last line
of stdout is the run as JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable

import torch

from profiles import tables
from profiles.capture import named_kernels_on_cpu
from profiles.layer_bench import CASES, LIGER, Size, measure_case
from profiles.memory_bench import Model, measure_memory, rotary_cache_mb
from profiles.timing import Effort, copy_bandwidth, measuring
from scripts import recorded
from scripts.bench_ops import note

SIZES = {
    2560: Size(4, 2048, 2560, heads=20, key_heads=4, ffn=6912),
    4096: Size(4, 2048, 4096, heads=32, key_heads=8, ffn=11008),
}
CPU_SIZE = Size(2, 16, 32, heads=4, key_heads=2, ffn=64)
SMALL, BASE = (768, 12, 12, 8, 1024), (1024, 24, 16, 4, 1024)
MODELS = (
    Model("residual, 124M", "with_hc", *SMALL, streams=1),
    Model("residual, 124M", "with_hc", *SMALL, streams=1, checkpointed=True),
    Model("DHC × 4, 124M", "with_hc", *SMALL),
    Model("DHC × 4, 124M", "with_hc", *SMALL, checkpointed=True),
    Model("DHC × 4, 355M", "with_hc", *BASE),
    Model("DHC × 4, 355M", "with_hc", *BASE, checkpointed=True),
    Model("residual, bf16 streams", "residual", *SMALL, streams=1),
    Model("mHC, bf16 streams", "mhc", *SMALL),
)
TINY = (32, 2, 2, 2, 16)
CPU_MODELS = (
    Model("DHC × 4", "with_hc", *TINY, vocabulary=64),
    Model("DHC × 4", "with_hc", *TINY, checkpointed=True, vocabulary=64),
    Model("mHC, bf16 streams", "mhc", *TINY, vocabulary=64),
)


def bench_layers(sizes: list[Size], device: str, effort: Effort, save: Callable) -> list[dict]:
    """Every case at every size; a peer that fails is noted and left out."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    bandwidth, records = copy_bandwidth(device), []
    for size in sizes:
        for name in CASES:
            note(f"{name}, C = {size.width}")
            try:
                for record in measure_case(name, size, dtype, device, effort, bandwidth):
                    records.append(record)
                    note(f"    {record['way']}: train {record['train_ms']:.3f} ms")
            except Exception as error:  # another project's kernel must not end a long run
                last = (records[-1]["case"], records[-1]["way"]) if records else ()
                if last != (name, "hc.compile"):
                    raise
                note(f"FAILED: {LIGER}: {error}")
                records.append({"case": name, "way": LIGER, "failed": str(error)[:300]})
            save(records)
    return records


def bench_memory(device: str, repeats: int, save: Callable) -> list[dict]:
    """Every model, one after another."""
    records = []
    for model in MODELS if device.startswith("cuda") else CPU_MODELS:
        note(f"{model.name}{', checkpointed' if model.checkpointed else ''}")
        records.append(measure_memory(model, device, repeats))
        gc.collect()
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
        save(records)
    return records


def run(args: argparse.Namespace, argv: list[str]) -> dict:
    """Measure the chosen tables; the file grows as they do."""
    cuda = args.device.startswith("cuda")
    data = recorded.header("bench_layers", args, argv) | {
        "rotary_cache": {"layers": 24, "head_dim": 64, "positions": 8192}
        | rotary_cache_mb(24, 64, 8192),
        "layers": [],
        "memory": [],
    }

    def saver(table: str) -> Callable:
        def save(records: list[dict]) -> None:
            data[table] = records
            if args.json:
                args.json.write_text(json.dumps(data, indent=1) + "\n")

        return save

    sizes = [SIZES[width] for width in args.width] if cuda else [CPU_SIZE]
    effort = Effort(5, 20) if args.quick else Effort()
    if not cuda:
        named_kernels_on_cpu()
    if "layers" in args.tables:
        with measuring(args.device):
            bench_layers(sizes, args.device, effort, saver("layers"))
    if "memory" in args.tables:
        bench_memory(args.device, 3 if args.quick or not cuda else 10, saver("memory"))
    return data


def layers_table(records: list[dict]) -> str:
    """One line a case, size and way."""
    keys = {"forward_ms": 4, "forward_graph_ms": 4, "forward_launches": 0}
    keys |= {"train_ms": 4, "train_graph_ms": 4, "train_launches": 0, "x_floor": 2}
    header = ["layer", "T×C", "way", "forward ms", "CUDA graph ms", "launches"]
    header += ["train ms", "CUDA graph ms", "launches", "train × floor"]
    rows = [
        [
            record["case"],
            f"{record['tokens']}×{record['width']}",
            record["way"],
            *(tables.number(record[key], digits) for key, digits in keys.items()),
        ]
        for record in records
        if "failed" not in record
    ]
    return tables.markdown(header, rows)


def memory_table(records: list[dict]) -> str:
    """One line a model: estimated and measured peak of a step, and what recomputing saves."""
    rows = []
    for record in records:
        measured = record["measured_mb"]
        ratio = None if measured is None else record["estimated_mb"] / measured
        rows.append(
            [
                record["model"] + (", checkpointed" if record["checkpointed"] else ""),
                f"{record['parameters'] / 1e6:.0f}M",
                f"{record['batch']}×{record['length']}",
                tables.number(record["estimated_mb"], 0),
                tables.number(measured, 0),
                tables.number(ratio, 3),
                tables.number(record["estimated_activation_mb"], 0),
                tables.number(record["step_ms"], 1),
            ]
        )
    header = ["model", "parameters", "B×S", "estimated MB", "measured MB", "ratio"]
    return tables.markdown([*header, "activations MB", "step ms"], rows)


def render(data: dict) -> str:
    """What a recorded run says."""
    cache = data["rotary_cache"]
    parts = [f"Measured on {tables.machine_line(data)}: `{data['command']}`."]
    if data["layers"]:
        parts.append(layers_table(data["layers"]))
        parts += [
            f"Not measured: {record['way']} in {record['case']} ({record['failed']})."
            for record in data["layers"]
            if "failed" in record
        ]
    if data["memory"]:
        parts.append(memory_table(data["memory"]))
    parts.append(
        f"Rotary tables of {cache['layers']} layers (head size {cache['head_dim']}, "
        f"{cache['positions']} positions): {cache['own']:.1f} MB of their own, "
        f"{cache['shared']:.1f} MB shared."
    )
    return "\n\n".join(parts)


def parse(argv: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="Time layers and measure training memory.")
    parser.add_argument("--quick", action="store_true", help="few repeats")
    tables_of = ("layers", "memory")
    parser.add_argument("--tables", nargs="+", choices=tables_of, default=list(tables_of))
    parser.add_argument("--width", type=int, nargs="+", choices=list(SIZES), default=list(SIZES))
    return recorded.parse(parser, argv)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    recorded.main(argv, parse, run, render)


if __name__ == "__main__":
    main()
