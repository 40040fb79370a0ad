"""The main job: train one model in three paths that must agree, and show what each costs.

    python -m scripts.quickstart [--steps N] [--preset P] [--text PATH] [--out DIR] [--device D]

eager      the plain functions, no compiler
compiled   torch.compile of the plain functions, block by block
custom-op  torch.compile of the whole model with the hc_inductor backend and the hc:: ops
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import hc_compile as hc
from hc_compile.kernels import get_kernel_status
from hc_compile.models import Transformer, TransformerConfig
from profiles.capture import capture, named_kernels_on_cpu
from profiles.machine import describe
from profiles.trace import Trace
from profiles.workload import compile_blocks
from scripts import report
from scripts.text import Corpus, load_corpus
from scripts.train import add_model_arguments, connection_config, sample_text
from scripts.training import Forward, TrainConfig, TrainResult, held_out_loss, train


@dataclass(frozen=True)
class Way:
    """One way to run the same model."""

    implementation: str
    compile: Callable[[Transformer], Forward]


PATHS = {
    "eager": Way("plain", lambda model: model),
    "compiled": Way("plain", compile_blocks),
    "custom-op": Way("ops", hc.compile),
}


@dataclass(frozen=True)
class Size:
    """Model and batch for one kind of machine."""

    dim: int
    layers: int
    heads: int
    length: int
    batch: int
    steps: int
    stream_dtype: torch.dtype | None


CPU_SIZE = Size(128, 2, 4, length=128, batch=8, steps=100, stream_dtype=None)
GPU_SIZE = Size(512, 6, 8, length=512, batch=32, steps=300, stream_dtype=torch.bfloat16)


@dataclass
class Outcome:
    """What one path gave: training measurements, trace, weights and held-out loss."""

    result: TrainResult
    trace: Trace
    state: dict[str, Tensor]
    held_out: float
    cached: bool

    @property
    def peak_bytes(self) -> int | None:
        """CUDA's peak, or on CPU what stays between steps plus the trace's growth in a step."""
        if self.result.peak_bytes is not None:
            return self.result.peak_bytes
        growth = self.trace.peak_bytes
        return None if growth is None else self.result.resident_bytes + growth


def ops_status(device: str) -> str:
    """What the custom-op path runs here: "ops, Triton" or "ops, decomposed"."""
    return get_kernel_status()["ops"] if device.startswith("cuda") else "ops, decomposed"


def build(size: Size, connection: hc.HCConfig, device: str, seed: int) -> Transformer:
    """The model; one seed gives the same weights on every path."""
    torch.manual_seed(seed)
    config = TransformerConfig(
        dim=size.dim,
        layers=size.layers,
        heads=size.heads,
        ffn_dim=3 * size.dim,
        max_seq_len=size.length,
        hc=connection,
        stream_dtype=size.stream_dtype,
    )
    return Transformer(config, device=device)


def cache_hits() -> int:
    """How many compiled graphs came from a cache so far in this process."""
    counters = torch._dynamo.utils.counters
    return (
        counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
    )


def run_path(
    name: str, size: Size, connection: hc.HCConfig, corpus: Corpus, cfg: TrainConfig, out: Path
) -> Outcome:
    """Train, trace and score one path, from the shared initial weights."""
    torch._dynamo.reset()
    gc.collect()
    if cfg.device.startswith("cuda"):
        torch.cuda.empty_cache()
    path, hits = PATHS[name], cache_hits()
    connection = replace(connection, implementation=path.implementation)
    model = build(size, connection, cfg.device, cfg.seed)
    result = train(model, path.compile(model), corpus, cfg, f"{name:>9}")
    state = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
    trace = capture(result.step, out / name)
    plain = trained(size, connection, cfg, state)
    return Outcome(
        result, trace, state, held_out_loss(plain, corpus, cfg), cached=cache_hits() > hits
    )


def trained(
    size: Size, connection: hc.HCConfig, cfg: TrainConfig, state: dict[str, Tensor]
) -> Transformer:
    """An eager model of the plain functions with trained weights."""
    model = build(size, replace(connection, implementation="plain"), cfg.device, cfg.seed)
    model.load_state_dict(state)
    return model


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options, with the device and size chosen."""
    parser = argparse.ArgumentParser(description="Train one model in three agreeing paths.")
    add_model_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("profiles/out"))
    parser.add_argument("--paths", nargs="+", choices=list(PATHS), default=list(PATHS))
    parser.add_argument("--commit", help="to record where the code lies outside git")
    for name in ("dim", "layers", "batch", "length"):
        parser.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    size = GPU_SIZE if args.device.startswith("cuda") else CPU_SIZE
    chosen = {
        name: getattr(args, name)
        for name in ("dim", "layers", "batch", "length", "steps")
        if getattr(args, name) is not None
    }
    args.size = replace(size, **chosen)
    return args


def main(argv: list[str] | None = None) -> None:
    """Run the paths, print the table, write plot, traces and JSON."""
    began = time.perf_counter()
    args = parse(argv)
    size: Size = args.size
    connection = connection_config(args, size.dim)
    corpus = load_corpus(args.text)
    cfg = TrainConfig(size.steps, size.batch, size.length, seed=args.seed, device=args.device)
    machine = describe(args.device) | ({"git_commit": args.commit} if args.commit else {})
    named_kernels_on_cpu()
    args.out.mkdir(parents=True, exist_ok=True)
    print(
        f"{machine['hardware']}; text: {corpus.source}, {corpus.files} files, "
        f"{corpus.train.numel() / 1e6:.1f} MB"
    )
    print(
        f"preset {connection.preset}, n = {connection.streams}, {size.layers} layers of "
        f"width {size.dim}, {size.steps} steps of {size.batch} x {size.length} bytes"
    )
    outcomes = {
        name: run_path(name, size, connection, corpus, cfg, args.out) for name in args.paths
    }
    record = report.record(machine, args.preset, size, cfg, outcomes, ops_status(args.device))
    model = trained(size, connection, cfg, outcomes[args.paths[-1]].state)
    record["sample"] = sample_text(model, corpus)
    report.show(record, {name: outcome.trace for name, outcome in outcomes.items()})
    plot = report.plot(record, args.out / "quickstart.png")
    record["total_seconds"] = time.perf_counter() - began
    report.write(record, args.out / "quickstart.json")
    print(
        f"\n{record['total_seconds']:.0f} s in all; wrote "
        + ", ".join(os.path.relpath(file) for file in (plot, args.out / "quickstart.json") if file)
        + f" and traces in {os.path.relpath(args.out)}/{{{','.join(args.paths)}}}"
    )
    print("TensorBoard: python -m profiles.view")


if __name__ == "__main__":
    main()
