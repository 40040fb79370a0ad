"""Fractions, views, branches, proposals, norms, mixing, dropout, pooling: all of them together."""

import itertools

import pytest
import torch

import hc_compile as hc
from tests.conftest import worst
from tests.test_presets import PRESETS, draw

DIM, N = 12, 2
FORMS = list(itertools.product((1, 2), (1, 2), (1, 3), (1, 2), ("rms", "layer"), (False, True)))


def config(name, fractions, views, branches, proposals, norm, mix, **more):
    return hc.HCConfig(
        DIM, N, name, fractions=fractions, views=views, branches=branches, proposals=proposals,
        norm=norm, mix_before_norm=mix, iterations=3, **more,
    )  # fmt: skip


def branch_of(cfg):
    """[..., (V,) C] to [..., (W,) C]."""

    def branch(u):
        u = u if cfg.views == 1 else u.sum(-2)
        scales = torch.arange(1.0, cfg.branches + 1, dtype=u.dtype)[:, None]
        y = torch.tanh(u.unsqueeze(-2) * scales)
        return y.squeeze(-2) if cfg.branches == 1 else y

    return branch


def build(cfg, seed=0):
    """Two sublayers with drawn parameters, in float64."""
    torch.manual_seed(seed)
    layers = [hc.HyperConnection(cfg, k, branch_of(cfg), dtype=torch.float64) for k in range(2)]
    net = torch.nn.ModuleList(layers)
    with torch.no_grad():
        for k, p in enumerate(net.parameters()):
            p.add_(0.3 * draw(*p.shape, seed=seed + k, dtype=torch.float64))
    return net


def step(net, x):
    for layer in net:
        x = layer(x)
    return hc.resolve(x)


def lazy_step(net, x):
    return step(net, hc.StreamState(x))


def run(function, net, x):
    x = x.detach().requires_grad_()
    out = function(net, x)
    leaves = [x, *net.parameters()]
    cot = draw(*out.shape, seed=9, dtype=torch.float64)
    return [out, *torch.autograd.grad(out, leaves, cot)]


def agree(a, b, limit=1e-9):
    for mine, truth in zip(a, b, strict=True):
        assert mine.shape == truth.shape and worst(mine, truth) < limit


@pytest.mark.parametrize("name", PRESETS)
def test_every_combination_works_or_is_refused(name):
    """Ops equal plain torch, eagerly and with the carried state, outputs and gradients."""
    x = draw(3, N, DIM, dtype=torch.float64)
    refused = 0
    for form in FORMS:
        try:
            cfg = config(name, *form)
        except ValueError as error:
            refused += 1
            assert "must be" in str(error)
            continue
        ops, plain = build(cfg), build(config(name, *form, implementation="plain"))
        truth = run(step, plain, x)
        agree(run(step, ops, x), truth)
        agree(run(lazy_step, ops, x), truth)
    limits = {"shc": 3 / 4, "mhc-v4.1": 3 / 4}
    assert refused == limits.get(name, 0) * len(FORMS) + (name == "shc") * len(FORMS) / 8


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, FORMS[(37 * k + 11) % len(FORMS)]) for k, name in enumerate(PRESETS) if name != "shc"]
    + [("shc", (2, 2, 3, 1, "rms", False)), ("fhc", (2, 2, 3, 2, "layer", True))],
)
def test_combinations_compile_whole(name, form):
    net = build(config(name, *form))
    x = draw(3, N, DIM, dtype=torch.float64)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    agree(run(compiled, net, x), run(step, net, x))


@pytest.mark.compile
def test_a_combination_compiles_with_inductor():
    net = build(config("fhc", 2, 2, 3, 2, "layer", True))
    x = draw(3, N, DIM, dtype=torch.float64)
    agree(run(hc.compile(step, fullgraph=True), net, x), run(step, net, x))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("name", ["dhc", "mhc", "mhc-ortho", "ihc"])
def test_every_fraction_reads_its_own_and_is_written_its_own(name, n):
    f = 3
    cfg = hc.HCConfig(DIM, n, name, fractions=f)
    layer = hc.HyperConnection(cfg, 1, dtype=torch.float64)
    with torch.no_grad():
        if layer.coefficients.phi is not None:
            layer.coefficients.phi.zero_()
    h = torch.eye(f, DIM // f, dtype=torch.float64).flatten().expand(2, DIM)
    u, add_residual = layer(hc.expand_streams(h, cfg))
    read = u.unflatten(-1, (f, -1))[0, :, :f]
    assert read.argmax(-1).tolist() == list(range(f))
    assert (read - read.diagonal().diag()).abs().max() < 0.03
    if name == "dhc":
        assert torch.equal(u, h)
    y = torch.zeros_like(u)
    y[..., : DIM // f] = 1
    change = add_residual(y) - add_residual(torch.zeros_like(y))
    assert change[..., : DIM // f].abs().min() > 0.9 and change[..., DIM // f :].abs().max() == 0


def test_fractions_of_mhc_are_doubly_stochastic():
    cfg = hc.HCConfig(DIM, 2, "mhc", fractions=3)
    layer = build(cfg)[0]
    x = draw(5, 6, DIM // 3, dtype=torch.float64)
    res = hc.functional.coefficients(x, *layer.coefficients(), cfg.constraint)[2]
    assert res.shape == (5, 6, 6)
    assert (res.sum(-1) - 1).abs().max() < 1e-9 and (res.sum(-2) - 1).abs().max() < 1e-3


def test_views_start_from_different_streams():
    cfg = hc.HCConfig(DIM, 4, "dhc", views=2)
    x = draw(3, 4, DIM)
    u, _ = hc.HyperConnection(cfg, layer_index=3)(x)
    assert torch.equal(u, x[:, [3, 0]])


def test_proposals_are_averaged_and_diverge():
    cfg = hc.HCConfig(DIM, 4, "mhc", proposals=2)
    layer = hc.HyperConnection(cfg, 1, dtype=torch.float64)
    phi, alpha, bias = layer.coefficients()
    x = draw(3, 4, DIM, dtype=torch.float64)
    alone = [hc.functional.coefficients(x, one, alpha, bias, cfg.constraint) for one in phi]
    both = hc.functional.coefficients(x, phi, alpha, bias, cfg.constraint)
    for a, b, mean in zip(*alone, both, strict=True):
        torch.testing.assert_close(mean, (a + b) / 2)
    assert not torch.equal(phi[0], phi[1])


def test_layer_norm_ignores_a_shift_of_every_stream():
    cfg = hc.HCConfig(DIM, 4, "dhc", norm="layer")
    layer = build(cfg)[0]
    x = draw(3, 4, DIM, dtype=torch.float64)
    made = [
        hc.functional.coefficients(each, *layer.coefficients(), cfg.constraint)
        for each in (x, x + draw(3, 4, 1, seed=1, dtype=torch.float64))
    ]
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(a, b)


def test_mixing_before_the_norm_starts_as_none():
    x = draw(3, 4, DIM)
    plain = hc.HyperConnection(hc.HCConfig(DIM, 4, "mhc-v4"))
    mixed = hc.HyperConnection(hc.HCConfig(DIM, 4, "mhc-v4", mix_before_norm=True))
    mixed.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(mixed(x)[0], plain(x)[0])
    decay, keep = hc.parameter_groups(mixed)
    assert any(p is mixed.coefficients.mix for p in keep["params"]) and len(decay["params"]) == 1


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("lazy", [False, True])
def test_dropout_of_the_written_streams(n, lazy):
    layer = hc.HyperConnection(hc.HCConfig(DIM, n, "mhc", dropout=0.5), branch=torch.tanh)
    plain = hc.HyperConnection(hc.HCConfig(DIM, n, "mhc"), branch=torch.tanh)
    x = 1 + draw(50, n, DIM).abs()

    def call(layer):
        return hc.resolve(layer(hc.StreamState(x) if lazy else x))

    kept = call(layer) != 0
    assert 0.4 < kept.float().mean() < 0.6
    torch.manual_seed(0)
    out = call(layer)
    torch.testing.assert_close(out[out != 0], 2 * call(plain)[out != 0])
    assert torch.equal(call(layer.eval()), call(plain))


def test_attention_pool():
    cfg = hc.HCConfig(DIM, 4, "mhc", reduce="attention")
    reduce = hc.StreamReduce(cfg, dtype=torch.float64)
    x = draw(3, 4, DIM, dtype=torch.float64)
    with torch.no_grad():
        reduce.attention.weight.copy_(draw(DIM, DIM, seed=1, dtype=torch.float64))
    logits = x @ reduce.attention.weight.T
    torch.testing.assert_close(reduce(x), (x * logits.softmax(1)).sum(1))
    h = draw(3, DIM)
    torch.testing.assert_close(hc.StreamReduce(cfg)(hc.expand_streams(h, cfg)), h)
    with pytest.raises(ValueError, match="use StreamReduce"):
        hc.reduce_streams(x, cfg)


def test_bad_branch_output_with_fractions():
    layer = hc.HyperConnection(hc.HCConfig(DIM, 2, "mhc", fractions=2))
    _, add_residual = layer(draw(3, 2, DIM))
    with pytest.raises(ValueError, match=r"y must be \[\.\.\., C\] = \[3, 12\], got \[3, 6\]"):
        add_residual(draw(3, 6))


@pytest.mark.interpreter
@pytest.mark.parametrize(("name", "fractions"), [("fhc", 4), ("mhc", 2), ("mhc-ortho", 2)])
@pytest.mark.parametrize(("proposals", "norm"), [(1, "rms"), (2, "layer")])
def test_interpreted_kernels(name, fractions, proposals, norm):
    """Fractions, views and branches in the Triton kernels, float32 against float64."""
    cfg = config(name, fractions, 2, 3, proposals, norm, False)
    net, x = build(cfg), draw(3, N, DIM, dtype=torch.float64)
    truth = run(step, net, x)
    x = x.float().requires_grad_()
    out = step(net.float(), x)
    cot = draw(*out.shape, seed=9, dtype=torch.float64).float()
    found = [out, *torch.autograd.grad(out, [x, *net.parameters()], cot)]
    agree([t.double() for t in found], truth, 2e-2 if "ortho" in name else 1e-3)
