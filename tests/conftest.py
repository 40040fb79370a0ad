"""Shared helpers: gradients of a tuple of outputs, and the error measure of the house."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items):
    """Kernels run interpreted in a process of their own: only tests that say so belong there."""
    kept = [item for item in items if bool(item.get_closest_marker("interpreter")) == INTERPRETED]
    items[:] = kept


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield


def cotangents(outputs, seed=1):
    """A random cotangent for each output; a constant one would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]


def outputs_and_gradients(function, inputs, cots=None):
    """Outputs and the gradient of every input, zeros where an input has none."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    outputs = function(*leaves)
    cots = cotangents(outputs) if cots is None else cots
    live = [(o, c.to(o)) for o, c in zip(outputs, cots, strict=True) if o.requires_grad]
    grads = torch.autograd.grad(
        [o for o, _ in live], leaves, [c for _, c in live], allow_unused=True
    )
    grads = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True)]
    return [o.detach() for o in outputs], grads


def worst(value, truth):
    """Largest error over the largest true element (NaN never passes a comparison).

    True values below 1e-4 count as 1e-4: some gradients cancel to nothing (n = 1, scale
    invariance), and rounding is then measured against the order-1 inputs that produced it.
    """
    if truth.numel() == 0:
        return 0.0
    error = (value.double() - truth.double()).abs().max().item()
    return error / max(truth.double().abs().max().item(), 1e-4)
