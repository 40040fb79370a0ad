"""Every op of the catalog with its real Triton kernels, interpreted on CPU tensors."""

import pytest
import torch

from custom_ops.catalog import CATALOG, ROWS, make_inputs
from custom_ops.registration import use_triton
from tests.conftest import cotangents, outputs_and_gradients, worst

pytestmark = pytest.mark.interpreter

CASES = [(row.name, variant) for row in ROWS for variant in row.variants]
SHAPES = [(3, 4, 33), (5, 3, 7)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_kernels_match_float64(name, variant, shape):
    row = CATALOG[name]
    tokens, n, width = shape
    inputs = make_inputs(row, variant, tokens, row.takes(variant, n), width, torch.float32)
    assert use_triton(inputs[0])
    wide = [t.double() for t in inputs]
    cots = cotangents(row.reference(variant, *wide))
    truth = outputs_and_gradients(lambda *t: row.reference(variant, *t), wide, cots)
    ours = outputs_and_gradients(lambda *t: row.call(variant, *t), inputs, cots)
    limit = 2e-4 if "newton" in name + variant else 2e-5
    for a, b in zip(ours[0] + ours[1], truth[0] + truth[1], strict=True):
        assert a.shape == b.shape and worst(a, b) < limit


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_kernels_take_no_tokens(name, variant):
    row = CATALOG[name]
    inputs = [t.requires_grad_() for t in make_inputs(row, variant, 0, row.takes(variant, 3), 7)]
    _, grads = outputs_and_gradients(lambda *t: row.call(variant, *t), inputs)
    assert all(g.shape == t.shape for g, t in zip(grads, inputs, strict=True))
    assert variant == "static" or all((g == 0).all() for g in grads)


@pytest.mark.parametrize("precision", ["bf16", "tf32", "ieee"])
def test_precision_of_the_projection_is_selectable(precision):
    row = CATALOG["project"]
    x, phi = make_inputs(row, "", 5, 3, 40)
    p, ss = torch.ops.hc.project(x, phi, False, precision)
    exact, squares = row.reference("", x.double(), phi.double())
    assert worst(p, exact) < (5e-3 if precision == "bf16" else 2e-3)
    assert worst(ss, squares) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "variant"), [c for c in CASES if CATALOG[c[0]].streams][::3])
def test_kernels_in_sixteen_bits(name, variant, dtype):
    row = CATALOG[name]
    inputs = make_inputs(row, variant, 3, 4, 33, dtype)
    wide = [t.double() for t in inputs]
    cots = [c.to(dtype) for c in cotangents(row.reference(variant, *wide))]
    truth = outputs_and_gradients(lambda *t: row.reference(variant, *t), wide, cots)
    ours = outputs_and_gradients(lambda *t: row.call(variant, *t), inputs, cots)
    for a, b in zip(ours[0] + ours[1], truth[0] + truth[1], strict=True):
        assert worst(a, b) < 2e-2


def test_opcheck_of_the_opaque_form():
    row = CATALOG["post"]
    inputs = [t.requires_grad_() for t in make_inputs(row, "", 3, 3, 5)]
    torch.library.opcheck(torch.ops.hc.post.default, (*inputs, None))
