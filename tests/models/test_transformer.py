"""The transformer: its twin at init, causality, gradients, tying, dtypes and errors."""

from dataclasses import replace

import pytest
import torch

import hc_compile as hc
from hc_compile.models import Transformer, TransformerConfig

SMALL = dict(vocab_size=37, dim=16, layers=2, heads=2, ffn_dim=24, max_seq_len=12)


def make(preset="mhc", seed=0, dtype=torch.float32, implementation="ops", **options):
    torch.manual_seed(seed)
    cfg = hc.HCConfig(dim=16, preset=preset, implementation=implementation)
    return Transformer(TransformerConfig(**{**SMALL, **options}, hc=cfg), dtype=dtype)


def tokens(rows=2, length=9, seed=0):
    return torch.randint(37, (rows, length), generator=torch.Generator().manual_seed(seed))


TWINS = [name for name, row in hc.PRESETS.items() if row.equals_residual]


@pytest.mark.parametrize("implementation", ["ops", "plain"])
@pytest.mark.parametrize("preset", TWINS)
def test_equals_its_residual_twin_at_init(preset, implementation):
    model = make(preset, dtype=torch.float64, implementation=implementation)
    twin = make("residual", dtype=torch.float64)
    missing, unexpected = twin.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert all(".hc_" in name for name in unexpected)
    inputs = tokens()
    torch.testing.assert_close(model(inputs), twin(inputs), rtol=0, atol=1e-12)


def test_leaves_its_twin_once_the_connections_move():
    model, inputs = make(dtype=torch.float64), tokens()
    before = model(inputs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hc_" in name:
                parameter.add_(torch.randn_like(parameter))
    assert (model(inputs) - before).abs().max() > 1e-3


@pytest.mark.parametrize("preset", list(hc.PRESETS))
def test_a_token_changes_nothing_before_it(preset):
    model, inputs = make(preset, dtype=torch.float64), tokens()
    changed = inputs.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 37
    out, other = model(inputs), model(changed)
    torch.testing.assert_close(out[:, :5], other[:, :5], rtol=0, atol=0)
    assert ((out - other)[:, 5:].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("preset", list(hc.PRESETS))
def test_every_parameter_learns_within_three_steps(preset):
    model = make(preset)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: dict[str, float] = dict.fromkeys(dict(model.named_parameters()), 0.0)
    for step in range(3):
        optimizer.zero_grad()
        model.loss(tokens(seed=step), tokens(seed=step + 10)).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                seen[name] = max(seen[name], float(parameter.grad.abs().max()))
        optimizer.step()
    assert [name for name, size in seen.items() if size == 0] == []


def test_tying_shares_one_weight():
    tied, untied = make(), make(tie_embeddings=False)
    assert untied.num_parameters() - tied.num_parameters() == 37 * 16
    tied.loss(tokens(), tokens(seed=1)).backward()
    # the head gives gradient to rows that no input token uses
    unused = [row for row in range(37) if row not in tokens()]
    assert (tied.embed.weight.grad[unused].abs().sum(-1) > 0).all()


def test_two_passes_learn_one_batch():
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model.loss(tokens(), tokens(seed=1))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_bf16_streams_keep_fp32_weights_and_stay_close():
    model = make()
    low = Transformer(replace(model.cfg, stream_dtype=torch.bfloat16))
    low.load_state_dict(model.state_dict())
    out = low(tokens())
    assert out.dtype == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in low.parameters())
    exact = model(tokens())
    assert (out.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_scaled_output_init_multiplies_only_output_projections():
    plain, scaled = make(), make(scale_output_init=True)
    for (name, before), (_, after) in zip(
        plain.named_parameters(), scaled.named_parameters(), strict=True
    ):
        factor = 2.0 if name.endswith("w_out") else 1.0  # sqrt(4 streams)
        torch.testing.assert_close(after, before * factor, msg=name)


def test_sublayers_are_numbered_through():
    torch.manual_seed(0)
    first, second = make().blocks
    one = hc.HyperConnection(first_config := make().cfg.hc, layer_index=1)
    three = hc.HyperConnection(first_config, layer_index=3)
    for layer, expected in ((first.hc_mlp, one), (second.hc_mlp, three)):
        for (name, value), (_, wanted) in zip(
            layer.named_parameters(), expected.named_parameters(), strict=True
        ):
            torch.testing.assert_close(value, wanted, msg=name)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(layers=0), "layers must be at least 1, got 0"),
        (dict(heads=3), "dim must be heads × an even head size, got dim 16, heads 3"),
        (dict(heads=16), "even head size"),
        (dict(dim=32), "hc.dim must be dim = 32, got 16"),
    ],
)
def test_config_errors(options, text):
    with pytest.raises(ValueError, match=text):
        make(**options)


def test_refuses_several_views():
    with pytest.raises(ValueError, match=r"hc\.views and hc\.branches must be 1"):
        replace(make().cfg, hc=hc.HCConfig(16, 4, views=2))


def test_forward_errors():
    model = make()
    with pytest.raises(TypeError, match="tokens must be int64 or int32"):
        model(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"tokens must be \[B, S\], got \[3\]"):
        model(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="max_seq_len = 12, got S = 13"):
        model(torch.ones(1, 13, dtype=torch.int64))


@pytest.mark.compile
def test_compiled_whole_model_equals_eager():
    inputs, targets = tokens(), tokens(seed=1)
    model = make(layers=1)
    model.loss(inputs, targets).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    logits = model(inputs).detach()
    model.zero_grad()
    torch._dynamo.reset()
    fused = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(fused(inputs), logits, rtol=1e-4, atol=1e-5)
    torch.nn.functional.cross_entropy(fused(inputs).flatten(0, 1), targets.flatten()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6, msg=name)
