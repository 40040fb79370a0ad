"""HCConfig: the one record that says which hyper-connection a model has."""

from dataclasses import dataclass, field, replace
from typing import Any

from custom_ops.constraint import Constraint, check_count
from hc_compile.presets import PRESETS, Preset

IMPLEMENTATIONS = ("ops", "plain")
REDUCTIONS = ("mean", "sum", "head")
EXPANSIONS = ("repeat", "embedding")


@dataclass(frozen=True)
class HCConfig:
    """Configuration of every hyper-connection of a model.

    Args:
        dim: C, width of one stream.
        streams: n; None takes the preset's (4, or 1 for "residual"). n = 1 is an exact residual.
        preset: name of a row of `hc.PRESETS`, or a `Preset` of your own.
        iterations: Sinkhorn iterations; None takes the preset's (20).
        norm_eps: eps of the RMS norm before the projection; None takes the preset's (1e-6).
        reduce: "mean", "sum" or "head"; None takes the preset's.
        expand: "repeat", or "embedding" for a learned zero-initialised stream embedding on top.
        precision: of φ in the projection kernels, "bf16x2" (>= 16 mantissa bits), "bf16", "tf32"
            or "ieee"; None takes the preset's ("bf16x2").
        implementation: "ops" for the hc:: ops, "plain" for the same mathematics in plain torch.

    Raises: ValueError or TypeError that name the argument, what it must be and what it was.
    """

    dim: int
    streams: int | None = None
    preset: str | Preset = "mhc"
    iterations: int | None = None
    norm_eps: float | None = None
    reduce: str | None = None
    expand: str = "repeat"
    precision: str | None = None
    implementation: str = "ops"
    constraint: Constraint = field(init=False, repr=False, compare=False, default=None)  # type: ignore[assignment]
    row: Preset = field(init=False, repr=False, compare=False, default=None)  # type: ignore[assignment]

    def __post_init__(self):
        row = self._row()
        check_count("dim", self.dim, least=1)
        streams = row.streams if self.streams is None else self.streams
        check_count("streams", streams, least=1)
        if row.max_streams is not None and streams > row.max_streams:
            raise ValueError(
                f"streams must be <= {row.max_streams} for preset {row.name!r}, got {streams}"
            )
        reduce = row.reduce if self.reduce is None else self.reduce
        _choice("reduce", reduce, REDUCTIONS)
        _choice("expand", self.expand, EXPANSIONS)
        _choice("implementation", self.implementation, IMPLEMENTATIONS)
        changes: dict[str, Any] = {"streams": streams} | row.constraint
        if self.iterations is not None:
            check_count("iterations", self.iterations, least=0)
            changes["iterations"] = self.iterations
        if self.norm_eps is not None:
            changes["norm_eps"] = self.norm_eps
        if self.precision is not None:
            changes["precision"] = self.precision
        object.__setattr__(self, "streams", streams)
        object.__setattr__(self, "reduce", reduce)
        object.__setattr__(self, "row", row)
        object.__setattr__(self, "constraint", Constraint(**changes))

    @property
    def n(self) -> int:
        """Number of streams, resolved."""
        return self.constraint.streams

    def _row(self) -> Preset:
        if isinstance(self.preset, Preset):
            return self.preset
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {tuple(PRESETS)}, got {self.preset!r}")
        return PRESETS[self.preset]

    def head_constraint(self) -> Constraint:
        """Constraint of the learned sigmoid head: only pre, no post and no res."""
        return replace(self.constraint, projection="flat", post="none", manifold="none")


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
