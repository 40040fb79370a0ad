"""How the drop-in is called: branches, halves of a layer, compilation, errors."""

import subprocess
import sys
from pathlib import Path

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
    randomised,
    run,
)

package = pytest.importorskip("hyper_connections")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "kind",
    [ours.HyperConnections, ours.mHC, our_v2.mHC, our_first.HyperConnections, ours.Residual],
)
def test_branch_conventions(kind):
    """Wrapped, manual and decorated calls agree; pytrees and arguments pass through."""
    shape = (
        (B, 5, S, C)
        if kind is our_v2.mHC
        else (B * S, C, 5)
        if kind is our_first.HyperConnections
        else (B * S, 5, C)
    )

    def branch(u, scale, *, shift):
        return u * scale + shift, {"cache": u.sum(), "number": 7}

    def make(given):
        torch.manual_seed(0)
        return kind(S, dim=C, layer_index=0, branch=given)

    x = draw(*shape).float()
    wrapped = make(branch)(x, 2.0, shift=1.0)
    u, add_residual = make(None)(x)
    manual = add_residual(branch(u, 2.0, shift=1.0))
    decorated = make(None).decorate_branch(branch)(x, 2.0, shift=1.0)
    for out in (manual, decorated):
        assert torch.equal(out[0], wrapped[0]) and out[1]["number"] == 7
        assert torch.equal(out[1]["cache"], wrapped[1]["cache"])
    with pytest.raises(ValueError, match="branch must not be given"):
        make(branch).decorate_branch(branch)


@pytest.mark.parametrize("kind", ["HyperConnections", "mHC"])
@pytest.mark.parametrize("fracs", [1, 2])
def test_width_then_depth_is_the_whole(kind, fracs):
    module = randomised(getattr(ours, kind)(S, dim=C, num_fracs=fracs))
    x, y = draw(B * S, 5, C), draw(B, 5, C, seed=1)
    u, mixed, rest = module.width_connection(x)
    assert_equal([u, module.depth_connection(y, mixed, **rest)], both(module, x, y))


def test_width_and_depth_of_the_package():
    """Its two halves, where a layer has no fractions."""
    theirs = randomised(package.HyperConnections(S, dim=C))
    mine = ours.HyperConnections(S, dim=C).double()
    mine.load_state_dict(theirs.state_dict())
    x, y = draw(B * S, 5, C), draw(B, 5, C, seed=1)
    halves = []
    for module in (theirs, mine):
        u, mixed, rest = module.width_connection(x)
        halves.append([u, mixed, module.depth_connection(y, mixed, **rest)])
    assert_equal(halves[1], halves[0])


def test_custom_depth_residual_fn_and_dropout():
    def make(module, **options):
        return module.HyperConnections(S, dim=C, layer_index=0, **options)

    gate = {"depth_residual_fn": lambda new, old: old + 0.5 * new}
    inputs = [draw(B * S, 5, C), draw(B, 5, C, seed=1)]
    assert_same(make(package, **gate), make(ours, **gate), both, inputs)

    def seeded(m, x, y):
        torch.manual_seed(7)
        return both(m, x, y)

    assert_same(make(package, dropout=0.5), make(ours, dropout=0.5), seeded, inputs)


def test_forward_method_names():
    branch = nn.Linear(C, C)
    layer = ours.mHC(S, dim=C, branch=branch, forward_method_names=("reset_parameters",))
    assert layer.reset_parameters == branch.reset_parameters
    with pytest.raises(ValueError, match="forward_method_names must be new names, got 'forward'"):
        ours.mHC(S, dim=C, branch=branch, forward_method_names=("forward",))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", [ours.HyperConnections, ours.mHC])
def test_low_precision_streams_keep_their_dtype(kind, dtype):
    module = randomised(kind(S, dim=C)).float()
    x, y = draw(B * S, 5, C), draw(B, 5, C, seed=1)
    truth = both(randomised(kind(S, dim=C)), x, y)
    for a, b in zip(both(module, x.to(dtype), y.to(dtype)), truth, strict=True):
        assert a.dtype == dtype
        assert (a - b).abs().max() < (0.1 if dtype == torch.bfloat16 else 1e-5) * b.abs().max()


def compiled_cases():
    yield "hc", lambda: ours.HyperConnections(S, dim=C, num_fracs=2, num_input_views=2)
    yield "hc channel first", lambda: ours.HyperConnections(S, dim=C, channel_first=True)
    yield "hc stats", lambda: ours.HyperConnections(S, dim=C, collect_stats=True)
    yield "fork", lambda: ours.HyperConnections(S, dim=C, mhc=True, mhc_residual_identity_mix=True)
    yield "mhc", lambda: ours.mHC(S, dim=C, sinkhorn_iters=3)
    yield "mhc proposals", lambda: ours.mHC(S, dim=C, num_dynamic_alpha_proposals=2)
    yield "mhc fractions", lambda: ours.mHC(S, dim=C, num_fracs=2, num_input_views=2)
    yield "v2 mixed", lambda: our_v2.mHC(S, dim=C, mix_streams_before_norm=True)
    yield "channel first", lambda: our_first.HyperConnections(S, dim=C)
    yield "branches", lambda: our_branches.HyperConnections(S, dim=C, num_branch_inputs=2)


CASES = dict(compiled_cases())


def case_step(module, x):
    u, add_residual = module(x)
    views = getattr(module, "num_input_views", 1)
    return u, add_residual((u if views == 1 else u.sum(0)).tanh())


def case_input(name):
    return draw(
        *((B, 5, S, C) if "v2" in name else (B * S, C, 5) if "first" in name else (B * S, 5, C))
    )


@pytest.mark.parametrize("name", CASES)
def test_compiles_whole_with_its_backward(name):
    module = randomised(CASES[name]())
    compiled = torch.compile(case_step, backend="aot_eager", fullgraph=True)
    x = case_input(name)
    assert_equal(run(module, compiled, [x]), run(module, case_step, [x]))


@pytest.mark.compile
@pytest.mark.parametrize("name", ["hc", "mhc", "v2 mixed"])
def test_compiles_with_inductor(name):
    module = randomised(CASES[name]())
    x = case_input(name)
    assert_equal(
        run(module, torch.compile(case_step, fullgraph=True), [x]), run(module, case_step, [x])
    )


def test_no_einops_at_run_time():
    code = (
        "import sys; sys.modules['einops'] = None\n"
        "from hc_compile.compat import hyper_connections as h, mhc_triton\n"
        "from hc_compile.compat.hyper_connections import mHCv2\n"
        "import torch; h.HyperConnections(2, dim=4)(torch.randn(2, 3, 4))\n"
        "assert not any(n == 'hyper_connections' for n in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=300)


BAD = [
    (lambda: ours.HyperConnections(0, dim=C), "num_residual_streams must be >= 1, got 0"),
    (lambda: ours.HyperConnections(S, dim=0), "dim must be >= 1, got 0"),
    (lambda: ours.HyperConnections(S, dim=C, num_fracs=5), "dim must be divisible by num_fracs"),
    (lambda: ours.HyperConnections(S, dim=C, num_input_views=0), "num_input_views must be >= 1"),
    (lambda: ours.HyperConnections(S, dim=C, mhc=True, num_fracs=2), "must be 1 with mhc=True"),
    (lambda: ours.HyperConnections(S, dim=C, residual_transform=nn.Identity()), "unless mhc=True"),
    (lambda: ours.HyperConnections(S, dim=C, mhc=True, mhc_h_res_proj="x"), "mhc_h_res_proj must"),
    (lambda: ours.HyperConnections(S, dim=C, mhc=True, sinkhorn_tau=0), "tau must be > 0"),
    (lambda: ours.mHC(S, dim=C, sinkhorn_iters=0), "sinkhorn_iters must be >= 1, got 0"),
    (
        lambda: ours.mHC(S, dim=C, log_domain_sinkhorn=True, residual_mix_constraint_fn=torch.exp),
        "log_domain_sinkhorn must be False",
    ),
    (
        lambda: our_v2.mHC(
            S, dim=C, use_triton_sinkhorn=True, residual_mix_constraint_fn=torch.exp
        ),
        "use_triton_sinkhorn must be False",
    ),
    (lambda: our_v2.sinkhorn_knopps(torch.zeros(2, 2), 0), "iters must be >= 1"),
    (lambda: our_first.HyperConnections(S, dim=C, channel_first=False), "channel_first must be"),
    (
        lambda: our_branches.HyperConnections(
            S, dim=C, num_branch_inputs=3, branch=[nn.Identity(), nn.Identity()]
        ),
        "num_branch_inputs must be divisible",
    ),
    (lambda: our_inputs.HyperConnections(S, dim=C, additional_input_paths=[0]), "additional_inp"),
    (
        lambda: ours.HyperConnections(S, dim=C)(torch.zeros(6, 5, C)),
        r"residuals must be \[\(b s\), \.\.\., d\] with s = 4, d = 12, got \[6, 5, 12\]",
    ),
    (
        lambda: ours.get_init_and_expand_reduce_stream_functions(S, add_stream_embed=True),
        "dim must be given",
    ),
    (
        lambda: ours.HyperConnections(
            S, dim=C, add_branch_out_to_residual=False
        ).depth_connection(torch.zeros(1, C), torch.zeros(S, C), beta=torch.zeros(S)),
        "add_branch_out_to_residual must be True",
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_errors(case):
    call, text = BAD[case]
    with pytest.raises(ValueError, match=text):
        call()
