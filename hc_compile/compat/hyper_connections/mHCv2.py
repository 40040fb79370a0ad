"""mHCv2: mHC on streams [..., s, d], with stream mixing before the norm and an attention pool."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hc_compile import functional
from hc_compile.checks import require_streams
from hc_compile.compat.hyper_connections import manifold_constrained_hyper_connections as first
from hc_compile.compat.hyper_connections import streams as folded
from hc_compile.compat.hyper_connections.connection import Branch, add
from hc_compile.compat.hyper_connections.manifold_constrained_hyper_connections import (
    log_domain_sinkhorn_knopps,
    sinkhorn_knopps,
)
from hc_compile.compat.hyper_connections.residual import Residual
from hc_compile.compat.hyper_connections.streams import InitFunctions, require_dim
from hc_compile.fractions import merge, split

__all__ = [
    "AttentionPoolReduceStream",
    "ManifoldConstrainedHyperConnections",
    "Residual",
    "StreamEmbed",
    "get_expand_reduce_stream_functions",
    "get_init_and_expand_reduce_stream_functions",
    "log_domain_sinkhorn_knopps",
    "mHC",
    "sinkhorn_knopps",
]


class StreamEmbed(nn.Module):
    """A learned offset [s, d] of each of the streams [..., s, d], zero at the start."""

    def __init__(self, num_streams: int, dim: int, expand_to_streams: bool = False):
        super().__init__()
        last = folded.ExpandStreams(num_streams, last=True)
        self.expand = last if expand_to_streams else nn.Identity()
        self.stream_embed = nn.Parameter(torch.zeros(num_streams, dim))

    def forward(self, residuals: Tensor) -> Tensor:
        return self.expand(residuals) + self.stream_embed


class AttentionPoolReduceStream(nn.Module):
    """Σ_i softmax_i(W x_i) ⊙ x_i over streams [..., s, d]; W starts as identity."""

    def __init__(self, dim: int):
        super().__init__()
        self.to_attn_logits = folded.identity_linear(dim)

    def forward(self, residuals: Tensor) -> Tensor:
        return functional.attention_pool(residuals, self.to_attn_logits.weight)


class ManifoldConstrainedHyperConnections(first.ManifoldConstrainedHyperConnections):
    """The package's second mHC, on streams [..., s, d].

    Args:
        use_triton_sinkhorn: the log-domain iteration; on a GPU every form runs in a kernel here.
        mix_streams_before_norm: coefficients from streams mixed by a learned [s, s] matrix, the
            identity at the start; what is read and written stays unmixed.
        The rest as the first mHC, without channel_first.
    """

    def __init__(
        self,
        num_residual_streams: int,
        *,
        dim: int,
        branch: Branch | None = None,
        layer_index: int | None = None,
        dropout: float = 0.0,
        residual_transform: nn.Module | None = None,
        add_branch_out_to_residual: bool = True,
        num_input_views: int = 1,
        depth_residual_fn: Callable[[Tensor, Tensor], Tensor] = add,
        num_fracs: int = 1,
        sinkhorn_iters: int = 20,
        log_domain_sinkhorn: bool = False,
        residual_mix_constraint_fn: Callable[[Tensor], Tensor] | None = None,
        forward_method_names: tuple[str, ...] = (),
        num_dynamic_alpha_proposals: int = 1,
        use_triton_sinkhorn: bool = False,
        mix_streams_before_norm: bool = False,
    ):
        if use_triton_sinkhorn and residual_mix_constraint_fn is not None:
            raise ValueError(
                "use_triton_sinkhorn must be False with a residual_mix_constraint_fn, got True"
            )
        super().__init__(
            num_residual_streams,
            dim=dim,
            branch=branch,
            layer_index=layer_index,
            dropout=dropout,
            residual_transform=residual_transform,
            add_branch_out_to_residual=add_branch_out_to_residual,
            num_input_views=num_input_views,
            depth_residual_fn=depth_residual_fn,
            num_fracs=num_fracs,
            sinkhorn_iters=sinkhorn_iters,
            log_domain_sinkhorn=log_domain_sinkhorn or use_triton_sinkhorn,
            residual_mix_constraint_fn=residual_mix_constraint_fn,
            forward_method_names=forward_method_names,
            num_dynamic_alpha_proposals=num_dynamic_alpha_proposals,
        )
        self.maybe_mix_streams = None
        if mix_streams_before_norm:
            n = num_residual_streams
            self.maybe_mix_streams = nn.Conv2d(n, n, 1, bias=False)
            nn.init.dirac_(self.maybe_mix_streams.weight)

    def _make_beta(self, s: int, f: int, dim: int) -> None:
        self.static_beta = nn.Parameter(torch.ones(s, f, 1))
        self.dynamic_beta_fn = nn.Parameter(torch.zeros(dim, f))

    def _rows(self, per_stream: Tensor) -> Tensor:
        return per_stream

    def _beta(self) -> Tensor:
        s, f = self.num_residual_streams, self.num_fracs
        return self.static_beta.view(s, f).expand(f, s, f)

    def _order(self, square: Tensor) -> Tensor:
        return square

    def _columns(self, fn: Tensor) -> Tensor:
        return fn

    def _read_logits(self, part: Tensor) -> Tensor:
        return part.mT

    def _stream_mix(self) -> Tensor | None:
        if self.maybe_mix_streams is None:
            return None
        weights = self.maybe_mix_streams.weight.flatten(1)
        if self.num_fracs == 1:
            return weights
        eye = torch.eye(self.num_fracs, dtype=weights.dtype, device=weights.device)
        return torch.kron(weights, eye)

    def _open(self, residuals: Tensor) -> Tensor:
        require_streams(residuals, self.num_residual_streams, self.dim)
        return split(residuals, self.num_fracs)

    def _close(self, x: Tensor) -> Tensor:
        return merge(x, self.num_fracs)

    @staticmethod
    def get_expand_reduce_stream_functions(*args: Any, **kwargs: Any):
        """The module's function of this name."""
        return get_expand_reduce_stream_functions(*args, **kwargs)

    @staticmethod
    def get_init_and_expand_reduce_stream_functions(*args: Any, **kwargs: Any) -> InitFunctions:
        """The module's function of this name."""
        return get_init_and_expand_reduce_stream_functions(*args, **kwargs)


mHC = ManifoldConstrainedHyperConnections


def get_expand_reduce_stream_functions(
    num_streams: int,
    add_stream_embed: bool = False,
    add_attn_pool_reduce_stream: bool = False,
    dim: int | None = None,
    disable: bool = False,
) -> tuple[nn.Module, nn.Module]:
    """(expand, reduce) of [..., d] and [..., s, d]: copies or an embedding; sum or attention."""
    if disable:
        return nn.Identity(), nn.Identity()
    expand = folded.ExpandStreams(num_streams, last=True)
    reduce = folded.ReduceStreams(num_streams, last=True)
    return (
        StreamEmbed(num_streams, require_dim(dim), True) if add_stream_embed else expand,
        AttentionPoolReduceStream(require_dim(dim)) if add_attn_pool_reduce_stream else reduce,
    )


def get_init_and_expand_reduce_stream_functions(
    num_streams: int,
    num_fracs: int = 1,
    dim: int | None = None,
    add_stream_embed: bool = False,
    add_attn_pool_reduce_stream: bool = False,
    disable: bool | None = None,
    sinkhorn_iters: int = 20,
    use_triton_sinkhorn: bool = False,
    **kwargs: Any,
) -> InitFunctions:
    """(make, expand, reduce) of mHCv2; further options go to every layer."""
    disable = folded.is_disabled(disable, num_streams, num_fracs)
    kind = Residual if disable else ManifoldConstrainedHyperConnections
    options = {"num_fracs": num_fracs, "sinkhorn_iters": sinkhorn_iters}
    make = partial(kind, num_streams, **options, use_triton_sinkhorn=use_triton_sinkhorn, **kwargs)
    make = make if dim is None else partial(make, dim=dim)
    ends = get_expand_reduce_stream_functions(
        num_streams, add_stream_embed, add_attn_pool_reduce_stream, dim, disable
    )
    return make, *ends
