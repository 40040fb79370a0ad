"""mHC-Triton's names: every formula against plain float64, causality, learning, errors."""

import warnings

import pytest
import torch
from torch import nn

from hc_compile.compat import mhc_triton as mhc
from tests.conftest import outputs_and_gradients, worst

N, D = 4, 6


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def agree(ours, truth, inputs, limit=1e-10):
    """Outputs and every gradient under random cotangents."""
    a, b = (outputs_and_gradients(f, inputs) for f in (ours, truth))
    for mine, right in zip(a[0] + a[1], b[0] + b[1], strict=True):
        assert mine.shape == right.shape and worst(mine, right) < limit


def sinkhorn(matrix, iterations, eps):
    """The published iteration, written out."""
    matrix = matrix.abs() + eps
    for _ in range(iterations):
        matrix = matrix / (matrix.sum(-1, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    return matrix


def weights(x, phi, bias, gates, iterations, eps, n):
    """pre, post and res of flattened streams."""
    z = (x @ phi) / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    gain = torch.cat([g.expand(k) for g, k in zip(gates, (n, n, n * n), strict=True)])
    pre, post, res = (gain * z + bias).split((n, n, n * n), -1)
    pre = pre.sigmoid()
    pre = pre / (pre.sum(-1, keepdim=True) + eps)
    return pre, 2 * post.sigmoid(), sinkhorn(res.unflatten(-1, (n, n)), iterations, eps)


@pytest.mark.parametrize("n", [1, 2, 4, 7])
@pytest.mark.parametrize(("iterations", "eps"), [(20, 1e-8), (3, 1e-2), (0, 1e-8)])
def test_sinkhorn_knopp(n, iterations, eps):
    agree(
        lambda m: (mhc.sinkhorn_knopp(m, iterations, eps),),
        lambda m: (sinkhorn(m, iterations, eps),),
        [draw(5, n, n)],
    )


def test_sinkhorn_knopp_is_doubly_stochastic():
    res = mhc.sinkhorn_knopp(draw(64, 4, 4).abs() + 0.1, num_iters=20)
    assert (res.sum(-1) - 1).abs().max() < 1e-5 and (res.sum(-2) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("per_token", [False, True])
def test_fused_stream_mix_and_add_residual(per_token):
    lead = (2, 3) if per_token else (2,)
    token = "bs" if per_token else "b"

    def truth(x, pre, res, post, y):
        u = torch.einsum(f"{token}n,bsnd->bsd", pre, x)
        mixed = torch.einsum(f"{token}nm,bsmd->bsnd", res, x)
        return u, mixed, mixed + torch.einsum(f"{token}n,bsd->bsnd", post, y)

    def ours(x, pre, res, post, y):
        u, mixed = mhc.fused_stream_mix(x, pre, res)
        return u, mixed, mhc.fused_add_residual(mixed, y, post)

    shapes = [(2, 3, N, D), (*lead, N), (*lead, N, N), (*lead, N), (2, 3, D)]
    agree(ours, truth, [draw(*s, seed=k) for k, s in enumerate(shapes)])


@pytest.mark.parametrize("n", [1, 3, 4])
def test_fused_dynamic_weights(n):
    count = n * n + 2 * n
    inputs = [draw(5, n * D), draw(n * D, count, seed=1), draw(count, seed=2)]
    inputs += [draw(1, seed=3 + k) for k in range(3)]
    agree(
        lambda x, phi, b, *g: mhc.fused_dynamic_weights(x, phi, b, *g, 7, 1e-3),
        lambda x, phi, b, *g: weights(x, phi, b, g, 7, 1e-3, n),
        inputs,
    )


def randomised(module, seed=0):
    with torch.no_grad():
        for k, p in enumerate(module.parameters()):
            p.copy_(draw(*p.shape, seed=seed + k))
    return module


def layer_truth(layer, pooled):
    """The layer written out, as a function of streams, branch output and its parameters."""
    names = [name for name, _ in layer.named_parameters()]

    def truth(x, y, *values):
        p = dict(zip(names, values, strict=True))
        bias = torch.cat([p["H_pre_base"], p["H_post_base"], p["H_res_base"].flatten()])
        if layer.dynamic:
            source = (x.mean(1, keepdim=True) if pooled else x).flatten(-2)
            gates = p["alpha_pre"], p["alpha_post"], p["alpha_res"]
            pre, post, res = weights(source, p["phi"], bias, gates, 20, 1e-6, N)
        else:
            pre, post = p["H_pre_base"].sigmoid(), p["H_post_base"].sigmoid()
            pre = pre / (pre.sum() + 1e-6)
            res = sinkhorn(p["H_res_base"], 20, 1e-6)
        u = (pre.unsqueeze(-1) * x).sum(-2)
        return u, res @ x + post.unsqueeze(-1) * y.unsqueeze(-2)

    return truth


@pytest.mark.parametrize(("dynamic", "pooled"), [(True, False), (True, True), (False, False)])
@pytest.mark.filterwarnings("ignore:pool_sequence")
def test_layer_against_float64(dynamic, pooled):
    layer = mhc.HyperConnection(D, N, 2, dynamic, pool_sequence=pooled).double()
    randomised(layer)
    names = [name for name, _ in layer.named_parameters()]

    def ours(x, y, *values):
        def run(x, y):
            u, add_residual = layer(x)
            return u, add_residual(y)

        wrapper = _Call(layer, run)
        return torch.func.functional_call(
            wrapper, {f"layer.{k}": v for k, v in zip(names, values, strict=True)}, (x, y)
        )

    inputs = [draw(2, 3, N, D, seed=90), draw(2, 3, D, seed=91)]
    agree(ours, layer_truth(layer, pooled), inputs + [p.detach() for p in layer.parameters()])


class _Call(nn.Module):
    def __init__(self, layer, run):
        super().__init__()
        self.layer, self.run = layer, run

    def forward(self, *args):
        return self.run(*args)


def test_quick_start_of_its_readme():
    hc = mhc.HyperConnection(dim=512, num_streams=4, dynamic=True)
    H = torch.randn(2, 16, 4, 512)
    branch_input, add_residual = hc(H)
    assert branch_input.shape == (2, 16, 512)
    assert add_residual(branch_input).shape == H.shape


def test_per_token_by_default_and_causal():
    layer = randomised(mhc.HyperConnection(D)).float()
    x = draw(2, 9, N, D, dtype=torch.float32)
    other = x.clone()
    other[:, 5:] += 1
    for k in range(2):
        a, b = layer(x)[k], layer(other)[k]
        if k:
            a, b = a(x[..., 0, :]), b(x[..., 0, :])
        assert torch.equal(a[:, :5], b[:, :5]) and not torch.equal(a[:, 5:], b[:, 5:])


def test_pooling_warns_and_is_not_causal():
    with pytest.warns(UserWarning, match="not causal"):
        layer = mhc.HyperConnection(D, pool_sequence=True)
    randomised(layer)
    x = draw(2, 9, N, D, dtype=torch.float32)
    other = x.clone()
    other[:, 5:] += 1
    assert not torch.equal(layer(x)[0][:, :5], layer(other)[0][:, :5])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mhc.HyperConnection(D)


def test_h_res_can_learn():
    """At an exact identity |z| has no derivative, so res would stay fixed; ours moves."""
    layer = mhc.HyperConnection(D).double()
    x = draw(2, 3, N, D, seed=4)

    def gradient():
        u, add_residual = layer(x)
        out = add_residual(u)
        return torch.autograd.grad((out * draw(*out.shape, seed=5)).sum(), layer.H_res_base)[0]

    off = ~torch.eye(N, dtype=torch.bool)
    assert gradient()[off].abs().min() > 1e-3
    with torch.no_grad():
        layer.H_res_base.copy_(torch.eye(N))
    assert (gradient()[off] == 0).all()


def test_init_weights_fills_a_layer_from_the_meta_device():
    with torch.device("meta"):
        layer = mhc.HyperConnection(D, layer_idx=2)
    layer.to_empty(device="cpu").init_weights()
    fresh = mhc.HyperConnection(D, layer_idx=2)
    for a, b in zip(layer.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)
    assert fresh.H_pre_base.argmax() == 2


@pytest.mark.parametrize("dynamic", [True, False])
def test_compiles_whole_with_its_backward(dynamic):
    layer = randomised(mhc.HyperConnection(D, dynamic=dynamic)).double()

    def step(x, y):
        u, add_residual = layer(x)
        return u, add_residual(u.tanh() + y)

    inputs = [draw(2, 3, N, D, seed=1), draw(2, 3, D, seed=2)]
    agree(torch.compile(step, backend="aot_eager", fullgraph=True), step, inputs)


@pytest.mark.compile
def test_compiles_with_inductor():
    layer = randomised(mhc.HyperConnection(D)).float()

    def step(x, y):
        u, add_residual = layer(x)
        return (add_residual(u.tanh() + y),)

    inputs = [t.float() for t in (draw(2, 3, N, D, seed=1), draw(2, 3, D, seed=2))]
    agree(torch.compile(step, fullgraph=True), step, inputs, 1e-4)


BAD = [
    (lambda: mhc.HyperConnection(0), ValueError, "dim must be >= 1, got 0"),
    (lambda: mhc.HyperConnection(8, 0), ValueError, "num_streams must be >= 1, got 0"),
    (lambda: mhc.HyperConnection(8, layer_idx=-1), ValueError, "layer_idx must be >= 0"),
    (lambda: mhc.HyperConnection(8, sinkhorn_iters=-1), ValueError, "iterations must be >= 0"),
    (lambda: mhc.HyperConnection(8, dynamic=False, pool_sequence=True), ValueError, "pool_seq"),
    (lambda: mhc.HyperConnection(8)(torch.zeros(2, 3, 8)), ValueError, "x must be"),
    (lambda: mhc.sinkhorn_knopp(torch.zeros(3, 4)), ValueError, "logits must be"),
    (
        lambda: mhc.fused_stream_mix(torch.zeros(2, 3, 4, 8), torch.zeros(3, 4), torch.eye(4)),
        ValueError,
        r"H_pre must be \[b, \.\.\.\] = \[2, 4\], got \[3, 4\]",
    ),
    (
        lambda: mhc.fused_add_residual(
            torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 8), torch.zeros(2, 3, 5)
        ),
        ValueError,
        "H_post must be",
    ),
    (
        lambda: mhc.fused_dynamic_weights(
            torch.zeros(2, 8), torch.zeros(8, 9), torch.zeros(9), *[torch.ones(1)] * 3
        ),
        ValueError,
        "bias must be",
    ),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD)
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.interpreter
@pytest.mark.parametrize("n", [3, 4])
def test_interpreted_kernels(n):
    """Its three operations in their Triton kernels, float32 against float64."""
    inputs = [draw(2, 3, n, 33), draw(2, 3, 33, seed=1), draw(2, n, seed=2), draw(2, n, n, seed=3)]
    layer = randomised(mhc.HyperConnection(33, n))

    def step(x, y, post, res):
        u, mixed = mhc.fused_stream_mix(x, post, mhc.sinkhorn_knopp(res, 3))
        v, add_residual = layer.to(x.dtype)(x)
        return u, mhc.fused_add_residual(mixed, y, post), v, add_residual(y)

    wide = outputs_and_gradients(step, inputs)
    narrow = outputs_and_gradients(step, [t.float() for t in inputs])
    for a, b in zip(narrow[0] + narrow[1], wide[0] + wide[1], strict=True):
        assert worst(a, b) < 2e-4
