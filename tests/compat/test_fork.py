"""The fork's `mhc=True`: static H_res, H_pre and H_post against float64, and that H_res learns."""

import pytest
import torch

from hc_compile.compat.hyper_connections import HyperConnections
from tests.compat.oracle import B, C, S, assert_equal, both, draw, randomised, run

CUBIC = (3.0, -3.2, 1.2)
SINKHORN = {"mhc": True, "sinkhorn_tau": 0.5, "sinkhorn_iters": 7}
ORTHO = {"mhc": True, "mhc_h_res_proj": "orthostochastic"}
OPTIONS = {
    "sinkhorn": SINKHORN,
    "sinkhorn mixed": SINKHORN | {"mhc_residual_identity_mix": True},
    "sinkhorn unwritten": SINKHORN | {"add_branch_out_to_residual": False},
    "ortho": ORTHO,
    "ortho cubic": ORTHO | {"ns_steps": 5, "ns_coeffs": CUBIC, "ns_eps": 1e-3},
    "ortho mixed": ORTHO | {"mhc_residual_identity_mix": True, "mhc_residual_alpha": 0.3},
}


def projected(logits, options):
    """H_res written out."""
    if options.get("mhc_h_res_proj") != "orthostochastic":
        z = logits / options["sinkhorn_tau"]
        for _ in range(options["sinkhorn_iters"]):
            z = z.log_softmax(1).log_softmax(0)  # rows, then columns
        return z.exp()
    steps = HyperConnections.__init__.__kwdefaults__["ns_coeffs"]
    if "ns_coeffs" in options:
        steps = [options["ns_coeffs"]] * options["ns_steps"]
    x = logits / (logits.square().sum().sqrt() + options.get("ns_eps", 1e-7))
    for a, b, c in steps:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.square()


def formula(options):
    def step(module, x, y):
        p = dict(module.named_parameters())
        h = projected(p["H_res_logits"], options)
        if "H_res_alpha_logit" in p:
            share = p["H_res_alpha_logit"].sigmoid()
            h = (1 - share) * torch.eye(S, dtype=h.dtype) + share * h
        streams = x.unflatten(0, (B, S))
        u = torch.einsum("s,bslc->blc", p["H_pre_logits"].softmax(0), streams)
        if not module.add_branch_out_to_residual:
            return u, y
        new = torch.einsum("st,bslc->btlc", h, streams)
        new = new + torch.einsum("s,blc->bslc", p["H_post_logits"].softmax(0), y)
        return u, new.flatten(0, 1)

    return step


@pytest.mark.parametrize("name", OPTIONS)
def test_static_form_against_float64(name):
    module = randomised(HyperConnections(S, dim=C, **OPTIONS[name]))
    inputs = [draw(B * S, 5, C, seed=60), draw(B, 5, C, seed=61)]
    assert_equal(run(module, both, inputs), run(module, formula(OPTIONS[name]), inputs))


@pytest.mark.parametrize("projection", ["sinkhorn", "orthostochastic"])
@pytest.mark.parametrize("mixed", [False, True])
def test_h_res_is_doubly_stochastic_and_learns(projection, mixed):
    module = HyperConnections(
        S, dim=C, mhc=True, mhc_h_res_proj=projection, mhc_residual_identity_mix=mixed,
        sinkhorn_iters=20, layer_index=1,
    )  # fmt: skip
    _, _, res = module.manifold.coefficients(module)
    assert res.min() >= 0
    for side in (-1, -2):
        assert (res.sum(side) - 1).abs().max() < 2e-3
    x, y = draw(B * S, 5, C).float(), draw(B, 5, C).float()
    out = both(module, x, y)[1]
    (grad,) = torch.autograd.grad((out * draw(*out.shape, seed=3)).sum(), module.H_res_logits)
    assert grad.abs().max() > 1e-5


def test_initial_logits_of_the_fork_have_no_gradient():
    """Why ours differ: −8/τ = −160 under exp in float32, and a Householder matrix squared."""
    fork = -8.0 * (1 - torch.eye(S))
    x, y = draw(B * S, 5, C).float(), draw(B, 5, C).float()
    module = HyperConnections(S, dim=C, mhc=True)
    with torch.no_grad():
        module.H_res_logits.copy_(fork)
    out = both(module, x, y)[1]
    (grad,) = torch.autograd.grad((out * draw(*out.shape, seed=3)).sum(), module.H_res_logits)
    assert grad.abs().max() == 0
    uniform = projected(fork.double(), ORTHO)
    assert (uniform - 1 / S).abs().max() < 1e-2


def test_identity_mix_starts_at_its_share():
    module = HyperConnections(S, dim=C, mhc=True, mhc_residual_identity_mix=True).double()
    torch.testing.assert_close(module.H_res_alpha_logit.sigmoid().item(), 0.01)


def test_residual_transform_acts_on_what_is_mixed():
    torch.manual_seed(0)
    transform = torch.nn.Linear(C, C)
    plain = randomised(HyperConnections(S, dim=C, mhc=True, layer_index=0))
    module = HyperConnections(S, dim=C, mhc=True, layer_index=0, residual_transform=transform)
    module = module.double()
    module.load_state_dict(plain.state_dict(), strict=False)
    x, y = draw(B * S, 5, C), draw(B, 5, C, seed=1)
    u, new = both(module, x, y)
    assert_equal([u, new], [both(plain, x, y)[0], both(plain, transform(x), y)[1]])


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("writes", [True, False])
def test_collect_stats(static, writes):
    module = HyperConnections(
        S, dim=C, mhc=static, collect_stats=True, add_branch_out_to_residual=writes
    )
    module(draw(B * S, 5, C).float())
    stats = module.last_stats
    assert all(v.ndim == 0 and not v.requires_grad for v in stats.values())
    if static:
        assert set(stats) - {"h_post_min"} == {
            "h_res_min", "h_res_row_sum", "h_res_col_sum", "h_pre_min",
        }  # fmt: skip
        torch.testing.assert_close(stats["h_res_row_sum"], torch.tensor(1.0))
    else:
        assert stats["alpha_branch_mean"] == 1 / S and stats["alpha_residual_mean"] == 1 / S
        assert ("beta_max" in stats) == writes
    assert ("h_post_min" in stats) == (static and writes)
    quiet = HyperConnections(S, dim=C, mhc=static)
    quiet(draw(B * S, 5, C).float())
    assert quiet.last_stats == {}
    quiet.collect_stats = True  # as the fork's training script sets it
    quiet(draw(B * S, 5, C).float())
    assert quiet.last_stats


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ns_coeffs": (CUBIC, CUBIC), "ns_steps": 3}, "ns_steps must be the number of ns_coeffs"),
        ({"ns_coeffs": (1.0, 2.0), "ns_steps": 3}, "ns_coeffs must hold"),
        ({"ns_steps": 0}, "ns_steps must be >= 1"),
        ({"mhc_residual_identity_mix": True, "mhc_residual_alpha": 1.0}, "must be in"),
    ],
)
def test_errors(options, text):
    with pytest.raises(ValueError, match=text):
        HyperConnections(S, dim=C, **ORTHO | options)
