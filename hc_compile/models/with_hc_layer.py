"""One layer of TransformerWithHC: masks, attention, and the layer between its streams."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hc_compile.config import HCConfig
from hc_compile.layers import flexible_attention
from hc_compile.models.cache import KVCache
from hc_compile.module import HyperConnection, expand_streams, reduce_streams


def variant(use_tanh: bool = True, static_weights: bool = False) -> str:
    """Preset of the paper's three variants: "dhc", "dhc-no-tanh" or "shc"."""
    return "shc" if static_weights else "dhc" if use_tanh else "dhc-no-tanh"


def attention_bias(
    attention_mask: Tensor | None, key_padding_mask: Tensor | None, queries: int, keys: int
) -> Tensor | None:
    """The masks of nn.MultiheadAttention as the one that `flexible_attention` takes.

    Args:
        attention_mask: broadcastable to [B, H, queries, keys] or [B, queries, keys]; bool, True
            where a query may not look, or floating, added to the scores.
        key_padding_mask: [B, keys] bool, True at padding. A padding position still sees itself,
            or its row would be NaN; nobody else sees it.
        queries, keys: numbers of positions; the last query stands at the last key.
    Returns: bool (True where it may look) or floating mask, None when nothing is hidden.
    """
    if attention_mask is not None and attention_mask.dim() == 3:
        attention_mask = attention_mask.unsqueeze(1)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        attention_mask = ~attention_mask
    if key_padding_mask is None:
        return attention_mask
    rows = torch.arange(keys - queries, keys, device=key_padding_mask.device)
    itself = rows[:, None] == torch.arange(keys, device=key_padding_mask.device)
    keep = ~key_padding_mask[:, None, None, :] | itself
    if attention_mask is None:
        return keep
    if attention_mask.dtype == torch.bool:
        return keep & attention_mask
    return attention_mask.masked_fill(~keep, float("-inf"))


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases, by `flexible_attention`."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(f"num_heads must divide hidden_size = {hidden_size}, got {num_heads}")
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool,
        cache: KVCache | None,
        layer: int,
    ) -> Tensor:
        """x [B, S, C] -> [B, S, C]; masks as for `attention_bias`."""
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        if cache is not None:
            key, value = cache.append(layer, key, value)
        mask = attention_bias(attention_mask, key_padding_mask, query.shape[-2], key.shape[-2])
        dropout = self.dropout if self.training else 0.0
        mixed = flexible_attention(query, key, value, mask, dropout, is_causal)
        return self.out_proj(mixed.transpose(1, 2).flatten(-2))


class TransformerLayerWithHC(nn.Module):
    """Attention and GELU MLP, each a pre-norm branch between hyper-connected streams.

    Args:
        hidden_size: C. num_heads: divides C. ffn_hidden_size: of the MLP.
        expansion_rate: n streams; 1 is the plain residual.
        dropout: of attention weights and of the MLP.
        use_tanh, static_weights: see `variant`.
        layer_norm_eps: of both LayerNorms.
        layer_index: 0-based place in the stack.
    Raises: ValueError, TypeError that name the argument.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        ffn_hidden_size: int,
        expansion_rate: int = 4,
        dropout: float = 0.1,
        use_tanh: bool = True,
        static_weights: bool = False,
        layer_norm_eps: float = 1e-5,
        *,
        layer_index: int = 0,
    ) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.hc = HCConfig(hidden_size, expansion_rate, variant(use_tanh, static_weights))
        self.attention_hc = HyperConnection(self.hc, 2 * layer_index)
        self.attention_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.attention = SelfAttention(hidden_size, num_heads, dropout)
        self.ffn_hc = HyperConnection(self.hc, 2 * layer_index + 1)
        self.ffn_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.ffn = nn.Sequential(
            nn.Linear(hidden_size, ffn_hidden_size),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(ffn_hidden_size, hidden_size),
            nn.Dropout(dropout),
        )

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        *,
        is_causal: bool = False,
        cache: KVCache | None = None,
    ) -> Tensor:
        """One layer.

        Args:
            x: streams [B, S, n, C], or [B, S, C] for a layer on its own: then the streams are
                made on the way in and averaged on the way out. A stack must pass [B, S, n, C]:
                merged at every layer, the streams could not differ and it would not be HC.
            attention_mask, key_padding_mask: as nn.MultiheadAttention's, see `attention_bias`.
            is_causal: a position sees none after it.
            cache: keys and values of earlier positions.
        Returns: the shape of x.
        """
        if x.dim() == 3:
            streams = expand_streams(x, self.hc)
            masks = (attention_mask, key_padding_mask)
            out = self(streams, *masks, is_causal=is_causal, cache=cache)
            return reduce_streams(out, self.hc)
        u, add_residual = self.attention_hc(x)
        masks = (attention_mask, key_padding_mask, is_causal)
        y = self.attention(self.attention_norm(u), *masks, cache, self.layer_index)
        u, add_residual_ffn = self.ffn_hc(add_residual(y))
        return add_residual_ffn(self.ffn(self.ffn_norm(u)))
