"""HCConfig: the one record that says which hyper-connection a model has."""

from dataclasses import dataclass, field, replace
from typing import Any

from custom_ops.constraint import CHOICES, Constraint, check_count
from hc_compile.presets import PRESETS, Preset

IMPLEMENTATIONS = ("ops", "plain")
REDUCTIONS = ("mean", "sum", "head", "attention", "pre")
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
        reduce: "mean", "sum", "head", "attention" (Σ_i softmax_i(W x_i) ⊙ x_i) or, with a delayed
            preset, "pre" (that of the last sublayer); None takes the preset's.
        expand: "repeat", or "embedding" for a learned zero-initialised stream embedding on top.
        precision: of φ in the projection kernels, "bf16x2" (>= 16 mantissa bits), "bf16", "tf32"
            or "ieee"; None takes the preset's ("bf16x2").
        implementation: "ops" for the hc:: ops, "plain" for the same mathematics in plain torch.
        fractions: f, parts of the width that mix like streams; None takes the preset's (1).
        views: V inputs of the branch; u is then [..., V, C].
        branches: W outputs of the branch; y is then [..., W, C].
        proposals: P projections whose coefficients are averaged.
        norm: "rms" or "layer" (mean subtracted) before the projection; a gain is part of φ.
        mix_before_norm: coefficients from streams mixed by a learned [n·f, n·f] matrix.
        dropout: of the written streams, in training.

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
    fractions: int | None = None
    views: int = 1
    branches: int = 1
    proposals: int = 1
    norm: str | None = None
    mix_before_norm: bool = False
    dropout: float = 0.0
    constraint: Constraint = field(init=False, repr=False, compare=False, default=None)  # type: ignore[assignment]
    row: Preset = field(init=False, repr=False, compare=False, default=None)  # type: ignore[assignment]

    def __post_init__(self):
        row = self._row()
        check_count("dim", self.dim, least=1)
        streams = row.streams if self.streams is None else self.streams
        check_count("streams", streams, least=1)
        fractions = row.fractions if self.fractions is None else self.fractions
        check_count("fractions", fractions, least=1)
        if self.dim % fractions:
            raise ValueError(f"dim must be divisible by fractions = {fractions}, got {self.dim}")
        total = streams * fractions
        if row.max_streams is not None and total > row.max_streams:
            what = "streams" if fractions == 1 else "streams * fractions"
            raise ValueError(
                f"{what} must be <= {row.max_streams} for preset {row.name!r}, got {total}"
            )
        self._check_options(row, total)
        reduce = row.reduce if self.reduce is None else self.reduce
        _choice("reduce", reduce, REDUCTIONS)
        if reduce == "pre" and not row.delayed:
            raise ValueError(
                f"reduce must not be 'pre' for preset {row.name!r}, which hands no pre on"
            )
        _choice("expand", self.expand, EXPANSIONS)
        _choice("implementation", self.implementation, IMPLEMENTATIONS)
        object.__setattr__(self, "streams", streams)
        object.__setattr__(self, "fractions", fractions)
        object.__setattr__(self, "reduce", reduce)
        object.__setattr__(self, "row", row)
        changes = self._changes(row, total, self.views * fractions)
        object.__setattr__(self, "constraint", Constraint(**changes))

    def _changes(self, row: Preset, total: int, views: int) -> dict[str, Any]:
        """Fields of the constraint that differ from its defaults."""
        if self.iterations is not None:
            check_count("iterations", self.iterations, least=0)
        given = {
            name: getattr(self, name)
            for name in ("norm", "iterations", "norm_eps", "precision")
            if getattr(self, name) is not None
        }
        sizes = {"streams": total, "views": views, "branches": self.branches}
        return row.constraint | sizes | given

    def _check_options(self, row: Preset, total: int) -> None:
        for name in ("views", "branches", "proposals"):
            count = getattr(self, name)
            check_count(name, count, least=1)
            if count > 1 and total == 1:
                raise ValueError(f"{name} must be 1 with one stream, got {count}")
        several = (self.views, self.fractions or row.fractions)
        if row.delayed and several != (1, 1):
            raise ValueError(
                f"views and fractions must be 1 for the delayed preset {row.name!r}, whose "
                f"sublayers hand on the weights of one read, got {several[0]} and {several[1]}"
            )
        if self.norm not in (None, *CHOICES["norm"]):
            raise ValueError(f"norm must be one of {CHOICES['norm']}, got {self.norm!r}")
        if not isinstance(self.mix_before_norm, bool):
            kind = type(self.mix_before_norm).__name__
            raise TypeError(f"mix_before_norm must be a bool, got {kind}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        composed = self.norm == "layer" or self.proposals > 1 or self.mix_before_norm
        if composed and row.constraint.get("projection") == "static":
            raise ValueError(
                "norm, proposals and mix_before_norm must be left alone for the static preset "
                f"{row.name!r}, got {self.norm!r}, {self.proposals} and {self.mix_before_norm}"
            )

    @property
    def n(self) -> int:
        """Number of streams, resolved."""
        assert self.streams is not None
        return self.streams

    @property
    def width(self) -> int:
        """C/f, the width of one fraction."""
        assert self.fractions is not None
        return self.dim // self.fractions

    def _row(self) -> Preset:
        if isinstance(self.preset, Preset):
            return self.preset
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {tuple(PRESETS)}, got {self.preset!r}")
        return PRESETS[self.preset]

    def head_constraint(self) -> Constraint:
        """Constraint of the learned sigmoid head: only pre, no post and no res."""
        return replace(
            self.constraint,
            streams=self.n,
            views=1,
            branches=1,
            projection="flat",
            post="none",
            manifold="none",
        )


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
