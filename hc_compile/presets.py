"""The variants as data: one row a preset, naming the parts of the one implementation.

Canonical orientation: res is applied [out, in]; a row that reproduces a transposed
implementation sets `transpose` in its constraint. Sources: HC = arXiv 2409.19606, mHC = arXiv
2512.24880, mHC-lite = arXiv 2601.05732, DeepSeek-V4, V4.1 and HY-V4 as their public model code.
"""

from dataclasses import dataclass, field
from typing import Any

from custom_ops.constraint import DEEPSEEK_V4, DYNAMIC_HC


@dataclass(frozen=True)
class Preset:
    """One variant of hyper-connections, fully pinned.

    constraint: fields of `custom_ops.constraint.Constraint` that differ from its defaults.
    bias_init: rule of `hc_compile.initial` for b. phi_std: standard deviation of φ, 0 for zeros.
    alpha: initial gates; alpha_index says which of them gates pre, post and res.
    reduce: "mean", "sum", "head" (learned sigmoid head) or "pre" (that of the last sublayer).
    delayed: a sublayer reads with the pre of the one before, the first reads stream 0.
    streams, fractions: defaults; max_streams: limit of their product.
    equals_residual: whether the network equals its plain residual twin at initialisation.
    """

    name: str
    source: str
    constraint: dict[str, Any] = field(default_factory=dict, hash=False)
    bias_init: str = "mhc"
    phi_std: float = 0.0
    alpha: tuple[float, ...] = (0.01, 0.01, 0.01)
    alpha_index: tuple[int, int, int] = (0, 1, 2)
    reduce: str = "mean"
    streams: int = 4
    fractions: int = 1
    max_streams: int | None = None
    equals_residual: bool = True
    delayed: bool = False


_ROWS = (
    Preset("residual", "x + F(x)", streams=1, max_streams=1),
    Preset(
        "shc",
        "HC eq. 1–4, static",
        DYNAMIC_HC | {"projection": "static"},
        bias_init="hc",
        alpha=(),
    ),
    Preset(
        "dhc",
        "HC eq. 5–9, dynamic, tanh, RMSNorm per stream",
        DYNAMIC_HC | {"squash": "tanh"},
        bias_init="hc",
        alpha=(0.01, 0.01),
        alpha_index=(0, 1, 0),
    ),
    Preset(
        "dhc-no-tanh",
        "HC eq. 5–9 without tanh",
        DYNAMIC_HC,
        bias_init="hc",
        alpha=(0.01, 0.01),
        alpha_index=(0, 1, 0),
    ),
    Preset(
        "fhc",
        "Frac-connections, arXiv 2503.14125: HC over fractions of one stream's width",
        DYNAMIC_HC | {"squash": "tanh"},
        bias_init="hc",
        alpha=(0.01, 0.01),
        alpha_index=(0, 1, 0),
        streams=1,
        fractions=2,
    ),
    Preset("mhc", "mHC eq. 3–9: columns first, rows last, 20 iterations"),
    Preset(
        "mhc-log", "mHC eq. 3–9 with the Sinkhorn iteration in the log domain", {"start": "log"}
    ),
    Preset(
        "mhc-v4",
        "DeepSeek-V4: row softmax + 1e-6, columns, then 19 × (rows, columns), transposed",
        DEEPSEEK_V4,
        bias_init="zeros",
        phi_std=0.02,
        alpha=(1.0, 1.0, 1.0),
        reduce="head",
        equals_residual=False,
    ),
    Preset(
        "mhc-v4.1",
        "DeepSeek-V4.1: as V4, read with the pre of the sublayer before; the last pre reduces",
        DEEPSEEK_V4 | {"norm_eps": 1e-20},
        bias_init="zeros",
        phi_std=0.02,
        alpha=(1.0, 1.0, 1.0),
        reduce="pre",
        equals_residual=False,
        delayed=True,
    ),
    Preset(
        "mhc-lite",
        "mHC-lite: convex combination of the n! permutations",
        {"manifold": "permutation"},
        bias_init="mhc-lite",
        max_streams=5,
    ),
    Preset(
        "mhc-kron",
        "KromHC, arXiv 2601.21579: Kronecker product of log2(n) doubly stochastic 2 × 2 matrices",
        {"manifold": "kronecker"},
        bias_init="mhc-kron",
    ),
    Preset(
        "mhc-ortho",
        "orthostochastic: res = O∘O, O the Newton–Schulz polar factor",
        {"manifold": "newton-schulz"},
        bias_init="mhc-ortho",
    ),
    Preset(
        "ihc",
        "HY-V4: res = I, only pre and post learned",
        {"pre_eps": 1e-6, "post_eps": 1e-6, "manifold": "identity"},
        bias_init="ihc",
        phi_std=0.02,
        alpha=(0.01, 0.01),
        alpha_index=(0, 1, 1),
        equals_residual=False,
    ),
)

PRESETS: dict[str, Preset] = {row.name: row for row in _ROWS}
