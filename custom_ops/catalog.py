"""One row an op: how to call it, its reference, inputs, mandatory bytes, equation.

Tests, benchmarks and profiles iterate this table; a new op is a file and a row here.
Equations are numbered as in mHC, arXiv 2512.24880.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from custom_ops import reference
from custom_ops.constraint import Constraint, takes_streams
from custom_ops.variants import CONSTRAINTS, DELAYED, SCHEDULES, SINKHORN_OPTIONS

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Row:
    """An op of the catalog.

    inputs(variant, T, n, C, generator): its tensors in float64, in the order of `call`.
    call, reference(variant, *tensors): the differentiable outputs, of the op and of the oracle.
    streams: indices of the inputs that have the stream dtype; the others are fp32 coefficients.
    units(n): C-units that must move, (forward, backward); None where no streams move.
    delayed_units(n): the same where the read is carried, see pre.py; None where nothing can be.
    """

    name: str
    equation: str
    inputs: Callable[..., Tensors]
    call: Callable[..., Tensors]
    reference: Callable[..., Tensors]
    streams: tuple[int, ...]
    units: Callable[[int], tuple[float, float]] | None
    variants: dict[str, dict] = field(default_factory=lambda: {"": {}})
    delayed_units: Callable[[int], tuple[float, float]] | None = None

    def takes(self, variant: str, most: int) -> int:
        """The largest number of streams up to `most` that a variant is defined for."""
        kind = CONSTRAINTS.get(variant, {}).get("manifold", "")
        return next(n for n in range(most, 0, -1) if takes_streams(kind, n))


def _draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _constraint(variant: str, n: int) -> Constraint:
    return Constraint(n, **CONSTRAINTS[variant])


def _bias(c: Constraint, generator: torch.Generator) -> Tensor:
    """b of order 1; away from singular matrices, where Newton–Schulz amplifies any rounding."""
    bias = _draw(generator, c.total)
    if c.manifold == "newton-schulz":
        bias[-c.sizes[2] :] += 4 * torch.eye(c.streams, dtype=bias.dtype).flatten()
    return bias


def _parameters(c: Constraint, width: int, generator: torch.Generator) -> Tensors:
    """φ, α and b with logits of order 1 (b alone if static), and the read norm's parameters."""
    bias = _bias(c, generator)
    if c.projection == "static":
        return (bias,)
    phi = _draw(generator, c.rows, c.norm_width(width)) / c.norm_width(width) ** 0.5
    norm = [_draw(generator, width) for _ in range(("none", "rms", "layer").index(c.read_norm))]
    return phi, 1 + 0.1 * _draw(generator, 3), bias, *norm


def _carried(variant: str, tokens: int, n: int, generator: torch.Generator) -> Tensors:
    return (_draw(generator, tokens, n),) if variant in DELAYED else ()


def _split(variant: str, parameters: Tensors) -> tuple[tuple, tuple]:
    """(φ, α, b), None where static, and (weight, shift, carried) of the read."""
    carried = parameters[-1] if variant in DELAYED else None
    parameters = parameters[:-1] if variant in DELAYED else parameters
    if len(parameters) == 1:
        return (None, None, *parameters), (None, None, carried)
    return parameters[:3], (*(*parameters[3:], None, None)[:2], carried)


def _write_inputs(c: Constraint, tokens: int, width: int, generator) -> Tensors:
    n = c.streams
    branch = (c.branches,) if c.branches > 1 else ()
    return (
        _draw(generator, tokens, n, width),
        _draw(generator, tokens, *branch, width),
        _draw(generator, tokens, *branch, n),
        torch.softmax(_draw(generator, tokens, n, n), -1),
    )


def _pre_inputs(variant, tokens, n, width, generator) -> Tensors:
    c = _constraint(variant, n)
    x, parameters = _draw(generator, tokens, n, width), _parameters(c, width, generator)
    return x, *parameters, *_carried(variant, tokens, n, generator)


def _post_inputs(variant, tokens, n, width, generator) -> Tensors:
    c = Constraint(n, branches=2 if variant == "branches" else 1)
    x, y, post, res = _write_inputs(c, tokens, width, generator)
    if variant == "of one stream":
        return x[:, :1], y, post, res[..., :1]
    if variant == "to one stream":
        return x, y, post[:, :1], res[:, :1]
    return x, y, post, res


def _post_pre_inputs(variant, tokens, n, width, generator) -> Tensors:
    c = _constraint(variant, n)
    write = _write_inputs(c, tokens, width, generator)
    parameters = _parameters(c, width, generator)
    return *write, *parameters, *_carried(variant, tokens, n, generator)


def _constrain_inputs(variant, tokens, n, width, generator) -> Tensors:
    c = _constraint(variant, n)
    rows = (n,) if c.projection == "stream" else ()
    p = _draw(generator, tokens, *rows, c.rows)
    ss = width * _draw(generator, tokens, *rows).square() + 0.1
    return p, ss, 1 + 0.1 * _draw(generator, 3), _bias(c, generator)


def _call_pre(variant, x, *parameters):
    c = _constraint(variant, x.shape[-2])
    parameters, read = _split(variant, parameters)
    return torch.ops.hc.pre(x, *parameters, c.spec, False, *read)[:4]


def _call_post_pre(variant, x, y, post, res, *parameters, ghost=None):
    """Streams, u and coefficients; with a ghost of x, as in a chain, the next for the streams."""
    c = _constraint(variant, x.shape[-2])
    parameters, read = _split(variant, parameters)
    given = (x, y, post, res, *parameters, c.spec, ghost, ghost is not None, *read)
    made = torch.ops.hc.post_pre(*given)
    return made[:5] if ghost is None else (*made[1:5], made[7])


def _streams_of(variant: str, p: Tensor, bias: Tensor) -> int:
    c = CONSTRAINTS[variant]
    for n in range(1, 17):
        if not takes_streams(c.get("manifold", ""), n):
            continue
        if Constraint(n, **c).total == bias.shape[0]:
            return n
    raise ValueError(f"bias must be [M] for some n <= 16, got {list(bias.shape)}")


def _call_constrain(variant, p, ss, alpha, bias):
    c = _constraint(variant, _streams_of(variant, p, bias))
    return torch.ops.hc.constrain(p, ss, alpha, bias, 8, c.spec)


def _reference_constrain(variant, p, ss, alpha, bias):
    c = _constraint(variant, _streams_of(variant, p, bias))
    return reference.constrain(p, ss, alpha, bias, 8, c)


def _reference_pre(variant, x, *parameters):
    (phi, alpha, bias), read = _split(variant, parameters)
    return reference.pre(x, phi, alpha, bias, _constraint(variant, x.shape[-2]), *read)


def _reference_post_pre(variant, x, y, post, res, *parameters):
    c = _constraint(variant, x.shape[-2])
    (phi, alpha, bias), read = _split(variant, parameters)
    return reference.post_pre(x, y, post, res, phi, alpha, bias, c, *read)


def _small_inputs(variant, tokens, n, width, generator) -> Tensors:
    return (_draw(generator, tokens, n, n),)


def _regular_inputs(variant, tokens, n, width, generator) -> Tensors:
    return (4 * torch.eye(n, dtype=torch.float64) + _draw(generator, tokens, n, n),)


def _flat_schedule(variant: str) -> list[float]:
    return [value for step in SCHEDULES[variant] for value in step]


ROWS = (
    Row(
        "sinkhorn",
        "eq. 9",
        _small_inputs,
        lambda variant, m: (torch.ops.hc.sinkhorn(m, *SINKHORN_OPTIONS[variant]),),
        lambda variant, m: (reference.sinkhorn(m, *SINKHORN_OPTIONS[variant]),),
        (),
        None,
        {name: {} for name in SINKHORN_OPTIONS},
    ),
    Row(
        "newton_schulz",
        "polar factor",
        _regular_inputs,
        lambda variant, m: (torch.ops.hc.newton_schulz(m, _flat_schedule(variant), 1e-7),),
        lambda variant, m: (reference.newton_schulz(m, SCHEDULES[variant], 1e-7),),
        (),
        None,
        {name: {} for name in SCHEDULES},
    ),
    Row(
        "project",
        "eq. 5",
        lambda variant, tokens, n, width, generator: (
            _draw(generator, tokens, n, width),
            _draw(generator, n * n + 2 * n, width if variant else n * width) / width**0.5,
        ),
        lambda variant, x, phi: torch.ops.hc.project(x, phi, bool(variant)),
        lambda variant, x, phi: reference.project(x, phi, bool(variant)),
        (0,),
        lambda n: (n, 2 * n),
        {"": {}, "stream": {}},
    ),
    Row(
        "constrain",
        "eq. 7-8",
        _constrain_inputs,
        _call_constrain,
        _reference_constrain,
        (),
        None,
        {name: c for name, c in CONSTRAINTS.items() if name != "static" and "read_norm" not in c},
    ),
    Row(
        "aggregate",
        "eq. 3",
        lambda variant, tokens, n, width, generator: (
            _draw(generator, tokens, n, width),
            _draw(generator, tokens, *((2,) if variant else ()), n),
        ),
        lambda variant, x, pre: (torch.ops.hc.aggregate(x, pre),),
        lambda variant, x, pre: (reference.aggregate(x, pre),),
        (0,),
        lambda n: (n + 1, 2 * n + 1),
        {"": {}, "views": {}},
    ),
    Row(
        "post",
        "eq. 3",
        _post_inputs,
        lambda variant, x, y, post, res: (torch.ops.hc.post(x, y, post, res),),
        lambda variant, x, y, post, res: (reference.post(x, y, post, res),),
        (0, 1),
        lambda n: (2 * n + 1, 3 * n + 2),
        {"": {}, "branches": {}, "of one stream": {}, "to one stream": {}},
    ),
    Row(
        "pre",
        "eq. 3-9",
        _pre_inputs,
        _call_pre,
        _reference_pre,
        (0,),
        lambda n: (2 * n + 1, 3 * n + 2),
        CONSTRAINTS,
        lambda n: (n + 1, 2 * n + 1),
    ),
    Row(
        "post_pre",
        "eq. 3-9",
        _post_pre_inputs,
        _call_post_pre,
        _reference_post_pre,
        (0, 1),
        lambda n: (3 * n + 2, 5 * n + 4),
        CONSTRAINTS,
        lambda n: (2 * n + 2, 3 * n + 3),
    ),
)

CATALOG: dict[str, Row] = {row.name: row for row in ROWS}


def make_inputs(
    row: Row,
    variant: str,
    tokens: int,
    n: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Tensors:
    """Inputs of one case: streams in `dtype`, coefficients in float32 (float64 for float64)."""
    generator = torch.Generator().manual_seed(seed)
    narrow = torch.float64 if dtype == torch.float64 else torch.float32
    drawn = row.inputs(variant, tokens, n, width, generator)
    return tuple(
        t.to(device=device, dtype=dtype if k in row.streams else narrow)
        for k, t in enumerate(drawn)
    )
