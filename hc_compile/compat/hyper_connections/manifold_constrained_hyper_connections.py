"""ManifoldConstrainedHyperConnections (mHC, arXiv 2512.24880, with HC's per-stream projection).

Columns, then rows of exp(z_res) normalised; pre = σ, post = 2σ. With fractions the manifold is
that of all S·f streams, [out, in] doubly stochastic.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from custom_ops.constraint import Constraint, check_count
from hc_compile import functional
from hc_compile.compat.hyper_connections.connection import (
    Branch,
    Connection,
    Gamma,
    add,
    first_reads,
    mix,
    start_index,
)
from hc_compile.compat.hyper_connections.hyper_connections import NORM_EPS, own_fractions
from hc_compile.compat.hyper_connections.layout import check_sizes
from hc_compile.compat.hyper_connections.residual import Residual
from hc_compile.compat.hyper_connections.streams import (
    AttentionPoolReduceStream,
    InitFunctions,
    StreamEmbed,
    get_expand_reduce_stream_functions,
    is_disabled,
)

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


def sinkhorn_knopps(log_alpha: Tensor, iters: int = 20) -> Tensor:
    """exp(log_alpha), columns then rows normalised, iters times: [..., n, n]."""
    check_count("iters", iters, least=1)
    return functional.sinkhorn(log_alpha, iters)


def log_domain_sinkhorn_knopps(log_alpha: Tensor, iters: int = 20) -> Tensor:
    """`sinkhorn_knopps` in the log domain."""
    check_count("iters", iters, least=1)
    return functional.sinkhorn(log_alpha, iters, start="log")


class ManifoldConstrainedHyperConnections(Connection):
    """The package's mHC on streams [(b s), ..., d].

    Args:
        num_residual_streams, dim, branch, layer_index, channel_first, dropout,
        add_branch_out_to_residual, num_input_views, depth_residual_fn, num_fracs: as
            `HyperConnections`.
        residual_transform: applied to the residuals before anything else.
        sinkhorn_iters: >= 1. log_domain_sinkhorn: iterate in the log domain.
        residual_mix_constraint_fn: takes the logits [..., S·f, S·f] to H_res instead of Sinkhorn.
        forward_method_names: methods of the branch that the layer shows as its own.
        num_dynamic_alpha_proposals: p > 1 averages pre and H_res over p projections.

    Raises: ValueError, TypeError that name the argument.
    """

    def __init__(
        self,
        num_residual_streams: int,
        *,
        dim: int,
        branch: Branch | None = None,
        layer_index: int | None = None,
        channel_first: bool = False,
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
    ):
        super().__init__()
        check_sizes(num_residual_streams, dim, num_fracs, num_input_views)
        check_count("sinkhorn_iters", sinkhorn_iters, least=1)
        check_count("num_dynamic_alpha_proposals", num_dynamic_alpha_proposals, least=1)
        if residual_mix_constraint_fn is not None and log_domain_sinkhorn:
            raise ValueError(
                "log_domain_sinkhorn must be False with a residual_mix_constraint_fn, got True"
            )
        self.branch, self.channel_first = branch, channel_first
        self.dim, self.num_residual_streams = dim, num_residual_streams
        self.num_fracs, self.num_input_views = num_fracs, num_input_views
        self.num_dynamic_alpha_proposals = num_dynamic_alpha_proposals
        self.add_branch_out_to_residual = add_branch_out_to_residual
        self.depth_residual_fn = depth_residual_fn
        self.dropout = nn.Dropout(dropout)
        transform = nn.Identity() if residual_transform is None else residual_transform
        self.residual_transform = transform
        self.residual_mix_constraint_fn = residual_mix_constraint_fn
        self.constraint = Constraint(
            num_residual_streams * num_fracs,
            views=num_input_views * num_fracs,
            branches=num_fracs,
            projection="stream",
            norm_eps=NORM_EPS,
            post="sigmoid" if add_branch_out_to_residual else "none",
            manifold="sinkhorn" if residual_mix_constraint_fn is None else "linear",
            start="log" if log_domain_sinkhorn else "exp-globalmax",
            iterations=sinkhorn_iters,
            transpose=True,
        )
        self._make_parameters(start_index(layer_index, num_residual_streams))
        self.forward_method_names = forward_method_names
        for name in forward_method_names:
            if hasattr(self, name):
                raise ValueError(f"forward_method_names must be new names, got {name!r}")
            setattr(self, name, getattr(self.branch, name))

    def _make_parameters(self, start: int) -> None:
        s, f, v = self.num_residual_streams, self.num_fracs, self.num_input_views
        dim = self.dim // f
        self.norm = Gamma(dim)
        read = self._rows(first_reads(start, s, f, v)).reshape(s * f, v * f)
        self.static_alpha = nn.Parameter(torch.cat([read, torch.eye(s * f)], 1))
        shape = (self.num_dynamic_alpha_proposals, dim, (s + v) * f)
        self.dynamic_alpha_fn = nn.Parameter(torch.zeros(shape))
        self.pre_branch_scale = nn.Parameter(torch.full((1,), 1e-2))
        self.residual_scale = nn.Parameter(torch.full((1,), 1e-2))
        if self.add_branch_out_to_residual:
            self._make_beta(s, f, dim)
            self.h_post_scale = nn.Parameter(torch.tensor(1e-2))

    def _make_beta(self, s: int, f: int, dim: int) -> None:
        self.static_beta = nn.Parameter(torch.ones(s * f))
        self.dynamic_beta_fn = nn.Parameter(torch.zeros((dim,) if f == 1 else (dim, f)))

    def _rows(self, per_stream: Tensor) -> Tensor:
        """[S, f, ...] in the order of the rows of static_alpha, here fractions first."""
        return per_stream.transpose(0, 1)

    def _beta(self) -> Tensor:
        """static_beta as [f2, S, f1]: what fraction f1 sends to fraction f2 of each stream."""
        s, f = self.num_residual_streams, self.num_fracs
        return self.static_beta.view(s, f).mT.unsqueeze(-1).expand(f, s, f)

    def _order(self, square: Tensor) -> Tensor:
        """[(f s), ..., (f s)] residual part of static_alpha to our (s f)."""
        s, f = self.num_residual_streams, self.num_fracs
        return square.view(f, s, f, s).permute(1, 0, 3, 2)

    def _columns(self, fn: Tensor) -> Tensor:
        """Residual columns [p, (f s), d] of dynamic_alpha_fn to our (s f)."""
        s, f = self.num_residual_streams, self.num_fracs
        return fn.unflatten(1, (f, s)).transpose(1, 2).flatten(1, 2)

    def _read_logits(self, part: Tensor) -> Tensor:
        """[(f s), (v f)] branch part of static_alpha to [(v f), S, f]."""
        s, f = self.num_residual_streams, self.num_fracs
        return part.view(f, s, -1).permute(2, 1, 0)

    def _arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        """φ [p, M/n, C], α [3] and b of `constraint` from the package's parameters."""
        f, v = self.num_fracs, self.num_input_views
        pre, res = self.static_alpha[:, : v * f], self.static_alpha[:, v * f :]
        fn = self.dynamic_alpha_fn.mT
        bias = [self._read_logits(pre), self._order(res)]
        rows = [fn[:, : v * f], self._columns(fn[:, v * f :])]
        gates: list[Tensor] = [self.pre_branch_scale, self.residual_scale]
        if self.add_branch_out_to_residual:
            bias.insert(1, self._beta())
            beta = self.dynamic_beta_fn.reshape(-1, f).mT
            rows.insert(1, beta.expand(fn.shape[0], *beta.shape))
            gates.insert(1, self.h_post_scale.reshape(1))
        else:
            gates.insert(1, self.residual_scale)
        phi = torch.cat(rows, 1) * self.norm.gain()
        phi = phi.squeeze(0) if fn.shape[0] == 1 else phi
        return phi, torch.cat(gates), torch.cat([part.flatten() for part in bias])

    def _sources(self, residuals: Tensor) -> tuple[Tensor, Tensor]:
        return super()._sources(self.residual_transform(residuals))

    def _stream_mix(self) -> Tensor | None:
        """W [n, n] mixing the streams before the norm, if any."""
        return None

    def _coefficients(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        phi, alpha, bias = self._arguments()
        weights, fn = self._stream_mix(), self.residual_mix_constraint_fn
        ghost = None
        if weights is None and fn is None:
            u, _, post, res, ghost = functional.read(x, phi, alpha, bias, self.constraint)
        else:
            source = x if weights is None else mix(x, weights)
            pre, post, res = self._constrained(source, phi, alpha, bias)
            u = functional.aggregate(x, pre)
        return u, own_fractions(post, self.num_residual_streams, self.num_fracs), res, ghost

    def _constrained(self, x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> Any:
        fn = self.residual_mix_constraint_fn
        if fn is None:
            return functional.coefficients(x, phi, alpha, bias, self.constraint)
        every = phi.unsqueeze(0) if phi.dim() == 2 else phi
        c = self.constraint
        made = [functional.coefficients(x, each, alpha, bias, c) for each in every.unbind()]
        made = [(pre, post, fn(logits.mT).mT) for pre, post, logits in made]
        return tuple(torch.stack(same).mean(0) for same in zip(*made, strict=True))

    get_expand_reduce_stream_functions = staticmethod(get_expand_reduce_stream_functions)

    @staticmethod
    def get_init_and_expand_reduce_stream_functions(*args: Any, **kwargs: Any) -> InitFunctions:
        """The module's function of this name."""
        return get_init_and_expand_reduce_stream_functions(*args, **kwargs)


mHC = ManifoldConstrainedHyperConnections


def get_init_and_expand_reduce_stream_functions(
    num_streams: int,
    num_fracs: int = 1,
    dim: int | None = None,
    add_stream_embed: bool = False,
    disable: bool | None = None,
    sinkhorn_iters: int = 20,
    **kwargs: Any,
) -> InitFunctions:
    """(make, expand, reduce) of mHC; further options go to every layer."""
    disable = is_disabled(disable, num_streams, num_fracs)
    kind = Residual if disable else ManifoldConstrainedHyperConnections
    make = partial(kind, num_streams, num_fracs=num_fracs, sinkhorn_iters=sinkhorn_iters, **kwargs)
    make = make if dim is None else partial(make, dim=dim)
    ends = get_expand_reduce_stream_functions(num_streams, add_stream_embed, dim, disable)
    return make, *ends
