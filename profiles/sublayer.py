"""One hyper-connected sublayer with an opaque branch, in every way to run it.

Everybody gets the same branch: a copy that no compiler sees into (2 C-units forward, 2 backward),
so that the rest is the cost of the hyper-connection alone. A chain runs several sublayers; its
figures are divided by their number, so a way that fuses across sublayers can show it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import hc_compile as hc
from custom_ops.catalog import CATALOG
from profiles.timing import Cost, Effort, measure, peak_growth, saved_bytes

BRANCH_UNITS = 2


@torch.library.custom_op("hc_bench::branch", mutates_args=())
def branch(u: Tensor) -> Tensor:
    """The stand-in for attention or an MLP: a copy."""
    return u.clone()


@branch.register_fake
def _(u: Tensor) -> Tensor:
    return torch.empty_like(u)


def _branch_backward(ctx, g: Tensor) -> Tensor:
    return torch.ops.hc_bench.branch(g)


branch.register_autograd(_branch_backward)


@dataclass(frozen=True)
class Shape:
    """Tokens, streams, width of a stream."""

    tokens: int
    width: int
    streams: int = 4

    @property
    def label(self) -> str:
        """As tables print it."""
        return f"{self.tokens}×{self.width}"


@dataclass(frozen=True)
class Way:
    """One way to run sublayers.

    Attributes:
        implementation: "ops", "plain", or the name of a peer.
        compile: None, "plain" (torch.compile) or "fused" (the hc_inductor backend).
        chain: sublayers run one after another.
        preset: the hyper-connection.
    """

    implementation: str
    compile: str | None = None
    chain: int = 1
    preset: str = "mhc"


WAYS: dict[str, Way] = {
    "eager PyTorch": Way("plain"),
    "compiled PyTorch": Way("plain", "plain"),
    "ours, eager": Way("ops"),
    "ours, torch.compile": Way("ops", "plain"),
    "ours, torch.compile, chain of 4": Way("ops", "plain", 4),
    "ours, hc.compile, chain of 4": Way("ops", "fused", 4),
    "ours, hc.compile, chain of 8": Way("ops", "fused", 8),
    "ours, v4.1, eager, chain of 4": Way("ops", None, 4, "mhc-v4.1"),
    "ours, v4.1, hc.compile, chain of 4": Way("ops", "fused", 4, "mhc-v4.1"),
    "ours, v4.1, hc.compile, chain of 8": Way("ops", "fused", 8, "mhc-v4.1"),
}


class Chain(nn.Module):
    """Sublayers one after another, each with coefficients of order 1 that depend on its input."""

    def __init__(self, way: Way, shape: Shape, iterations: int, device: str):
        super().__init__()
        cfg = hc.HCConfig(
            shape.width,
            shape.streams,
            way.preset,
            iterations=iterations,
            implementation=way.implementation,
        )
        self.sublayers = nn.ModuleList(
            hc.HyperConnection(cfg, k, torch.ops.hc_bench.branch, device=device)
            for k in range(way.chain)
        )
        self.apply(draw_coefficients)

    def forward(self, x: Tensor) -> Tensor:
        """Streams [T, n, C] -> the same."""
        for sublayer in self.sublayers:
            x = sublayer(x)
        return hc.resolve(x)


@torch.no_grad()
def draw_coefficients(module: nn.Module) -> None:
    """Random φ, α and b, with logits of order 1: an untrained φ is zero and would time zeros."""
    phi = getattr(module, "phi", None)
    if phi is not None:
        phi.normal_(0.0, phi.shape[-1] ** -0.5)
        module.alpha.normal_(1.0, 0.1)
        module.bias.normal_()


def build(way: Way, shape: Shape, iterations: int, device: str) -> nn.Module:
    """The module of one way, compiled if it says so.

    Raises:
        ImportError: when a peer is not installed.
    """
    if way.implementation in ("ops", "plain"):
        chain = Chain(way, shape, iterations, device)
        if way.compile == "fused":
            return hc.compile(chain, dynamic=False)  # type: ignore[return-value]
        return torch.compile(chain, dynamic=False) if way.compile else chain  # type: ignore
    from profiles.peers import PEERS

    return PEERS[way.implementation](shape, iterations, device)


@dataclass(frozen=True)
class SublayerCost:
    """A sublayer: forward without grad, train (forward, backward); memory over streams' bytes."""

    forward: Cost
    train: Cost
    peak_streams: float | None
    saved_streams: float


def steps(model: nn.Module, shape: Shape, dtype: torch.dtype, device: str) -> list[Callable]:
    """Calls without arguments: forward for training, forward alone without grad, whole step."""
    size = (shape.tokens, shape.streams, shape.width)
    x = torch.randn(size, dtype=dtype, device=device).requires_grad_()
    cotangent = torch.randn(size, dtype=dtype, device=device)
    leaves = [x, *model.parameters()]
    return [
        lambda: model(x),
        torch.no_grad()(lambda: model(x)),
        lambda: torch.autograd.grad(model(x), leaves, cotangent),
    ]


def measure_sublayer(
    way: Way, shape: Shape, dtype: torch.dtype, iterations: int, device: str, effort: Effort
) -> SublayerCost:
    """Build and measure one way at one shape; everything per sublayer."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = build(way, shape, iterations, device)
    keep, forward, train = steps(model, shape, dtype, device)
    costs = [per_sublayer(measure(call, device, effort), way.chain) for call in (train, forward)]
    streams = shape.tokens * shape.streams * shape.width * dtype.itemsize * way.chain
    peak = peak_growth(train, device)
    return SublayerCost(
        forward=costs[1],
        train=costs[0],
        peak_streams=None if peak is None else peak / streams,
        saved_streams=saved_bytes(keep, model.parameters()) / streams,
    )


def per_sublayer(cost: Cost, chain: int) -> Cost:
    """A chain's cost over its sublayers; the first call stays what it was."""
    graph = None if cost.graph_ms is None else cost.graph_ms / chain
    return Cost(cost.ms / chain, graph, cost.first_seconds)


def units(streams: int, delayed: bool = False) -> tuple[int, int]:
    """Mandatory C-units of a sublayer and its branch, fused at the boundary: forward, train."""
    row = CATALOG["post_pre"]
    counted = row.delayed_units if delayed else row.units
    assert counted is not None
    forward, backward = (int(units) for units in counted(streams))
    return forward + BRANCH_UNITS, forward + backward + 2 * BRANCH_UNITS
