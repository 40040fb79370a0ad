"""Every op of the catalog against the float64 reference: outputs, gradients, opcheck."""

import pytest
import torch

from custom_ops.catalog import CATALOG, ROWS, make_inputs
from custom_ops.constraint import Constraint, parse
from custom_ops.variants import CONSTRAINTS, DELAYED
from tests.conftest import cotangents, outputs_and_gradients, worst

CASES = [(row.name, variant) for row in ROWS for variant in row.variants]
SHAPES = [(1, 4, 7), (5, 2, 1), (3, 3, 33), (6, 1, 8), (2, 5, 5), (2, 6, 3), (1, 7, 2), (3, 8, 9)]
WIDE_SHAPES = [(t, n, c) for t in (1, 5) for n in range(1, 9) for c in (1, 7, 33, 64, 129)]
EPS = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-12}


def _run(name, variant, shape, dtype, seed=0, neighbours=0):
    """Compare one case with float64 and with the reference at the same dtype.

    neighbours: of thousands of cases the reference is close to some by chance alone. How close it
    comes is then also asked at so many inputs that differ by a rounding, each of its own truth.
    """
    row = CATALOG[name]
    tokens, n, width = shape
    iterates = "newton" in name + variant  # nearly singular matrices amplify their own roundings
    inputs = make_inputs(row, variant, tokens, n, width, dtype, seed=seed)
    truth_inputs = [t.double() for t in inputs]
    cots = cotangents(row.reference(variant, *truth_inputs), seed + 1)
    if dtype != torch.float64:  # what an op is given, it is given rounded
        outputs = row.call(variant, *inputs)
        cots = [c.to(o.dtype).double() for c, o in zip(cots, outputs, strict=True)]

    def reference(tensors):
        return outputs_and_gradients(lambda *t: row.reference(variant, *t), tensors, cots)

    pairs = [
        (reference(near), reference([t.double() for t in near]))
        for near in (inputs, *_neighbours(inputs, neighbours))
    ]
    truth = pairs[0][1]
    ours = outputs_and_gradients(lambda *t: row.call(variant, *t), inputs, cots)
    for kind, part in (("output", 0), ("gradient", 1)):
        for k, (a, c) in enumerate(zip(ours[part], truth[part], strict=True)):
            assert a.shape == c.shape
            eager = max(worst(b[part][k], t[part][k]) for b, t in pairs)
            limit = 2 * eager + EPS[dtype] * (10 if iterates else 1)
            assert worst(a, c) <= limit, (kind, k, worst(a, c), limit)


def _neighbours(inputs, count):
    """The inputs `count` times, each element moved up or down by a rounding."""
    generator = torch.Generator().manual_seed(9)
    for _ in range(count):
        signs = [torch.randint(2, t.shape, generator=generator) * 2 - 1 for t in inputs]
        steps = [
            1 + torch.finfo(t.dtype).eps * sign for t, sign in zip(inputs, signs, strict=True)
        ]
        yield [(t.double() * step).to(t.dtype) for t, step in zip(inputs, steps, strict=True)]


def _limit(row, variant, shape):
    tokens, n, width = shape
    return tokens, row.takes(variant, n), width


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_float64_outputs_and_gradients(name, variant, shape):
    _run(name, variant, _limit(CATALOG[name], variant, shape), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_no_worse_than_eager(name, variant, dtype):
    _run(name, variant, _limit(CATALOG[name], variant, (5, 4, 33)), dtype)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", WIDE_SHAPES)
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_full_product(name, variant, shape, dtype):
    if variant == "read-layer" and shape[-1] == 1:
        pytest.skip("one element less its mean is 0: the gradients of such a norm are roundings")
    _run(name, variant, _limit(CATALOG[name], variant, shape), dtype, seed=3, neighbours=8)


@pytest.mark.parametrize("std", [1.0, 5.0, 10.0])
@pytest.mark.parametrize("iterations", [0, 1, 2, 5, 20])
@pytest.mark.parametrize("start", ["exp-globalmax", "exp-rowmax", "softmax", "log"])
def test_sinkhorn_backward_is_that_of_the_truncated_iteration(start, iterations, std):
    from custom_ops import reference

    generator = torch.Generator().manual_seed(0)
    logits = std * torch.randn(64, 4, 4, generator=generator, dtype=torch.float64)
    eps = 1e-6 if start == "softmax" else 1e-30
    options = (iterations, start, "row", "max", eps)
    truth = outputs_and_gradients(lambda m: (reference.sinkhorn(m, *options),), [logits])
    ours = outputs_and_gradients(lambda m: (torch.ops.hc.sinkhorn(m, *options),), [logits])
    for a, b in zip(ours[0] + ours[1], truth[0] + truth[1], strict=True):
        assert worst(a, b) < 1e-11


def test_sinkhorn_gradient_of_an_almost_final_matrix_differs():
    """The shortcut others ship (the final matrix at every step) is wrong at hard logits."""
    generator = torch.Generator().manual_seed(0)
    logits = 10 * torch.randn(64, 4, 4, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    options = (20, "exp-globalmax", "column", "max", 1e-30)
    final = torch.ops.hc.sinkhorn(logits, *options)
    cotangent = cotangents([final])[0]
    (true,) = torch.autograd.grad(final, logits, cotangent)
    grad, matrix = cotangent, final.detach()
    for _ in range(20):
        grad = grad - (grad * matrix).sum(-1, keepdim=True)
        grad = grad - (grad * matrix).sum(-2, keepdim=True)
    assert worst(grad * matrix, true) > 1e-2


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_extreme_logits_stay_finite(scale):
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(8, 4, 4, generator=generator)
    logits.requires_grad_()
    for start in ("exp-globalmax", "log", "softmax"):
        options = (20, start, "row", "add", 1e-6) if start == "softmax" else None
        options = options or (20, start, "column", "max", 1e-30)
        out = torch.ops.hc.sinkhorn(logits, *options)
        (grad,) = torch.autograd.grad(out, logits, torch.randn_like(out))
        assert out.isfinite().all() and grad.isfinite().all()
        last = -2 if start == "softmax" else -1
        assert (out.sum(last) <= 1 + 1e-3).all()


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_non_contiguous_inputs_and_cotangents(name, variant):
    row = CATALOG[name]
    n = row.takes(variant, 3)
    inputs = make_inputs(row, variant, 4, n, 6, torch.float64)
    strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in inputs]
    cots = cotangents(row.call(variant, *inputs))
    strided_cots = [c.transpose(0, -1).contiguous().transpose(0, -1) for c in cots]
    plain = outputs_and_gradients(lambda *t: row.call(variant, *t), inputs, cots)
    other = outputs_and_gradients(lambda *t: row.call(variant, *t), strided, strided_cots)
    for a, b in zip(plain[0] + plain[1], other[0] + other[1], strict=True):
        assert worst(b, a) < 1e-12


@pytest.mark.parametrize(("name", "variant"), [c for c in CASES if c[0] != "post_pre"])
def test_leading_dimensions_and_no_tokens(name, variant):
    row = CATALOG[name]
    n = row.takes(variant, 3)
    inputs = make_inputs(row, variant, 6, n, 5, torch.float64)
    flat = row.call(variant, *inputs)
    per_token = _token_inputs(name, variant, inputs)
    folded = [t.unflatten(0, (2, 3)) if k in per_token else t for k, t in enumerate(inputs)]
    for a, b in zip(row.call(variant, *folded), flat, strict=True):
        assert torch.equal(a.reshape(b.shape), b)
    empty = [t[:0] if k in per_token else t for k, t in enumerate(inputs)]
    outs, grads = outputs_and_gradients(lambda *t: row.call(variant, *t), empty)
    assert all(g.isfinite().all() for g in grads)
    assert outs[0].numel() == 0 or variant == "static"


def _token_inputs(name, variant, inputs):
    """Indices of the inputs with a token axis."""
    return {
        "sinkhorn": (0,),
        "newton_schulz": (0,),
        "project": (0,),
        "constrain": (0, 1),
        "aggregate": (0, 1),
        "post": (0, 1, 2, 3),
        "pre": (0, len(inputs) - 1) if variant in DELAYED else (0,),
    }[name]


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_opcheck(name, variant):
    row = CATALOG[name]
    n = row.takes(variant, 3)
    inputs = make_inputs(row, variant, 4, n, 5)
    leaves = [t.requires_grad_() for t in inputs]
    calls = _recorded_calls(lambda: row.call(variant, *leaves))
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    for op, args in calls:
        torch.library.opcheck(op, args, test_utils=utilities)
    if name in ("post", "aggregate", "project") or variant in ("sinkhorn", "static", "tanh"):
        op, args = calls[0]
        torch.library.opcheck(op, args, test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize("weighed", [False, True])
def test_opcheck_of_ghosts(weighed):
    row = CATALOG["post_pre"]
    x, *rest = make_inputs(row, "delayed", 4, 3, 5)
    *leaves, carried = [t.requires_grad_() for t in rest]
    ghost, spec = torch.zeros_like(x).requires_grad_(), Constraint(3, iterations=2).spec
    options = (spec, ghost, True, None, None, carried, weighed)
    torch.library.opcheck(torch.ops.hc.post_pre.default, (x, *leaves, *options))
    y, post, res = leaves[:3]
    row_left = (post.sum(-1, keepdim=True), res.sum(-2, keepdim=True))
    write = [t.detach().requires_grad_() for t in row_left]
    ghost = (ghost[:, :1] if weighed else ghost).detach().requires_grad_()
    torch.library.opcheck(torch.ops.hc.post.default, (x, y, *write, ghost))


def _recorded_calls(function):
    """The hc:: calls that `function` makes, with their arguments."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "hc" and "loop" not in func._opname:
                copies = [
                    a.detach().clone().requires_grad_() if isinstance(a, torch.Tensor) else a
                    for a in args
                ]
                self.calls.append((func, tuple(copies)))
            return func(*args, **(kwargs or {}))

    with Recorder() as recorder:
        function()
    assert recorder.calls
    return recorder.calls


GRADGRAD = [
    (name, variant)
    for name, variant in CASES
    if name != "post_pre" or variant in ("sinkhorn", "tanh", "static", "identity")
]


@pytest.mark.parametrize(("name", "variant"), GRADGRAD)
def test_double_backward(name, variant):
    row = CATALOG[name]
    inputs = make_inputs(row, variant, 2, 2, 2, torch.float64)
    leaves = tuple(t.requires_grad_() for t in inputs)
    assert torch.autograd.gradgradcheck(
        lambda *t: [o for o in row.call(variant, *t) if o.requires_grad], leaves, atol=1e-4
    )


def test_catalog_covers_every_registered_op():
    registered = {
        name.removeprefix("hc::").removesuffix("_backward")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("hc::")
    }
    loops = {"sinkhorn_loop", "newton_schulz_loop"}
    assert registered - loops == set(CATALOG)
    for row in ROWS:
        assert row.equation and row.variants


def test_every_manifold_and_activation_has_a_case():
    from custom_ops.constraint import CHOICES, Constraint

    records = [Constraint(2, **kw) for kw in CONSTRAINTS.values()]
    for name in ("projection", "norm_form", "squash", "pre", "post", "manifold"):
        used = {getattr(c, name) for c in records}
        assert set(CHOICES[name]) - used <= {"none"}, name
    assert all(parse(c.spec) == c for c in records)


def test_poisoned_token_stays_alone():
    """NaN in one token: that token is NaN, every other bitwise as before."""
    row = CATALOG["pre"]
    inputs = list(make_inputs(row, "sinkhorn", 6, 4, 16))
    clean = row.call("sinkhorn", *inputs)
    inputs[0] = inputs[0].clone()
    inputs[0][2, 1, 3] = float("nan")
    dirty = row.call("sinkhorn", *inputs)
    for a, b in zip(clean, dirty, strict=True):
        keep = torch.tensor([0, 1, 3, 4, 5])
        assert torch.equal(a[keep], b[keep])
        assert b[2].isnan().any()
    assert dirty[3][2].isnan().all()
