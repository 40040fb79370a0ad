"""Time a training step of a dense transformer trunk against its plain residual twin.

    python -m scripts.bench_model [--quick] [--width C ...] [--json PATH] [--plot PATH]
    python -m scripts.bench_model --recompute [--layers N] [--memory-plot PATH]
    python -m scripts.bench_model --render PATH   # the README's table from a recorded run

All ways run in one process and take turns; the step is forward and backward with gradients of the
input and of all weights. `--recompute` adds the policies of hc_compile/recompute.py and what each
keeps between forward and backward. The last line of stdout is the run as JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch

from profiles import tables
from profiles.capture import capture
from profiles.dense_net import (
    PER_PASS,
    RECOMPUTE,
    WAYS,
    ModelWay,
    Net,
    Trunk,
    interleaved_ms,
    prepare,
    summary,
    warm_compiler,
)
from profiles.memory_plot import memory_over_step, plot_memory
from profiles.saved import saved_by
from scripts import recorded
from scripts.bench_ops import note

NETS = {
    2560: Net(2560, heads=20, ffn=6912),
    4096: Net(4096, heads=32, ffn=11008),
}
CPU_NET = Net(32, heads=2, ffn=64, layers=1, batch=2, length=16, iterations=2)
# Every way compiles the same code once more: past the usual limit Dynamo would run it eagerly.
GRAPHS = {"recompile_limit": 64, "fail_on_recompile_limit_hit": True}
QUICK_WAYS = ("residual", "ours, hc.compile")
# Without a policy, by how the names of recompute policies begin.
BASES = {"": "ours, hc.compile", "v4.1, ": "ours, v4.1, hc.compile"}


def bench_net(
    net: Net, ways: dict[str, ModelWay], device: str, rounds: int, repeats: int, memory: bool
) -> list[dict]:
    """Every way on one net; "residual" must be among them. `memory`: also over a step."""
    torch.compiler.reset()
    gc.collect()
    if any(way.compile for way in ways.values()):
        warm_compiler(device)
    with torch._dynamo.config.patch(**GRAPHS):
        return time_ways(net, ways, device, rounds, repeats, memory)


def time_ways(
    net: Net, ways: dict[str, ModelWay], device: str, rounds: int, repeats: int, memory: bool
) -> list[dict]:
    """Compile every way, let them take turns, and count what each launches and holds."""
    runners = {}
    for name, way in ways.items():
        note(f"C = {net.width}: compiling {name}")
        runners[name] = prepare(net, way, device)
        note(f"    {runners[name].compile_seconds:.1f} s")
    times = interleaved_ms(runners, device, rounds, repeats)
    records = []
    for name, runner in runners.items():
        with tempfile.TemporaryDirectory() as folder:
            launches = capture(runner.step, folder, steps=2, memory=False).launches
        record = {"way": name, "width": net.width, "launches": launches}
        record |= summary(runner, times[name], times["residual"], device)
        if memory:
            record["memory"] = memory_over_step(runner.step, device)
        records.append(record)
    return records


def bench_saved(net: Net, device: str) -> list[dict]:
    """What each policy keeps for the backward, as a multiple of one x a sublayer."""
    h = torch.randn(net.batch, net.length, net.width, device=device).to(net.dtype)
    x = h.unsqueeze(-2).expand(*h.shape[:-1], net.streams, net.width)
    whole = x.numel() * x.element_size() * 2 * net.layers
    records = []
    for name, way in BASES.items():
        trunk = Trunk(net, WAYS[way], device)
        for policy in ("none", "coefficients", "streams"):
            note(f"C = {net.width}: partitioning with recompute={policy} ({way})")
            forward, kept = saved_by(trunk, policy, x)
            torch.autograd.backward(forward(h.requires_grad_()), torch.ones_like(h))
            parts = {key: getattr(kept, key) for key in ("streams", "coefficients", "branches")}
            record = {"policy": name + policy, "width": net.width, "sublayers": 2 * net.layers}
            record |= {key: size / whole for key, size in parts.items()}
            records.append(record | {"backward_ops": kept.backward.total()})
    return records


def run(args: argparse.Namespace, argv: list[str]) -> dict:
    """Measure the chosen nets."""
    cuda = args.device.startswith("cuda")
    nets = [NETS[width] for width in args.width] if cuda else [CPU_NET]
    nets = [replace(net, layers=args.layers or net.layers) for net in nets]
    ways = WAYS | (PER_PASS if args.per_pass else {})
    if args.ways:
        ways = {name: way for name, way in ways.items() if name in ("residual", *args.ways)}
    if args.quick or not cuda:
        ways = {name: way for name, way in ways.items() if name in QUICK_WAYS}
    if args.recompute:
        ways |= {name: WAYS[name] for name in BASES.values()} | RECOMPUTE
    if args.eager:
        ways = {name: replace(way, compile=None) for name, way in ways.items()}
    rounds, repeats = (2, 5) if args.quick or not cuda else (6, 10)
    data = recorded.header("bench_model", args, argv) | {
        "nets": [{**asdict(net), "dtype": str(net.dtype)} for net in nets],
        "rounds": rounds,
        "repeats": repeats,
        "model": [],
    }

    def save() -> None:
        if args.json:
            args.json.write_text(json.dumps(data, indent=1) + "\n")

    for net in nets:
        if args.recompute:
            data.setdefault("saved", []).extend(bench_saved(net, args.device))
            save()
        memory = args.memory_plot is not None
        data["model"] += bench_net(net, ways, args.device, rounds, repeats, memory)
        save()
    if args.plot:
        plot(data, args.plot)
    if args.memory_plot:
        lines = {f"{r['way']}, C = {r['width']}": r["memory"] for r in data["model"]}
        title = f"Memory over a step, {nets[0].layers} layers; {tables.machine_line(data)}"
        plot_memory(lines, title, args.memory_plot)
    return data


def plot(data: dict, file: Path) -> Path | None:
    """Step time of every way, one panel a width."""
    panels: dict[str, dict[str, float]] = {}
    for record in data["model"]:
        panels.setdefault(f"C = {record['width']}", {})[record["way"]] = record["step_ms"]
    title = f"Forward and backward of a dense transformer; {tables.machine_line(data)}"
    return tables.bars(panels, title, "ms a step", file)


def parse(argv: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="Time a dense transformer's training step.")
    parser.add_argument("--quick", action="store_true", help="residual and fused only, few rounds")
    parser.add_argument("--width", type=int, nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), help="these and residual only")
    parser.add_argument("--per-pass", action="store_true", help="also stop after each graph pass")
    parser.add_argument("--recompute", action="store_true", help="also every recompute policy")
    parser.add_argument("--layers", type=int, help="blocks of two sublayers; default 2 (CPU: 1)")
    parser.add_argument("--memory-plot", type=Path, help="write memory over a step here, as PNG")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--plot", type=Path, help="write a PNG here")
    return recorded.parse(parser, argv)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    recorded.main(argv, parse, run, tables.render)


if __name__ == "__main__":
    main()
