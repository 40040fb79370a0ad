"""What is installed beside torch, by name."""

from importlib.util import find_spec

FUSED_KERNELS_AVAILABLE = find_spec("triton") is not None
FLASH_ATTN_AVAILABLE = find_spec("flash_attn") is not None
XFORMERS_AVAILABLE = find_spec("xformers") is not None
