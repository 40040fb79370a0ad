"""What turns a projection into coefficients: one frozen record, no tensors.

Legend (the whole project): T tokens (all leading dimensions), n streams, C width of a stream,
K = n·C, V input views, W branch outputs, M coefficients a token.
"""

import json
import math
from dataclasses import dataclass, field, fields
from functools import lru_cache

CHOICES = {
    "projection": ("flat", "stream", "static"),
    "norm": ("rms", "layer"),
    "norm_form": ("inside", "outside"),
    "squash": ("none", "tanh"),
    "pre": ("sigmoid", "sigmoid-sum", "softmax", "linear", "none"),
    "post": ("sigmoid", "softmax", "linear", "none"),
    "manifold": (
        "sinkhorn",
        "newton-schulz",
        "permutation",
        "kronecker",
        "identity",
        "linear",
        "none",
    ),
    "start": ("exp", "exp-rowmax", "exp-globalmax", "softmax", "abs", "log"),
    "first": ("row", "column"),
    "denominator": ("add", "max"),
    "precision": ("bf16x2", "bf16", "tf32", "ieee"),
    "read_norm": ("none", "rms", "layer"),
}
MAX_PERMUTATION_STREAMS = 5

# Fields of published recipes that differ from the defaults of Constraint.
DYNAMIC_HC = {
    "projection": "stream",
    "pre": "linear",
    "post": "linear",
    "post_scale": 1.0,
    "manifold": "linear",
    "transpose": True,
}
DEEPSEEK_V4 = {
    "pre_eps": 1e-6,
    "start": "softmax",
    "first": "row",
    "denominator": "add",
    "eps": 1e-6,
    "transpose": True,
}

# (a, b, c) of X <- aX + (bA + cA²)X with A = XXᵀ; the last two finish the convergence.
NEWTON_SCHULZ_SCHEDULE = (
    (7.2086, -15.5131, 9.0178),
    (3.9623, -2.5813, 0.4542),
    (3.9466, -2.5765, 0.4544),
    (3.8991, -2.5671, 0.4566),
    (3.7186, -2.5308, 0.4653),
    (3.1390, -2.3073, 0.4733),
    (2.1715, -1.5246, 0.3885),
    (1.8648, -1.2224, 0.3577),
    (15 / 8, -10 / 8, 3 / 8),
    (15 / 8, -10 / 8, 3 / 8),
)


@dataclass(frozen=True)
class Constraint:
    """How `hc::constrain` makes pre, post and res from p = φx and ss = Σx².

    r  = rsqrt(ss/K + norm_eps)   (norm_form "outside": 1/(sqrt(ss/K) + norm_eps))
    z  = α ⊙ squash(r·p) + b      (projection "static": z = b)
    norm "layer": p and ss are those of x less its mean; the composed functions make them.
    pre = act(z_pre) + pre_eps, post = post_scale·act(z_post) + post_eps,
    res = manifold(z_res / temperature), transposed if `transpose`, always applied [out, in].

    Order of the M coefficients in z and b: [pre V·n | post W·n | res]; res holds n² logits
    row-major, n! for "permutation", one for each of the log2(n) factors of "kronecker" (the 2 × 2
    matrices [[a, 1-a], [1-a, a]], a = σ), none for "identity" and "none". With "stream" the
    projected row of stream j is [pre_j (V) | post_j (W) | res_j: (n)].

    precision is that of φ in the forward product of the kernels: at least 16 mantissa bits by
    default, 8 for "bf16", 11 for "tf32", plain fp32 for "ieee"; plain torch always has fp32.
    read_norm and read_eps: the norm that the read of `hc::pre` ends with (see read_norm.py).
    """

    streams: int
    views: int = 1
    branches: int = 1
    projection: str = "flat"
    norm: str = "rms"
    norm_eps: float = 1e-6
    norm_form: str = "inside"
    squash: str = "none"
    pre: str = "sigmoid"
    pre_eps: float = 0.0
    post: str = "sigmoid"
    post_scale: float = 2.0
    post_eps: float = 0.0
    manifold: str = "sinkhorn"
    temperature: float = 1.0
    transpose: bool = False
    iterations: int = 20
    start: str = "exp-globalmax"
    first: str = "column"
    denominator: str = "max"
    eps: float = 1e-30
    schedule: tuple[tuple[float, float, float], ...] = NEWTON_SCHULZ_SCHEDULE
    precision: str = "bf16x2"
    read_norm: str = "none"
    read_eps: float = 1e-6
    spec: str = field(init=False, repr=False, compare=False, default="")

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        for name in ("streams", "views", "branches"):
            check_count(name, getattr(self, name), least=1)
        check_count("iterations", self.iterations, least=0)
        if self.temperature <= 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")
        if self.manifold == "permutation" and self.streams > MAX_PERMUTATION_STREAMS:
            raise ValueError(
                f"streams must be <= {MAX_PERMUTATION_STREAMS} for the permutation manifold "
                f"({self.streams}! = {math.factorial(self.streams)} logits), got {self.streams}"
            )
        if self.start == "softmax" and self.first != "row":
            raise ValueError(f"first must be 'row' when start is 'softmax', got {self.first!r}")
        if not takes_streams(self.manifold, self.streams):
            raise ValueError(
                f"streams must be a power of two for the {self.manifold} manifold, "
                f"got {self.streams}"
            )
        if self.projection == "stream" and self.manifold in ("permutation", "kronecker"):
            raise ValueError(f"manifold must not be {self.manifold!r} with projection 'stream'")
        if self.read_norm != "none" and self.views > 1:
            raise ValueError(f"views must be 1 with a read_norm, got {self.views}")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        changed = {
            f.name: values[f.name] for f in fields(self) if f.init and values[f.name] != f.default
        }
        object.__setattr__(self, "spec", json.dumps(changed, separators=(",", ":")))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Number of pre, post and res coefficients a token."""
        n = self.streams
        res = {
            "permutation": math.factorial(n) if self.manifold == "permutation" else 0,
            "kronecker": n.bit_length() - 1,
            "identity": 0,
            "none": 0,
        }.get(self.manifold, n * n)
        pre = 0 if self.pre == "none" else self.views * n
        post = 0 if self.post == "none" else self.branches * n
        return pre, post, res

    @property
    def total(self) -> int:
        """M, the number of coefficients a token."""
        return sum(self.sizes)

    @property
    def rows(self) -> int:
        """Rows of φ: M for a flat projection, M/n for one per stream, 0 if static."""
        if self.projection == "static":
            return 0
        return self.total // self.streams if self.projection == "stream" else self.total

    def norm_width(self, dim: int) -> int:
        """Number of elements under the RMS norm: n·C flat, C per stream."""
        return dim if self.projection == "stream" else self.streams * dim


def takes_streams(manifold: str, streams: int) -> bool:
    """Whether a manifold is defined for so many streams."""
    if manifold == "permutation":
        return streams <= MAX_PERMUTATION_STREAMS
    return manifold != "kronecker" or streams & (streams - 1) == 0


def check_count(name: str, value: int, least: int) -> None:
    """Raise unless `value` is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")


@lru_cache(maxsize=1024)
def parse(spec: str) -> Constraint:
    """The Constraint that `Constraint.spec` describes."""
    values = json.loads(spec)
    if "schedule" in values:
        values["schedule"] = tuple(tuple(step) for step in values["schedule"])
    return Constraint(**values)
