"""Stability monitors of the residual mix: spectral norm, gains, likeness of the streams.

    monitor.watch(model)          # off unless asked; a few small kernels a sublayer
    model(tokens)                 # compiled or not, checkpointed or not
    monitor.report(model)         # {"blocks.0.hc_attn": {"spectral": 1.0, ...}, "composite": …}

Every forward leaves res of some evenly spaced tokens in a buffer; all arithmetic on it happens
in float64 when somebody asks. Recomputing a forward writes the same values again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor, nn

from hc_compile.module import HyperConnection


class Monitor(nn.Module):
    """What one hyper-connection did in its last forward, at `tokens` evenly spaced tokens.

    Args:
        streams: n, or n·f where each stream has f fractions, which mix like streams.
        tokens: how many tokens are looked at; with fewer in a batch, some count twice.
        device: of the buffers, which no state dict holds.
    """

    res: Tensor
    cosine: Tensor
    seen: Tensor

    def __init__(
        self, streams: int, tokens: int = 256, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        if tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {tokens}")
        self.tokens = tokens
        size = (tokens, streams, streams)
        self.register_buffer("res", torch.zeros(size, device=device), persistent=False)
        self.register_buffer("cosine", torch.zeros(1, device=device), persistent=False)
        seen = torch.zeros(1, dtype=torch.bool, device=device)
        self.register_buffer("seen", seen, persistent=False)

    def _apply(self, fn: Callable, recurse: bool = True) -> Monitor:
        """Move, but keep float32: model.to(bfloat16) would round the matrices to 8 bits."""
        super()._apply(fn, recurse)
        self.res, self.cosine = self.res.float(), self.cosine.float()
        return self

    def forward(self, x: Tensor, res: Tensor) -> None:
        """Take note of streams x [..., n, C] and res [..., n, n] (or static [n, n])."""
        n = res.shape[-1]
        streams, mixes = x.detach().reshape(-1, n, x.shape[-1]), res.detach().reshape(-1, n, n)
        if streams.shape[0] == 0:
            return
        with torch.no_grad():
            place = torch.arange(self.tokens, device=x.device)
            self.res.copy_(mixes[place * mixes.shape[0] // self.tokens])
            some = streams[place * streams.shape[0] // self.tokens].float()
            unit = some / torch.linalg.vector_norm(some, dim=-1, keepdim=True).clamp_min(1e-30)
            # Σ_{i≠j} ⟨u_i, u_j⟩ = ‖Σ u_i‖² − Σ ‖u_i‖²
            pairs = unit.sum(-2).square().sum(-1) - unit.square().sum((-2, -1))
            self.cosine.copy_((pairs / max(n * (n - 1), 1)).mean())
            self.seen.fill_(True)

    def matrices(self) -> Tensor | None:
        """res [tokens, n, n] of the last forward in float64 on the CPU, None before the first."""
        return self.res.double().cpu() if bool(self.seen) else None

    def log_amax(self) -> float | None:
        """Log of the spectral norm of res, mean over tokens; None before the first forward."""
        mixes = self.matrices()
        return None if mixes is None else gains(mixes)["log_amax"]


def gains(res: Tensor) -> dict[str, float]:
    """How much matrices can amplify, each figure a mean over them.

    spectral = σ_max(res); log_amax = log(spectral); row_gain = max_i |Σ_j res_ij| (forward) and
    column_gain = max_j |Σ_i res_ij| (backward), the Amax gains of mHC (arXiv 2512.24880, 3.1).

    Args:
        res: [..., n, n].
    Returns: the four figures; log_amax is -inf for matrices of zeros.
    """
    spectral = torch.linalg.matrix_norm(res, ord=2).mean().item()
    return {
        "spectral": spectral,
        "log_amax": math.log(spectral) if spectral > 0 else -math.inf,
        "row_gain": res.sum(-1).abs().amax(-1).mean().item(),
        "column_gain": res.sum(-2).abs().amax(-1).mean().item(),
    }


def connections(model: nn.Module) -> dict[str, HyperConnection]:
    """Hyper-connections with more than one stream by name, in order of layer_index."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, HyperConnection) and module.coefficients is not None
    }
    return dict(sorted(found.items(), key=lambda item: item[1].layer_index))


def watch(model: nn.Module, tokens: int = 256) -> None:
    """Give every hyper-connection of `model` a Monitor (a new one if it had one).

    Args:
        model: any module; compiled code is compiled once more.
        tokens: see `Monitor`.
    Raises: ValueError when there is nothing to watch.
    """
    found = connections(model)
    if not found:
        raise ValueError("model must contain a HyperConnection with n > 1, got none")
    for connection in found.values():
        device = next(connection.parameters()).device
        connection.monitor = Monitor(connection.cfg.constraint.streams, tokens, device)


def unwatch(model: nn.Module) -> None:
    """Take every Monitor away."""
    for connection in connections(model).values():
        connection.monitor = None


def report(model: nn.Module) -> dict[str, dict[str, float]]:
    """`gains` and the mean cosine between streams of each watched sublayer, and "composite".

    The composite is `gains` of res_L ⋯ res_2 res_1, token by token, over all watched sublayers.
    Sublayers that have not run are left out.
    """
    found: dict[str, dict[str, float]] = {}
    every: list[Tensor] = []
    for name, connection in connections(model).items():
        monitor = connection.monitor
        mixes = monitor.matrices() if isinstance(monitor, Monitor) else None
        if mixes is not None:
            assert isinstance(monitor, Monitor)
            found[name] = gains(mixes) | {"similarity": monitor.cosine.item()}
            every.append(mixes)
    if every:
        found["composite"] = gains(reduce(lambda below, above: above @ below, every))
    return found
