"""HYDRA's names for layers and kernels; those of its own model are refused by name."""

from __future__ import annotations

from hc_compile.kernels import (
    benchmark_kernels,
    get_kernel_status,
    print_benchmark_results,
    set_use_triton_kernels,
)
from hc_compile.layers import (
    FLASH_ATTN_AVAILABLE,
    FUSED_KERNELS_AVAILABLE,
    XFORMERS_AVAILABLE,
    GradientCheckpointMixin,
    RMSNorm,
    RotaryEmbedding,
    SwiGLUMLP,
    compute_memory_footprint,
    flexible_attention,
    fused_qk_norm,
    fused_rms_norm,
    fused_rope,
    fused_swiglu,
    get_activation,
    get_attention_backend,
    init_weights_normal,
    scale_residual_weights,
    set_attention_backend,
)

__all__ = [
    "FLASH_ATTN_AVAILABLE",
    "FUSED_KERNELS_AVAILABLE",
    "XFORMERS_AVAILABLE",
    "GradientCheckpointMixin",
    "RMSNorm",
    "RotaryEmbedding",
    "SwiGLUMLP",
    "benchmark_kernels",
    "compute_memory_footprint",
    "flexible_attention",
    "fused_qk_norm",
    "fused_rms_norm",
    "fused_rope",
    "fused_swiglu",
    "get_activation",
    "get_attention_backend",
    "get_kernel_status",
    "init_weights_normal",
    "print_benchmark_results",
    "scale_residual_weights",
    "set_attention_backend",
    "set_use_triton_kernels",
]

REFUSED = {
    "CCGQAAttention": "that model's own attention; flexible_attention has its grouped queries",
    "create_ccgqa_mod_mor_model": "that model; hc_compile.models has transformers to start from",
}


def __getattr__(name: str) -> object:
    if name in REFUSED:
        raise ImportError(f"{name} is not part of hc_compile: {REFUSED[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
