"""Gradient checkpointing as a switch, initial weights, and what a training step will hold."""

from __future__ import annotations

import math

import torch
from torch import nn


class GradientCheckpointMixin:
    """`enable_gradient_checkpointing()` and its opposite for any module.

    They set `_gradient_checkpointing` on the module and on every submodule that has it; the
    module's forward decides what to checkpoint (torch.utils.checkpoint, use_reentrant=False).
    """

    _gradient_checkpointing: bool = False

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward."""
        self._set_gradient_checkpointing(True)

    def disable_gradient_checkpointing(self) -> None:
        """Keep activations."""
        self._set_gradient_checkpointing(False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether it is on."""
        return self._gradient_checkpointing

    def _set_gradient_checkpointing(self, enabled: bool) -> None:
        if not isinstance(self, nn.Module):
            raise TypeError(f"self must be an nn.Module too, got {type(self).__name__}")
        self._gradient_checkpointing = enabled
        for module in self.modules():
            if hasattr(module, "_gradient_checkpointing"):
                module._gradient_checkpointing = enabled  # type: ignore[assignment]


def init_weights_normal(module: nn.Module, std: float = 0.02) -> None:
    """Draw a Linear's, Embedding's or Conv1d's weight from N(0, std²) and zero its bias.

    For `model.apply(init_weights_normal)`; other modules stay as they are.
    """
    if not isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d):
        return
    nn.init.normal_(module.weight, std=std)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)  # type: ignore[arg-type]


RESIDUAL_WEIGHTS = ("o_proj", "out_proj", "w_out", "down")


@torch.no_grad()
def scale_residual_weights(
    module: nn.Module, n_layers: int, scale_factor: float | None = None
) -> None:
    """Multiply the weights that write to the residual stream by 1/√(2·n_layers) (GPT-2).

    Args:
        module: holds parameters whose names contain "o_proj", "out_proj", "w_out" or "down".
        n_layers: ≥ 1, two branches each.
        scale_factor: instead of 1/√(2·n_layers).
    Raises: ValueError when n_layers is not positive or no parameter has such a name.
    """
    if n_layers < 1:
        raise ValueError(f"n_layers must be at least 1, got {n_layers}")
    scale = 1 / math.sqrt(2 * n_layers) if scale_factor is None else scale_factor
    found = [
        parameter
        for name, parameter in module.named_parameters()
        if any(part in name for part in RESIDUAL_WEIGHTS)
    ]
    if not found:
        raise ValueError(f"module must have a parameter named like {RESIDUAL_WEIGHTS}, got none")
    for parameter in found:
        parameter.mul_(scale)
