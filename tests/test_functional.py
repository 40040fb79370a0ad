"""The public functions: transforms, static coefficients, errors in eager and under Dynamo."""

import pytest
import torch

import hc_compile as hc
from custom_ops import reference
from custom_ops.constraint import Constraint
from tests.conftest import worst
from tests.test_presets import draw

F = hc.functional
C = Constraint(3, iterations=4)


def parameters(dim=5, dtype=torch.float64):
    return (
        draw(C.rows, C.norm_width(dim), seed=1, dtype=dtype),
        draw(3, seed=2, dtype=dtype),
        draw(C.total, seed=3, dtype=dtype),
    )


def functions():
    phi, alpha, bias = parameters()
    y = draw(4, 5, seed=4, dtype=torch.float64)
    post, res = (draw(4, *s, seed=5, dtype=torch.float64) for s in ((3,), (3, 3)))
    return {
        "sinkhorn": (lambda x: F.sinkhorn(x[..., :3], 3), reference_of_sinkhorn),
        "newton_schulz": (
            lambda x: F.newton_schulz(x[..., :3]),
            lambda x: reference.newton_schulz(x[..., :3], hc_schedule(), 1e-7),
        ),
        "coefficients": (
            lambda x: sum(
                o.sum() * k for k, o in enumerate(F.coefficients(x, phi, alpha, bias, C))
            ),
            lambda x: sum(
                o.sum() * k for k, o in enumerate(reference.coefficients(x, phi, alpha, bias, C))
            ),
        ),
        "aggregate": (lambda x: F.aggregate(x, post), lambda x: reference.aggregate(x, post)),
        "post": (lambda x: F.post(x, y, post, res), lambda x: reference.post(x, y, post, res)),
        "pre": (
            lambda x: F.pre(x, phi, alpha, bias, C)[0],
            lambda x: reference.pre(x, phi, alpha, bias, C)[0],
        ),
        "post_pre": (
            lambda x: F.post_pre(x, y, post, res, phi, alpha, bias, C)[1],
            lambda x: reference.post_pre(x, y, post, res, phi, alpha, bias, C)[1],
        ),
    }


def reference_of_sinkhorn(x):
    return reference.sinkhorn(x[..., :3], 3)


def hc_schedule():
    from custom_ops.constraint import NEWTON_SCHULZ_SCHEDULE

    return NEWTON_SCHULZ_SCHEDULE


X = draw(4, 3, 5, dtype=torch.float64)
TANGENT = draw(4, 3, 5, seed=9, dtype=torch.float64)
NAMES = list(functions())


@pytest.mark.parametrize("name", NAMES)
def test_grad_jvp_and_vmap(name):
    """torch.func through the public functions; an op's own jvp would silently be zero."""
    ours, oracle = functions()[name]
    scalar = lambda f: lambda x: (f(x) ** 2).sum()  # noqa: E731
    first = torch.func.grad(scalar(ours))(X)
    assert worst(first, torch.func.grad(scalar(oracle))(X)) < 1e-12
    value, tangent = torch.func.jvp(ours, (X,), (TANGENT,))
    expected_value, expected = torch.func.jvp(oracle, (X,), (TANGENT,))
    assert worst(value, expected_value) < 1e-12 and worst(tangent, expected) < 1e-12
    assert tangent.abs().max() > 1e-6
    batch = torch.stack([X, 2 * X, X - 1])
    mapped = torch.func.vmap(ours)(batch)
    assert worst(mapped, torch.stack([oracle(b) for b in batch])) < 1e-12
    per_sample = torch.func.vmap(torch.func.grad(scalar(ours)))(batch)
    looped = torch.stack([torch.func.grad(scalar(oracle))(b) for b in batch])
    assert worst(per_sample, looped) < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_ad(name):
    import torch.autograd.forward_ad as fwd

    ours, oracle = functions()[name]
    with fwd.dual_level():
        tangents = [fwd.unpack_dual(f(fwd.make_dual(X, TANGENT))).tangent for f in (ours, oracle)]
    assert worst(*tangents) < 1e-12 and tangents[0].abs().max() > 1e-6


def test_hessian_of_a_whole_boundary():
    ours, oracle = functions()["post_pre"]
    small = X[:, :, :]
    a, b = (torch.func.hessian(lambda x, f=f: (f(x) ** 2).sum())(small) for f in (ours, oracle))
    assert worst(a, b) < 1e-10


def test_transforms_also_compiled():
    ours, oracle = functions()["post"]
    compiled = torch.compile(
        lambda x: torch.func.grad(lambda z: (ours(z) ** 2).sum())(x), backend="aot_eager"
    )
    expected = torch.func.grad(lambda z: (oracle(z) ** 2).sum())(X)
    assert worst(compiled(X), expected) < 1e-12


def test_static_coefficients_equal_their_expansion():
    x, y = draw(2, 3, 4, 6), draw(2, 3, 6, seed=1)
    pre, post, res = draw(4, seed=2), draw(4, seed=3), draw(4, 4, seed=4)
    lead = (2, 3)
    assert torch.equal(F.aggregate(x, pre), F.aggregate(x, pre.expand(*lead, 4)))
    expanded = F.post(x, y, post.expand(*lead, 4), res.expand(*lead, 4, 4))
    assert torch.equal(F.post(x, y, post, res), expanded)
    leaves = [t.requires_grad_() for t in (pre, post, res)]
    out = F.post(F.aggregate(x, leaves[0]).unsqueeze(-2) * x, y, leaves[1], leaves[2])
    grads = torch.autograd.grad(out, leaves, draw(*out.shape, seed=5))
    assert all(
        g.shape == t.shape and g.abs().max() > 0 for g, t in zip(grads, leaves, strict=True)
    )


def test_doubly_stochastic_side_by_side():
    """The side normalised last is exact, the other approximate (MATHEMATICS of truncation)."""
    logits = draw(256, 4, 4, dtype=torch.float64)
    columns_first = F.sinkhorn(logits, 20)
    assert (columns_first.sum(-1) - 1).abs().max() < 1e-14
    assert 1e-14 < (columns_first.sum(-2) - 1).abs().max() < 1e-2
    rows_first = F.sinkhorn(logits, 20, first="row")
    assert (rows_first.sum(-2) - 1).abs().max() < 1e-14
    log_domain = F.sinkhorn(logits, 20, start="log")
    assert worst(log_domain, columns_first) < 1e-12


def test_newton_schulz_is_the_polar_factor_of_each_matrix():
    matrix = torch.eye(4, dtype=torch.float64) + 0.3 * draw(32, 4, 4, dtype=torch.float64)
    scales = torch.logspace(-3, 3, 32, dtype=torch.float64).view(32, 1, 1)
    u, _, v = torch.linalg.svd(matrix)
    assert worst(F.newton_schulz(matrix * scales, eps=0.0), u @ v) < 1e-6


T3 = torch.zeros(8, 4, 6)
BAD = [
    (lambda: F.post(T3, torch.zeros(8, 6), torch.zeros(8, 4), torch.zeros(8, 16)), ValueError,
     r"res must be \[n, n\] = \[4, 4\], got \[8, 16\]"),
    (lambda: F.post(T3, torch.zeros(8, 6), torch.zeros(8, 4), torch.zeros(8, 4, 3)), ValueError,
     r"res must be \[\.\.\., n, n\] = \[8, 4, 4\], got \[8, 4, 3\]"),
    (lambda: F.post(T3, torch.zeros(7, 6), torch.zeros(8, 4), torch.zeros(8, 4, 4)), ValueError,
     r"y must be \[\.\.\., C\] = \[8, 6\], got \[7, 6\]"),
    (lambda: F.aggregate(T3, torch.zeros(8, 3)), ValueError,
     r"pre must be \[\.\.\., n\] = \[8, 4\], got \[8, 3\]"),
    (lambda: F.aggregate(torch.zeros(8, 0, 6), torch.zeros(8, 0)), ValueError, "n, C >= 1"),
    (lambda: F.aggregate(T3.int(), torch.zeros(8, 4)), TypeError, "got torch.int32"),
    (lambda: F.aggregate(T3, torch.zeros(8, 4, device="meta")), ValueError,
     "pre must be on cpu"),
    (lambda: F.sinkhorn(torch.zeros(4, 3)), ValueError, r"logits must be \[\.\.\., n, n\]"),
    (lambda: F.sinkhorn(torch.zeros(4, 4), -1), ValueError, "iterations must be >= 0, got -1"),
    (lambda: F.sinkhorn(torch.zeros(4, 4), first="up"), ValueError, "first must be one of"),
    (lambda: F.sinkhorn(torch.zeros(4, 4), start="softmax"), ValueError, "first must be 'row'"),
    (lambda: F.newton_schulz(torch.zeros(4, 5)), ValueError, "matrix must be"),
    (lambda: F.newton_schulz(torch.zeros(4, 4), ((1.0, 2.0),)), ValueError, "schedule"),
    (lambda: F.coefficients(T3, None, None, torch.zeros(24), Constraint(4)), ValueError,
     "phi and alpha must be tensors"),
    (lambda: F.pre(T3, torch.zeros(24, 4), torch.zeros(3), torch.zeros(24), Constraint(4)),
     ValueError, r"phi must be \[M, n\*C\] = \[24, 24\], got \[24, 4\]"),
    (lambda: F.pre(T3, torch.zeros(24, 24), torch.zeros(3), torch.zeros(9), Constraint(4)),
     ValueError, r"bias must be \[M\] = \[24\], got \[9\]"),
    (lambda: F.pre(T3, None, None, torch.zeros(24), Constraint(3)), ValueError,
     r"x must be \[\.\.\., n, C\] = \[\.\.\., 3, C\]"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_errors_name_argument_expectation_and_value(case):
    call, error, text = BAD[case]
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize("case", [0, 3, 5, 8])
def test_errors_carry_their_text_through_dynamo(case):
    call, _, text = BAD[case]
    with pytest.raises(Exception, match=text):
        torch.compile(call, backend="eager", fullgraph=True)()


CONSTRAINT_ERRORS = [
    ({"streams": 0}, "streams must be >= 1"),
    ({"streams": 6, "manifold": "permutation"}, "streams must be <= 5 .*720 logits"),
    ({"streams": 4, "start": "softmax"}, "first must be 'row'"),
    (
        {"streams": 4, "projection": "stream", "manifold": "permutation"},
        "manifold must not be 'permutation'",
    ),
    ({"streams": 4, "temperature": 0.0}, "temperature must be > 0"),
    ({"streams": 4, "pre": "relu"}, "pre must be one of"),
]


@pytest.mark.parametrize(("fields", "text"), CONSTRAINT_ERRORS)
def test_constraint_errors(fields, text):
    with pytest.raises(ValueError, match=text):
        Constraint(**fields)
