"""Which kernels run: status, kill switch, and a quick benchmark of the layers.

`HC_DISABLE_TRITON=1` in the environment (`HYDRA_DISABLE_TRITON=1` does the same), or
`set_use_triton_kernels(False)`, makes every hc:: op compute in plain torch, with the same result.
Code compiled before keeps what it was compiled with.
"""

from typing import Any

import torch

from custom_ops.registration import INTERPRETED, set_triton_enabled, triton_enabled
from hc_compile.installed import (
    FLASH_ATTN_AVAILABLE,
    FUSED_KERNELS_AVAILABLE,
    XFORMERS_AVAILABLE,
)
from hc_compile.kernels_benchmark import benchmark_kernels, print_benchmark_results
from hc_compile.layers.functions import (
    fused_qk_norm,
    fused_rms_norm,
    fused_rope,
    fused_swiglu,
)

__all__ = [
    "FLASH_ATTN_AVAILABLE",
    "FUSED_KERNELS_AVAILABLE",
    "XFORMERS_AVAILABLE",
    "benchmark_kernels",
    "fused_qk_norm",
    "fused_rms_norm",
    "fused_rope",
    "fused_swiglu",
    "get_kernel_status",
    "print_benchmark_results",
    "set_use_triton_kernels",
]


def set_use_triton_kernels(enabled: bool) -> None:
    """Use the Triton kernels (True) or plain torch (False) from the next call or compile on."""
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled must be a bool, got {type(enabled).__name__}")
    set_triton_enabled(enabled)


def get_kernel_status() -> dict[str, Any]:
    """What is installed and what runs: triton version, CUDA, whether kernels are used, and how."""
    version = None
    if FUSED_KERNELS_AVAILABLE:
        import triton

        version = triton.__version__
    on_device = torch.cuda.is_available() or INTERPRETED
    uses = triton_enabled() and FUSED_KERNELS_AVAILABLE and on_device
    return {
        "triton_available": FUSED_KERNELS_AVAILABLE,
        "triton_version": version,
        "cuda_available": torch.cuda.is_available(),
        "interpreted": INTERPRETED,
        "use_triton_kernels": uses,
        "ops": "ops, Triton" if uses else "ops, decomposed",
        "flash_attn_available": FLASH_ATTN_AVAILABLE,
        "xformers_available": XFORMERS_AVAILABLE,
    }
