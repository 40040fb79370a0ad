"""HyperConnections (HC, arXiv 2409.19606, algorithm 2) with fractions (2503.14125) and views.

With `mhc=True` the coefficients are the static manifold ones of static_mhc.py.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from custom_ops.constraint import NEWTON_SCHULZ_SCHEDULE, Constraint
from hc_compile import functional
from hc_compile.compat.hyper_connections.connection import (
    Branch,
    Connection,
    Gamma,
    add,
    first_reads,
    start_index,
)
from hc_compile.compat.hyper_connections.layout import check_sizes
from hc_compile.compat.hyper_connections.residual import Residual
from hc_compile.compat.hyper_connections.static_mhc import StaticManifold
from hc_compile.compat.hyper_connections.stats import dynamic_stats
from hc_compile.compat.hyper_connections.streams import (
    AttentionPoolReduceStream,
    InitFunctions,
    StreamEmbed,
    get_expand_reduce_stream_functions,
    is_disabled,
)

__all__ = [
    "AttentionPoolReduceStream",
    "HyperConnections",
    "Residual",
    "StreamEmbed",
    "get_expand_reduce_stream_functions",
    "get_init_and_expand_reduce_stream_functions",
]

NORM_EPS = 1e-24  # the package divides by max(‖x‖, 1e-12)
NS_COEFFS = NEWTON_SCHULZ_SCHEDULE[:8]
NS_STEPS = len(NS_COEFFS)


def dynamic_constraint(
    streams: int, views: int, branches: int, tanh: bool, writes: bool = True
) -> Constraint:
    """The package's dynamic hyper-connection in our terms."""
    return Constraint(
        streams,
        views=views,
        branches=branches,
        projection="stream",
        norm_eps=NORM_EPS,
        squash="tanh" if tanh else "none",
        pre="linear",
        post="linear" if writes else "none",
        post_scale=1.0,
        manifold="linear",
        transpose=True,
    )


class HyperConnections(Connection):
    """The package's dynamic hyper-connection on streams [(b s), ..., d].

    Args:
        num_residual_streams: s. dim: d. branch: F, or None to get (branch_input, add_residual).
        layer_index: the first read is of stream layer_index mod s; None draws it from torch's
            generator.
        tanh, dropout, channel_first ([(b s), d, ...]): as in the package.
        add_branch_out_to_residual: False makes add_residual give back the branch's output.
        num_input_views: v > 1 gives the branch [v, b, ..., d].
        depth_residual_fn: (branch part, mixed residuals) to new residuals.
        num_fracs: f, fractions of d that mix like streams; each reads its own at the start.
        mhc and what follows: the fork's static manifold-constrained form; `collect_stats` (also an
            attribute) fills `last_stats` at every call.
        residual_transform: with mhc, applied to the residuals that are mixed, not to those read.

    Raises: ValueError, TypeError that name the argument.
    """

    def __init__(
        self,
        num_residual_streams: int,
        *,
        dim: int,
        branch: Branch | None = None,
        layer_index: int | None = None,
        tanh: bool = True,
        channel_first: bool = False,
        dropout: float = 0.0,
        residual_transform: nn.Module | None = None,
        add_branch_out_to_residual: bool = True,
        num_input_views: int = 1,
        depth_residual_fn: Callable[[Tensor, Tensor], Tensor] = add,
        num_fracs: int = 1,
        mhc: bool = False,
        sinkhorn_iters: int = 10,
        sinkhorn_tau: float = 0.05,
        mhc_h_res_proj: str = "sinkhorn",
        ns_steps: int = NS_STEPS,
        ns_eps: float = 1e-7,
        ns_coeffs: tuple = NS_COEFFS,
        mhc_residual_identity_mix: bool = False,
        mhc_residual_alpha: float = 0.01,
        collect_stats: bool = False,
    ):
        super().__init__()
        check_sizes(num_residual_streams, dim, num_fracs, num_input_views)
        self.branch, self.channel_first = branch, channel_first
        self.dim, self.num_residual_streams = dim, num_residual_streams
        self.num_fracs, self.num_input_views = num_fracs, num_input_views
        self.add_branch_out_to_residual = add_branch_out_to_residual
        self.depth_residual_fn = depth_residual_fn
        self.dropout = nn.Dropout(dropout)
        self.collect_stats, self.last_stats = collect_stats, {}
        start = start_index(layer_index, num_residual_streams)
        self.manifold = None
        if mhc:
            if num_fracs > 1 or num_input_views > 1:
                raise ValueError(
                    "num_fracs and num_input_views must be 1 with mhc=True, "
                    f"got {num_fracs} and {num_input_views}"
                )
            self.manifold = StaticManifold(
                mhc_h_res_proj, sinkhorn_iters, sinkhorn_tau, ns_steps, ns_eps, ns_coeffs
            )
            mixed = mhc_residual_alpha if mhc_residual_identity_mix else None
            self.manifold.make_parameters(self, start, mixed)
            self.residual_transform = residual_transform
            return
        if residual_transform is not None or mhc_residual_identity_mix:
            raise ValueError(
                "residual_transform and mhc_residual_identity_mix must be left out unless mhc=True"
            )
        self._make_parameters(start, tanh)

    def _make_parameters(self, start: int, tanh: bool) -> None:
        s, f, v = self.num_residual_streams, self.num_fracs, self.num_input_views
        writes, dim = self.add_branch_out_to_residual, self.dim // f
        self.constraint = dynamic_constraint(s * f, v * f, f, tanh, writes)
        self.norm = Gamma(dim)
        # rows (f1 s), columns (f2 t) with t over the views, then the streams
        read = first_reads(start, s, f, v).permute(1, 0, 3, 2)
        keep = torch.eye(s * f).view(f, s, f, s)
        self.static_alpha = nn.Parameter(torch.cat([read, keep], -1).reshape(s * f, -1))
        self.dynamic_alpha_fn = nn.Parameter(torch.zeros(dim, (s + v) * f))
        self.dynamic_alpha_scale = nn.Parameter(torch.tensor(1e-2))
        if writes:
            self.static_beta = nn.Parameter(torch.ones(s * f))
            self.dynamic_beta_fn = nn.Parameter(torch.zeros((dim,) if f == 1 else (dim, f)))
            self.dynamic_beta_scale = nn.Parameter(torch.tensor(1e-2))

    def _sources(self, residuals: Tensor) -> tuple[Tensor, Tensor]:
        if self.manifold is None or self.residual_transform is None:
            return super()._sources(residuals)
        return self._open(residuals), self._open(self.residual_transform(residuals))

    def _coefficients(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        if self.manifold is not None:
            pre, post, res = self.manifold.coefficients(self)
            if self.collect_stats:
                writes = post if self.add_branch_out_to_residual else None
                self.last_stats = self.manifold.stats(pre, writes, res)
            return functional.aggregate(x, pre), post, res, None
        u, pre, post, res, ghost = functional.read(x, *self._arguments(), self.constraint)
        if self.collect_stats:
            writes = post if self.add_branch_out_to_residual else None
            self.last_stats = dynamic_stats(pre, writes, res)
        return u, own_fractions(post, self.num_residual_streams, self.num_fracs), res, ghost

    def _arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        """φ, α [3] and b of `constraint` from the package's parameters."""
        s, f, v = self.num_residual_streams, self.num_fracs, self.num_input_views
        pre, res = self.static_alpha.view(f, s, f, v + s).split((v, s), -1)
        columns = self.dynamic_alpha_fn.mT.unflatten(0, (f, v + s)).transpose(0, 1)
        bias = [pre.permute(3, 2, 1, 0), res.permute(1, 0, 3, 2)]
        rows = [columns[:v].flatten(0, 1), columns[v:].flatten(0, 1)]
        gates: list[Tensor] = [self.dynamic_alpha_scale] * 3
        if self.add_branch_out_to_residual:
            beta = self.static_beta.view(s, f).mT.unsqueeze(-1).expand(f, s, f)
            bias.insert(1, beta)
            rows.insert(1, self.dynamic_beta_fn.view(-1, f).mT)
            gates[1] = self.dynamic_beta_scale
        phi = torch.cat(rows) * self.norm.gain()
        return phi, torch.stack(gates), torch.cat([part.flatten() for part in bias])

    get_expand_reduce_stream_functions = staticmethod(get_expand_reduce_stream_functions)

    @staticmethod
    def get_init_and_expand_reduce_stream_functions(*args, **kwargs) -> InitFunctions:
        """The module's function of this name."""
        return get_init_and_expand_reduce_stream_functions(*args, **kwargs)


def own_fractions(post: Tensor, streams: int, fracs: int) -> Tensor:
    """post [..., f2, (s f1)], made from the fraction it comes from, as [..., f1, (s f2)]."""
    if fracs == 1:
        return post
    return post.unflatten(-1, (streams, fracs)).transpose(-1, -3).flatten(-2)


def get_init_and_expand_reduce_stream_functions(
    num_streams: int,
    num_fracs: int = 1,
    dim: int | None = None,
    add_stream_embed: bool = False,
    disable: bool | None = None,
) -> InitFunctions:
    """(make, expand, reduce): make(dim=…, …) gives a HyperConnections, or a Residual if disabled.

    Args:
        num_streams, num_fracs: given to every HyperConnections.
        dim: given too; needed for a stream embedding.
        add_stream_embed: expand with a learned offset of each stream.
        disable: plain residuals; None disables one stream of one fraction.
    """
    disable = is_disabled(disable, num_streams, num_fracs)
    kind = Residual if disable else HyperConnections
    make = partial(kind, num_streams, num_fracs=num_fracs)
    make = make if dim is None else partial(make, dim=dim)
    ends = get_expand_reduce_stream_functions(num_streams, add_stream_embed, dim, disable)
    return make, *ends
