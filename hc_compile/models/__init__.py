"""Models built on hyper-connections: the transformer, its layers and sampling."""

from hc_compile.models.generate import generate
from hc_compile.models.transformer import Block, Transformer, TransformerConfig

__all__ = ["Block", "Transformer", "TransformerConfig", "generate"]
