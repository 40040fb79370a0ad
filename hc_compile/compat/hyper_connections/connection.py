"""What every hyper-connection of the package does around its coefficients.

Inside, fractions are streams: x [b, ..., S·f, C/f] in the order (stream, fraction), u one input
view a fraction, y one branch output a fraction.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from hc_compile import functional
from hc_compile.compat.hyper_connections.layout import fold, unfold
from hc_compile.fractions import join_views, merge, split

Branch = nn.Module | Callable[..., Any]


def add(x: Tensor, y: Tensor) -> Tensor:
    """The default depth_residual_fn."""
    return x + y


class Gamma(nn.Module):
    """Gain − 1 of the RMS norm, zero at the start; the norm itself is inside the ops."""

    def __init__(self, *shape: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(shape))

    def gain(self) -> Tensor:
        """[C]."""
        return self.gamma.flatten() + 1


class Wrapper(nn.Module):
    """A branch inside a residual of some kind: the package's calling conventions."""

    branch: Branch | None

    def _enter(self, residuals: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Callable]:
        """The branch's input and the function that turns its output into new residuals."""
        raise NotImplementedError

    def _call(self, branch: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return branch(inputs, *args, **kwargs)

    def forward(self, residuals: Tensor, *branch_args: Any, **branch_kwargs: Any) -> Any:
        """New residuals with a branch, else (branch_input, add_residual).

        A branch may return any pytree; its first leaf is its output, the rest passes through.
        """
        inputs, add_residual = self._enter(residuals, *branch_args, **branch_kwargs)
        if self.branch is None:
            return inputs, add_residual
        return add_residual(self._call(self.branch, inputs, *branch_args, **branch_kwargs))

    def decorate_branch(self, branch: Any) -> Callable:
        """`branch` with this connection around it."""
        if self.branch is not None:
            raise ValueError("branch must not be given to the constructor and decorated too")

        def forward_and_add_residual(residual: Tensor, *args: Any, **kwargs: Any) -> Any:
            inputs, add_residual = self._enter(residual, *args, **kwargs)
            return add_residual(self._call(branch, inputs, *args, **kwargs))

        return forward_and_add_residual


def on_first_leaf(function: Callable[[Tensor], Tensor]) -> Callable:
    """`function` applied to the first leaf of a pytree."""

    def apply(out: Any) -> Any:
        (first, *rest), spec = tree_flatten(out)
        return tree_unflatten([function(first), *rest], spec)

    return apply


class Connection(Wrapper):
    """A hyper-connection; subclasses own the parameters and give `_coefficients`."""

    dim: int
    num_residual_streams: int
    num_fracs: int = 1
    num_input_views: int = 1
    channel_first: bool = False
    add_branch_out_to_residual: bool = True
    depth_residual_fn: Callable[[Tensor, Tensor], Tensor]
    dropout: nn.Module

    def _coefficients(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """u [..., (V·f,) C/f], post, res and the ghost of streams x [..., S·f, C/f]."""
        raise NotImplementedError

    def _sources(self, residuals: Tensor) -> tuple[Tensor, Tensor]:
        """What the branch and the coefficients read, and what is mixed and written."""
        x = self._open(residuals)
        return x, x

    def _open(self, residuals: Tensor) -> Tensor:
        x = unfold(residuals, self.num_residual_streams, self.dim, self.channel_first)
        return split(x, self.num_fracs)

    def _close(self, x: Tensor) -> Tensor:
        return fold(merge(x, self.num_fracs), self.channel_first)

    def _branch_input(self, u: Tensor) -> Tensor:
        """u as the package gives it: [b, ..., C], views in front, channels where they were."""
        views = self.num_input_views
        u = join_views(u, views, self.num_fracs)
        u = u if views == 1 else u.movedim(-2, 0)
        return u.movedim(-1, 1 if views == 1 else 2) if self.channel_first else u

    def _branch_output(self, y: Tensor) -> Tensor:
        """The branch's output as [b, ..., C], or [b, ..., f, C/f] with fractions."""
        y = y.movedim(1, -1) if self.channel_first else y
        return y if self.num_fracs == 1 else y.unflatten(-1, (self.num_fracs, -1))

    def _read(self, residuals: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        x, written = self._sources(residuals)
        u, post, res, ghost = self._coefficients(x)
        return self._branch_input(u), written, post, res, ghost if written is x else None

    def _enter(self, residuals: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Callable]:
        u, x, post, res, ghost = self._read(residuals)
        if not self.add_branch_out_to_residual:
            return u, lambda out: out

        def write(y: Tensor) -> Tensor:
            if self.depth_residual_fn is not add:
                mixed = self._close(mix(x, res))
                return self.depth_connection(y, mixed, beta=post)
            new = functional.post(x, self._branch_output(y), post, res, ghost=ghost)
            return self.dropout(self._close(new))

        return u, on_first_leaf(write)

    def width_connection(self, residuals: Tensor) -> tuple[Tensor, Tensor, dict]:
        """branch_input, the mixed residuals, and {"beta": post} for `depth_connection`."""
        u, x, post, res, _ = self._read(residuals)
        beta = post if self.add_branch_out_to_residual else None
        return u, self._close(mix(x, res)), {"beta": beta}

    def depth_connection(
        self, branch_output: Tensor, residuals: Tensor, *, beta: Tensor
    ) -> Tensor:
        """New residuals from mixed ones: dropout(depth_residual_fn(Σ_w post_w y_w, ·))."""
        if not self.add_branch_out_to_residual:
            raise ValueError("add_branch_out_to_residual must be True to write the streams")
        y = self._branch_output(branch_output)
        if y.dim() <= branch_output.dim():  # one output: [..., C] and post [..., S]
            y, beta = y.unsqueeze(-2), beta.unsqueeze(-2)
        weights = beta.mT.expand(*y.shape[:-2], *beta.mT.shape[-2:])
        added = self._close(functional.aggregate(y, weights))
        return self.dropout(self.depth_residual_fn(added, residuals))


def joined_arguments(
    alpha: Tensor,
    beta: Tensor,
    static_alpha: Tensor,
    static_beta: Tensor,
    scales: tuple[Tensor, Tensor],
    views: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """φ, α [3] and b of a layer without fractions.

    Args: alpha [V + S, C] and beta [V, C] project, static_alpha [S, V + S] holds reads and then
    the residual mix, static_beta [S] or [S, V]; scales are those of alpha and beta.
    """
    phi = torch.cat([alpha[:views], beta, alpha[views:]])
    read, keep = static_alpha[:, :views], static_alpha[:, views:]
    write = static_beta.reshape(len(static_alpha), views)
    bias = torch.cat([part.flatten() for part in (read.mT, write.mT, keep)])
    return phi, torch.stack([scales[0], scales[1], scales[0]]), bias


def mix(x: Tensor, res: Tensor) -> Tensor:
    """Σ_j res_ij x_j alone, for what can't take the fused write."""
    return functional.aggregate(x, res.expand(*x.shape[:-2], *res.shape[-2:]))


def start_index(layer_index: int | None, count: int) -> int:
    """layer_index mod count; without one a stream drawn from torch's generator."""
    if layer_index is None:
        return int(torch.randint(count, (), device="cpu"))
    return layer_index % count


def first_reads(start: int, streams: int, fracs: int, views: int) -> Tensor:
    """Initial read [S, f, V, f]: each view's fraction reads its own of stream `start`."""
    read = torch.zeros(streams, fracs, views, fracs)
    read[start] = torch.eye(fracs).unsqueeze(1)
    return read
