"""Megatron's layer and block against its formulas written out in float64."""

import pytest
import torch
from torch import nn

from hc_compile import monitor
from hc_compile.compat import megatron
from hc_compile.compat.megatron import Block, Layer, from_flags

H, N = 12, 4
FORK = dict(hidden_size=H, use_hyper_connections=True, num_residual_streams=N)
MHC = FORK | dict(use_manifold_hyper_connections=True)
MAIN = dict(hidden_size=H, enable_mhc_connections=True, mhc_num_residual_streams=N)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Branch(nn.Module):
    """y and a bias, as Megatron's linear layers hand them back; mixes along s (attention)."""

    def __init__(self, seed, mixes):
        super().__init__()
        self.weight = nn.Parameter(randn(H, H, seed=seed) / H**0.5)
        self.bias, self.mixes = nn.Parameter(randn(H, seed=seed + 1)), mixes

    def forward(self, x, scale=1.0):
        x = x.cumsum(0) * scale if self.mixes else x
        return torch.tanh(x @ self.weight.T), self.bias


def layer(flags, number=1, **options):
    made = Layer(
        flags,
        Branch(10 * number, True),
        Branch(10 * number + 5, False),
        number,
        input_layernorm=nn.RMSNorm(H),
        pre_mlp_layernorm=nn.LayerNorm(H),
        **options,
    ).double()
    for name, p in made.named_parameters():
        if "hyper_conn" in name:
            with torch.no_grad():
                p.copy_(randn(*p.shape, seed=number))
    return made


def block(flags, layers=3):
    return Block(flags, [layer(flags, k + 1) for k in range(layers)], nn.LayerNorm(H)).double()


def mappings(x, c, iterations, inside, eps):
    """H_pre, H_post, H_res of streams x [s, b, n·h] as megatron/core has them."""
    phi, alpha, bias = c.phi, c.alpha, c.bias
    mean_square = x.square().mean(-1, keepdim=True)
    r = 1 / (mean_square + eps).sqrt() if inside else 1 / (mean_square.sqrt() + eps)
    gates = torch.cat([alpha[0].expand(N), alpha[1].expand(N), alpha[2].expand(N * N)])
    z = r * (x @ phi.T) * gates + bias
    pre, post = z[..., :N].sigmoid() + 1e-6, 2 * z[..., N : 2 * N].sigmoid()
    m = z[..., 2 * N :].unflatten(-1, (N, N)).softmax(-1) + 1e-6
    m = m / (m.sum(-2, keepdim=True) + 1e-6)
    for _ in range(iterations - 1):
        m = m / (m.sum(-1, keepdim=True) + 1e-6)
        m = m / (m.sum(-2, keepdim=True) + 1e-6)
    return pre, post, m


def written_out(model, hidden, iterations=20, inside=False, eps=1e-6):
    """A block of mHC layers: expand by copying, H_resᵀ x + H_post y, contract by the mean."""
    x = hidden.repeat(1, 1, N)
    for one in model.layers:
        for site, norm, branch in (
            (one.hyper_conn_attn, one.input_layernorm, one.self_attention),
            (one.hyper_conn_mlp, one.pre_mlp_layernorm, one.mlp),
        ):
            pre, post, res = mappings(x, site.coefficients, iterations, inside, eps)
            streams = x.unflatten(-1, (N, H))
            y, bias = branch(norm((pre.unsqueeze(-1) * streams).sum(-2)))
            mixed = torch.einsum("sbij,sbic->sbjc", res, streams)
            x = (mixed + post.unsqueeze(-1) * (y + bias).unsqueeze(-2)).flatten(-2)
    return model.final_layernorm(x.unflatten(-1, (N, H)).mean(-2))


@pytest.mark.parametrize("rms", [{}, dict(mhc_norm_eps=1e-2, mhc_norm_eps_inside_sqrt=True)])
@pytest.mark.parametrize("iterations", [1, 20])
def test_block_computes_megatrons_formulas(iterations, rms):
    model = block(from_flags(MAIN, mhc_sinkhorn_iterations=iterations, **rms))
    hidden, cot = randn(5, 2, H).requires_grad_(), randn(5, 2, H, seed=1)
    leaves = [hidden, *model.parameters()]
    options = (iterations, bool(rms), rms.get("mhc_norm_eps", 1e-6))
    out, expected = model(hidden), written_out(model, hidden, *options)
    assert (out - expected).abs().max() < 1e-10
    pairs = zip(
        torch.autograd.grad(out, leaves, cot),
        torch.autograd.grad(expected, leaves, cot),
        strict=True,
    )
    for a, b in pairs:
        assert (a - b).abs().max() <= 1e-8 * b.abs().max() + 1e-10


def test_initial_values_are_megatrons():
    flags = from_flags(MAIN | dict(hidden_size=256), mhc_init_gating_factor=0.03)
    torch.manual_seed(0)
    c = megatron.HyperConnection(flags.hc, 0).coefficients
    assert torch.equal(c.alpha, torch.full((3,), 0.03)) and not c.bias.any()
    bound = (6 / (4 * 256 + 24)) ** 0.5  # of Xavier's uniform
    assert abs(c.phi.std().item() / (bound / 3**0.5) - 1) < 0.02


def test_seed_loop_runs_as_it_stands(capsys):
    model = block(from_flags(MHC))

    def loop():
        # After a forward pass, get log_amax from mHC layers
        for layer in model.layers:
            if hasattr(layer, "hyper_conn_attn") and layer.hyper_conn_attn is not None:
                log_amax = layer.hyper_conn_attn.get_log_amax()
                if log_amax is not None:
                    print(f"Layer {layer.layer_number} attention log_amax: {log_amax:.4f}")
        return capsys.readouterr().out.splitlines()

    assert loop() == []
    model(randn(5, 2, H))
    lines = loop()
    assert [line.split()[1] for line in lines] == ["1", "2", "3"]
    assert all(abs(float(line.split()[-1])) < 0.05 for line in lines)  # doubly stochastic
    assert set(monitor.report(model)) >= {"layers.2.hyper_conn_mlp", "composite"}
    grown = model.layers[1].hyper_conn_attn
    grown.monitor(randn(5, N, H), 3 * torch.eye(N).expand(5, N, N))
    assert grown.get_log_amax() == pytest.approx(torch.tensor(3.0).log().item())
    monitor.unwatch(model)
    model(randn(5, 2, H))
    assert loop() == []


@pytest.mark.parametrize("flags", [dict(hidden_size=H), FORK | dict(num_residual_streams=1)])
def test_one_stream_is_exactly_the_plain_network(flags):
    flags = from_flags(flags | dict(hyper_connections_dropout=0.5))
    model, hidden = block(flags), randn(5, 2, H)
    assert model.layers[0].hyper_conn_attn is None and model.layers[0].hyper_conn_mlp is None
    x = hidden
    for one in model.layers:
        y, bias = one.self_attention(one.input_layernorm(x))
        x = x + (y + bias)
        y, bias = one.mlp(one.pre_mlp_layernorm(x))
        x = x + (y + bias)
    assert torch.equal(model(hidden), model.final_layernorm(x))


def test_mtp_layers_are_left_alone():
    flags, hidden = from_flags(MHC, hyper_connections_dropout=0.5), randn(5, 2, H)
    plain, mtp = layer(from_flags(dict(hidden_size=H))), layer(flags, is_mtp_layer=True)
    assert mtp.hyper_conn_attn is None and mtp.hyper_conn_mlp is None
    assert torch.equal(mtp(hidden), plain(hidden))
    with pytest.raises(ValueError, match="layers must all have the block's 4 streams"):
        Block(flags, [mtp])


def test_layouts_and_arguments():
    flags = from_flags(MHC)
    hidden = randn(5, 2, H)
    streams = megatron.expand(hidden, flags.hc)
    assert torch.equal(streams, hidden.repeat(1, 1, N))
    assert torch.allclose(megatron.contract(streams, flags.hc), hidden)
    one = layer(flags)
    assert one(streams).shape == (5, 2, N * H)
    assert not torch.equal(one(streams, 2.0), one(streams, scale=1.0))
    with pytest.raises(ValueError, match=r"x must be \[s, b, n·h\] = \[s, b, 48\]"):
        one(hidden)
    with pytest.raises(ValueError, match="layer_number must be at least 1, got 0"):
        layer(flags, 0)


def test_dropout_of_streams_and_of_branches():
    streams = randn(40, 2, N * H)
    for name, rate in (("hyper_connections_dropout", 0.5), ("hidden_dropout", 1.0)):
        one = layer(from_flags(MHC, **{name: rate}))
        torch.manual_seed(0)
        out = one(streams)
        if rate == 0.5:
            assert 0.4 < (out == 0).double().mean() < 0.6
        else:  # nothing is written: only the mix is left
            one.self_attention = one.mlp = nn.Identity()
            assert torch.equal(out, one(streams))
        assert torch.equal(one.eval()(streams), one(streams))
        assert (one(streams) != 0).all()


@pytest.mark.parametrize("layers", [None, 1, 2])
def test_recompute_groups_change_nothing(layers, monkeypatch):
    options = dict(recompute_granularity="selective", recompute_modules=["mhc"])
    plain = block(from_flags(MAIN))
    again = block(from_flags(MAIN, mhc_recompute_layer_num=layers, **options))
    calls = []
    groups = megatron.Block._run
    monkeypatch.setattr(
        megatron.Block, "_run", lambda self, *args: calls.append(args[0]) or groups(self, *args)
    )
    hidden, cot, results = randn(5, 2, H), randn(5, 2, H, seed=1), []
    for model in (plain, again):
        calls.clear()
        out = model(hidden)
        forward = len(calls)
        out.backward(cot)
        results.append([out, *(p.grad for p in model.parameters())])
    expected = {None: 1, 1: 3, 2: 2}[layers]
    assert forward == expected and len(calls) == 2 * expected
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_recompute_keeps_products_and_recomputes_the_rest():
    """A forward saves less with recompute on, and the backward runs no product of it again."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = {}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen[str(func)] = self.seen.get(str(func), 0) + 1
            return func(*args, **(kwargs or {}))

    options = dict(recompute_granularity="selective", recompute_modules=["mhc"])
    counts = []
    for more in ({}, options):
        model, hidden = block(from_flags(MAIN, **more)), randn(5, 2, H)
        with Count() as count:
            model(hidden).sum().backward()
        counts.append(count.seen)
    plain, again = counts
    assert again["aten.mm.default"] == plain["aten.mm.default"]
    assert again["hc.pre.default"] == 2 * plain["hc.pre.default"]


@pytest.mark.parametrize("recompute", [False, True])
def test_compiles_without_a_graph_break(recompute):
    options = dict(recompute_granularity="selective", recompute_modules=["mhc"])
    model = block(from_flags(MAIN, **(options if recompute else {})), layers=2)
    hidden, cot = randn(5, 2, H), randn(5, 2, H, seed=1)
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        out = run(hidden)
        out.backward(cot)
        results.append([out, *(p.grad.clone() for p in model.parameters())])
        log_amax = model.layers[0].hyper_conn_attn.get_log_amax()
        results[-1].append(torch.tensor(log_amax, dtype=torch.float64))
        model.layers[0].hyper_conn_attn.monitor.res.zero_()
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 1e-9 * a.abs().max() + 1e-12


def test_fork_starts_as_the_plain_network():
    for flags in (FORK, MHC, MHC | dict(mhc_log_domain_sinkhorn=True)):
        flags = from_flags(flags)
        plain = block(from_flags(dict(hidden_size=H)))
        model = block(flags)
        for number, one in enumerate(model.layers):
            fresh = Layer(flags, nn.Identity(), nn.Identity(), number + 1).double()
            one.hyper_conn_attn, one.hyper_conn_mlp = fresh.hyper_conn_attn, fresh.hyper_conn_mlp
        assert (model(randn(5, 2, H)) - plain(randn(5, 2, H))).abs().max() < 1e-10


def test_against_megatron_core_where_it_has_the_module():
    """Its own HyperConnectionModule, where a megatron-core that holds it is installed."""
    module = pytest.importorskip("megatron.core.transformer.hyper_connection")
    config_class = pytest.importorskip("megatron.core.transformer").TransformerConfig
    options = dict(num_residual_streams=N, enable_hyper_connections=True)
    config = config_class(num_layers=1, hidden_size=H, num_attention_heads=2, **options)
    theirs = module.HyperConnectionModule(config=config, layer_number=1)
    ours = megatron.HyperConnection(from_flags(config).hc, 0)
    with torch.no_grad():
        ours.coefficients.phi.copy_(theirs.mapping_proj.weight)
        theirs.bias.copy_(randn(len(theirs.bias)))
        ours.coefficients.bias.copy_(theirs.bias)
    x = randn(5, 2, N * H, dtype=torch.float32)
    pre, post, res = theirs.compute_mappings(x)
    u, add_residual = ours(x)
    torch.testing.assert_close(u, theirs.aggregate(x, pre), rtol=1e-4, atol=1e-5)
    y = randn(5, 2, H, dtype=torch.float32)
    written = (post.unsqueeze(-1) * y.unsqueeze(-2)).flatten(-2)
    expected = theirs.apply_h_res(res, x) + written
    torch.testing.assert_close(add_residual(y), expected, rtol=1e-4, atol=1e-5)
