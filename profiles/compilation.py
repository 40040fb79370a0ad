"""What torch.compile did: graphs, graph breaks, recompilations, and where its time went."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch._dynamo.utils as dynamo

PHASES = {
    "dynamo": "tracing Python into a graph, guards",
    "aot": "autograd, functionalisation, partition",
    "inductor": "lowering, fusion, code generation",
    "kernels": "waiting for Triton (on a CPU: the C++ compiler)",
}
FRAME = re.compile(r"^!?\d+/(\d+)")


@dataclass
class Compilation:
    """What was compiled inside a `compilation()` block.

    Attributes:
        graphs: graphs that Dynamo gave to the backend.
        breaks: reason -> number of graph breaks.
        recompiles: reasons, one for each time a frame was compiled again.
        phases: own seconds of each of PHASES; forward and backward together.
    """

    graphs: int = 0
    breaks: dict[str, int] = field(default_factory=dict)
    recompiles: list[str] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain data, counts beside the reasons."""
        return {
            "graphs": self.graphs,
            "graph_breaks": sum(self.breaks.values()),
            "graph_break_reasons": self.breaks,
            "recompiles": len(self.recompiles),
            "recompile_reasons": self.recompiles,
            "phases": self.phases,
        }


@contextmanager
def compilation() -> Iterator[Compilation]:
    """Collect what is compiled inside; Dynamo's counters are cleared on entry."""
    found = Compilation()
    dynamo.counters.clear()
    dynamo.clear_compilation_metrics()
    yield found
    found.graphs = dynamo.counters["stats"]["unique_graphs"]
    found.breaks = {first_line(why): n for why, n in dynamo.counters["graph_break"].items()}
    metrics = dynamo.get_compilation_metrics()
    found.recompiles = [first_line(m.recompile_reason or "unknown") for m in metrics if again(m)]
    found.phases = phases(metrics)


def first_line(reason: str) -> str:
    """A reason without its explanation and stack."""
    return reason.strip().splitlines()[0] if reason.strip() else "unknown"


def again(metric: Any) -> bool:
    """Whether a forward compilation was of a frame compiled before: "frame/1" and later."""
    match = FRAME.match(str(metric.compile_id))
    return metric.is_forward is not False and bool(match) and int(match[1]) > 0


def phases(metrics: list[Any]) -> dict[str, float]:
    """Own seconds of each phase: the cumulative times are nested, so each loses what it holds."""

    def seconds(metric: Any, name: str) -> float:
        return (getattr(metric, name, None) or 0) / 1e6

    total = dict.fromkeys(PHASES, 0.0)
    for metric in metrics:
        dynamo_s = seconds(metric, "dynamo_cumulative_compile_time_us")
        aot = seconds(metric, "aot_autograd_cumulative_compile_time_us")
        aot += seconds(metric, "backward_cumulative_compile_time_us")
        inductor = seconds(metric, "inductor_cumulative_compile_time_us")
        kernels = seconds(metric, "triton_compile_time_us")
        total["dynamo"] += max(dynamo_s - aot, 0.0)
        total["aot"] += max(aot - inductor, 0.0)
        total["inductor"] += max(inductor - kernels, 0.0)
        total["kernels"] += kernels
    return {name: round(value, 4) for name, value in total.items()}
