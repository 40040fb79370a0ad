"""Other kernels for the same sublayer, called where they are installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec

import torch
from torch import Tensor, nn


class LigerSublayer(nn.Module):
    """Liger-Kernel's mHC functions around the shared branch; φ in bf16, its fastest form."""

    def __init__(self, shape, iterations: int, device: str):
        super().__init__()
        from liger_kernel.ops import mhc

        self.mhc, self.iterations = mhc, iterations
        n, wide = shape.streams, shape.streams * shape.width
        count = n * n + 2 * n
        phi = torch.randn(wide, count, device=device) * wide**-0.5
        self.phi = nn.Parameter(phi.to(torch.bfloat16))
        self.bias = nn.Parameter(torch.randn(count, device=device))
        self.gates = nn.ParameterList(
            nn.Parameter(torch.tensor(1.0, device=device)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Streams [T, n, C] -> the same."""
        options = (True, self.iterations, 1e-6, 0.0, 1e-6, 2.0)
        pre, post, res = self.mhc.LigerMHCCoeffsFunction.apply(
            x, self.phi, self.bias, *self.gates, *options
        )
        u = self.mhc.LigerMHCPreFunction.apply(x, pre)
        return self.mhc.LigerMHCPostResFunction.apply(x, torch.ops.hc_bench.branch(u), post, res)


class TransformerEngineSublayer(nn.Module):
    """Transformer Engine's Triton functions; its streams lie innermost, [T, 1, C, n]."""

    def __init__(self, shape, iterations: int, device: str):
        super().__init__()
        from transformer_engine.pytorch.triton import mhc

        if iterations != 20:
            raise ValueError(f"iterations must be 20 for this peer, got {iterations}")
        self.mhc = mhc
        n, wide = shape.streams, shape.streams * shape.width
        count = n * n + 2 * n
        self.phi = nn.Parameter(torch.randn(count, wide, device=device) * wide**-0.5)
        self.alpha = nn.Parameter(torch.ones(3, device=device))
        self.bias = nn.Parameter(torch.randn(1, count, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Streams [T, n, C], taken as [T, 1, C, n]: only time is looked at."""
        n = x.shape[1]
        streams = x.view(x.shape[0], 1, x.shape[2], n)
        u, post, res = self.mhc.mhc_generate_mix_and_aggregate(
            streams, self.phi, self.alpha, self.bias
        )
        y = torch.ops.hc_bench.branch(u)
        return self.mhc.mhc_fused_expand_combine(y, None, post, streams, res, n).view_as(x)


class TileKernelsSublayer(nn.Module):
    """TileKernels' functions: one fused kernel without grad, one per step with it."""

    def __init__(self, shape, iterations: int, device: str):
        super().__init__()
        from tile_kernels.modeling.mhc import functional

        self.functional, self.iterations = functional, iterations
        self.streams = shape.streams
        n, wide = shape.streams, shape.streams * shape.width
        count = n * n + 2 * n
        self.phi = nn.Parameter(torch.randn(count, wide, device=device) * wide**-0.5)
        self.alpha = nn.Parameter(torch.ones(3, device=device))
        self.bias = nn.Parameter(torch.randn(count, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Streams [T, n, C] -> the same."""
        streams = x.unsqueeze(0)
        u, (post, res) = self.functional.mhc_pre(
            streams,
            self.phi,
            self.alpha,
            self.bias,
            mhc_mult=self.streams,
            post_mult_value=2.0,
            sinkhorn_repeat=self.iterations,
        )
        y = torch.ops.hc_bench.branch(u)
        return self.functional.mhc_post(y, streams, post, res).squeeze(0)


PEERS: dict[str, Callable] = {
    "liger_kernel": LigerSublayer,
    "transformer_engine": TransformerEngineSublayer,
    "tile_kernels": TileKernelsSublayer,
}
LABELS = {
    "liger_kernel": "Liger-Kernel (bf16 φ)",
    "transformer_engine": "Transformer Engine",
    "tile_kernels": "TileKernels",
}


def installed() -> dict[str, str]:
    """Importable peers and their versions."""
    return {name: _version(name) for name in PEERS if find_spec(name) is not None}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"
