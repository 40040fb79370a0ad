"""HyperConnection, StreamExpand and StreamReduce: the modules people put in their models."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from custom_ops import reference
from hc_compile import functional
from hc_compile.checks import require_device, require_float, require_shape, require_streams
from hc_compile.config import HCConfig
from hc_compile.fractions import join_views, merge, own_outputs, split, split_output
from hc_compile.parameters import (
    AttentionPool,
    CoefficientParameters,
    HeadParameters,
    StreamEmbedding,
)
from hc_compile.state import StreamState


class HyperConnection(nn.Module):
    """One hyper-connected sublayer: u = Σ_i pre_i x_i, x'_i = Σ_j res_ij x_j + post_i F(u).

    Args:
        cfg: which variant, how many streams, how wide.
        layer_index: k, the sublayer's position in the network (attention and MLP count apart);
            spreads the initial read over the streams. Default 0.
        branch: F; without it, calling the layer returns (u, add_residual).
        device, dtype: of the HC parameters, float32 (or float64 for reference runs). They live in
            the submodule `coefficients` and none is 0-d.

    With n = 1 (and no fractions) the layer has no parameters and is exactly x + F(x).
    Source: HC, arXiv 2409.19606; mHC, arXiv 2512.24880, eq. 3–9.
    """

    def __init__(
        self,
        cfg: HCConfig,
        layer_index: int = 0,
        branch: nn.Module | Callable[..., Any] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        if not isinstance(cfg, HCConfig):
            raise TypeError(f"cfg must be an HCConfig, got {type(cfg).__name__}")
        if isinstance(layer_index, bool) or not isinstance(layer_index, int) or layer_index < 0:
            raise ValueError(f"layer_index must be an int >= 0, got {layer_index!r}")
        self.cfg = cfg
        self.layer_index = layer_index
        self.branch = branch
        self.coefficients = (
            CoefficientParameters(cfg, layer_index, device, dtype)
            if cfg.constraint.streams > 1
            else None
        )
        self.dropout = nn.Dropout(cfg.dropout) if cfg.dropout else None
        self.monitor: nn.Module | None = None  # see hc_compile.monitor

    def extra_repr(self) -> str:
        return f"dim={self.cfg.dim}, streams={self.cfg.n}, preset={self.cfg.row.name!r}"

    def forward(self, x: Tensor | StreamState, *args: Any, **kwargs: Any) -> Any:
        """Read the streams, and with a branch run it and write them.

        Args:
            x: [..., n, C] streams, or a StreamState, which makes the write lazy.
            *args, **kwargs: passed on to the branch.

        Returns: (u [..., C], add_residual) without a branch; with one the new streams, or
            (streams, *rest) when the branch returned (y, *rest). A delayed preset always makes
            a StreamState; given a tensor, it reads stream 0.
        Raises: ValueError, TypeError that name the argument.
        """
        u, add_residual = self._read(x)
        if self.branch is None:
            if args or kwargs:
                raise TypeError("args and kwargs must be empty without a branch")
            return u, add_residual
        out = self.branch(u, *args, **kwargs)
        if isinstance(out, tuple):
            return add_residual(out[0]), *out[1:]
        return add_residual(out)

    def _read(self, x: Tensor | StreamState) -> tuple[Tensor, Callable]:
        lazy = isinstance(x, StreamState)
        state = x if isinstance(x, StreamState) else StreamState(x)
        require_streams(state.x, self.cfg.n, self.cfg.dim)
        if self.coefficients is None:
            x = resolve(state)
            return x.squeeze(-2), partial(self._add_to_one, x, lazy)
        lazy = lazy or self.cfg.row.delayed
        x, (u, pre, post, res, ghost) = self._coefficients(state, lazy)
        if self.monitor is not None:
            self.monitor(x, res)
        c, fractions = self.cfg, self.cfg.dim // self.cfg.width
        post = own_outputs(post, c.branches, fractions)
        carry = pre if c.row.delayed else None
        add_residual = partial(self._write, x, post, res, ghost, carry, lazy)
        return join_views(u, c.views, fractions), add_residual

    def _coefficients(self, state: StreamState, lazy: bool) -> tuple[Tensor, tuple]:
        """The streams split into fractions, a pending write done, and u, pre, post, res, ghost."""
        assert self.coefficients is not None
        plain = self.cfg.implementation == "plain"
        phi, alpha, bias = self.coefficients()
        parameters = (phi, alpha, bias, self.cfg.constraint)
        carried = read_weights(state) if self.cfg.row.delayed else None
        if plain:
            require_device(state.x, phi=phi, alpha=alpha, bias=bias)
        ops = reference if plain else functional
        x, mix = split(state.x, self.cfg.dim // self.cfg.width), self.coefficients.mix
        if mix is not None:
            x = x if state.pending is None else ops.post(x, *state.pending)
            source = ops.aggregate(x, mix.expand(*x.shape[:-2], *mix.shape))
            pre, post, res = ops.coefficients(source, *parameters)
            u = ops.aggregate(x, pre if carried is None else carried)
            return x, (u, pre, post, res, None)
        constants = None if plain else self.coefficients.constants(x, self.cfg.constraint)
        if constants is not None:
            x = x if state.pending is None else ops.post(x, *state.pending)
            u = ops.aggregate(x, constants[0] if carried is None else carried)
            return x, (u, *constants, None)
        if state.pending is not None:
            x, *made = ops.post_pre(x, *state.pending, *parameters, carried=carried)
            return x, (*made, None)
        if lazy or plain:
            return x, (*ops.pre(x, *parameters, carried=carried), None)
        return x, functional.read(x, *parameters)

    def _write(
        self,
        x: Tensor,
        post: Tensor,
        res: Tensor,
        ghost: Tensor | None,
        carry: Tensor | None,
        lazy: bool,
        y: Tensor,
    ) -> Tensor | StreamState:
        fractions = self.cfg.dim // self.cfg.width
        require_float("y", y)
        if fractions > 1:
            branches = () if self.cfg.branches == 1 else (self.cfg.branches,)
            shape = (*x.shape[:-2], *branches, self.cfg.dim)
            require_shape("y", y, "[..., W, C]" if branches else "[..., C]", shape)
        y = split_output(y, self.cfg.branches, fractions)
        if lazy and self.dropout is None:
            functional.check_write(x, y, post, res)
            return StreamState(merge(x, fractions), (y, post, res), carry)
        if self.cfg.implementation == "plain":
            functional.check_write(x, y, post, res)
            new = reference.post(x, y, post, res)
        else:
            new = functional.post(x, y, post, res, ghost=ghost)
        new = self._drop(merge(new, fractions))
        return StreamState(new, None, carry) if lazy else new

    def _drop(self, x: Tensor) -> Tensor:
        return x if self.dropout is None else self.dropout(x)

    def _add_to_one(self, x: Tensor, lazy: bool, y: Tensor) -> Tensor | StreamState:
        new = self._drop(_add_to_one(x, y))
        return StreamState(new) if lazy else new


def _add_to_one(x: Tensor, y: Tensor) -> Tensor:
    require_float("y", y)
    if y.shape != (*x.shape[:-2], x.shape[-1]):
        raise ValueError(
            f"y must be [..., C] = {[*x.shape[:-2], x.shape[-1]]}, got {list(y.shape)}"
        )
    return (x + y.unsqueeze(-2)).to(x.dtype)


def resolve(state: Tensor | StreamState) -> Tensor:
    """The streams [..., n, C], with a pending write done."""
    if not isinstance(state, StreamState):
        return state
    if state.pending is None:
        return state.x
    fractions = state.x.shape[-1] // state.pending[0].shape[-1]
    return merge(functional.post(split(state.x, fractions), *state.pending), fractions)


def read_weights(state: StreamState) -> Tensor:
    """The pre handed on by the sublayer before; stream 0 alone where there was none."""
    if state.pre is not None:
        return state.pre
    x = state.x  # not x.new_ones: in a graph that would be one more user of the streams
    one = torch.ones(1, dtype=reference.compute_dtype(x), device=x.device)
    return torch.nn.functional.pad(one, (0, x.shape[-2] - 1))


def expand_streams(h: Tensor, cfg: HCConfig) -> Tensor:
    """Embedding to streams: [..., C] -> [..., n, C], n copies.

    Raises: ValueError if the configuration needs parameters (use StreamExpand) or h is not
        [..., C].
    """
    if cfg.expand != "repeat":
        raise ValueError(f"cfg.expand must be 'repeat' (or use StreamExpand), got {cfg.expand!r}")
    return _repeat(h, cfg)


def _repeat(h: Tensor, cfg: HCConfig) -> Tensor:
    require_float("h", h)
    if h.dim() < 1 or h.shape[-1] != cfg.dim:
        raise ValueError(f"h must be [..., C] = [..., {cfg.dim}], got {list(h.shape)}")
    return h.unsqueeze(-2).expand(*h.shape[:-1], cfg.n, cfg.dim).contiguous()


def reduce_streams(x: Tensor | StreamState, cfg: HCConfig) -> Tensor:
    """Streams to the model's output: [..., n, C] -> [..., C] by mean or sum over the streams.

    With reduce "pre" x must be the StreamState that the last sublayer made.

    Raises: ValueError if the configuration needs parameters (use StreamReduce).
    """
    if cfg.reduce in ("head", "attention") and cfg.n != 1:
        raise ValueError(
            f"cfg.reduce must be 'mean' or 'sum' (or use StreamReduce), got {cfg.reduce!r}"
        )
    state, x = x, resolve(x)
    require_streams(x, cfg.n, cfg.dim)
    if cfg.n == 1:
        return x.squeeze(-2)
    if cfg.reduce == "pre":
        if not isinstance(state, StreamState):
            raise TypeError(f"x must be a StreamState to reduce by 'pre', got {type(x).__name__}")
        ops = reference if cfg.implementation == "plain" else functional
        return ops.aggregate(x, read_weights(state))
    wide = x.to(reference.compute_dtype(x))
    total = wide.sum(-2) if cfg.reduce == "sum" else wide.mean(-2)
    return total.to(x.dtype)


class StreamExpand(nn.Module):
    """`expand_streams` as a module, plus the learned stream embedding if configured."""

    lazy = False  # hand out a StreamState, see hc_compile/blocks.py

    def __init__(
        self,
        cfg: HCConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.cfg = cfg
        learned = cfg.expand == "embedding" and cfg.n > 1
        self.embedding = StreamEmbedding(cfg, device, dtype) if learned else None

    def forward(self, h: Tensor) -> Tensor | StreamState:
        """[..., C] -> [..., n, C], or a StreamState of it if `lazy`."""
        x = _repeat(h, self.cfg)
        x = x if self.embedding is None else self.embedding(x)
        return StreamState(x) if self.lazy else x


class StreamReduce(nn.Module):
    """`reduce_streams` as a module, with the learned head or attention pool if configured.

    The head (DeepSeek-V4) is Σ_i (σ(α φx·r + b) + eps)_i x_i, the pool Σ_i softmax_i(W x_i) ⊙ x_i.
    """

    def __init__(
        self,
        cfg: HCConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.cfg = cfg
        learned = cfg.reduce == "head" and cfg.n > 1
        self.head = HeadParameters(cfg, device, dtype) if learned else None
        self.constraint = cfg.head_constraint()
        pooled = cfg.reduce == "attention" and cfg.n > 1
        self.attention = AttentionPool(cfg, device, dtype) if pooled else None

    def forward(self, x: Tensor | StreamState) -> Tensor:
        """[..., n, C] -> [..., C]."""
        if self.attention is not None:
            x = resolve(x)
            require_streams(x, self.cfg.n, self.cfg.dim)
            return functional.attention_pool(x, self.attention.weight)
        if self.head is None:
            return reduce_streams(x, self.cfg)
        x = resolve(x)
        require_streams(x, self.cfg.n, self.cfg.dim)
        ops = reference if self.cfg.implementation == "plain" else functional
        phi, alpha, bias = self.head()
        return ops.pre(x, phi, alpha, bias, self.constraint)[0]
