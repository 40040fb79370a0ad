"""What the kernel tests share: where they run, random inputs and the error they measure."""

import os

import torch

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def random(*shape: int, dtype=torch.float32, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 31 * len(shape) + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


def worst(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute error over the root mean square of what was expected."""
    expected = expected.double()
    scale = expected.square().mean().sqrt().clamp_min(1e-30)
    return ((out.double() - expected).abs().max() / scale).item()


def tolerance(dtype: torch.dtype) -> float:
    """Two roundings of the largest element met (6 sigma); the interpreter truncates bf16."""
    ulp = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2e-6}[dtype]
    return 6 * ulp if dtype != torch.float32 else 10 * ulp
