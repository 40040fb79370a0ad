"""HyperConnection, StreamExpand and StreamReduce: the modules people put in their models."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from custom_ops import reference
from hc_compile import functional
from hc_compile.checks import require_device, require_float, require_streams
from hc_compile.config import HCConfig
from hc_compile.parameters import CoefficientParameters, HeadParameters, StreamEmbedding
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

    With n = 1 the layer has no parameters and is exactly x + F(x).
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
            CoefficientParameters(cfg, layer_index, device, dtype) if cfg.n > 1 else None
        )
        self.monitor: nn.Module | None = None  # see hc_compile.monitor

    def extra_repr(self) -> str:
        return f"dim={self.cfg.dim}, streams={self.cfg.n}, preset={self.cfg.row.name!r}"

    def forward(self, x: Tensor | StreamState, *args: Any, **kwargs: Any) -> Any:
        """Read the streams, and with a branch run it and write them.

        Args:
            x: [..., n, C] streams, or a StreamState, which makes the write lazy.
            *args, **kwargs: passed on to the branch.

        Returns: (u [..., C], add_residual) without a branch; with one the new streams, or
            (streams, *rest) when the branch returned (y, *rest).
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
            streams = resolve(state)
            write = _add_lazily if lazy else _add_to_one
            return streams.squeeze(-2), partial(write, streams)
        plain = self.cfg.implementation == "plain"
        phi, alpha, bias = self.coefficients()
        parameters = (phi, alpha, bias, self.cfg.constraint)
        if plain:
            require_device(state.x, phi=phi, alpha=alpha, bias=bias)
        ops = reference if plain else functional
        ghost, streams = None, state.x
        if state.pending is not None:
            streams, u, _, post, res = ops.post_pre(streams, *state.pending, *parameters)
        elif lazy or plain:
            u, _, post, res = ops.pre(streams, *parameters)
        else:
            u, _, post, res, ghost = functional.read(streams, *parameters)
        if self.monitor is not None:
            self.monitor(streams, res)
        if lazy:
            return u, partial(_note, streams, post, res)
        if plain:
            return u, partial(_write_plain, streams, post, res)
        return u, partial(_write, streams, post, res, ghost)


def _write(x: Tensor, post: Tensor, res: Tensor, ghost: Tensor | None, y: Tensor) -> Tensor:
    return functional.post(x, y, post, res, ghost=ghost)


def _write_plain(x: Tensor, post: Tensor, res: Tensor, y: Tensor) -> Tensor:
    functional.check_write(x, y, post, res)
    return reference.post(x, y, post, res)


def _note(x: Tensor, post: Tensor, res: Tensor, y: Tensor) -> StreamState:
    functional.check_write(x, y, post, res)
    return StreamState(x, (y, post, res))


def _add_to_one(x: Tensor, y: Tensor) -> Tensor:
    require_float("y", y)
    if y.shape != (*x.shape[:-2], x.shape[-1]):
        raise ValueError(
            f"y must be [..., C] = {[*x.shape[:-2], x.shape[-1]]}, got {list(y.shape)}"
        )
    return (x + y.unsqueeze(-2)).to(x.dtype)


def _add_lazily(x: Tensor, y: Tensor) -> StreamState:
    return StreamState(_add_to_one(x, y))


def resolve(state: Tensor | StreamState) -> Tensor:
    """The streams [..., n, C], with a pending write done."""
    if not isinstance(state, StreamState):
        return state
    return state.x if state.pending is None else functional.post(state.x, *state.pending)


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

    Raises: ValueError if the configuration needs parameters (use StreamReduce).
    """
    if cfg.reduce == "head" and cfg.n != 1:
        raise ValueError("cfg.reduce must be 'mean' or 'sum' (or use StreamReduce), got 'head'")
    x = resolve(x)
    require_streams(x, cfg.n, cfg.dim)
    if cfg.n == 1:
        return x.squeeze(-2)
    wide = x.to(reference.compute_dtype(x))
    total = wide.sum(-2) if cfg.reduce == "sum" else wide.mean(-2)
    return total.to(x.dtype)


class StreamExpand(nn.Module):
    """`expand_streams` as a module, plus the learned stream embedding if configured."""

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

    def forward(self, h: Tensor) -> Tensor:
        """[..., C] -> [..., n, C]."""
        x = _repeat(h, self.cfg)
        return x if self.embedding is None else self.embedding(x)


class StreamReduce(nn.Module):
    """`reduce_streams` as a module, with the learned sigmoid head if configured.

    The head (DeepSeek-V4) is Σ_i (σ(α φx·r + b) + eps)_i x_i.
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

    def forward(self, x: Tensor | StreamState) -> Tensor:
        """[..., n, C] -> [..., C]."""
        if self.head is None:
            return reduce_streams(x, self.cfg)
        x = resolve(x)
        require_streams(x, self.cfg.n, self.cfg.dim)
        ops = reference if self.cfg.implementation == "plain" else functional
        phi, alpha, bias = self.head()
        return ops.pre(x, phi, alpha, bias, self.constraint)[0]
