"""Layers around hyper-connections: pure functions that Inductor fuses, and thin modules."""

from hc_compile.installed import (
    FLASH_ATTN_AVAILABLE,
    FUSED_KERNELS_AVAILABLE,
    XFORMERS_AVAILABLE,
)
from hc_compile.layers.attention import (
    flexible_attention,
    get_attention_backend,
    set_attention_backend,
)
from hc_compile.layers.footprint import compute_memory_footprint
from hc_compile.layers.functions import (
    apply_rope,
    check_last_dim,
    fused_qk_norm,
    fused_rms_norm,
    fused_rope,
    fused_swiglu,
    linear,
    rms_norm,
    rope_tables,
)
from hc_compile.layers.modules import RMSNorm, RotaryEmbedding, SwiGLUMLP, get_activation
from hc_compile.layers.training import (
    GradientCheckpointMixin,
    init_weights_normal,
    scale_residual_weights,
)

__all__ = [
    "FLASH_ATTN_AVAILABLE",
    "FUSED_KERNELS_AVAILABLE",
    "XFORMERS_AVAILABLE",
    "GradientCheckpointMixin",
    "RMSNorm",
    "RotaryEmbedding",
    "SwiGLUMLP",
    "apply_rope",
    "check_last_dim",
    "compute_memory_footprint",
    "flexible_attention",
    "fused_qk_norm",
    "fused_rms_norm",
    "fused_rope",
    "fused_swiglu",
    "get_activation",
    "get_attention_backend",
    "init_weights_normal",
    "linear",
    "rms_norm",
    "rope_tables",
    "scale_residual_weights",
    "set_attention_backend",
]
