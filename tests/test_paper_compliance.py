"""What the papers state, checked against what the code computes.

HC = arXiv 2409.19606, mHC = arXiv 2512.24880, mHC-lite = arXiv 2601.05732; RMSNorm = arXiv
1910.07467, RoPE = arXiv 2104.09864, SwiGLU = arXiv 2002.05202, GQA = arXiv 2305.13245.
"""

import math

import pytest
import torch
from torch import nn

import hc_compile as hc
from hc_compile.layers import (
    RotaryEmbedding,
    SwiGLUMLP,
    flexible_attention,
    fused_rms_norm,
    linear,
)
from hc_compile.models import TransformerWithHC

C = 16
DYNAMIC = ["dhc", "dhc-no-tanh"]


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def connection(preset, n=4, k=0, moved=False):
    layer = hc.HyperConnection(hc.HCConfig(C, n, preset), k, dtype=torch.float64)
    if moved:
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(randn(*p.shape, seed=k))
    return layer


def coefficients(layer, x):
    found = hc.functional.coefficients(x, *layer.coefficients(), layer.cfg.constraint)
    lead = x.shape[:-2]
    return [t.expand(*lead, *t.shape[-d:]) for t, d in zip(found, (1, 1, 2), strict=True)]


# Hyper-Connections


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("preset", ["shc", *DYNAMIC])
def test_hc_initial_matrices(preset, n):
    """Eq. 14: A_m = e_{k mod n}, A_r = I, B = 1, for any input, since W = 0."""
    for k in range(2 * n):
        pre, post, res = coefficients(connection(preset, n, k), randn(3, n, C))
        assert torch.equal(pre, torch.eye(n, dtype=torch.float64)[k % n].expand(3, n))
        assert torch.equal(post, torch.ones(3, n, dtype=torch.float64))
        assert torch.equal(res, torch.eye(n, dtype=torch.float64).expand(3, n, n))


def test_hc_initial_gates_and_projections():
    layer = connection("dhc")
    assert not layer.coefficients.phi.any()
    assert torch.allclose(layer.coefficients.alpha, torch.tensor(0.01, dtype=torch.float64))


@pytest.mark.parametrize("branch", [torch.tanh, torch.sin])
def test_hc_matrix_contains_the_residual_and_parallel_blocks(branch):
    """Section 3.2: with fixed matrices two sublayers are sequential, or run in parallel."""
    n, h = 2, randn(5, C)
    x = torch.stack([h, h], -2)
    second = torch.cos

    def sublayer(x, f, pre, post, res):
        return hc.functional.post(x, f(hc.functional.aggregate(x, pre)), post, res)

    e0, e1, ones = torch.eye(n)[0].double(), torch.eye(n)[1].double(), torch.ones(n).double()
    keep = torch.eye(n).double()
    # sequential: both read what was written
    out = sublayer(sublayer(x, branch, e0, ones, keep), second, e0, ones, keep)
    expected = h + branch(h)
    expected = expected + second(expected)
    assert torch.allclose(out.mean(-2), expected)
    # parallel: the first writes to one stream only, the second reads the other
    out = sublayer(sublayer(x, branch, e0, 2 * e0, keep), second, e1, 2 * e1, keep)
    assert torch.allclose(out.mean(-2), h + branch(h) + second(h))


def test_hc_parameters_of_olmo_1b():
    """Table: DHC×4 adds 0.033 % to OLMo-1B (16 layers of width 2048, 1.18e9 parameters)."""
    with torch.device("meta"):
        layer = hc.HyperConnection(hc.HCConfig(2048, 4, "dhc"))
    extra = 2 * 16 * sum(p.numel() for p in layer.parameters())
    assert extra / 1.177e9 == pytest.approx(0.00033, rel=0.03)


def test_hc_static_weights_are_not_decayed_and_outputs_are_drawn_wider():
    """Section 4: no weight decay on static matrices; std of output projections times √n."""
    torch.manual_seed(0)
    model = TransformerWithHC(11, 64, 1, 4, max_seq_length=4, expansion_rate=4)
    decay, keep = (group["params"] for group in hc.parameter_groups(model, 0.1))
    for layer in model.layers:
        c = layer.attention_hc.coefficients
        assert any(p is c.phi for p in decay)
        assert all(any(p is q for q in keep) for p in (c.bias, c.alpha))
        ratio = layer.attention.out_proj.weight.std() / layer.attention.qkv.weight.std()
        assert abs(ratio.item() / math.sqrt(4) - 1) < 0.1


def test_hc_tanh_bounds_what_the_input_adds():
    """Eq. 10–13: |dynamic part| ≤ s with tanh; without it grows with W."""
    x, found = randn(50, 4, C), {}
    for preset in DYNAMIC:
        layer = connection(preset)
        with torch.no_grad():
            layer.coefficients.phi.copy_(100 * randn(*layer.coefficients.phi.shape))
        post = coefficients(layer, x)[1]
        found[preset] = (post - 1).abs().max().item()
    assert found["dhc"] <= 0.01 + 1e-12
    assert found["dhc-no-tanh"] > 1


# mHC


@pytest.mark.parametrize("preset", ["mhc", "mhc-log"])
def test_mhc_coefficients(preset):
    """Eq. 5–8: one RMS norm over n·C, z = α·φv + b, pre = σ, post = 2σ, res by Sinkhorn."""
    layer, x = connection(preset, moved=True), randn(7, 4, C)
    phi, alpha, bias = layer.coefficients()
    flat = x.flatten(1)
    v = flat / (flat.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    z = v @ phi.T * torch.cat([alpha[i].expand(s) for i, s in enumerate((4, 4, 16))]) + bias
    pre, post, res = coefficients(layer, x)
    assert torch.allclose(pre, torch.sigmoid(z[:, :4]))
    assert torch.allclose(post, 2 * torch.sigmoid(z[:, 4:8]))
    m = torch.exp(z[:, 8:].unflatten(-1, (4, 4)))
    for _ in range(20):  # T_r(T_c(M)): columns, then rows
        m = m / m.sum(-2, keepdim=True)
        m = m / m.sum(-1, keepdim=True)
    assert torch.allclose(res, m)


@pytest.mark.parametrize(
    ("preset", "columns"),
    [
        ("mhc", 1e-2),
        ("mhc-log", 1e-2),
        ("mhc-lite", 1e-9),
        ("mhc-kron", 1e-9),
        ("mhc-ortho", 1e-9),
    ],
)
def test_mhc_manifold_and_its_closure(preset, columns):
    """Eq. 6: doubly stochastic, so the spectral norm is 1 and products stay on the manifold.

    Twenty iterations end on the rows, which are exact; the columns are what is left over.
    """
    product = torch.eye(4, dtype=torch.float64)
    for k in range(1, 9):
        layer = connection(preset, k=k)
        with torch.no_grad():
            layer.coefficients.phi.copy_(0.1 * randn(*layer.coefficients.phi.shape, seed=k))
            layer.coefficients.alpha.fill_(0.5)
        res = coefficients(layer, randn(7, 4, C, seed=k))[2]
        assert (res >= 0).all()
        product = res @ product
        for matrix in (res, product):
            assert (matrix.sum(-1) - 1).abs().max() < 1e-9
            assert (matrix.sum(-2) - 1).abs().max() < columns
            assert (torch.linalg.matrix_norm(matrix, ord=2) - 1).abs().max() < columns


def test_mhc_starts_with_gates_of_a_hundredth_and_twenty_iterations():
    layer = connection("mhc")
    assert torch.allclose(layer.coefficients.alpha, torch.tensor(0.01, dtype=torch.float64))
    assert layer.cfg.constraint.iterations == 20


def test_mhc_lite_needs_no_iteration():
    """Exactly doubly stochastic from n! logits, Birkhoff–von Neumann."""
    layer = connection("mhc-lite", moved=True)
    assert layer.cfg.constraint.sizes == (4, 4, 24)
    res = coefficients(layer, 10 * randn(7, 4, C))[2]
    for axis in (-1, -2):
        assert (res.sum(axis) - 1).abs().max() < 1e-12


# the layers around them


def test_rms_norm_is_invariant_to_scale():
    """RMSNorm, section 4: re-scaling the input changes nothing; re-centring does."""
    x, w = randn(3, 8), randn(8, seed=1)
    assert torch.allclose(fused_rms_norm(100 * x, w, 0.0), fused_rms_norm(x, w, 0.0))
    assert not torch.allclose(fused_rms_norm(x + 1, w, 0.0), fused_rms_norm(x, w, 0.0))


@pytest.mark.parametrize("interleaved", [True, False])
def test_rope_scores_depend_on_the_distance(interleaved):
    """RoPE, eq. 11: ⟨R_m q, R_n k⟩ is a function of m − n; rotations keep norms."""
    rope = RotaryEmbedding(8, 40, interleaved=interleaved).double()
    q, k = randn(1, 1, 1, 8).expand(1, 1, 40, 8), randn(1, 1, 1, 8, seed=1).expand(1, 1, 40, 8)
    scores = (rope(q) @ rope(k).mT)[0, 0]
    for distance in (0, 1, 7):
        line = scores.diagonal(distance)
        assert (line - line[0]).abs().max() < 1e-5
    assert torch.allclose(rope(q).norm(dim=-1), q.norm(dim=-1))


def test_swiglu_formula():
    """SwiGLU, eq. 5 without bias: (Swish₁(xW) ⊙ xV) W₂."""
    mlp, x = SwiGLUMLP(8, 12).double(), randn(3, 8)
    w, v = mlp.gate_up.weight.chunk(2)
    expected = linear(torch.sigmoid(x @ w.T) * (x @ w.T) * (x @ v.T), mlp.down.weight)
    assert torch.allclose(mlp(x), expected)


def test_grouped_queries_share_a_key_head():
    """GQA: H/G neighbouring query heads use one key head."""
    q, k, v = randn(1, 8, 5, 4), randn(1, 2, 5, 4, seed=1), randn(1, 2, 5, 4, seed=2)
    out = flexible_attention(q, k, v, is_causal=True)
    for head in range(8):
        one = slice(head // 4, head // 4 + 1)
        alone = flexible_attention(q[:, head : head + 1], k[:, one], v[:, one], is_causal=True)
        assert torch.allclose(out[:, head : head + 1], alone)


def test_single_stream_is_the_residual_network():
    """HC with n = 1 and B = A = 1 is x + F(x)."""
    layer, branch = connection("dhc", 1), nn.Linear(C, C).double()
    x = randn(3, 1, C)
    u, add_residual = layer(x)
    assert torch.equal(add_residual(branch(u))[:, 0], x[:, 0] + branch(x[:, 0]))
