"""Which kernels run: status and kill switch.

`HC_DISABLE_TRITON=1` in the environment, or `set_use_triton_kernels(False)`, makes every hc:: op
compute in plain torch, with the same result. Code compiled before keeps what it was compiled with.
"""

import importlib.util
from typing import Any

import torch

from custom_ops.registration import INTERPRETED, set_triton_enabled, triton_enabled


def set_use_triton_kernels(enabled: bool) -> None:
    """Use the Triton kernels (True) or plain torch (False) from the next call or compile on."""
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled must be a bool, got {type(enabled).__name__}")
    set_triton_enabled(enabled)


def get_kernel_status() -> dict[str, Any]:
    """What is installed and what runs: triton version, CUDA, whether kernels are used, and how."""
    available = importlib.util.find_spec("triton") is not None
    version = None
    if available:
        import triton

        version = triton.__version__
    uses = triton_enabled() and available and (torch.cuda.is_available() or INTERPRETED)
    return {
        "triton_available": available,
        "triton_version": version,
        "cuda_available": torch.cuda.is_available(),
        "interpreted": INTERPRETED,
        "use_triton_kernels": uses,
        "ops": "ops, Triton" if uses else "ops, decomposed",
    }
