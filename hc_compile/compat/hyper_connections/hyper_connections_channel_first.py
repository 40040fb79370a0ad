"""The package's channel-first module: its parameters are 1×1 convolutions, here as matrices."""

import torch
from torch import Tensor, nn

from hc_compile import functional
from hc_compile.compat.hyper_connections import hyper_connections as base
from hc_compile.compat.hyper_connections.connection import (
    Branch,
    Connection,
    Gamma,
    add,
    joined_arguments,
    start_index,
)
from hc_compile.compat.hyper_connections.layout import check_sizes
from hc_compile.compat.hyper_connections.residual import Residual, init_functions
from hc_compile.compat.hyper_connections.streams import (
    InitFunctions,
    get_expand_reduce_stream_functions,
)

__all__ = [
    "HyperConnections",
    "Residual",
    "get_expand_reduce_stream_functions",
    "get_init_and_expand_reduce_stream_functions",
]


class HyperConnections(Connection):
    """HC on streams [(b s), d, ...] with any spatial dimensions.

    Args:
        num_residual_streams, dim, branch, layer_index, tanh, dropout: as in hyper_connections.py.
        channel_first: must be True, as the package works so whatever it is given.
    """

    def __init__(
        self,
        num_residual_streams: int,
        *,
        dim: int,
        branch: Branch | None = None,
        layer_index: int | None = None,
        tanh: bool = True,
        channel_first: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        check_sizes(num_residual_streams, dim)
        if not channel_first:
            raise ValueError(
                "channel_first must be True here (or use hyper_connections), got False"
            )
        self.branch, self.channel_first = branch, True
        self.dim, self.num_residual_streams = dim, num_residual_streams
        self.depth_residual_fn = add
        self.dropout = nn.Dropout(dropout)
        s, start = num_residual_streams, start_index(layer_index, num_residual_streams)
        self.constraint = base.dynamic_constraint(s, 1, 1, tanh)
        self.norm = Gamma(dim, 1, 1)
        self.static_beta = nn.Parameter(torch.ones(s))
        eye = torch.eye(s)
        self.static_alpha = nn.Parameter(torch.cat([eye[:, start : start + 1], eye], 1))
        self.dynamic_alpha_fn = nn.Conv2d(dim, s + 1, 1, bias=False)
        self.dynamic_beta_fn = nn.Sequential(nn.Conv2d(dim, 1, 1, bias=False))
        nn.init.zeros_(self.dynamic_alpha_fn.weight)
        nn.init.zeros_(self.dynamic_beta_fn[0].weight)  # type: ignore[arg-type]
        self.dynamic_alpha_scale = nn.Parameter(torch.tensor(1e-2))
        self.dynamic_beta_scale = nn.Parameter(torch.tensor(1e-2))

    def _coefficients(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        alpha = self.dynamic_alpha_fn.weight.flatten(1)
        beta = self.dynamic_beta_fn[0].weight.flatten(1)  # type: ignore[union-attr]
        scales = (self.dynamic_alpha_scale, self.dynamic_beta_scale)
        phi, gates, bias = joined_arguments(
            alpha, beta, self.static_alpha, self.static_beta, scales
        )
        phi = phi * self.norm.gain()
        u, _, post, res, ghost = functional.read(x, phi, gates, bias, self.constraint)
        return u, post, res, ghost

    get_expand_reduce_stream_functions = staticmethod(get_expand_reduce_stream_functions)

    @staticmethod
    def get_init_and_expand_reduce_stream_functions(*args, **kwargs) -> InitFunctions:
        """The module's function of this name."""
        return get_init_and_expand_reduce_stream_functions(*args, **kwargs)


def get_init_and_expand_reduce_stream_functions(
    num_streams: int, disable: bool | None = None
) -> InitFunctions:
    """(make, expand, reduce) of the channel-first module."""
    return init_functions(HyperConnections, num_streams, disable)
