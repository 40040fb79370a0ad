"""Remember what torch.compile finds out about our Triton kernels.

For every launch, while tracing (a forward kernel twice) and once more while lowering, torch asks
which arguments the kernel writes, and finds out by building the kernel's IR again. Tracing four
boundaries forward and backward took 11.7 s without this, 10.1 of them in 116 such analyses, and
2.9 s with it; sixteen boundaries take 6.4 s (fake CUDA tensors on a loaded two-core CPU, torch
2.11.0). The answer depends on the kernel, its constants and the types of its arguments alone, so
it is kept, for kernels of this project only. torch has no public hook for it; where the private
one is missing, nothing is done.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch._higher_order_ops import triton_kernel_wrap

ANALYSES = ("identify_mutated_tensors", "identify_accessed_tensors")  # torch 2.11, 2.13
OURS = "custom_ops.kernels."


class Remembered:
    """An analysis `f(kernel, arguments, tma)` that answers once for equal kernels of ours."""

    def __init__(self, analysis: Callable):
        self.analysis = analysis
        self.answers: dict[Hashable, Any] = {}

    def __call__(self, kernel: Any, kwargs: dict[str, Any], tma_descriptor_metadata: Any) -> Any:
        function = getattr(kernel, "fn", None)  # of the Autotuner that torch puts around a launch
        function = kernel if hasattr(kernel, "params") else function
        ours = getattr(function, "__module__", "").startswith(OURS)
        if not ours or tma_descriptor_metadata or len(getattr(kernel, "configs", ())) > 1:
            return self.analysis(kernel, kwargs, tma_descriptor_metadata)
        constants = {p.name for p in function.params if p.is_constexpr}  # type: ignore[union-attr]
        kinds = ((name, _kind(v, name in constants)) for name, v in sorted(kwargs.items()))
        configs = getattr(kernel, "configs", ())  # one without keywords decides nothing
        chosen = str([config.kwargs for config in configs if config.kwargs])
        key = (function, chosen, tuple(kinds))
        if key not in self.answers:
            self.answers[key] = self.analysis(kernel, kwargs, tma_descriptor_metadata)
        return self.answers[key]


def _kind(value: Any, constant: bool) -> Hashable:
    """What of an argument the kernel's IR depends on."""
    if isinstance(value, torch.Tensor):
        return "tensor", value.dtype
    if hasattr(value, "get_dtype"):  # Inductor's
        return "tensor", value.get_dtype()
    if constant or value is None or isinstance(value, bool):
        return type(value), value
    if isinstance(value, int):  # Triton specialises on 1 and on multiples of 16
        return int, value == 1, value % 16 == 0
    return type(value)


@functools.cache
def remember() -> None:
    """Keep torch's answers about our kernels from now on, in this process."""
    for name in ANALYSES:
        found = getattr(triton_kernel_wrap, name, None)
        if found is not None and not isinstance(found, Remembered):
            setattr(triton_kernel_wrap, name, Remembered(found))
