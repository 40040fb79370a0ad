"""Initial weights and their scale by depth."""

import math

import pytest
import torch
from torch import nn

from hc_compile.layers import SwiGLUMLP, init_weights_normal, scale_residual_weights


def test_initial_weights():
    torch.manual_seed(0)
    linear, conv = nn.Linear(64, 64), nn.Conv1d(8, 64, 8)
    model = nn.Sequential(linear, nn.Embedding(64, 64), conv, nn.LayerNorm(64))
    model.apply(init_weights_normal)
    for module in model[:3]:
        assert abs(module.weight.std().item() / 0.02 - 1) < 0.1
    assert not linear.bias.any() and not conv.bias.any()
    assert torch.equal(model[3].weight, torch.ones(64))


def test_residual_weights_are_scaled_by_depth():
    mlp = SwiGLUMLP(4, 8)
    before = {name: p.detach().clone() for name, p in mlp.named_parameters()}
    scale_residual_weights(mlp, 8)
    assert torch.equal(mlp.gate_up.weight, before["gate_up.weight"])
    torch.testing.assert_close(mlp.down.weight, before["down.weight"] / 4)
    scale_residual_weights(mlp, 8, scale_factor=2.0)
    torch.testing.assert_close(mlp.down.weight, before["down.weight"] / 2)


def test_default_scale_is_one_over_root_two_layers():
    mlp = SwiGLUMLP(2, 2)
    nn.init.ones_(mlp.down.weight)
    scale_residual_weights(mlp, 5)
    assert mlp.down.weight[0, 0].item() == pytest.approx(1 / math.sqrt(10))


def test_errors():
    with pytest.raises(ValueError, match="module must have a parameter named"):
        scale_residual_weights(nn.Linear(2, 2), 1)
    with pytest.raises(ValueError, match="n_layers must be at least 1, got 0"):
        scale_residual_weights(SwiGLUMLP(2, 2), 0)
