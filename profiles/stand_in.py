"""A GPU that is not there: ops take their kernels, which compile for sm_90 and are never run.

What remains of a call is Python: its launches can be counted and its cost on the host measured on
any machine. Outputs hold whatever their memory held. It replaces Triton's driver for good, so it
belongs in a process of its own.
"""

from __future__ import annotations

import importlib
import pkgutil

import torch
import triton
from torch._inductor.async_compile import AsyncCompile
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import custom_ops.kernels


class Driver:
    """As much of a Triton driver as compiling and launching ask for; `launched`: every grid."""

    def __init__(self, capability: int = 90):
        self.target = GPUTarget("cuda", capability, 32)
        self.utils = self
        self.launched: list[tuple[int, ...]] = []
        self.launcher_cls = lambda source, metadata: lambda *a: self.launched.append(a[:3])

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return {"max_shared_mem": 232_448}

    def load_binary(self, name, binary, shared, device):
        return 0, 0, 0, 0, 1024  # module, function, registers, spills, most threads


class _Idle:
    """A kernel of Inductor's that was not built."""

    def run(self, *args, **kwargs) -> None:
        """Launch nothing."""


def modules(package) -> list:
    """The modules of a package, imported."""
    prefix = package.__name__ + "."
    return [
        importlib.import_module(prefix + found.name)
        for found in pkgutil.iter_modules(package.__path__)
    ]


def kernels_without_device(build: bool = True) -> list[tuple[int, ...]]:
    """From now on CPU tensors take the kernels; returns the list that launches add grids to.

    build: compile kernels; without it launches do nothing, Inductor's code included.
    """
    driver = Driver()
    triton.runtime.driver.set_active(driver)
    if not build:
        JITFunction.run = lambda *args, **kwargs: None  # type: ignore[method-assign]
        AsyncCompile.triton = lambda *args, **kwargs: _Idle()  # type: ignore[method-assign]

    def use_triton(x: torch.Tensor) -> bool:
        return x.dtype != torch.float64

    for module in modules(custom_ops) + modules(custom_ops.kernels):
        if hasattr(module, "use_triton"):
            module.use_triton = use_triton
    return driver.launched
