"""HYDRA's names for layers and kernels; those of its own model are refused by name."""

from __future__ import annotations

from hc_compile import kernels, layers
from hc_compile.kernels import *  # noqa: F403
from hc_compile.layers import *  # noqa: F403

__all__ = sorted({*kernels.__all__, *layers.__all__})  # type: ignore[reportUnsupportedDunderAll]

REFUSED = {
    "CCGQAAttention": "that model's own attention; flexible_attention has its grouped queries",
    "create_ccgqa_mod_mor_model": "that model; hc_compile.models has transformers to start from",
}


def __getattr__(name: str) -> object:
    if name in REFUSED:
        raise ImportError(f"{name} is not part of hc_compile: {REFUSED[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
