"""aggregate, post and their backwards against float64."""

import pytest
import torch

from custom_ops import reference
from custom_ops.kernels.aggregate import aggregate, aggregate_backward
from custom_ops.kernels.post import post, post_backward
from custom_ops.kernels.pre_backward import aggregate_dots
from tests.kernels.cases import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    SHAPES,
    Sublayer,
    anywhere,
    check_sublayer,
    on_gpu,
    random,
    worst,
)

pytestmark = anywhere


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("views", [1, 3])
def test_aggregate(shape, dtype, views):
    case = Sublayer(*shape, dtype, views=views)
    dx, dpre = aggregate_backward(case.du, case.x, case.pre)
    check_sublayer(case, {"u": aggregate(case.x, case.pre), "read_dx": dx, "dpre": dpre})
    check_sublayer(case, {"dpre": aggregate_dots(case.du, case.x)})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("branches", [1, 2])
def test_post(shape, dtype, branches):
    case = Sublayer(*shape, dtype, branches=branches)
    check_sublayer(case, {"out": post(case.x, case.y, case.post, case.res)})
    for need_dx in (False, True):
        dx, dy, dpost, dres = post_backward(case.g, case.x, case.y, case.post, case.res, need_dx)
        outputs = {"dy": dy, "dpost": dpost, "dres": dres}
        assert (dx is not None) == need_dx
        check_sublayer(case, outputs | ({"mixed": dx} if need_dx else {}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("before, after", [(1, 4), (4, 1), (3, 2), (9, 2)])
@pytest.mark.parametrize("branches", [1, 2])
def test_post_between_numbers_of_streams(before, after, branches, dtype):
    """The first sublayer of a network makes n streams of one, its mean one of n."""
    tokens, width = 3, 130
    x, g = random(tokens, before, width, dtype=dtype), random(tokens, after, width, dtype=dtype)
    y = random(tokens, branches, width, dtype=dtype, seed=1)
    weights, res = random(tokens, branches, after), random(tokens, after, before, seed=2)
    made = post(x, y, weights, res)
    dx, dy, dweights, dres = post_backward(g, x, y, weights, res, True)
    wide = [t.double().requires_grad_() for t in (x, y, weights, res)]
    exact = reference.post(*wide)
    truth = [exact, *torch.autograd.grad(exact, wide, g.double())]
    limit = (8 if INTERPRETED else 2) * torch.finfo(dtype).eps + 1e-5
    for ours, true in zip((made, dx, dy, dweights, dres), truth, strict=True):
        assert ours.shape == true.shape and worst(ours, true.detach()) <= limit * 4


def test_post_takes_a_branch_of_another_dtype():
    case = Sublayer(2, 4, 65, torch.float32)
    case.y = case.y.to(torch.float16)
    out = post(case.x, case.y, case.post, case.res)
    _, dy, _, _ = post_backward(case.g, case.x, case.y, case.post, case.res, False)
    assert out.dtype == torch.float32 and dy.dtype == torch.float16
    check_sublayer(case, {"out": out, "dy": dy})


def test_a_token_does_not_see_the_others():
    case = Sublayer(6, 4, 70, torch.float32)
    before = post(case.x, case.y, case.post, case.res)
    case.x[3:] += 1.0
    case.y[3:] = float("nan")
    after = post(case.x, case.y, case.post, case.res)
    assert torch.equal(before[:3], after[:3])
    assert after[3:].isnan().all()


@on_gpu
def test_offsets_beyond_32_bits():
    tokens, streams, width = 70_000, 4, 8192
    x = torch.randn(tokens, streams, width, device=DEVICE, dtype=torch.bfloat16)
    pre = torch.randn(tokens, 1, streams, device=DEVICE)
    last = slice(tokens - 5, tokens)
    exact = torch.einsum("tvn,tnc->tvc", pre[last].double(), x[last].double())
    assert worst(aggregate(x, pre)[last], exact) < 0.05
