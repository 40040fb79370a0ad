"""Every hc:: op that a path calls, against the time its mandatory bytes take at copy bandwidth.

    floor = mandatory bytes / copy bandwidth       × floor = time / floor

Which ops, how often and at which shapes is recorded from one training step, after the path's
graph passes. Mandatory bytes are the catalog's C-units; where a call has no such row (coefficients
alone, streams made of one) they are its tensors in and out, each once, which the row says. Time is
that of the call alone, with the step's own tensors. On a GPU the trace's hc_ kernels are then
shared out among the ops that launch them, by their time alone: `trace_ms`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from custom_ops.catalog import CATALOG
from hc_compile.passes import PassPipeline
from profiles.timing import Effort, measure, measuring
from profiles.trace import Trace, category, clean_name
from profiles.workload import TrainingStep, Workload

BACKWARD = "_backward"
QUICK = Effort(5, 30)


@dataclass
class OpCall:
    """One hc:: op at one set of shapes, with the tensors of its first call."""

    func: Any
    args: tuple
    kwargs: dict
    output: Any
    calls: int = 1
    named: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        names = [argument.name for argument in self.func._schema.arguments]
        self.named = dict(zip(names, self.args, strict=False)) | self.kwargs

    @property
    def name(self) -> str:
        """As in "hc::post_pre_backward"."""
        return self.func._schema.name

    def shape(self) -> tuple[int, int, int] | None:
        """T, n, C of the streams x [..., n, C], None where the op has none."""
        x = self.named.get("x")
        if not isinstance(x, Tensor) or x.dim() < 2:
            return None
        return x.shape[:-2].numel(), x.shape[-2], x.shape[-1]


class OpRecorder(TorchDispatchMode):
    """Notes hc:: calls by op and shapes; calls made inside another op are part of it."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple, OpCall] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if getattr(func, "namespace", "") == "hc":
            key = (func, str(tree_map_only(Tensor, _signature, (args, kwargs))))
            if key in self.found:
                self.found[key].calls += 1
            else:
                self.found[key] = OpCall(func, args, kwargs, out)
        return out


def _signature(tensor: Tensor) -> str:
    return f"{tensor.dtype}{list(tensor.shape)}"


def record_ops(workload: Workload, passes: bool) -> list[OpCall]:
    """The hc:: ops of one forward and backward, as written or after the graph passes.

    Dynamo compiles nothing while a dispatch mode is on, so the mode is entered inside its graph.
    """
    recorder = OpRecorder()

    def recorded(function: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            with recorder:
                return function(*args, **kwargs)

        return run

    def passes_only(graph_module: torch.fx.GraphModule, example_inputs: list) -> Callable:
        PassPipeline()(graph_module.graph)
        graph_module.recompile()
        return recorded(graph_module.forward)

    if passes:
        forward = torch.compile(workload.model, backend=passes_only)
    else:
        forward = recorded(workload.model)
    TrainingStep(workload, forward, around_backward=recorder).gradients()
    return list(recorder.found.values())


def mandatory_bytes(call: OpCall) -> tuple[float | None, float, str]:
    """C-units, bytes and where they come from: "catalog" or "tensors in and out"."""
    base, _, backward = call.name.removeprefix("hc::").partition(BACKWARD)
    backward = call.name.endswith(BACKWARD)
    row, shape = CATALOG.get(base), call.shape()
    if row is None or row.units is None or shape is None or not _regular(call, shape[1]):
        return None, float(_each_once((call.args, call.kwargs, call.output))), "tensors in and out"
    tokens, n, width = shape
    carried = isinstance(call.named.get("carried"), Tensor) and row.delayed_units is not None
    counted = row.delayed_units if carried else row.units
    assert counted is not None
    units = counted(n)[1 if backward else 0]
    if call.named.get("need_dx") is False:
        units -= n
    if base == "pre" and isinstance(call.named.get("g"), Tensor):
        units += n
    return units, units * tokens * width * call.named["x"].element_size(), "catalog"


def _regular(call: OpCall, n: int) -> bool:
    """Whether a call has the shapes that the catalog counts: square res, one view, one branch."""
    x, res = call.named["x"], call.named.get("res")
    thin = [call.named[k] for k in ("y", "du") if isinstance(call.named.get(k), Tensor)]
    square = not isinstance(res, Tensor) or res.shape[-2:] == (n, n)
    return square and all(t.dim() == x.dim() - 1 for t in thin)


def _each_once(values: Any) -> int:
    """Bytes of the tensors in a nest, each storage once, by its largest view."""
    sizes: dict[int, int] = {}
    for t in tree_leaves(values):
        if isinstance(t, Tensor) and t.numel():
            size = min(t.numel() * t.element_size(), t.untyped_storage().nbytes())
            at = t.untyped_storage().data_ptr()
            sizes[at] = max(size, sizes.get(at, 0))
    return sum(sizes.values())


def kernels_alone(call: Callable[[], object]) -> dict[str, float]:
    """Microseconds of every hc_ kernel that one call launches on a GPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        call()
        torch.cuda.synchronize()
    found: dict[str, float] = {}
    for event in profiler.key_averages():
        name = clean_name(event.key)
        if event.self_device_time_total and category(name) == "hyper-connection":
            found[name] = found.get(name, 0.0) + event.self_device_time_total
    return found


def op_rows(
    calls: list[OpCall], device: str, bandwidth: float, effort: Effort = QUICK
) -> list[dict[str, Any]]:
    """One row per op, shape and bytes, most time in a step first; runs every op alone."""
    rows: dict[tuple, dict[str, Any]] = {}
    with measuring(device), torch.no_grad():
        for call in calls:
            row = op_row(call, device, effort)
            key = (row["op"], str(row["shape"]), row["bytes"])
            known = rows.setdefault(key, row)
            if known is not row:
                merge(known, row)
    for row in rows.values():
        row |= against_floor(row["ms"], row["bytes"], bandwidth)
    return sorted(rows.values(), key=lambda row: -row["ms"] * row["calls"])


def op_row(call: OpCall, device: str, effort: Effort) -> dict[str, Any]:
    """What an op moves and how long it takes alone."""

    def alone() -> object:
        return call.func(*call.args, **call.kwargs)

    units, size, source = mandatory_bytes(call)
    shape = call.shape()
    return {
        "op": call.name,
        "calls": call.calls,
        "shape": list(shape) if shape else None,
        "units": units,
        "bytes": size,
        "bytes_from": source,
        "ms": measure(alone, device, effort).best_ms,
        "kernels": kernels_alone(alone) if device.startswith("cuda") else {},
    }


def merge(row: dict[str, Any], other: dict[str, Any]) -> None:
    """Add calls of the same shape whose other inputs differ: means weighted by calls."""
    total = row["calls"] + other["calls"]
    share, rest = row["calls"] / total, other["calls"] / total
    names = {**row["kernels"], **other["kernels"]}
    row["ms"] = share * row["ms"] + rest * other["ms"]
    row["kernels"] = {
        name: share * row["kernels"].get(name, 0.0) + rest * other["kernels"].get(name, 0.0)
        for name in names
    }
    row["calls"] = total


def against_floor(ms: float, size: float, bandwidth: float) -> dict[str, float]:
    """Achieved GB/s and × floor of a time."""
    return {"gb_per_s": size / ms / 1e6, "x_floor": ms / (size / bandwidth * 1e3)}


def share_trace(rows: list[dict[str, Any]], trace: Trace, bandwidth: float) -> None:
    """Add to each row its kernels' time in the trace, per call; None where it has no kernel.

    A kernel that several ops launch is shared out by calls × time alone.
    """
    whole: dict[str, float] = {}
    for row in rows:
        for name, micros in row["kernels"].items():
            whole[name] = whole.get(name, 0.0) + row["calls"] * micros
    for row in rows:
        found = {name: us for name, us in row["kernels"].items() if name in trace.kernels}
        if not found:
            row["trace_ms"] = row["trace_x_floor"] = None
            continue
        per_step = sum(
            trace.kernels[name].micros / trace.steps * row["calls"] * us / whole[name]
            for name, us in found.items()
        )
        row["trace_ms"] = per_step / row["calls"] / 1e3
        row["trace_x_floor"] = against_floor(row["trace_ms"], row["bytes"], bandwidth)["x_floor"]


def summary(rows: list[dict[str, Any]], trace: Trace, bandwidth: float) -> Mapping[str, Any]:
    """All hc:: ops of a step: floor, time alone, and the trace's own hc_ kernels on a GPU."""
    floor = sum(row["calls"] * row["bytes"] for row in rows) / bandwidth * 1e3
    alone = sum(row["calls"] * row["ms"] for row in rows)
    found: dict[str, Any] = {"floor_ms": floor, "alone_ms": alone, "trace_ms": None}
    if trace.device == "cuda":
        ours = trace.by_category().get("hyper-connection", (0.0, 0.0))
        found["trace_ms"] = ours[1] / 1e3
    for name in ("alone", "trace"):
        ms = found[f"{name}_ms"]
        found[f"{name}_x_floor"] = ms / floor if ms and floor else None
    return found
