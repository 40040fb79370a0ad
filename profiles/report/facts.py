"""What a record says, in words: the opening lines, categories and their order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from profiles.report.parts import number

# category of a trace -> css class, label, colour; in the order in which bars show them
CATEGORIES = {
    "hyper-connection": ("c-hc", "hc:: ours", "#5fbf72"),
    "inductor": ("c-ind", "Inductor", "#7fb3e6"),
    "matmul": ("c-mm", "matmul", "#f0c14b"),
    "attention": ("c-att", "attention", "#e597bd"),
    "optimizer": ("c-opt", "optimizer", "#f09a6f"),
    "copy": ("c-copy", "copies", "#b9a5ea"),
    "other": ("c-other", "other ops", "#c3c7cc"),
    "idle": ("c-idle", "idle", "#eeeeee"),
}


def category_order(paths: Mapping[str, Any]) -> list[str]:
    """Categories that any path has time in."""
    found = {c["name"] for path in paths.values() for c in path["categories"] if c["ms"] > 0}
    return [name for name in CATEGORIES if name in found]


def milliseconds(path: Mapping[str, Any], name: str) -> float:
    """A path's time in a category."""
    return next((c["ms"] for c in path["categories"] if c["name"] == name), 0.0)


def model_line(record: Mapping[str, Any]) -> str:
    """The model and its inputs in a few words."""
    known = record["workload"]
    parts = [str(known["model"])]
    if "preset" in known:
        parts.append(f"preset {known['preset']}, n = {known['streams']}")
    if "layers" in known:
        parts.append(f"{known['layers']} layers of width {known['dim']}")
    parts.append(f"{known['parameters']:,} parameters")
    return ", ".join([*parts, *known["inputs"]])


def headline(record: Mapping[str, Any]) -> tuple[str, str]:
    """What was compared on what machine, and the result."""
    machine, paths = record["machine"], record["paths"]
    what = (
        f"{model_line(record)}: one training step in {len(paths)} "
        f"path{'s' if len(paths) > 1 else ''} on {machine['hardware']}, "
        f"torch {machine['versions']['torch']}."
    )
    (first, base), *others = paths.items()
    if not others:
        return what, f"{first} takes {number(base['step_ms'])} ms a step."
    name, best = min(others, key=lambda item: item[1]["step_ms"])
    ratio = base["step_ms"] / best["step_ms"]
    faster = f"{number(ratio)}× as fast" if ratio >= 1 else f"{number(1 / ratio)}× slower"
    result = (
        f"{name} takes {number(best['step_ms'])} ms a step where {first} takes "
        f"{number(base['step_ms'])} ms ({faster}), with {number(best['launches'])} instead of "
        f"{number(base['launches'])} {launch_noun(record)}"
    )
    if base["peak_bytes"] and best["peak_bytes"]:
        result += f" and {best['peak_bytes'] / base['peak_bytes']:.0%} of its peak memory"
    return what, result + "."


def on_gpu(record: Mapping[str, Any]) -> bool:
    """Whether the traces hold kernels of a GPU."""
    return any(path["trace"]["device"] == "cuda" for path in record["paths"].values())


def launch_noun(record: Mapping[str, Any]) -> str:
    """What a launch is on this device."""
    return "kernel launches" if on_gpu(record) else "operator calls"


def method(record: Mapping[str, Any]) -> Iterable[str]:
    """How the numbers were made, one sentence each."""
    steps, traced = record["settings"]["steps"], record["settings"]["traced"]
    which = "median" if on_gpu(record) else "fastest (other load on a CPU only adds time)"
    yield (
        f"step ms: {which} of {steps} training steps without the profiler. Caches were cold; "
        "compile s is what the first call took beyond a step."
    )
    if on_gpu(record):
        yield f"Kernels, launches and memory: means over {traced} traced steps of device events."
        yield "idle: the step without the profiler minus the time of its kernels."
        yield "Peak: torch.cuda.max_memory_allocated over one step."
    else:
        yield (
            f"Without a GPU a trace lists leaf operators that compute; times are means over "
            f"{traced} traced steps and carry the profiler's cost, so a traced step is longer "
            "than step ms."
        )
        yield "idle: the traced step minus its operators: Python, dispatch, the autograd engine."
        yield (
            "Peak (estimated): parameters, buffers, inputs and optimizer state plus the largest "
            "growth of tensor bytes in a traced step."
        )
    yield (
        "Kernels are sorted into categories by name alone: ours begin with hc_ or hc::, "
        "Inductor's with triton_ or cpp_fused. Eager hyper-connections are among the other ops."
    )
    yield (
        "The run left one trace a path in a folder of its name: python -m profiles.view "
        "--logdir OUT opens them in TensorBoard."
    )
    yield (
        "Δ: largest difference from the first path over the largest element there, of the "
        "outputs and of all gradients, at the first step."
    )
