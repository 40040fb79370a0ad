"""TransformerWithHC: a pre-norm GPT over hyper-connected streams (HC, arXiv 2409.19606).

    ids [B,S] ─ token + position ─ expand ─ [B,S,n,C] ─ layers ─ mean ─ LayerNorm ─ head [B,S,V]

The n streams run through the whole stack, as in the paper, and are merged once at its end.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hc_compile.config import HCConfig
from hc_compile.layers import GradientCheckpointMixin
from hc_compile.models.cache import KVCache
from hc_compile.models.generate import generate
from hc_compile.models.with_hc_layer import TransformerLayerWithHC, variant
from hc_compile.module import expand_streams, reduce_streams

INIT_STD = 0.02


class TransformerWithHC(nn.Module, GradientCheckpointMixin):
    """GPT-2-style causal language model whose residual stream is the paper's hyper-connection.

    Args:
        vocab_size: V. hidden_size: C. num_layers, num_heads: as named.
        ffn_hidden_size: of the MLP; None takes 4·C.
        max_seq_length: learned positions, and the longest input.
        expansion_rate: n streams (2, 4 and 8 in the paper); 1 is the plain residual.
        dropout: of embeddings, attention weights and MLP.
        use_tanh: DHC with tanh (True) or without; no effect on static weights.
        static_weights: SHC, whose matrices are learned but not computed from the input.
        layer_norm_eps: of every LayerNorm.

    The head shares the token embedding. Output projections are drawn with std 0.02·√n (HC,
    section 4), everything else with 0.02.
    Raises: ValueError, TypeError that name the argument.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        ffn_hidden_size: int | None = None,
        max_seq_length: int = 2048,
        expansion_rate: int = 4,
        dropout: float = 0.1,
        use_tanh: bool = True,
        static_weights: bool = False,
        layer_norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        self.max_seq_length, self.num_heads = max_seq_length, num_heads
        self.hc = HCConfig(hidden_size, expansion_rate, variant(use_tanh, static_weights))
        self.token_embedding = nn.Embedding(vocab_size, hidden_size)
        self.position_embedding = nn.Embedding(max_seq_length, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            TransformerLayerWithHC(
                hidden_size,
                num_heads,
                4 * hidden_size if ffn_hidden_size is None else ffn_hidden_size,
                expansion_rate,
                dropout,
                use_tanh,
                static_weights,
                layer_norm_eps,
                layer_index=index,
            )
            for index in range(num_layers)
        )
        self.final_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)
        self.lm_head.weight = self.token_embedding.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw embeddings and projections; hyper-connections keep their own init."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                out = name.endswith(("attention.out_proj", "ffn.3"))
                nn.init.normal_(module.weight, std=INIT_STD * (self.hc.n**0.5 if out else 1.0))
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits of the next token at every position.

        Args:
            input_ids: [B, S] integers in [0, V).
            attention_mask: [B, T] with 0 at padding, T = S plus the cached positions.
            position_ids: [B, S] or [1, S]; default counts on from the cached positions.
            cache: from `new_cache`; keys and values of input_ids are added to it.
        Returns: [B, S, V].
        Raises: ValueError naming the argument.
        """
        start = 0 if cache is None else cache.limit or 0
        positions = self._positions(input_ids, position_ids, start)
        padding = None
        if attention_mask is not None:
            expected = [input_ids.shape[0], start + input_ids.shape[1]]
            if list(attention_mask.shape) != expected:
                raise ValueError(
                    f"attention_mask must be [B, T] = {expected}, got {list(attention_mask.shape)}"
                )
            padding = attention_mask == 0
        h = self.token_embedding(input_ids) + self.position_embedding(positions)
        x = expand_streams(self.dropout(h), self.hc)
        if cache is not None:
            cache.limit = start + input_ids.shape[1]
        for layer in self.layers:
            options = {"is_causal": True, "cache": cache}
            if self._gradient_checkpointing and self.training:
                x = checkpoint(layer, x, None, padding, use_reentrant=False, **options)
            else:
                x = layer(x, None, padding, **options)
        if cache is not None:
            cache.advance(input_ids.shape[1])
        return self.lm_head(self.final_norm(reduce_streams(x, self.hc)))

    def _positions(self, input_ids: Tensor, position_ids: Tensor | None, start: int) -> Tensor:
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids must be [B, S], got {list(input_ids.shape)}")
        end = start + input_ids.shape[1]
        if end > self.max_seq_length:
            raise ValueError(
                f"input_ids must end within max_seq_length = {self.max_seq_length}, got {end}"
            )
        if position_ids is None:
            return torch.arange(start, end, device=input_ids.device).unsqueeze(0)
        return position_ids

    def new_cache(self, batch_size: int, max_seq_length: int | None = None) -> KVCache:
        """An empty cache for `batch_size` sequences of up to max_seq_length positions."""
        weight = self.token_embedding.weight
        return KVCache(
            len(self.layers),
            batch_size,
            self.num_heads,
            self.max_seq_length if max_seq_length is None else max_seq_length,
            self.hc.dim // self.num_heads,
            device=weight.device,
            dtype=weight.dtype,
        )

    def generate(self, input_ids: Tensor, max_new_tokens: int, **options) -> Tensor:
        """`models.generate` with a cache: [B, S] -> [B, S + max_new_tokens]; dropout as set."""
        length = input_ids.shape[1] + max_new_tokens
        cache = self.new_cache(input_ids.shape[0], min(length, self.max_seq_length))
        return generate(
            self,
            input_ids,
            max_new_tokens,
            max_seq_len=self.max_seq_length,
            cache=cache,
            **options,
        )

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters, a shared one once; without both embeddings unless told."""
        total = sum(parameter.numel() for parameter in self.parameters())
        if non_embedding:
            total -= self.token_embedding.weight.numel() + self.position_embedding.weight.numel()
        return total
