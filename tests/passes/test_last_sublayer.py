"""The mean or sum over the streams is folded into the last post, or left alone."""

import pytest
import torch

import hc_compile as hc
from hc_compile.passes.graph import arguments, is_op, outputs, value
from hc_compile.passes.last_sublayer import last_sublayer
from hc_compile.passes.link_ghosts import link_ghosts
from tests.conftest import worst
from tests.passes.harness import assert_equal, results, with_passes
from tests.passes.test_pipeline import block_of, net_and_input
from tests.test_presets import DIM, draw


def folded(function, net, *inputs):
    """Shapes that the posts of the rewritten graph make, and whether results are equal."""
    shapes = []

    def look(graph):
        shapes.extend(tuple(value(n).shape[-2:]) for n in graph.nodes if is_op(n, "post"))
        return False

    ours = results(with_passes(function, [last_sublayer, look]), net, *inputs)
    assert_equal(ours, results(function, net, *inputs))
    return shapes


@pytest.mark.parametrize("name", ["mhc", "shc", "dhc", "ihc"])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_only_the_last_post_makes_one_stream(name, reduce):
    net, h = net_and_input(name, 4)
    cfg = hc.HCConfig(DIM, 4, name, reduce=reduce)

    def function(h):
        x = net.expand(h)
        for k in range(3):
            x = block_of(net, k, x)
        return net.norm(hc.reduce_streams(x, cfg))

    assert folded(function, net, h) == [(4, DIM), (4, DIM), (1, DIM)]


@pytest.mark.parametrize(
    "n, reduce, kept", [(4, "mean", True), (3, "mean", False), (3, "sum", True)]
)
def test_a_ghost_stays_where_one_cotangent_is_that_of_all_streams(n, reduce, kept):
    """A mean over three is not a sum scaled exactly: there ∂x is formed by the post as well."""
    net, h = net_and_input("mhc", n)
    cfg, ghosts = hc.HCConfig(DIM, n, "mhc", reduce=reduce), []

    def function(h):
        x = net.expand(h)
        for k in range(2):
            x = block_of(net, k, x)
        return net.norm(hc.reduce_streams(x, cfg))

    def look(graph):
        posts = [node for node in graph.nodes if is_op(node, "post")]
        ghosts.extend(arguments(node, "post")["ghost"] is not None for node in posts)
        return False

    ours = results(with_passes(function, [last_sublayer, look]), net, h)
    assert_equal(ours, results(function, net, h))
    assert ghosts == [True, kept]


STATIC = draw(4, dtype=torch.float64)
WEIGHTS = {
    "its own": lambda x: x,
    "static": lambda x: x._replace(pre=STATIC),
    "scaled": lambda x: x._replace(pre=2 * x.pre),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_streams_weighed_by_a_carried_pre_are_never_made(name):
    """Where the weights are those that the last seam made, its ghost is one row."""
    net, h = net_and_input("mhc-v4.1", 4)
    ghosts = []

    def function(h):
        x = net.expand(h)
        for k in range(3):
            x = block_of(net, k, x)
        return net.reduce(WEIGHTS[name](x))

    def look(graph):
        posts = [arguments(n, "post")["ghost"] for n in graph.nodes if is_op(n, "post")]
        ghosts.extend(None if ghost is None else tuple(value(ghost).shape) for ghost in posts)
        return False

    assert folded(function, net, h) == [(1, DIM)]
    results(with_passes(function, [last_sublayer, look]), net, h)
    assert ghosts == [(*h.shape[:-1], 1, DIM) if name == "its own" else None]


@torch.no_grad()
def test_no_ghost_where_nothing_is_differentiated():
    net, h = net_and_input("mhc-v4.1", 4)
    seams = []

    def look(graph):
        seams.extend(arguments(n, "post_pre") for n in graph.nodes if is_op(n, "post_pre"))
        return False

    with_passes(net, [last_sublayer, look])(h)
    assert seams and not any(seam["with_ghost"] or seam["weighed"] for seam in seams)


def test_streams_that_are_also_returned_keep_both_gradients():
    """x' of the last seam has another user: its cotangent is added to the row's."""
    net, h = net_and_input("mhc-v4.1", 4)
    users = []

    def function(h):
        x = net.expand(h)
        for k in range(3):
            x = block_of(net, k, x)
        return net.reduce(x), x.x * 1.5

    def look(graph):
        seams = [n for n in graph.nodes if is_op(n, "post_pre")]
        assert [arguments(n, "post_pre")["weighed"] for n in seams] == [False, True]
        users.extend(outputs(seams[-1])[0][0].users)
        return False

    assert folded(function, net, h) == [(1, DIM)]
    results(with_passes(function, [last_sublayer, look]), net, h)
    assert len(users) == 2


def test_a_ghost_that_is_taken_is_left():
    """Where links were made first, ∂x is formed twice, as without them."""
    net, h = net_and_input("mhc-v4.1", 4)
    ours = results(with_passes(net, [link_ghosts, last_sublayer]), net, h)
    assert_equal(ours, results(net, net, h))


def test_several_branches_weighed_stay():
    cfg = hc.HCConfig(DIM, 4, "mhc-v4.1", branches=2)
    layer = hc.HyperConnection(cfg, dtype=torch.float64)
    h = draw(2, DIM, dtype=torch.float64).requires_grad_()

    def function(h):
        u, add_residual = layer(hc.expand_streams(h, cfg))
        return hc.reduce_streams(add_residual(torch.stack([u, torch.tanh(u)], -2)), cfg)

    assert folded(function, layer, h) == [(4, DIM)]


WRITTEN_OUT = {
    "mean": lambda x: x.mean(-2),
    "mean of a list": lambda x: torch.mean(x, dim=[-2]),
    "sum": lambda x: torch.sum(x, 2),
}
LEFT_ALONE = {
    "other user": lambda x: x.mean(-2) + x[..., 0, :],
    "keepdim": lambda x: x.mean(-2, keepdim=True),
    "over columns": lambda x: x.mean(-1),
    "over both": lambda x: x.mean((-2, -1)),
    "everything": lambda x: x.mean(),
    "another dtype": lambda x: x.sum(-2, dtype=torch.float32),
    "narrowed first": lambda x: x.float().mean(-2).double(),
    "scaled first": lambda x: (2 * x).mean(-2),
}


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_reductions_written_by_hand(name):
    net, h = net_and_input("mhc", 4, layers=1)
    function = WRITTEN_OUT[name]
    got = folded(lambda h: function(block_of(net, 0, net.expand(h))), net.connections, h)
    assert got == [(1, DIM)]


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_other_uses_keep_the_streams(name):
    net, h = net_and_input("mhc", 4, layers=1)
    function = LEFT_ALONE[name]
    got = folded(lambda h: function(block_of(net, 0, net.expand(h))), net.connections, h)
    assert got == [(4, DIM)]


def write_inputs(tokens=20, n=4):
    """x and y in bf16, post and res in fp32."""
    x, y = draw(tokens, n, DIM).bfloat16(), draw(tokens, DIM, seed=1).bfloat16()
    res = torch.softmax(draw(tokens, n, n, seed=3), -1)
    return [t.requires_grad_() for t in (x, y, draw(tokens, n, seed=2), res)]


def test_a_mean_kept_in_float32_is_not_rounded_to_the_streams():
    def function(*t):
        return hc.functional.post(*t).float().mean(-2)

    inputs = write_inputs()
    assert torch.equal(with_passes(function, [last_sublayer])(*inputs), function(*inputs))
    assert not torch.equal(function(*inputs), function(*inputs).bfloat16().float())


def test_several_branches():
    x, y = draw(5, 3, DIM, dtype=torch.float64), draw(5, 2, DIM, seed=1, dtype=torch.float64)
    post = draw(5, 2, 3, seed=2, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, y, post, draw(5, 3, 3, dtype=torch.float64))]

    def function(*t):
        return hc.functional.post(*t).mean(-2)

    assert folded(function, torch.nn.ModuleList(), *inputs) == [(1, DIM)]


def test_rounds_less_than_the_unrewritten_graph():
    """bf16 streams: x' is not rounded before the mean, so the error against float64 shrinks."""
    inputs = write_inputs(tokens=500)
    cfg = hc.HCConfig(DIM, 4, "mhc")

    def function(*t):
        return hc.reduce_streams(hc.functional.post(*t), cfg)

    net = torch.nn.ModuleList()
    wide = [t.detach().double().requires_grad_() for t in inputs]
    truth = results(function, net, *wide)
    plain = results(with_passes(function, []), net, *inputs)
    ours = results(with_passes(function, [last_sublayer]), net, *inputs)
    assert (ours[0].double() - truth[0]).norm() < (plain[0].double() - truth[0]).norm()
    for a, b, t in zip(ours, plain, truth, strict=True):
        unit = torch.finfo(a.dtype).eps
        assert worst(a, t) <= 2 * worst(b, t) + 2 * unit
