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


PEERS: dict[str, Callable] = {"liger_kernel": LigerSublayer}
LABELS = {"liger_kernel": "Liger-Kernel (bf16 φ)"}


def installed() -> dict[str, str]:
    """Importable peers and their versions."""
    return {name: _version(name) for name in PEERS if find_spec(name) is not None}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"
