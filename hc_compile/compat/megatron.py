"""Megatron's hyper-connections: its flags, its layer around attention and MLP, its block.

    flags = megatron.from_flags(transformer_config)        # flags -> HCConfig and what is beside
    layer = megatron.Layer(flags, attention, mlp, layer_number=1)
    block = megatron.Block(flags, layers)                  # [s, b, h] -> [s, b, h]

Between layers the streams are [s, b, n·h], stream by stream. Both flag sets are read: the fork's
(`use_hyper_connections`, …) and Megatron-LM's (`enable_mhc_connections`, …).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import hc_compile as hc
from hc_compile.compat.megatron_flags import Flags, from_flags
from hc_compile.monitor import Monitor

__all__ = ["Block", "Flags", "HyperConnection", "Layer", "contract", "expand", "from_flags"]


def expand(hidden: Tensor, cfg: hc.HCConfig) -> Tensor:
    """[s, b, h] -> streams [s, b, n·h], n copies."""
    return hc.expand_streams(hidden, cfg).flatten(-2)


def contract(hidden: Tensor, cfg: hc.HCConfig) -> Tensor:
    """Streams [s, b, n·h] -> [s, b, h], their mean."""
    return hc.reduce_streams(hidden.unflatten(-1, (cfg.n, cfg.dim)), cfg)


class HyperConnection(hc.HyperConnection):
    """`hc_compile.HyperConnection` on [s, b, n·h] that watches its residual mix from the start."""

    def __init__(self, cfg: hc.HCConfig, layer_index: int, **options: Any) -> None:
        super().__init__(cfg, layer_index, **options)
        assert self.coefficients is not None
        self.monitor = Monitor(cfg.n, device=self.coefficients.bias.device)

    def forward(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Streams [s, b, n·h] -> (u [s, b, h], add_residual: y [s, b, h] -> [s, b, n·h])."""
        n, width = self.cfg.n, self.cfg.dim
        if x.shape[-1] != n * width:
            raise ValueError(f"x must be [s, b, n·h] = [s, b, {n * width}], got {list(x.shape)}")
        u, add_residual = super().forward(x.unflatten(-1, (n, width)))
        return u, lambda y: add_residual(y).flatten(-2)

    def get_log_amax(self) -> float | None:
        """Log of the spectral norm of H_res, mean over tokens; None before the first forward.

        Also None once `monitor.unwatch` took the monitor away.
        """
        return self.monitor.log_amax() if isinstance(self.monitor, Monitor) else None


class Layer(nn.Module):
    """Pre-norm attention and MLP between streams, as a Megatron TransformerLayer.

    Args:
        flags: from `from_flags`.
        self_attention: (hidden [s, b, h], *args, **kwargs) -> y or (y, bias).
        mlp: hidden [s, b, h] -> y or (y, bias).
        layer_number: from 1, as Megatron counts.
        input_layernorm, pre_mlp_layernorm: before the branches; None leaves the input as it is.
        is_mtp_layer: a multi-token-prediction layer, which stays a plain residual.
        device: of the hyper-connections' parameters, float32.

    `hyper_conn_attn` and `hyper_conn_mlp` are None where the layer is a plain residual.
    """

    def __init__(
        self,
        flags: Flags,
        self_attention: nn.Module,
        mlp: nn.Module,
        layer_number: int = 1,
        *,
        input_layernorm: nn.Module | None = None,
        pre_mlp_layernorm: nn.Module | None = None,
        is_mtp_layer: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if layer_number < 1:
            raise ValueError(f"layer_number must be at least 1, got {layer_number}")
        self.flags, self.layer_number = flags, layer_number
        self.input_layernorm = nn.Identity() if input_layernorm is None else input_layernorm
        self.self_attention = self_attention
        self.pre_mlp_layernorm = nn.Identity() if pre_mlp_layernorm is None else pre_mlp_layernorm
        self.mlp = mlp
        plain = is_mtp_layer or flags.hc.n == 1
        first = 2 * (layer_number - 1)
        sites = [
            None if plain else HyperConnection(flags.hc, first + k, device=device) for k in (0, 1)
        ]
        self.hyper_conn_attn, self.hyper_conn_mlp = sites

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Streams [s, b, n·h] ([s, b, h] where plain) -> the same; arguments go to attention."""
        hidden_states = self._sublayer(
            self.hyper_conn_attn,
            hidden_states,
            lambda u: self.self_attention(self.input_layernorm(u), *args, **kwargs),
        )
        return self._sublayer(
            self.hyper_conn_mlp, hidden_states, lambda u: self.mlp(self.pre_mlp_layernorm(u))
        )

    def _sublayer(self, site: HyperConnection | None, x: Tensor, branch: Callable) -> Tensor:
        """Read, run the branch, add the bias that it hands back, drop out, write."""
        u, add_residual = (x, lambda y: x + y) if site is None else site(x)
        out = branch(u)
        y, bias = out if isinstance(out, tuple) else (out, None)
        y = y if bias is None else y + bias
        x = add_residual(F.dropout(y, self.flags.hidden_dropout, self.training))
        if site is None or not self.flags.stream_dropout:
            return x
        return F.dropout(x, self.flags.stream_dropout, self.training)


class Block(nn.Module):
    """Expand, layers, contract, as a Megatron TransformerBlock.

    With `recompute_modules` holding "mhc", groups of `mhc_recompute_layer_num` layers recompute
    hyper-connections and element-wise work in the backward and keep products and attention.

    Args:
        flags: from `from_flags`.
        layers: of `Layer`.
        final_layernorm: after the contraction, or None.
    """

    def __init__(
        self, flags: Flags, layers: list[Layer], final_layernorm: nn.Module | None = None
    ) -> None:
        super().__init__()
        if any((layer.hyper_conn_attn is None) != (flags.hc.n == 1) for layer in layers):
            raise ValueError(f"layers must all have the block's {flags.hc.n} streams")
        self.flags = flags
        self.layers = nn.ModuleList(layers)
        self.final_layernorm = nn.Identity() if final_layernorm is None else final_layernorm

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[s, b, h] -> [s, b, h]; further arguments go to every layer's attention."""
        cfg = self.flags.hc
        x = hidden_states if cfg.n == 1 else expand(hidden_states, cfg)
        group = self.flags.recompute_layers or len(self.layers)
        for start in range(0, len(self.layers), group):
            if self.flags.recompute and torch.is_grad_enabled():
                x = checkpoint(
                    self._run,
                    start,
                    group,
                    x,
                    *args,
                    use_reentrant=False,
                    context_fn=_keep_products,
                    **kwargs,
                )
            else:
                x = self._run(start, group, x, *args, **kwargs)
        return self.final_layernorm(x if cfg.n == 1 else contract(x, cfg))

    def _run(self, start: int, group: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for layer in self.layers[start : start + group]:
            x = layer(x, *args, **kwargs)
        return x


KEPT = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product", "_flash_attention")


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = str(op).removeprefix("aten.").split(".")[0]
    keep = name in KEPT or name.startswith(KEPT[-2:])
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_products() -> tuple:
    return create_selective_checkpoint_contexts(_policy)
