"""What a kernel writes to, found once instead of at every launch that is traced.

Before torch functionalises a launch, and again when it lowers one, it builds its kernel's Triton
IR to see which arguments are written: 0.2 s of Python, where a step of L sublayers has 18 L
launches. The answer depends on the kernel, its constants and the types of its arguments alone.
"""

import functools
import importlib
from typing import Any

import torch

ANALYSES = ("identify_mutated_tensors", "identify_accessed_tensors")  # torch 2.11, torch 2.13
_found: dict[tuple, Any] = {}


def _kind(value: Any) -> Any:
    """All that the analysis sees of an argument."""
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return type(value), value
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        typed = getattr(value, "get_dtype", None)  # Inductor's buffers; a symbol has neither
        dtype = typed and typed()
    return type(value), dtype


def _remembering(analyse):
    @functools.wraps(analyse)
    def remembered(kernel, kwargs, tma_descriptor_metadata):
        function = getattr(kernel, "fn", kernel)  # torch wraps a launch with num_warps in a tuner
        name = getattr(function, "__name__", "")
        configs = getattr(kernel, "configs", ())
        if not name.startswith("hc_") or tma_descriptor_metadata or len(configs) > 1:
            return analyse(kernel, kwargs, tma_descriptor_metadata)
        constants = str(configs[0].kwargs) if configs else ""
        key = (name, constants, *((name, _kind(value)) for name, value in kwargs.items()))
        if key not in _found:
            _found[key] = analyse(kernel, kwargs, tma_descriptor_metadata)
        return _found[key]

    return remembered


@functools.cache
def remember() -> None:
    """Let torch keep its findings on our kernels; nothing changes for anyone else's."""
    module = importlib.import_module("torch._higher_order_ops.triton_kernel_wrap")
    for name in ANALYSES:
        if hasattr(module, name):
            setattr(module, name, _remembering(getattr(module, name)))
