"""Residual: the plain x + F(x) behind the same calls, what `disable` gives."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from hc_compile.compat.hyper_connections.connection import Branch, Wrapper, on_first_leaf
from hc_compile.compat.hyper_connections.streams import (
    InitFunctions,
    get_expand_reduce_stream_functions,
    is_disabled,
)


class Residual(Wrapper):
    """x + F(x), constructed and called like a hyper-connection, whose other options it ignores."""

    def __init__(
        self,
        *args: Any,
        branch: Branch | None = None,
        residual_transform: nn.Module | None = None,
        **kwargs: Any,
    ):
        super().__init__()
        self.branch = branch
        self.residual_transform = (
            nn.Identity() if residual_transform is None else residual_transform
        )

    def width_connection(self, residuals: Tensor) -> tuple[Tensor, Tensor, dict]:
        """(residuals, residuals, {})."""
        return residuals, residuals, {}

    def depth_connection(self, branch_output: Tensor, residuals: Tensor) -> Tensor:
        """branch_output + residual_transform(residuals)."""
        return branch_output + self.residual_transform(residuals)

    def _enter(self, residuals: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Callable]:
        return residuals, on_first_leaf(lambda y: self.depth_connection(y, residuals))


def init_functions(kind: type, num_streams: int, disable: bool | None) -> InitFunctions:
    """(make, expand, reduce): make(dim=…) gives a `kind`, or a Residual if disabled."""
    disable = is_disabled(disable, num_streams)
    make = partial(Residual if disable else kind, num_streams)
    return make, *get_expand_reduce_stream_functions(num_streams, disable=disable)
