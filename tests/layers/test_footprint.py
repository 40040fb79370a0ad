"""The memory estimate against what the allocator hands out in the same step."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import hc_compile as hc
from hc_compile.layers import compute_memory_footprint
from hc_compile.models import Transformer, TransformerConfig, TransformerWithHC


def with_hc(streams, checkpointed=False):
    model = TransformerWithHC(1000, 64, 3, 4, max_seq_length=128, expansion_rate=streams)
    if checkpointed:
        model.enable_gradient_checkpointing()
    return model


def transformer(preset):
    options = dict(vocab_size=500, dim=64, layers=3, heads=4, ffn_dim=192, max_seq_len=128)
    return Transformer(TransformerConfig(**options, hc=hc.HCConfig(64, preset=preset)))


def measured_mb(step):
    """Peak of the CPU allocator's balance during a step, from the profiler's own events."""
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    balance = peak = 0
    for event in events:
        if event.name() == "[memory]":
            balance += event.nbytes()
            peak = max(peak, balance)
    return peak / 1e6


MODELS = {
    "residual": lambda: transformer("residual"),
    "mhc": lambda: transformer("mhc"),
    "dhc": lambda: with_hc(4),
    "one stream": lambda: with_hc(1),
    "dhc, checkpointed": lambda: with_hc(4, checkpointed=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_estimate_is_within_15_percent_of_the_peak(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    tokens = torch.randint(500, (4, 128))

    def step():
        model.zero_grad(set_to_none=True)
        out = model(tokens)
        torch.nn.functional.cross_entropy(out.flatten(0, 1), tokens.flatten()).backward()

    found = compute_memory_footprint(model, batch_size=4, seq_len=128)
    growth = found["estimated_activation_mb"] + found["gradients_mb"]
    assert abs(growth / measured_mb(step) - 1) < 0.15
    count = sum(p.numel() for p in model.parameters()) * 4e-6
    assert found["parameters_mb"] == pytest.approx(count)
    assert found["optimizer_mb"] == pytest.approx(2 * count)
    whole = found["total_static_mb"] + found["optimizer_mb"] + growth
    assert found["estimated_training_mb"] == pytest.approx(whole)


def test_runs_nothing_for_real():
    """The model keeps its gradients, and sizes far beyond the memory are no matter."""
    model = with_hc(4)
    found = compute_memory_footprint(model, batch_size=32768, seq_len=128)
    assert all(p.grad is None for p in model.parameters())
    assert found["estimated_training_mb"] > 100_000
    more = compute_memory_footprint(model, batch_size=65536, seq_len=128)
    ratio = more["estimated_activation_mb"] / found["estimated_activation_mb"]
    assert ratio == pytest.approx(2, rel=0.01)


def test_checkpointing_shows():
    plain, again = (
        compute_memory_footprint(with_hc(4, on), 16, 128)["estimated_activation_mb"]
        for on in (False, True)
    )
    assert again < 0.7 * plain


def test_other_inputs_losses_and_optimisers():
    model = torch.nn.Linear(8, 3)
    model.bias.requires_grad_(False)
    found = compute_memory_footprint(
        model,
        inputs=(torch.zeros(5, 8),),
        loss=lambda out: out.square().mean(),
        optimizer_states=0,
    )
    assert found["optimizer_mb"] == 0
    assert found["gradients_mb"] == pytest.approx(24 * 4e-6)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        compute_memory_footprint(model, batch_size=0)
