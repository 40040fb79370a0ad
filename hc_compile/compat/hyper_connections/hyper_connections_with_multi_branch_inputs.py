"""Several branch inputs: V = W views and outputs, folded into the batch as [(i b), ..., d]."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from custom_ops.constraint import check_count
from hc_compile import functional
from hc_compile.compat.hyper_connections.connection import (
    Connection,
    Gamma,
    add,
    joined_arguments,
    start_index,
)
from hc_compile.compat.hyper_connections.hyper_connections import dynamic_constraint
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

Branches = nn.Module | Sequence[nn.Module]


class HyperConnections(Connection):
    """HC whose branch gets i linear combinations of the streams and gives back i outputs.

    Args:
        branch: one module for all inputs, or modules that share them out evenly.
        layer_index: decides which streams the inputs start from; None draws it.
        num_branch_inputs: i.
        The rest as in hyper_connections.py.
    """

    def __init__(
        self,
        num_residual_streams: int,
        *,
        dim: int,
        branch: Branches | None = None,
        layer_index: int | None = None,
        tanh: bool = True,
        channel_first: bool = False,
        dropout: float = 0.0,
        num_branch_inputs: int = 1,
    ):
        super().__init__()
        check_sizes(num_residual_streams, dim)
        check_count("num_branch_inputs", num_branch_inputs, least=1)
        s, count = num_residual_streams, num_branch_inputs
        self.branches = None
        if branch is not None:
            modules = [branch] if isinstance(branch, nn.Module) else list(branch)
            if not modules or count % len(modules):
                raise ValueError(
                    f"num_branch_inputs must be divisible by the number of branches = "
                    f"{len(modules)}, got {count}"
                )
            self.branches = nn.ModuleList(modules)
        self.channel_first, self.dim, self.num_residual_streams = channel_first, dim, s
        self.num_branch_inputs = count
        self.depth_residual_fn = add
        self.dropout = nn.Dropout(dropout)
        self.constraint = dynamic_constraint(s, count, count, tanh)
        self.norm = Gamma(dim)
        offset = start_index(layer_index, s * count) * count
        order = torch.arange(s)[:, None] + torch.arange(count) + offset
        read = (order % s == 0).float()
        self.static_beta = nn.Parameter(torch.ones(s, count))
        self.static_alpha = nn.Parameter(torch.cat([read, torch.eye(s)], 1))
        self.dynamic_alpha_fn = nn.Parameter(torch.zeros(dim, s + count))
        self.dynamic_alpha_scale = nn.Parameter(torch.tensor(1e-2))
        self.dynamic_beta_fn = nn.Parameter(torch.zeros(dim, count))
        self.dynamic_beta_scale = nn.Parameter(torch.tensor(1e-2))

    @property
    def branch(self) -> Any:
        """What the base class asks for: the branches, or None."""
        return self.branches

    def _coefficients(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        count = self.num_branch_inputs
        rows = (self.dynamic_alpha_fn.mT, self.dynamic_beta_fn.mT)
        scales = (self.dynamic_alpha_scale, self.dynamic_beta_scale)
        phi, gates, bias = joined_arguments(
            *rows, self.static_alpha, self.static_beta, scales, count
        )
        phi = phi * self.norm.gain()
        u, _, post, res, ghost = functional.read(x, phi, gates, bias, self.constraint)
        if count == 1:
            u, post = u.unsqueeze(-2), post.unsqueeze(-2)
        return u, post, res, ghost

    def _branch_input(self, u: Tensor) -> Tensor:
        u = u.movedim(-2, 0).flatten(0, 1)
        return u.movedim(-1, 1) if self.channel_first else u

    def _branch_output(self, y: Tensor) -> Tensor:
        y = y.movedim(1, -1) if self.channel_first else y
        count = self.num_branch_inputs
        return y.unflatten(0, (count, y.shape[0] // count)).movedim(0, -2)

    def _call(self, branch: Any, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Each branch on its share of the inputs."""
        several = isinstance(branch, nn.ModuleList | Sequence)
        branches: list[Any] = list(branch) if several else [branch]
        return torch.cat(
            [
                function(part, *args, **kwargs)
                for function, part in zip(branches, inputs.chunk(len(branches)), strict=True)
            ]
        )

    get_expand_reduce_stream_functions = staticmethod(get_expand_reduce_stream_functions)

    @staticmethod
    def get_init_and_expand_reduce_stream_functions(*args, **kwargs) -> InitFunctions:
        """The module's function of this name."""
        return get_init_and_expand_reduce_stream_functions(*args, **kwargs)

    def decorate_branch(self, branch: Callable | Sequence[Callable]) -> Callable:
        """One branch for all inputs, or branches that share them out evenly, wrapped."""
        count = 1 if callable(branch) else len(branch)
        if self.num_branch_inputs % count:
            raise ValueError(
                f"num_branch_inputs must be divisible by the number of branches = {count}, "
                f"got {self.num_branch_inputs}"
            )
        return super().decorate_branch(branch)


def get_init_and_expand_reduce_stream_functions(
    num_streams: int, disable: bool | None = None
) -> InitFunctions:
    """(make, expand, reduce) of the multi-branch module."""
    return init_functions(HyperConnections, num_streams, disable)
