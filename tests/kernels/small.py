"""What the tests of the small-matrix kernels share: where they run and how errors are judged."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

# The same test runs interpreted on the CPU, in a process with TRITON_INTERPRET=1, or on a GPU.
anywhere = [
    pytest.mark.interpreter if INTERPRETED else pytest.mark.gpu,
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(),
        reason="needs TRITON_INTERPRET=1 or a CUDA device",
    ),
]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE)


def error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error as a fraction of the largest exact value, at least 0.01; NaN counts as inf."""
    difference = (value.double() - exact.double()).abs().max().item()
    scale = max(exact.double().abs().max().item(), 1e-2)
    return difference / scale if difference == difference else float("inf")


def check(value: torch.Tensor, exact: torch.Tensor, eager: torch.Tensor, slack: float = 2e-6):
    """The kernel's error against float64 is at most twice eager fp32's, plus a slack."""
    assert value.shape == exact.shape
    assert error(value, exact) <= 2 * error(eager, exact) + slack
