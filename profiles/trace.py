"""Read one torch.profiler trace: kernels or operators, launches, time and memory per step."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

TRACE_GLOB = "*.pt.trace.json*"
DEVICE_CATEGORIES = {"kernel", "gpu_memcpy", "gpu_memset"}
LAUNCH = re.compile(r"^(cuda|cu|hip)\w*Launch\w*Kernel")
# Operators that run no arithmetic and allocate nothing; a CPU trace lists them, a GPU runs none.
BOOKKEEPING = re.compile(
    r"^(aten::(_?unsafe_view|view|_reshape_alias|as_strided|select|slice|expand|expand_as|t|"
    r"transpose|permute|unsqueeze|squeeze|reshape|flatten|unflatten|split|chunk|unbind|narrow|"
    r"detach|alias|item|_local_scalar_dense|resolve_conj|resolve_neg|result_type|is_nonzero|"
    r"lift_fresh|empty|empty_like|empty_strided|resize_|set_)$"
    r"|detach$|\w+Backward\d*$|autograd::|torch::|TorchDynamo|Torch-Compiled|Pregraph|"
    r"AOTDispatcher|CompiledFunction|## |Optimizer|ProfilerStep|\[)"
)
# Taken whole: the copies that such an operator makes inside belong to it.
WHOLE = re.compile(r"^aten::(mm|addmm|bmm|baddbmm|_scaled_dot_product\w+)$")
# First match wins. The names are what Inductor, the vendor libraries and torch print.
CATEGORIES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("hyper-connection", re.compile(r"^(hc::|_?hc_)")),
    ("inductor", re.compile(r"^(triton_|cpp_fused)")),
    ("attention", re.compile(r"flash|fmha|scaled_dot_product|attention", re.I)),
    (
        "matmul",
        re.compile(r"gemm|cutlass|nvjet|cublas|::(mm|addmm|bmm|baddbmm|linear|matmul)$", re.I),
    ),
    ("copy", re.compile(r"memcpy|memset|copy_|::clone|::fill_|::zero_|::to$", re.I)),
    ("optimizer", re.compile(r"multi_tensor|adam|_foreach_|lerp_|addc(div|mul)_", re.I)),
)


@dataclass(frozen=True)
class Kernel:
    """One kernel (or, without a GPU, one leaf operator) summed over the traced steps."""

    name: str
    category: str
    calls: int
    micros: float


@dataclass(frozen=True)
class Trace:
    """What one trace says about a step.

    Attributes:
        path: the trace file.
        device: "cuda" when the trace holds device kernels, else "cpu".
        steps: profiler steps in the trace, at least 1.
        launches: kernels started per step; on CPU leaf operators that compute.
        busy_micros: summed kernel time per step.
        step_micros: mean wall time of a step under the profiler.
        peak_bytes: highest growth of allocated tensor memory within a step, None when the
            trace was taken without profile_memory.
        kernels: by name, numbers over all traced steps.
    """

    path: str
    device: str
    steps: int
    launches: float
    busy_micros: float
    step_micros: float
    peak_bytes: int | None
    kernels: dict[str, Kernel] = field(repr=False)

    def by_category(self) -> dict[str, tuple[float, float]]:
        """Category -> (calls, microseconds) per step, most time first."""
        calls: dict[str, int] = {}
        micros: dict[str, float] = {}
        for kernel in self.kernels.values():
            calls[kernel.category] = calls.get(kernel.category, 0) + kernel.calls
            micros[kernel.category] = micros.get(kernel.category, 0.0) + kernel.micros
        order = sorted(micros, key=lambda name: -micros[name])
        return {name: (calls[name] / self.steps, micros[name] / self.steps) for name in order}

    def to_json(self) -> dict:
        """The trace as plain data, kernels in order of time, the file by its folder and name."""
        path = "/".join(Path(self.path).parts[-2:])
        kernels = sorted(self.kernels.values(), key=lambda kernel: -kernel.micros)
        return {**asdict(self), "path": path, "kernels": [asdict(kernel) for kernel in kernels]}

    @classmethod
    def from_json(cls, data: dict) -> Trace:
        """The trace that `to_json` gave."""
        kernels = {kernel["name"]: Kernel(**kernel) for kernel in data["kernels"]}
        return cls(**{**data, "kernels": kernels})


def category(name: str) -> str:
    """The kernel's category by its name, "other" when nothing matches."""
    return next((label for label, pattern in CATEGORIES if pattern.search(name)), "other")


def clean_name(name: str) -> str:
    """Drop the numbers that Inductor adds per graph, so that names compare across traces."""
    name = re.sub(r"^graph_\d+_", "", name)
    if name.startswith(("triton_", "cpp_fused")):
        name = re.sub(r"_\d+$", "", name)
    return name


def find_trace(path: Path | str) -> Path:
    """The trace file itself, or the newest one in a folder.

    Raises:
        FileNotFoundError: when there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    found = sorted(path.glob(TRACE_GLOB), key=lambda file: file.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"path must be a trace or hold {TRACE_GLOB}, got {path}")
    return found[-1]


def load_events(path: Path | str) -> list[dict]:
    """The trace's events; reads .json and .json.gz."""
    path = find_trace(path)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return json.load(file)["traceEvents"]


def leaf_operators(events: Iterable[dict]) -> Iterator[tuple[str, float]]:
    """Name and own time of every computing operator that calls no other computing one.

    An operator inside one of ours is named "hc::sinkhorn > aten::div".
    """
    for event, micros, leaf, ours in self_times(events):
        if leaf and not BOOKKEEPING.match(event["name"]):
            inside = f"{ours} > " if ours and ours != event["name"] else ""
            yield inside + event["name"], micros


def self_times(events: Iterable[dict]) -> Iterator[tuple[dict, float, bool, str]]:
    """Each event with its time outside its children, whether it is a leaf, its hc:: ancestor.

    An operator whose only children are bookkeeping (views, allocations) is a leaf.
    """
    by_thread: dict[tuple, list[dict]] = {}
    for event in events:
        by_thread.setdefault((event["pid"], event["tid"]), []).append(event)
    for thread in by_thread.values():
        thread.sort(key=lambda event: (event["ts"], -event["dur"]))
        stack: list[list] = []  # [event, time of children, is leaf, hc:: ancestor]
        for event in [*thread, {"ts": float("inf"), "dur": 0, "name": ""}]:
            while stack and stack[-1][0]["ts"] + stack[-1][0]["dur"] <= event["ts"]:
                done, children, leaf, ours = stack.pop()
                yield done, done["dur"] - children, leaf, ours
            if stack and WHOLE.match(stack[-1][0]["name"]):
                continue
            if stack:
                stack[-1][1] += event["dur"]
                stack[-1][2] &= bool(BOOKKEEPING.match(event["name"]))
            ours = stack[-1][3] if stack else ""
            if event["name"].startswith("hc::"):
                ours = event["name"]
            stack.append([event, 0.0, True, ours])


def allocations(events: Iterable[dict], device_type: int) -> list[tuple[float, int]]:
    """(microseconds, bytes allocated in all) after every allocation and release, in order."""
    return sorted(
        (event["ts"], event["args"]["Total Allocated"])
        for event in events
        if event.get("name") == "[memory]" and event["args"].get("Device Type") == device_type
    )


def profiler_steps(events: Iterable[dict]) -> list[dict]:
    """The spans of the profiler's steps."""
    return [
        event
        for event in events
        if event.get("ph") == "X"
        and "dur" in event
        and event.get("cat") == "user_annotation"
        and event["name"].startswith("ProfilerStep#")
    ]


def peak_growth(events: list[dict], steps: list[dict], device_type: int) -> int | None:
    """Highest rise of allocated bytes above the level at a step's start, over all steps."""
    marks = allocations(events, device_type)
    peak = None
    for step in steps:
        level = next((total for ts, total in reversed(marks) if ts < step["ts"]), 0)
        inside = [total for ts, total in marks if 0 <= ts - step["ts"] <= step["dur"]]
        if inside:
            peak = max(peak or 0, int(max(inside) - level))
    return peak


def read_trace(path: Path | str) -> Trace:
    """Summarise a trace written by torch.profiler.

    Args:
        path: a .json or .json.gz trace, or a folder whose newest trace is read.
    Returns: a `Trace`; kernels when the trace has device events, else leaf CPU operators.
    Raises:
        FileNotFoundError: when there is no trace.
    """
    path = find_trace(path)
    events = load_events(path)
    whole = [event for event in events if event.get("ph") == "X" and "dur" in event]
    steps = profiler_steps(whole)
    count = max(len(steps), 1)
    device = [event for event in whole if event.get("cat") in DEVICE_CATEGORIES]
    if device:
        work = [(event["name"], event["dur"]) for event in device]
        starts = sum(bool(LAUNCH.match(event["name"])) for event in whole)
    else:
        work = list(leaf_operators(event for event in whole if event.get("cat") == "cpu_op"))
        starts = len(work)
    kernels: dict[str, Kernel] = {}
    for raw, micros in work:
        name = clean_name(raw)
        old = kernels.get(name, Kernel(name, category(name), 0, 0.0))
        kernels[name] = Kernel(name, old.category, old.calls + 1, old.micros + micros)
    return Trace(
        path=str(path),
        device="cuda" if device else "cpu",
        steps=count,
        launches=starts / count,
        busy_micros=sum(kernel.micros for kernel in kernels.values()) / count,
        step_micros=sum(step["dur"] for step in steps) / count,
        peak_bytes=peak_growth(events, steps, 1 if device else 0),
        kernels=kernels,
    )
