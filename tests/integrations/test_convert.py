"""hc.convert: equal at the start in value and gradient, learns from there, runs as before."""

import re

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import hc_compile as hc
from tests.conftest import worst
from tests.integrations.cases import (
    FAMILIES,
    TEXT,
    TWINS,
    build,
    config,
    converted,
    inputs,
    move,
    output,
    output_and_gradients,
)
from tests.passes.harness import with_passes


@pytest.fixture(params=FAMILIES)
def model(request):
    return build(request.param)


@pytest.mark.parametrize(
    ("family", "preset"),
    [(f, p) for f in FAMILIES for p in TWINS if f in ("gpt2", "llama") or p in ("mhc", "shc")],
)
def test_output_and_gradients_equal_the_originals(family, preset):
    model = build(family)
    ours = converted(model, preset=preset)
    (out, grads), (other, others) = output_and_gradients(model), output_and_gradients(ours)
    assert worst(other, out) <= 1e-9
    for name, grad in grads.items():
        assert worst(others[name], grad) <= 1e-9, name


@pytest.mark.parametrize("options", [dict(reduce="attention"), dict(expand="embedding"),
                                     dict(streams=2, mix_before_norm=True)])  # fmt: skip
def test_options_that_keep_the_start(options):
    model = build("llama")
    assert worst(output(converted(model, **options)), output(model)) <= 1e-9


def test_dropout_stays_where_it_was(model):
    """In training both draw the same masks in the same order."""
    ours, outs = converted(model), []
    for each in (model.train(), ours.train()):
        torch.manual_seed(0)
        outs.append(output(each))
    assert worst(outs[1], outs[0]) <= 1e-9


@pytest.mark.parametrize("preset", ["mhc", "dhc", "mhc-lite", "shc"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "vit"])
def test_connections_learn_within_three_steps_and_the_loss_falls(family, preset):
    model = converted(build(family, torch.float32), preset=preset)
    given = inputs(model)
    targets = given if hasattr(model, "config") else torch.tensor([1, 4])
    optimizer = torch.optim.AdamW(hc.parameter_groups(model), lr=3e-3)
    names = [name for name, _ in model.named_parameters() if "hc_" in name]
    seen, losses = dict.fromkeys(names, 0.0), []
    for step in range(12):
        optimizer.zero_grad()
        loss = F.cross_entropy(output(model, given).flatten(0, -2), targets.flatten())
        loss.backward()
        losses.append(loss.item())
        for name, parameter in model.named_parameters():
            if name in seen and step < 3:
                seen[name] = max(seen[name], float(parameter.grad.abs().max()))
        optimizer.step()
    assert names and [name for name, size in seen.items() if size == 0] == []
    assert losses[-1] < 0.8 * losses[0]


def test_keys_references_and_ties_stay(model):
    named, keys = dict(model.named_parameters()), list(model.state_dict())
    assert hc.convert(model, config()) is model
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in named.items())
    extra = [key for key in model.state_dict() if key not in keys]
    assert len(extra) == 2 * 2 * 3  # two layers of two sites: φ, α and b
    assert all(re.search(r"\.[01]\.hc_(attn|mlp)\.coefficients\.\w+$", key) for key in extra)


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "vit"])
def test_checkpoints_load_both_ways(family):
    original, ours = build(family), move(converted(build(family)))
    fresh = converted(build(family, seed=1))
    fresh.load_state_dict(ours.state_dict())
    assert torch.equal(output(fresh), output(ours))
    fresh = converted(build(family, seed=1))
    missing, unexpected = fresh.load_state_dict(original.state_dict(), strict=False)
    assert not unexpected and all(".hc_" in key for key in missing)
    assert worst(output(fresh), output(original)) <= 1e-9
    missing, unexpected = build(family).load_state_dict(ours.state_dict(), strict=False)
    assert not missing and all(".hc_" in key for key in unexpected)


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_saves_as_transformers_does(family, tmp_path):
    ours = move(converted(build(family)))
    ours.save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    fresh = hc.convert(plain.eval(), config())
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert torch.equal(output(fresh), output(ours))
    assert fresh.lm_head.weight is fresh.get_input_embeddings().weight


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_is_the_same(family, cache):
    model = build(family)
    ours, given = converted(model), inputs(model, 6)
    options = dict(max_new_tokens=8, do_sample=False, cache_implementation=cache)
    options["disable_compile"] = True
    assert torch.equal(ours.generate(given, **options), model.generate(given, **options))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_decoding_with_cache_equals_the_whole(family):
    model, given = move(converted(build(family))), inputs(build(family))
    first = model(given[:, :6], use_cache=True)
    rest = model(given[:, 6:], past_key_values=first.past_key_values, use_cache=True)
    both = torch.cat([first.logits, rest.logits], 1)
    assert worst(both, output(model, given)) <= 1e-10


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(family, reentrant):
    model = move(converted(build(family)))
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    out, grads = output_and_gradients(model.train())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    other, others = recomputed(model) if reentrant else output_and_gradients(model)
    assert worst(other, out) <= 1e-12
    for name, grad in grads.items():
        assert worst(others[name], grad) <= 1e-12, name


def recomputed(model):
    """`output_and_gradients` by backward(), which alone serves reentrant checkpoints."""
    out = output(model)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    out.backward(cotangent)
    return out.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_one_graph_forward_and_backward(family):
    model = move(converted(build(family)))
    expected = output_and_gradients(model)
    compiled = torch.compile(lambda given: output(model, given), fullgraph=True,
                             backend="aot_eager")  # fmt: skip
    out = compiled(inputs(model))
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(out, list(named.values()), cotangent)
    assert worst(out, expected[0]) <= 1e-9
    for name, grad in zip(named, grads, strict=True):
        assert worst(grad, expected[1][name]) <= 1e-9, name


@pytest.mark.parametrize("family", ["gpt2", "llama", "vit"])
def test_every_seam_fuses(family):
    """Four sublayers: the first reads and writes one stream, the last is only averaged.

    Llama's norm narrows to float32, the one folded into a read keeps float64.
    """
    model, counts = move(converted(build(family))), {}
    compiled = with_passes(lambda given: output(model, given), counts=counts)
    assert worst(compiled(inputs(model)), output(model)) <= (1e-6 if family == "llama" else 1e-9)
    assert counts["post_pre"] == 3 and "pre" not in counts and counts["post"] == 1


@pytest.mark.compile
def test_hc_compile_serves_a_converted_model():
    model = move(converted(build("llama", torch.float32), preset="shc"))
    compiled = hc.compile(lambda given: output(model, given), fullgraph=True)
    assert worst(compiled(inputs(model)), output(model)) <= 1e-4


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_hidden_states_between_layers_are_streams(family):
    model = build(family)
    ours = converted(model)
    given = inputs(model)
    theirs = model(given, output_hidden_states=True).hidden_states
    first, streams, last = ours(given, output_hidden_states=True).hidden_states
    assert torch.equal(first, theirs[0]) and worst(last, theirs[2]) <= 1e-9
    assert streams.shape == (2, 10, 4, 16)
    assert worst(hc.reduce_streams(streams, config()), theirs[1]) <= 1e-9


def test_connections_are_float32_on_their_layers_device():
    model = hc.convert(build("llama", torch.bfloat16), config())
    dtypes = {("hc_" in name, p.dtype) for name, p in model.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    assert output(model).dtype == torch.bfloat16
    exact, plain = output(build("llama")), output(build("llama", torch.bfloat16))
    assert worst(output(model), exact) <= 2 * worst(plain, exact) + 1e-2
    with torch.device("meta"):
        ours = hc.convert(transformers.AutoModelForCausalLM.from_config(TEXT["llama"]()), config())
    assert all(parameter.is_meta for parameter in ours.parameters())


def test_connections_follow_the_layers_mode():
    model = converted(build("gpt2"), dropout=0.5)
    assert not any(part.training for part in model.modules())
    assert torch.equal(output(model), output(model))


def test_sublayers_are_numbered_through():
    layers = converted(build("llama")).model.layers
    numbers = [(layer.hc_attn.layer_index, layer.hc_mlp.layer_index) for layer in layers]
    assert numbers == [(0, 1), (2, 3)]
