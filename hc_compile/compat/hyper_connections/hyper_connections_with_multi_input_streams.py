"""Several inputs in streams: further arguments of the branch are read from their own streams."""

from collections.abc import Callable
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
    joined_arguments,
    start_index,
)
from hc_compile.compat.hyper_connections.hyper_connections import NORM_EPS, dynamic_constraint
from hc_compile.compat.hyper_connections.layout import check_sizes, unfold
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

Path = int | str


class ProjActScale(nn.Module):
    """Projection and gate of dynamic coefficients; their norm and tanh are inside the ops."""

    def __init__(self, dim: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim, dim_out, bias=False)
        nn.init.zeros_(self.proj.weight)
        self.scale = nn.Parameter(torch.tensor(1e-2))


class HyperConnections(Connection):
    """HC whose branch takes further arguments that lie in streams as well.

    Args:
        additional_input_paths: each an int k >= 1 (positional argument k of the call, residuals
            being 0) or a name (keyword argument), or (path, width) for another width than dim.
        The rest as in hyper_connections.py.

    Without a branch the call gives (([branch_input, *args], kwargs), add_residual).
    """

    def __init__(
        self,
        num_residual_streams: int,
        *,
        dim: int,
        additional_input_paths: list[Path | tuple[Path, int]] | None = None,
        branch: Branch | None = None,
        layer_index: int | None = None,
        tanh: bool = True,
        channel_first: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        check_sizes(num_residual_streams, dim)
        self.branch, self.channel_first = branch, channel_first
        self.dim, self.num_residual_streams = dim, num_residual_streams
        self.depth_residual_fn = add
        self.dropout = nn.Dropout(dropout)
        s, start = num_residual_streams, start_index(layer_index, num_residual_streams)
        self.constraint = dynamic_constraint(s, 1, 1, tanh)
        self.read_constraint = Constraint(
            s,
            projection="stream",
            norm_eps=NORM_EPS,
            squash="tanh" if tanh else "none",
            pre="linear",
            post="none",
            manifold="none",
        )
        eye = torch.eye(s)
        self.norm = Gamma(dim)
        self.dynamic_alpha_and_branch_input = ProjActScale(dim, s + 1)
        self.static_alpha = nn.Parameter(torch.cat([eye[:, start : start + 1], eye], 1))
        self.dynamic_beta = ProjActScale(dim, 1)
        self.static_beta = nn.Parameter(torch.ones(s))
        paths = [
            one if isinstance(one, tuple) else (one, dim) for one in additional_input_paths or ()
        ]
        for path, width in paths:
            if isinstance(path, str):
                continue
            check_count("additional_input_paths", path, least=1)
            check_count("additional_input_paths", width, least=1)
        self.additional_input_paths = paths
        self.additional_norms = nn.ModuleList(Gamma(width) for _, width in paths)
        self.additional_to_dynamic_input = nn.ModuleList(ProjActScale(w, 1) for _, w in paths)
        self.additional_static_input = nn.ParameterList(
            nn.Parameter(eye[start].clone()) for _ in paths
        )

    def _coefficients(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        alpha, beta = self.dynamic_alpha_and_branch_input, self.dynamic_beta
        rows, scales = (alpha.proj.weight, beta.proj.weight), (alpha.scale, beta.scale)
        phi, gates, bias = joined_arguments(*rows, self.static_alpha, self.static_beta, scales)
        phi = phi * self.norm.gain()
        u, _, post, res, ghost = functional.read(x, phi, gates, bias, self.constraint)
        return u, post, res, ghost

    def _additional(self, streams: Tensor, index: int) -> Tensor:
        """Σ_i pre_i x_i of one further input in streams."""
        width = self.additional_input_paths[index][1]
        x = unfold(streams, self.num_residual_streams, width, self.channel_first)
        to_input: Any = self.additional_to_dynamic_input[index]
        gamma: Any = self.additional_norms[index]
        phi = to_input.proj.weight * gamma.gain()
        bias = self.additional_static_input[index]
        u = functional.pre(x, phi, to_input.scale.expand(3), bias, self.read_constraint)[0]
        return u.movedim(-1, 1) if self.channel_first else u

    def _enter(self, residuals: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Callable]:
        u, write = super()._enter(residuals)
        args, kwargs = self._inputs(args, kwargs)
        return ([u, *args], kwargs), write

    def _inputs(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The call's other arguments, those in streams replaced by what is read of them."""
        positional, named = list(args), dict(kwargs)
        for index, (path, _) in enumerate(self.additional_input_paths):
            found: Any = named if isinstance(path, str) else positional
            key: Any = path if isinstance(path, str) else path - 1
            if key not in named if isinstance(path, str) else key >= len(positional):
                raise ValueError(f"the call must have the additional input {path!r}, got none")
            found[key] = self._additional(found[key], index)
        return tuple(positional), named

    def _call(self, branch: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        positional, named = inputs
        return branch(*positional, **named)

    def width_connection(  # type: ignore[override]
        self, residuals: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Tensor, dict]:
        """(([branch_input, *args], kwargs), mixed residuals, {"beta": post})."""
        u, mixed, rest = super().width_connection(residuals)
        args, kwargs = self._inputs(args, kwargs)
        return ([u, *args], kwargs), mixed, rest

    get_expand_reduce_stream_functions = staticmethod(get_expand_reduce_stream_functions)

    @staticmethod
    def get_init_and_expand_reduce_stream_functions(*args, **kwargs) -> InitFunctions:
        """The module's function of this name."""
        return get_init_and_expand_reduce_stream_functions(*args, **kwargs)


def get_init_and_expand_reduce_stream_functions(
    num_streams: int, disable: bool | None = None
) -> InitFunctions:
    """(make, expand, reduce) of the multi-input module."""
    return init_functions(HyperConnections, num_streams, disable)
