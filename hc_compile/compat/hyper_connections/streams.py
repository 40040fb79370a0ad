"""Into the streams and out of them: expand, reduce, StreamEmbed, AttentionPoolReduceStream."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from custom_ops.constraint import check_count
from hc_compile import functional
from hc_compile.compat.hyper_connections.layout import fold, unfold


class ExpandStreams(nn.Module):
    """[b, ...] to [(b s), ...], or [..., d] to [..., s, d] if `last`, by copies."""

    def __init__(self, num_streams: int, last: bool = False):
        super().__init__()
        self.num_streams, self.axis = num_streams, -2 if last else 1

    def forward(self, h: Tensor) -> Tensor:
        shape = list(h.shape)
        shape.insert(len(shape) - 1 if self.axis == -2 else 1, self.num_streams)
        copies = h.unsqueeze(self.axis).expand(shape)
        return copies.contiguous() if self.axis == -2 else copies.flatten(0, 1)


class ReduceStreams(nn.Module):
    """Sum over the streams: the inverse layout of `ExpandStreams`."""

    def __init__(self, num_streams: int, last: bool = False):
        super().__init__()
        self.num_streams, self.last = num_streams, last

    def forward(self, x: Tensor) -> Tensor:
        if self.last:
            return x.sum(-2)
        return x.unflatten(0, (x.shape[0] // self.num_streams, self.num_streams)).sum(1)


class StreamEmbed(nn.Module):
    """A learned offset [s, d] of each stream, zero at the start."""

    def __init__(
        self,
        num_streams: int,
        dim: int,
        channel_first: bool = False,
        expand_to_streams: bool = False,
    ):
        super().__init__()
        check_count("num_streams", num_streams, least=1)
        self.num_streams, self.dim, self.channel_first = num_streams, dim, channel_first
        self.expand = ExpandStreams(num_streams) if expand_to_streams else nn.Identity()
        self.stream_embed = nn.Parameter(torch.zeros(num_streams, dim))

    def forward(self, residuals: Tensor) -> Tensor:
        x = self.expand(residuals)
        x = unfold(x, self.num_streams, self.dim, self.channel_first)
        return fold(x + self.stream_embed, self.channel_first)


class AttentionPoolReduceStream(nn.Module):
    """Σ_i softmax_i(W x_i) ⊙ x_i over the streams, a weight a channel; W starts as identity."""

    def __init__(self, num_streams: int, dim: int, channel_first: bool = False):
        super().__init__()
        check_count("num_streams", num_streams, least=1)
        self.num_streams, self.dim, self.channel_first = num_streams, dim, channel_first
        self.to_attn_logits = identity_linear(dim)

    def forward(self, residuals: Tensor) -> Tensor:
        x = unfold(residuals, self.num_streams, self.dim, self.channel_first)
        pooled = functional.attention_pool(x, self.to_attn_logits.weight)
        return pooled.movedim(-1, 1) if self.channel_first else pooled


def identity_linear(dim: int) -> nn.Linear:
    """A bias-free linear map that starts as the identity."""
    linear = nn.Linear(dim, dim, bias=False)
    nn.init.eye_(linear.weight)
    return linear


def get_expand_reduce_stream_functions(
    num_streams: int,
    add_stream_embed: bool = False,
    dim: int | None = None,
    disable: bool = False,
) -> tuple[nn.Module, nn.Module]:
    """(expand, reduce) of the folded layout: copies, plus an embedding if asked for; sum."""
    check_count("num_streams", num_streams, least=1)
    if disable:
        return nn.Identity(), nn.Identity()
    reduce = ReduceStreams(num_streams)
    if not add_stream_embed:
        return ExpandStreams(num_streams), reduce
    return StreamEmbed(num_streams, require_dim(dim), expand_to_streams=True), reduce


def require_dim(dim: int | None) -> int:
    """Raise unless dim is given."""
    if dim is None:
        raise ValueError(
            "dim must be given with a stream embedding or an attention pool, got None"
        )
    return dim


def is_disabled(disable: bool | None, num_streams: int, num_fracs: int = 1) -> bool:
    """The default of `disable`: one stream, one fraction."""
    return (num_streams == 1 and num_fracs == 1) if disable is None else disable


InitFunctions = tuple[Callable[..., nn.Module], nn.Module, nn.Module]
