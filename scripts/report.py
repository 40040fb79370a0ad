"""The quickstart's table, plot and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from profiles.compare import format_table
from profiles.compare import report as compare_report
from profiles.trace import Trace

STYLES = (
    {"color": "#4477aa", "linewidth": 4.0, "alpha": 0.45},
    {"color": "#cc6677", "linewidth": 1.6, "linestyle": "--"},
    {"color": "#228833", "linewidth": 1.4, "linestyle": ":"},
)


def path_record(outcome: Any, base: Any, tokens_per_step: int, label: str) -> dict[str, Any]:
    """One path's numbers as plain data; differences are from `base`, the first path."""
    result, first = outcome.result, base.result
    losses = zip(result.losses, first.losses, strict=True)
    return {
        "label": label,
        "step_ms": result.median_seconds * 1e3,
        "tokens_per_second": tokens_per_step / result.median_seconds,
        "peak_bytes": outcome.peak_bytes,
        "compile_seconds": result.compile_seconds,
        "compile_cached": outcome.cached,
        "final_loss": result.final_loss,
        "held_out_loss": outcome.held_out,
        "largest_loss_difference": max(abs(a - b) for a, b in losses),
        "first_logits_difference": float((result.first_logits - first.first_logits).abs().max()),
        "losses": result.losses,
        "step_seconds": result.step_seconds,
        "trace": outcome.trace.to_json(),
    }


def record(
    machine: dict[str, Any],
    preset: str,
    size: Any,
    cfg: Any,
    outcomes: Mapping[str, Any],
    ops_status: str,
) -> dict[str, Any]:
    """Everything that the run measured, as plain data."""
    base = next(iter(outcomes.values()))
    labels = {"custom-op": f"custom-op ({ops_status})"}
    return {
        "machine": machine,
        "preset": preset,
        "size": {key: str(v) if "dtype" in key else v for key, v in asdict(size).items()},
        "training": asdict(cfg),
        "memory_method": (
            "torch.cuda.max_memory_allocated over the timed steps"
            if machine["device"].startswith("cuda")
            else "tensor bytes between steps plus the largest growth within a profiled step"
        ),
        "paths": {
            name: path_record(outcome, base, cfg.batch * cfg.length, labels.get(name, name))
            for name, outcome in outcomes.items()
        },
    }


def table(data: dict[str, Any]) -> str:
    """One row per path."""
    rows = []
    for name, path in data["paths"].items():
        peak = path["peak_bytes"]
        mark = " (cached)" if path["compile_cached"] else ""
        rows.append(
            [
                path["label"],
                f"{path['step_ms']:.1f}",
                f"{path['tokens_per_second']:,.0f}",
                "n/a" if peak is None else f"{peak / 2**20:.0f}",
                "–" if name == "eager" else f"{path['compile_seconds']:.1f}{mark}",
                f"{path['final_loss']:.4f}",
                f"{path['largest_loss_difference']:.1e}",
                f"{path['first_logits_difference']:.1e}",
            ]
        )
    header = ["path", "step ms", "tokens/s", "peak MiB", "compile s", "final loss"]
    return format_table([*header, "max Δloss", "max Δlogits"], rows)


def show(data: dict[str, Any], traces: Mapping[str, Trace]) -> None:
    """Print the table, the kernel comparison and the sample."""
    first = next(iter(data["paths"]))
    print(f"\n{table(data)}")
    print(
        f"step ms: median after warm-up. Peak: {data['memory_method']}.\n"
        f"Δloss: over the whole curve; Δlogits: first step; both from {first}."
    )
    if "compiled" in data["paths"]:
        print("compiled: block by block, one compilation serves all; custom-op: the whole model.")
    print(f"\nWhat a step launches\n{compare_report(traces, top=3)}")
    losses = ", ".join(f"{n} {p['held_out_loss']:.4f}" for n, p in data["paths"].items())
    print(f"\nHeld-out loss: {losses}")
    print(f"Sample (32 bytes of held-out text, then the model's):\n{data['sample']}")


def plot(data: dict[str, Any], file: Path) -> Path | None:
    """Loss curves beside step times; None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for (name, path), style in zip(data["paths"].items(), STYLES, strict=False):
        left.plot(path["losses"], label=name, **style)
        bar = right.bar(name, path["step_ms"], color=style["color"])
        right.bar_label(bar, fmt="%.1f")
    left.set(xlabel="step", ylabel="loss (nats per byte)", title="Training loss")
    left.legend(frameon=False)
    right.set(ylabel="ms a step (median)", title="Speed")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    machine = data["machine"]
    figure.suptitle(
        f"{data['preset']}, {data['size']['layers']} layers of width {data['size']['dim']} on "
        f"{machine['hardware']}, torch {machine['versions']['torch']}",
        fontsize=10,
    )
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return file


def write(data: dict[str, Any], file: Path) -> None:
    """Save the record as JSON."""
    file.write_text(json.dumps(data, indent=1) + "\n")
