"""project, pre_dx and project_backward against float64."""

import pytest
import torch

from custom_ops.kernels import pre_dx as dx_kernels
from custom_ops.kernels import slots
from custom_ops.kernels.pre_backward import pre_dx, project_backward
from custom_ops.kernels.project import PRECISIONS, project
from tests.kernels.cases import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    SHAPES,
    Sublayer,
    anywhere,
    check_sublayer,
    on_gpu,
    worst,
)

pytestmark = anywhere
SPLIT = 2e-4  # worst element of a product with 16 mantissa bits, both factors at 4 sigma


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (130, 1, 40), (2, 4, 1100)], ids=str)
def test_project(shape, dtype):
    case = Sublayer(*shape, dtype)
    p, ss = project(case.x, case.phi)
    check_sublayer(case, {"p": p}, slack=SPLIT if dtype == torch.bfloat16 else 4e-6)
    check_sublayer(case, {"ss": ss})


@pytest.mark.parametrize("coefficients", [1, 35, 80, 130, 300])
def test_project_takes_any_number_of_coefficients(coefficients):
    case = Sublayer(3, 2, 40, torch.bfloat16, coefficients=coefficients)
    p, ss = project(case.x, case.phi)
    check_sublayer(case, {"p": p, "ss": ss}, slack=SPLIT)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_project_precisions(precision, dtype):
    case = Sublayer(17, 4, 96, dtype)
    p, _ = project(case.x, case.phi, precision)
    allowed = {"bf16": 2e-2, "bf16x2": SPLIT, "tf32": 5e-3, "ieee": 1e-5}[precision]
    assert worst(p, case.results(torch.float64)["p"]) < allowed


def test_project_refuses_an_unknown_precision():
    case = Sublayer(2, 2, 16, torch.float32)
    with pytest.raises(ValueError, match="precision must be one of"):
        project(case.x, case.phi, "half")


PRE_DX = [
    (shape, views, dtype)
    for shape, views in [(shape, 1) for shape in [*SHAPES, (70, 4, 65)]]
    + [(shape, 2) for shape in (SHAPES[:2] if INTERPRETED else SHAPES)]
    for dtype in DTYPES
]


def slowest(shape, dtype):
    """What takes a minute interpreted and is one of two types."""
    return pytest.mark.full if INTERPRETED and shape[1] > 8 and dtype != torch.float32 else ()


@pytest.mark.parametrize(
    "shape, views, dtype",
    [pytest.param(*case, marks=slowest(case[0], case[2])) for case in PRE_DX],
    ids=str,
)
def test_pre_dx(shape, views, dtype):
    case = Sublayer(*shape, dtype, views=views)
    given = (case.x, case.du, case.pre, case.phi, case.dp, case.dss, case.g, case.res)
    slack = SPLIT if dtype == torch.bfloat16 else 4e-6
    dx, dphi, none = pre_dx(*given)
    assert none is None
    check_sublayer(case, {"dx": dx, "dphi": dphi}, slack=slack)
    if views == 1:
        dx, dphi, dots = pre_dx(*given, with_dots=True)
        made = {"dx": dx, "dphi": dphi, "dpre": dots.unsqueeze(1)}
        check_sublayer(case, made, slack=slack)


SPEEDS = pytest.mark.parametrize("speed", [3.35e12, 4.9e12], ids=["H100", "H200"])


@SPEEDS
@pytest.mark.parametrize("tokens", [1, 70] if INTERPRETED else [1, 70, 4500])
@pytest.mark.parametrize("streams, width", [(1, 640), (2, 136), (3, 640), (4, 136)])
def test_pre_dx_for_either_memory(streams, width, tokens, speed, monkeypatch):
    """A faster memory gets a kernel of its own, on any device that is told so."""
    monkeypatch.setattr(dx_kernels, "memory_speed", lambda device: speed)
    case = Sublayer(tokens, streams, width, torch.bfloat16)
    given = (case.x, case.du, case.pre, case.phi, case.dp, case.dss, case.g, case.res)
    dx, dphi, _ = pre_dx(*given)
    check_sublayer(case, {"dx": dx, "dphi": dphi}, slack=SPLIT)
    dx, dphi, dots = pre_dx(*given, with_dots=True)
    check_sublayer(case, {"dx": dx, "dphi": dphi, "dpre": dots.unsqueeze(1)}, slack=SPLIT)
    dx, dphi = project_backward(case.dp, case.dss, case.x, case.phi)
    check_sublayer(case, {"project_dx": dx, "dphi": dphi}, slack=SPLIT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("streams", [1, 3, 4, 6])
def test_pre_dx_of_one_cotangent(streams, dtype):
    """One row of g, for all streams: that of a post that made one stream of n."""
    case = Sublayer(7, streams, 130, dtype)
    given = (case.x, case.du, case.pre, case.phi, case.dp, case.dss)
    one, res = case.g[:, :1].contiguous(), case.res.sum(1, keepdim=True)
    case.g = one.expand_as(case.x)
    slack = SPLIT if dtype == torch.bfloat16 else 4e-6
    check_sublayer(case, {"dx": pre_dx(*given, one, res)[0]}, slack=slack)


ROWS = [(5, 1, 96), (130, 1, 160)]  # of one stream, taken for four
ROWS += [] if INTERPRETED else [(4500, 1, 2560), (203, 1, 7168)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("coefficients", [3, 24])
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_project_backward_of_one_stream(shape, coefficients, dtype):
    case = Sublayer(*shape, dtype, coefficients=coefficients)
    dx, dphi = project_backward(case.dp, case.dss, case.x, case.phi)
    slack = SPLIT if dtype == torch.bfloat16 else 4e-6
    check_sublayer(case, {"project_dx": dx, "dphi": dphi}, slack=slack)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_project_backward(shape):
    case = Sublayer(*shape, torch.bfloat16)
    dx, dphi = project_backward(case.dp, case.dss, case.x, case.phi)
    check_sublayer(case, {"project_dx": dx, "dphi": dphi}, slack=SPLIT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [70, 600] if INTERPRETED else [70, 600, 2560, 7168])
def test_a_token_does_not_see_the_others(width, dtype, monkeypatch):
    """Few tokens take the turns of the loop apart (slots.py), and add them to the same bits."""
    if INTERPRETED:
        monkeypatch.setattr(slots, "few_tokens", lambda coefficients: 16)
    few = slots.few_tokens(24)
    case = Sublayer(few + (14 if INTERPRETED else 130), 4, width, dtype)
    whole = project(case.x, case.phi)
    for tokens in (1, 5, few, few + 6):
        for a, b in zip(whole, project(case.x[:tokens].contiguous(), case.phi), strict=True):
            assert torch.equal(a[:tokens], b)
    case.x[1:] *= 3.0
    assert torch.equal(whole[0][:1], project(case.x, case.phi)[0][:1])


@on_gpu
@SPEEDS
@pytest.mark.parametrize("streams, width", [(4, 640), (8, 640), (16, 256), (4, 2560)])
@pytest.mark.parametrize("tokens", [300, 4500])
def test_bitwise_repeatable(tokens, streams, width, speed, monkeypatch):
    """Inputs small enough to stay in L2: an early copy over a buffer in use showed here."""
    monkeypatch.setattr(dx_kernels, "memory_speed", lambda device: speed)
    case = Sublayer(tokens, streams, width, torch.bfloat16)

    def outputs():
        given = (case.x, case.du, case.pre, case.phi, case.dp, case.dss, case.g, case.res)
        made = (*pre_dx(*given, with_dots=True), *pre_dx(*given)[:2])
        return (*project(case.x, case.phi), *made)

    first = outputs()
    for _ in range(200):
        assert all(torch.equal(*pair) for pair in zip(first, outputs(), strict=True))


@on_gpu
@pytest.mark.parametrize("coefficients", [24, 80])
def test_dphi_over_many_tokens(coefficients):
    tokens = 65_536
    x = torch.randn(tokens, 4, 256, device=DEVICE, dtype=torch.bfloat16)
    dp = torch.randn(tokens, coefficients, device=DEVICE)
    phi = torch.randn(coefficients, 1024, device=DEVICE)
    exact = dp.double().T @ x.flatten(1).double()
    fp32 = dp.T @ x.flatten(1).float()
    dss = torch.zeros(tokens, device=DEVICE)

    def error(out):
        return ((out.double() - exact).norm() / exact.norm()).item()

    assert error(project_backward(dp, dss, x, phi)[1]) <= 4e-6
    allowed = error(fp32) if coefficients <= 32 else 4e-6
    assert error(project_backward(dp, dss, x, phi, "ieee")[1]) <= allowed
