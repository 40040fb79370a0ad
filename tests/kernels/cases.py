"""What the kernel tests share: inputs, float64 results, and the error they are judged by."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
CAN_RUN = INTERPRETED or torch.cuda.is_available()
# The same tests run interpreted on the CPU, in a process with TRITON_INTERPRET=1, or on a GPU.
anywhere = [
    pytest.mark.interpreter if INTERPRETED else pytest.mark.gpu,
    pytest.mark.skipif(not CAN_RUN, reason="needs CUDA or TRITON_INTERPRET=1"),
]
on_gpu = pytest.mark.skipif(INTERPRETED, reason="needs CUDA")

SMALL = [(3, 4, 130), (2, 1, 7), (1, 3, 640), (2, 8, 33), (1, 16, 70), (5, 2, 129)]
LARGE = [(203, n, 640) for n in (1, 2, 3, 4, 5, 6, 7, 8, 16)] + [
    (1, 4, 1),
    (77, 4, 5129),
    (64, 4, 7168),
    (33, 8, 321),
]
SHAPES = SMALL if INTERPRETED else SMALL + LARGE
DTYPES = (
    [torch.bfloat16, torch.float32]
    if INTERPRETED
    else [
        torch.bfloat16,
        torch.float16,
        torch.float32,
    ]
)


def random(*shape: int, dtype=torch.float32, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 31 * len(shape) + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


class Sublayer:
    """Random tensors of one sublayer; `wide(name)` is one of them in another precision."""

    def __init__(self, tokens, streams, width, dtype, views=1, branches=1, coefficients=None):
        coefficients = coefficients or streams * streams + 2 * streams
        self.x = random(tokens, streams, width, dtype=dtype, seed=1)
        self.g = random(tokens, streams, width, dtype=dtype, seed=2)
        self.y = random(tokens, branches, width, dtype=dtype, seed=3)
        self.du = random(tokens, views, width, dtype=dtype, seed=4)
        self.pre = random(tokens, views, streams, seed=5)
        self.post = random(tokens, branches, streams, seed=6)
        self.res = random(tokens, streams, streams, seed=7)
        self.phi = random(coefficients, streams * width, scale=0.02, seed=8)
        self.dp = random(tokens, coefficients, seed=9)
        self.dss = random(tokens, seed=10) * 0.1

    def results(self, precision: torch.dtype) -> dict[str, torch.Tensor]:
        """Every quantity the kernels compute, in plain torch."""

        def product(equation, *names):
            return torch.einsum(equation, *[getattr(self, name).to(precision) for name in names])

        flat = self.x.to(precision).flatten(1)
        dflat = product("tm,mk->tk", "dp", "phi")
        project_dx = dflat.view_as(self.x) + 2 * self.dss.to(precision)[:, None, None] * self.x
        mixed = product("tij,tic->tjc", "res", "g")
        read = product("tvn,tvc->tnc", "pre", "du")
        return {
            "u": product("tvn,tnc->tvc", "pre", "x"),
            "read_dx": read,
            "dpre": product("tvc,tnc->tvn", "du", "x"),
            "out": product("tij,tjc->tic", "res", "x") + product("twn,twc->tnc", "post", "y"),
            "mixed": mixed,
            "dy": product("twn,tnc->twc", "post", "g"),
            "dpost": product("tnc,twc->twn", "g", "y"),
            "dres": product("tic,tjc->tij", "g", "x"),
            "p": flat @ self.phi.to(precision).T,
            "ss": flat.square().sum(1),
            "project_dx": project_dx,
            "dx": mixed + read + project_dx,
            "dphi": self.dp.to(precision).T @ flat,
        }


def worst(out: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest absolute error over the root mean square of what was expected; inf for NaN."""
    scale = exact.square().mean().sqrt().clamp_min(1e-30)
    error = ((out.double() - exact).abs().max() / scale).item()
    return error if error == error else float("inf")


def check_sublayer(case: Sublayer, outputs: dict[str, torch.Tensor], slack: float = 4e-6) -> None:
    """Each output is at most twice as wrong as fp32 torch rounded to the same dtype, + slack.

    The interpreter truncates to bf16 where the device rounds, so it is allowed twice that.
    """
    exact, eager = case.results(torch.float64), case.results(torch.float32)
    factor = 4 if INTERPRETED else 2
    for name, out in outputs.items():
        allowed = factor * worst(eager[name].to(out.dtype), exact[name]) + slack
        allowed += torch.finfo(out.dtype).eps  # eager is exact by luck on a few elements
        assert out.shape == exact[name].shape, name
        assert worst(out, exact[name]) <= allowed, (name, worst(out, exact[name]), allowed)


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
