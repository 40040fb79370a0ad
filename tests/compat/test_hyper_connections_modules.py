"""The drop-in's other modules against those of the package."""

import pytest
import torch
from torch import nn

from hc_compile.compat import hyper_connections as ours
from hc_compile.compat.hyper_connections import (
    hyper_connections_channel_first as our_first,
)
from hc_compile.compat.hyper_connections import (
    hyper_connections_with_multi_branch_inputs as our_branches,
)
from hc_compile.compat.hyper_connections import (
    hyper_connections_with_multi_input_streams as our_inputs,
)
from hc_compile.compat.hyper_connections import mHCv2 as our_v2
from tests.compat.oracle import (
    B,
    C,
    S,
    assert_equal,
    assert_same,
    both,
    draw,
    in_float64,
    randomised,
)

package = pytest.importorskip("hyper_connections")
package_v2 = pytest.importorskip("hyper_connections.mHCv2")
package_first = pytest.importorskip("hyper_connections.hyper_connections_channel_first")
package_branches = pytest.importorskip(
    "hyper_connections.hyper_connections_with_multi_branch_inputs"
)
package_inputs = pytest.importorskip(
    "hyper_connections.hyper_connections_with_multi_input_streams"
)


@pytest.mark.parametrize("tanh", [True, False])
def test_channel_first_module(tanh):
    pair = (
        m.HyperConnections(S, dim=C, tanh=tanh, layer_index=2) for m in (package_first, our_first)
    )
    assert_same(*pair, both, [draw(B * S, C, 3, 5), draw(B, C, 3, 5, seed=1)])


@pytest.mark.parametrize("spatial", [(5,), (2, 3, 2)])
def test_channel_first_module_beyond_two_dimensions(spatial):
    """Its convolutions take 2-D only; the same numbers laid out in 2-D are the oracle."""
    module = randomised(our_first.HyperConnections(S, dim=C))
    x, y = draw(B * S, C, *spatial), draw(B, C, *spatial, seed=1)
    flat = [t.flatten(2).unsqueeze(-1) for t in (x, y)]
    for a, b in zip(both(module, x, y), both(module, *flat), strict=True):
        assert_equal([a.flatten(2).unsqueeze(-1)], [b])


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_multi_branch_module(count, first):
    options = {"dim": C, "num_branch_inputs": count, "channel_first": first, "layer_index": 3}
    pair = (m.HyperConnections(S, **options) for m in (package_branches, our_branches))
    place = (C, 3, 2) if first else (3, 2, C)
    assert_same(*pair, both, [draw(B * S, *place), draw(count * B, *place, seed=1)])


@pytest.mark.parametrize(("count", "given"), [(2, 1), (4, 2), (3, 3)])
def test_multi_branch_module_with_branches(count, given):
    def make(module):
        torch.manual_seed(0)
        branches = [nn.Linear(C, C) for _ in range(given)]
        return module.HyperConnections(
            S, dim=C, num_branch_inputs=count, layer_index=1,
            branch=branches if given > 1 else branches[0],
        )  # fmt: skip

    inputs = [draw(B * S, 5, C)]
    assert_same(make(package_branches), make(our_branches), lambda m, x: [m(x)], inputs)


def test_multi_branch_decorates_branches():
    made = [m.HyperConnections(S, dim=C, num_branch_inputs=2, layer_index=1) for m in
            (package_branches, our_branches)]  # fmt: skip
    functions = [torch.tanh, torch.sin]
    assert_same(*made, lambda m, x: [m.decorate_branch(functions)(x)], [draw(B * S, 5, C)])


PATHS = [1, "memory", (2, 6), ("wide", 8)]


def call_with_inputs(m, x, *extra):
    (args, kwargs), add_residual = m(
        x, extra[0], extra[2], memory=extra[1], wide=extra[3], flag=None
    )
    assert kwargs.pop("flag") is None
    return *args, kwargs["memory"], kwargs["wide"], add_residual(args[0].tanh())


def test_multi_input_module():
    pair = (m.HyperConnections(S, dim=C, additional_input_paths=PATHS, layer_index=2) for m in
            (package_inputs, our_inputs))  # fmt: skip
    widths = (C, C, C, 6, 8)
    inputs = [draw(B * S, 5, w, seed=k) for k, w in enumerate(widths)]
    assert_same(*pair, call_with_inputs, inputs)


def test_multi_input_module_channel_first():
    """The package crashes; the same numbers channels last are the oracle."""
    widths = (C, C, C, 6, 8)
    last = [draw(B * S, 5, w, seed=k) for k, w in enumerate(widths)]
    first = [t.movedim(1, -1) for t in last]
    theirs = package_inputs.HyperConnections(
        S, dim=C, additional_input_paths=PATHS, channel_first=True
    )
    with pytest.raises(TypeError, match="rearrange"):
        call_with_inputs(theirs.double(), *first)
    options = {"dim": C, "additional_input_paths": PATHS, "layer_index": 1}
    modules = [our_inputs.HyperConnections(S, **options, channel_first=f) for f in (False, True)]
    results = [
        call_with_inputs(randomised(m), *t) for m, t in zip(modules, (last, first), strict=True)
    ]
    assert_equal([t.movedim(1, -1) for t in results[1]], results[0])


def test_multi_input_module_with_a_branch():
    def make(module):
        torch.manual_seed(0)
        branch = nn.Bilinear(C, 6, C)
        return module.HyperConnections(
            S, dim=C, branch=branch, additional_input_paths=[(1, 6)], layer_index=0
        )

    inputs = [draw(B * S, 5, C), draw(B * S, 5, 6, seed=1)]
    assert_same(make(package_inputs), make(our_inputs), lambda m, x, y: [m(x, y)], inputs)
    with pytest.raises(ValueError, match="additional input 1, got none"):
        make(our_inputs).double()(inputs[0])


STREAM_MODULES = [
    (lambda m: m.StreamEmbed(S, C), (B * S, 5, C)),
    (lambda m: m.StreamEmbed(S, C, expand_to_streams=True), (B, 5, C)),
    (lambda m: m.StreamEmbed(S, C, channel_first=True), (B * S, C, 3, 2)),
    (lambda m: m.AttentionPoolReduceStream(S, C), (B * S, 5, C)),
    (lambda m: m.AttentionPoolReduceStream(S, C, channel_first=True), (B * S, C, 3, 2)),
    (lambda m: m.get_expand_reduce_stream_functions(S)[0], (B, 5, C)),
    (lambda m: m.get_expand_reduce_stream_functions(S)[1], (B * S, 5, C)),
    (lambda m: m.get_expand_reduce_stream_functions(S, True, C)[0], (B, 5, C)),
]
V2_MODULES = [
    (lambda m: m.StreamEmbed(S, C), (B, 5, S, C)),
    (lambda m: m.StreamEmbed(S, C, expand_to_streams=True), (B, 5, C)),
    (lambda m: m.AttentionPoolReduceStream(C), (B, 5, S, C)),
    (lambda m: m.get_expand_reduce_stream_functions(S)[0], (B, 5, C)),
    (lambda m: m.get_expand_reduce_stream_functions(S)[1], (B, 5, S, C)),
    (lambda m: m.get_expand_reduce_stream_functions(S, True, True, C)[0], (B, 5, C)),
    (lambda m: m.get_expand_reduce_stream_functions(S, True, True, C)[1], (B, 5, S, C)),
]


@pytest.mark.parametrize("case", range(len(STREAM_MODULES) + len(V2_MODULES)))
def test_expand_reduce_embed_and_pool(case):
    first = [(package, ours, *one) for one in STREAM_MODULES]
    second = [(package_v2, our_v2, *one) for one in V2_MODULES]
    theirs, mine, make, shape = (first + second)[case]
    assert_same(make(theirs), make(mine), lambda m, x: [m(x)], [draw(*shape)])


@pytest.mark.parametrize("embed", [False, True])
def test_usage_of_its_readme(embed):
    """Expand, two wrapped branches, reduce; and `disable` as plain residuals."""

    def network(module, disable):
        torch.manual_seed(0)
        make, expand, reduce = module.get_init_and_expand_reduce_stream_functions(
            S, dim=C, add_stream_embed=embed, disable=disable
        )
        layers = [make(branch=nn.Linear(C, C), layer_index=k) for k in range(2)]
        return nn.Sequential(expand, *layers, reduce)

    for disable in (False, True):
        pair = (network(m, disable) for m in (package, ours))
        assert_same(*pair, lambda m, x: [m(x)], [draw(B, 5, C)])


def test_its_multi_branch_functions_crash_and_ours_do_not():
    with pytest.raises(TypeError, match="num_streams"):
        package_branches.get_init_and_expand_reduce_stream_functions(4)
    make, expand, reduce = our_branches.get_init_and_expand_reduce_stream_functions(4)
    x = draw(B, 5, C).float()
    assert torch.equal(reduce(expand(x)), 4 * x)
    assert isinstance(make(dim=C), our_branches.HyperConnections)


@pytest.mark.interpreter
def test_gradient_of_its_fused_sinkhorn_is_wrong():
    """It differentiates every step at the last matrix; ours is the truncated iteration's."""
    from hyper_connections.triton_sinkhorn import TritonSinkhornFunction

    from tests.conftest import worst

    logits, cot = 5 * draw(32, 4, 4), draw(32, 4, 4, seed=1)
    errors = []
    truth = logits.clone().requires_grad_()
    with in_float64():
        value = package_v2.log_domain_sinkhorn_knopps(truth)
    (exact,) = torch.autograd.grad(value, truth, cot)
    for function in (TritonSinkhornFunction.apply, our_v2.log_domain_sinkhorn_knopps):
        leaf = logits.float().requires_grad_()
        out = function(leaf, 20)
        assert worst(out, value) < 1e-5
        errors.append(worst(torch.autograd.grad(out, leaf, cot.float())[0], exact))
    assert errors[0] > 1e-2 and errors[1] < 1e-4
