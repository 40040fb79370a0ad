"""TransformerWithHC sees what its masks allow, and the same through a cache."""

import pytest
import torch
from torch import nn

from hc_compile.models import TransformerLayerWithHC, generate
from hc_compile.models.with_hc_layer import attention_bias
from tests.models.cases import VARIANTS, ids, make, randn


@pytest.mark.parametrize("name", VARIANTS)
def test_a_token_changes_nothing_before_it(name):
    model, inputs = make(moved=True, **VARIANTS[name]), ids()
    changed = inputs.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 37
    out, other = model(inputs), model(changed)
    assert torch.equal(out[:, :5], other[:, :5])
    assert ((out - other)[:, 5:].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_seen_by_nobody(side):
    model = make(moved=True, dtype=torch.float64)
    tokens, mask = ids(), torch.ones(2, 9, dtype=torch.int64)
    gap = slice(0, 3) if side == "left" else slice(6, 9)
    real = slice(3, 9) if side == "left" else slice(0, 6)
    mask[1, gap] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    out = model(tokens, mask, positions)
    assert out.isfinite().all()
    alone = model(tokens[1:, real])
    torch.testing.assert_close(out[1:, real], alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(out[:1], model(tokens[:1]), rtol=0, atol=1e-12)
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_layer_masks_are_those_of_multihead_attention():
    """Bool, floating, padding and causal masks against torch's own module, same weights."""
    layer = TransformerLayerWithHC(16, 2, 32, dropout=0.0).double()
    torch_attention = nn.MultiheadAttention(16, 2, batch_first=True, dtype=torch.float64)
    attention = layer.attention
    torch_attention.load_state_dict(
        {
            "in_proj_weight": attention.qkv.weight,
            "in_proj_bias": attention.qkv.bias,
            "out_proj.weight": attention.out_proj.weight,
            "out_proj.bias": attention.out_proj.bias,
        }
    )
    x = randn(3, 5, 16)
    causal = torch.ones(5, 5).triu(1).bool()
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 4:], padding[2, 3:] = True, True
    bias = randn(5, 5, seed=2)
    per_row = torch.stack([causal, causal.flip(0, 1), torch.zeros_like(causal)])
    for mask, pad, is_causal, same in (
        (causal, None, False, causal),
        (None, None, True, causal),
        (causal, padding, False, causal),
        (bias, None, False, bias),
        (bias, None, True, bias.masked_fill(causal, float("-inf"))),
        (per_row, None, False, per_row.repeat_interleave(2, 0)),
        (None, padding, False, None),
    ):
        given = attention(x, mask, pad, is_causal, None, 0)
        expected = torch_attention(x, x, x, key_padding_mask=pad, attn_mask=same)[0]
        rows = slice(None) if pad is None else ~pad  # a padding position also sees itself here
        torch.testing.assert_close(given[rows], expected[rows])


def test_padding_rows_see_themselves():
    mask = attention_bias(None, torch.tensor([[True, True, False]]), 3, 3)
    assert mask.int().tolist() == [[[[1, 0, 1], [0, 1, 1], [0, 0, 1]]]]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("cuts", [(9,), (1,) * 9, (4, 3, 2)])
def test_cache_equals_the_whole_context(name, cuts):
    model = make(moved=True, dtype=torch.float64, **VARIANTS[name])
    inputs, cache, parts, at = ids(), model.new_cache(2), [], 0
    for cut in cuts:
        parts.append(model(inputs[:, at : at + cut], cache=cache))
        at += cut
    torch.testing.assert_close(torch.cat(parts, 1), model(inputs), rtol=0, atol=1e-12)


def test_cached_batch_with_left_padding():
    model = make(moved=True, dtype=torch.float64)
    inputs, mask = ids(), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    whole, cache = model(inputs, mask, positions), model.new_cache(2)
    first = model(inputs[:, :6], mask[:, :6], positions[:, :6], cache=cache)
    rest = model(inputs[:, 6:], mask, positions[:, 6:], cache=cache)
    torch.testing.assert_close(torch.cat((first, rest), 1), whole, rtol=0, atol=1e-12)


def test_generation_with_and_without_cache_agree():
    model = make(moved=True, dtype=torch.float64).eval()
    for options in (dict(temperature=0.0), dict(seed=3, top_k=5)):
        cached = model.generate(ids(length=3), 7, **options)
        assert cached.shape == (2, 10)
        assert cached.equal(generate(model, ids(length=3), 7, max_seq_len=12, **options))


def test_a_cache_that_was_reset_starts_anew():
    model, inputs = make(moved=True, dtype=torch.float64), ids()
    cache = model.new_cache(2)
    model(ids(seed=3), cache=cache)
    cache.reset(0)
    model(inputs[:, :4], cache=cache)
    model(ids(length=3, seed=4), cache=cache)
    cache.reset(4)
    rest = model(inputs[:, 4:], cache=cache)
    torch.testing.assert_close(rest, model(inputs)[:, 4:], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="length must be a number where all rows go in step"):
        cache.reset(torch.tensor([1, 2]))
