"""Models built on hyper-connections: transformers, their layers and sampling."""

from hc_compile.models.cache import KVCache
from hc_compile.models.generate import generate
from hc_compile.models.transformer import Block, Transformer, TransformerConfig
from hc_compile.models.with_hc import TransformerWithHC
from hc_compile.models.with_hc_layer import TransformerLayerWithHC

__all__ = [
    "Block",
    "KVCache",
    "Transformer",
    "TransformerConfig",
    "TransformerLayerWithHC",
    "TransformerWithHC",
    "generate",
]
