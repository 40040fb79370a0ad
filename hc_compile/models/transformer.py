"""A decoder-only transformer whose residual stream is a hyper-connection of any preset.

Legend: B batch, S positions, C hidden size of one stream (`dim`), n streams, V vocabulary.

    tokens [B,S] ─ embed ─ expand ─ [B,S,n,C] ─ block 0 … block L−1 ─ reduce ─ norm ─ head [B,S,V]
    block k:  x ─ hc_attn (layer_index 2k) ─ norm ─ attention ─ x′
              x′ ─ hc_mlp (layer_index 2k + 1) ─ norm ─ SwiGLU ─ x″
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hc_compile.config import HCConfig
from hc_compile.layers import RMSNorm, linear, rope_tables
from hc_compile.models.cache import KVCache
from hc_compile.models.layers import Attend, CausalAttention, SwiGLU, attend_causally
from hc_compile.module import HyperConnection, StreamExpand, StreamReduce


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a `Transformer`; the hyper-connection is its own frozen `hc` config.

    Args:
        vocab_size: V ≥ 1.
        dim: C, equal to hc.dim and divisible by heads; C / heads is even (RoPE).
        layers: transformer blocks, each of two sublayers, ≥ 1.
        heads: attention heads.
        ffn_dim: hidden size of the SwiGLU MLP.
        max_seq_len: longest S that forward accepts.
        tie_embeddings: the head shares the embedding's weight.
        hc: which hyper-connection; default mHC with 4 streams of width `dim`.
        init_std: standard deviation of embedding and weights at init.
        scale_output_init: multiply the init of each branch's output projection by √n, as the
            hyper-connections paper (arXiv 2409.19606) does for static and dynamic HC. Off by
            default: with it a model no longer starts from its residual twin's weights.
        stream_dtype: dtype of the streams; None keeps the embedding's. With bf16 the weights
            stay as they are stored and are cast where they are used.
    Raises:
        ValueError: naming the field, what was expected and what was given.
    """

    vocab_size: int = 256
    dim: int = 256
    layers: int = 4
    heads: int = 4
    ffn_dim: int = 768
    max_seq_len: int = 256
    tie_embeddings: bool = True
    hc: HCConfig = field(default=None)  # type: ignore[assignment]
    init_std: float = 0.02
    scale_output_init: bool = False
    stream_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "layers", "heads", "ffn_dim", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(
                f"dim must be heads × an even head size, got dim {self.dim}, heads {self.heads}"
            )
        if self.hc is None:
            object.__setattr__(self, "hc", HCConfig(dim=self.dim, streams=4, preset="mhc"))
        if self.hc.dim != self.dim:
            raise ValueError(f"hc.dim must be dim = {self.dim}, got {self.hc.dim}")
        if (self.hc.views, self.hc.branches) != (1, 1):
            raise ValueError(
                "hc.views and hc.branches must be 1, as its branches have one input and output, "
                f"got {self.hc.views} and {self.hc.branches}"
            )


class Block(nn.Module):
    """Attention and MLP, each a pre-norm branch between the streams of a hyper-connection."""

    def __init__(
        self,
        cfg: TransformerConfig,
        index: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.hc_attn = HyperConnection(cfg.hc, 2 * index, device=device, dtype=dtype)
        self.attn_norm = RMSNorm(cfg.dim, device=device, dtype=dtype)
        self.attn = CausalAttention(cfg.dim, cfg.heads, device=device, dtype=dtype)
        self.hc_mlp = HyperConnection(cfg.hc, 2 * index + 1, device=device, dtype=dtype)
        self.mlp_norm = RMSNorm(cfg.dim, device=device, dtype=dtype)
        self.mlp = SwiGLU(cfg.dim, cfg.ffn_dim, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend = attend_causally
    ) -> Tensor:
        """x [B, S, n, C] (or a StreamState) -> x' like x; tables as for `causal_attention`."""
        u, add_residual = self.hc_attn(x)
        x = add_residual(self.attn(self.attn_norm(u), cos, sin, attend))
        u, add_residual = self.hc_mlp(x)
        return add_residual(self.mlp(self.mlp_norm(u)))


class Transformer(nn.Module):
    """Byte- or token-level language model over hyper-connected streams.

    The state of a model and of its plain residual twin (`HCConfig(dim, preset="residual")`) share
    every name outside the `hc_*`, `expand` and `reduce` submodules.

    Args:
        cfg: sizes and hyper-connection.
        device: of parameters and tables.
        dtype: of all parameters and tables, float32 or (for reference runs) float64; streams in
            bf16 are `cfg.stream_dtype`.
    Raises:
        ValueError: when dtype is neither.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        cfg: TransformerConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.dim, device=device, dtype=dtype)
        self.expand = StreamExpand(cfg.hc, device=device, dtype=dtype)
        self.blocks = nn.ModuleList(
            Block(cfg, index, device=device, dtype=dtype) for index in range(cfg.layers)
        )
        self.reduce = StreamReduce(cfg.hc, device=device, dtype=dtype)
        self.norm = RMSNorm(cfg.dim, device=device, dtype=dtype)
        self.head = (
            None
            if cfg.tie_embeddings
            else nn.Parameter(torch.empty(cfg.vocab_size, cfg.dim, device=device, dtype=dtype))
        )
        cos, sin = rope_tables(cfg.max_seq_len, cfg.dim // cfg.heads, dtype=dtype)
        self.register_buffer("cos", cos.to(device), persistent=False)
        self.register_buffer("sin", sin.to(device), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw embedding, head and branch weights; hyper-connections keep their own init."""
        std, streams = self.cfg.init_std, self.cfg.hc.streams
        assert streams is not None
        out_std = std * (streams**0.5 if self.cfg.scale_output_init else 1.0)
        nn.init.normal_(self.embed.weight, std=std)
        if self.head is not None:
            nn.init.normal_(self.head, std=std)
        for block in self.blocks:
            assert isinstance(block, Block)
            nn.init.normal_(block.attn.w_qkv, std=std)
            nn.init.normal_(block.attn.w_out, std=out_std)
            nn.init.normal_(block.mlp.w_gate_up, std=std)
            nn.init.normal_(block.mlp.w_out, std=out_std)

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits of the next token at every position.

        Args:
            tokens: [B, S] int64 (or int32) in [0, V), S ≤ max_seq_len.
            cache: from `new_cache`; the tokens follow those it holds and are added to it. A
                prompt may come at once or in pieces, then one token a call.
        Returns: logits [B, S, V] in the streams' dtype.
        Raises:
            TypeError: when tokens are not integers.
            ValueError: on a wrong rank or too long a sequence.
        """
        self._check(tokens, cache)
        length = tokens.shape[1]
        h = self.embed(tokens)
        x = self.expand(h.to(self.cfg.stream_dtype or h.dtype))
        if cache is None:
            cos, sin = self.cos[:length], self.sin[:length]
            for block in self.blocks:
                x = block(x, cos, sin)
        else:
            positions, attend = cache.positions(length), cache.attention(length)
            cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
            for layer, block in enumerate(self.blocks):
                x = block(x, cos, sin, partial(attend, layer))
            cache.advance(length)
        h = self.norm(self.reduce(x))
        return linear(h, self.embed.weight if self.head is None else self.head)

    def _check(self, tokens: Tensor, cache: KVCache | None) -> None:
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens must be int64 or int32, got {tokens.dtype}")
        if tokens.dim() != 2:
            raise ValueError(f"tokens must be [B, S], got {list(tokens.shape)}")
        if tokens.shape[1] > self.cfg.max_seq_len:
            raise ValueError(
                f"tokens must have S <= max_seq_len = {self.cfg.max_seq_len}, "
                f"got S = {tokens.shape[1]}"
            )
        if cache is not None and tokens.shape[0] != cache.length.shape[0]:
            rows = cache.length.shape[0]
            raise ValueError(f"tokens must be [{rows}, S], as the cache, got {list(tokens.shape)}")

    def new_cache(self, batch: int, max_seq_len: int | None = None) -> KVCache:
        """An empty cache for `batch` rows of up to max_seq_len tokens (None: the model's)."""
        c, weight = self.cfg, self.embed.weight
        longest = c.max_seq_len if max_seq_len is None else max_seq_len
        if not 1 <= longest <= c.max_seq_len:
            raise ValueError(f"max_seq_len must be in [1, {c.max_seq_len}], got {longest}")
        kind = {"device": weight.device, "dtype": c.stream_dtype or weight.dtype}
        return KVCache(c.layers, batch, c.heads, longest, c.dim // c.heads, **kind)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats, computed in fp32 or wider.

        Args:
            tokens, targets: [B, S] int64.
        Returns: a 0-d tensor.
        """
        logits = self(tokens)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(wide).flatten(0, 1), targets.flatten())

    def num_parameters(self) -> int:
        """Number of parameters; a tied weight counts once."""
        return sum(parameter.numel() for parameter in self.parameters())
