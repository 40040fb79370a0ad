"""Measure every op of the catalog against its reference: eager, compiled, ours."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from custom_ops.catalog import CATALOG, ROWS, Row
from profiles.sublayer import Shape
from profiles.timing import Cost, Effort, floor_ms, measure

DIRECTIONS = ("forward", "backward")
SEAMS = 64  # with φ and its halves of 2 MB and more each, several times an L2


# The boundary with delayed pre: one pass over the streams in each direction.
DELAYED = replace(
    CATALOG["post_pre"],
    name="post_pre, delayed",
    variants={"delayed": {}},
    units=CATALOG["post_pre"].delayed_units,
)


@dataclass
class Budget:
    """Seconds that compiling slow references may take; once spent, the rest is skipped."""

    seconds: float
    spent: float = 0.0

    @property
    def left(self) -> bool:
        """Whether another compilation may start."""
        return self.spent < self.seconds


def variant_of(row: Row) -> str:
    """The variant that is timed: mHC's own where there are several."""
    return "sinkhorn" if "sinkhorn" in row.variants else next(iter(row.variants))


def call_of(row: Row) -> Callable:
    """The timed variant's call; a boundary has the ghosts that it has in a chain."""
    call = partial(row.call, variant_of(row))
    if row.call is not CATALOG["post_pre"].call:
        return call
    return lambda x, *rest: call(x, *rest, ghost=x.new_zeros(()).expand(x.shape))


def device_inputs(row: Row, shape: Shape, dtype: torch.dtype, device: str) -> list[Tensor]:
    """The row's random inputs, drawn on the device, as leaves that want gradients."""
    generator = torch.Generator(device).manual_seed(0)
    with torch.device(device):
        drawn = row.inputs(variant_of(row), shape.tokens, shape.streams, shape.width, generator)
    return [
        t.to(dtype if k in row.streams else torch.float32).requires_grad_()
        for k, t in enumerate(drawn)
    ]


def calls(function: Callable, inputs: list[Tensor]) -> Iterator[tuple[str, Callable]]:
    """The forward, then the backward over one kept graph, as calls without arguments."""
    yield "forward", lambda: function(*inputs)
    outputs = as_tuple(function(*inputs))
    live = [o for o in outputs if o.requires_grad]
    cotangents = [torch.randn_like(o) for o in live]
    yield (
        "backward",
        lambda: torch.autograd.grad(
            live, inputs, cotangents, retain_graph=True, allow_unused=True
        ),
    )


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One output or several, as a tuple."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def functions(row: Row, budget: Budget | None) -> dict[str, Callable]:
    """Ways to compute a row; the compiled reference while there is budget left for it."""
    variant = variant_of(row)
    found: dict[str, Callable] = {
        "ours": call_of(row),
        "eager": partial(row.reference, variant),
    }
    if budget is not None and budget.left:
        reference = row.reference
        found["compiled"] = torch.compile(lambda *t: reference(variant, *t), dynamic=False)
    return found


def measure_row(
    row: Row,
    shape: Shape,
    dtype: torch.dtype,
    device: str,
    effort: Effort,
    bandwidth: float,
    budget: Budget | None = None,
) -> list[dict]:
    """One record per way and direction of an op at a shape; × floor where streams move."""
    torch.compiler.reset()
    inputs = device_inputs(row, shape, dtype, device)
    records = []
    for way, function in functions(row, budget).items():
        began = time.perf_counter()
        for direction, call in calls(function, inputs):
            cost = measure(call, device, effort)
            records.append(
                {"op": row.name, "direction": direction, "way": way}
                | {"tokens": shape.tokens, "width": shape.width, "streams": shape.streams}
                | traffic(row, direction, shape, dtype, cost, bandwidth)
            )
        if way == "compiled" and budget is not None:
            budget.spent += time.perf_counter() - began
    return records


@torch.no_grad()
def measure_seam(shape: Shape, dtype: torch.dtype, device: str, effort: Effort) -> dict:
    """A boundary of sublayers without gradients, in microseconds.

    Several run one after another, each with tensors of its own: in a model the weights of a
    branch push the next boundary's φ out of L2, so here the next boundaries' own do.
    """
    row = CATALOG["post_pre"]
    count = SEAMS if device.startswith("cuda") else 1
    several = [device_inputs(row, shape, dtype, device) for _ in range(count)]

    def run() -> None:
        for inputs in several:
            row.call(variant_of(row), *inputs)

    cost = measure(run, device, effort)
    return {
        "tokens": shape.tokens,
        "width": shape.width,
        "streams": shape.streams,
        "us": cost.ms / count * 1e3,
        "graph_us": None if cost.graph_ms is None else cost.graph_ms / count * 1e3,
    }


def traffic(
    row: Row, direction: str, shape: Shape, dtype: torch.dtype, cost: Cost, bandwidth: float
) -> dict:
    """A cost as plain data, with GB/s of mandatory bytes and × floor of the graph's time."""
    record = {
        "ms": cost.ms,
        "graph_ms": cost.graph_ms,
        "first_seconds": cost.first_seconds,
        "units": None,
        "gb_per_s": None,
        "x_floor": None,
    }
    if row.units is None:
        return record
    moved = row.units(shape.streams)[DIRECTIONS.index(direction)]
    floor = floor_ms(moved, shape.tokens, shape.width, dtype.itemsize, bandwidth)
    return record | {
        "units": moved,
        "gb_per_s": bandwidth * floor / cost.best_ms / 1e9,
        "x_floor": cost.best_ms / floor,
    }


def streaming_rows() -> list[Row]:
    """Ops that move streams, the cheapest to compile first."""
    order = ("aggregate", "post", "project", "pre", "post_pre")
    known = [CATALOG[name] for name in order if name in CATALOG]
    return [*known, DELAYED] + [r for r in ROWS if r.units is not None and r.name not in order]


def small_rows() -> list[Row]:
    """Ops on the n × n matrices and coefficients of every token."""
    return [row for row in ROWS if row.units is None]
