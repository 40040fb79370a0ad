"""Layers against independent formulas in float64, and their errors."""

import pytest
import torch
import torch.nn.functional as F

from hc_compile.layers import RMSNorm, apply_rope, linear, rms_norm, rope_tables
from hc_compile.models.layers import CausalAttention, SwiGLU, causal_attention, swiglu


def randn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def test_rms_norm_matches_torch():
    x, weight = randn(3, 5, 7), randn(7, seed=1)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), F.rms_norm(x, (7,), weight, 1e-5))


def test_rms_norm_of_bf16_accumulates_wider():
    x = randn(4, 512, dtype=torch.bfloat16)
    weight = torch.ones(512)
    exact = F.rms_norm(x.double(), (512,), None, 1e-6)
    out = rms_norm(x, weight)
    assert out.dtype == torch.bfloat16
    # half a unit in the last place of bf16 is 2^-9 of the value
    assert ((out.double() - exact).abs() <= exact.abs() * 2**-8).all()


def test_rope_turns_pairs_by_position_times_frequency():
    cos, sin = rope_tables(9, 6, base=100.0, dtype=torch.float64)
    x = randn(2, 3, 9, 6)
    pairs = torch.complex(x[..., :3], x[..., 3:])
    angles = torch.arange(9.0, dtype=torch.float64)[:, None] * 100.0 ** (
        -torch.arange(3.0, dtype=torch.float64) / 3
    )
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    torch.testing.assert_close(apply_rope(x, cos, sin), expected)


def test_rope_scores_depend_on_distance_only():
    cos, sin = rope_tables(12, 8, dtype=torch.float64)
    query, key = randn(1, 1, 1, 8), randn(1, 1, 1, 8, seed=1)
    queries = apply_rope(query.expand(1, 1, 12, 8), cos, sin)
    keys = apply_rope(key.expand(1, 1, 12, 8), cos, sin)
    scores = (queries @ keys.mT)[0, 0]
    torch.testing.assert_close(scores[:-1, :-1], scores[1:, 1:])
    assert (scores[0, 0] - scores[0, 5]).abs() > 1e-3


def test_attention_matches_softmax_written_out():
    heads, S, C = 2, 5, 8
    x, w_qkv, w_out = randn(3, S, C), randn(3 * C, C, seed=1), randn(C, C, seed=2)
    cos, sin = rope_tables(S, C // heads, dtype=torch.float64)
    q, k, v = (
        part.reshape(3, S, heads, C // heads).transpose(1, 2)
        for part in (x @ w_qkv.T).split(C, dim=-1)
    )
    scores = apply_rope(q, cos, sin) @ apply_rope(k, cos, sin).mT / (C // heads) ** 0.5
    scores = scores.masked_fill(torch.ones(S, S).triu(1).bool(), float("-inf"))
    expected = (scores.softmax(-1) @ v).transpose(1, 2).reshape(3, S, C) @ w_out.T
    torch.testing.assert_close(causal_attention(x, w_qkv, w_out, cos, sin, heads), expected)


def test_swiglu_matches_formula():
    x, w_gate_up, w_down = randn(4, 6), randn(10, 6, seed=1), randn(6, 5, seed=2)
    gate, up = x @ w_gate_up[:5].T, x @ w_gate_up[5:].T
    expected = (gate / (1 + torch.exp(-gate)) * up) @ w_down.T
    torch.testing.assert_close(swiglu(x, w_gate_up, w_down), expected)


def test_linear_casts_the_weight_to_the_input():
    x, weight = randn(2, 4, dtype=torch.bfloat16), randn(3, 4, dtype=torch.float32)
    weight.requires_grad_()
    out = linear(x, weight)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: rms_norm(torch.ones(2, 3), torch.ones(4)), r"x must be \[..., 4\], got \[2, 3\]"),
        (lambda: RMSNorm(3)(torch.ones(2, 3, dtype=torch.int64)), "floating"),
        (lambda: rope_tables(4, 3), "head_dim must be even"),
        (lambda: rope_tables(0, 4), "positions must be at least 1, got 0"),
        (lambda: CausalAttention(10, 3), "heads must divide dim = 10, got 3"),
        (lambda: SwiGLU(4, 0), "hidden must be at least 1, got 0"),
        (
            lambda: apply_rope(torch.ones(1, 1, 5, 4), *rope_tables(4, 4)),
            r"must be \[S, D/2\] = \[5, 2\]",
        ),
        (
            lambda: CausalAttention(8, 2)(torch.ones(5, 8), *rope_tables(5, 4)),
            r"x must be \[B, S, C\], got \[5, 8\]",
        ),
    ],
)
def test_errors_name_what_was_expected(call, text):
    with pytest.raises((ValueError, TypeError), match=text):
        call()
