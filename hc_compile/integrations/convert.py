"""`hc.convert`: a pre-norm transformer of transformers or timm becomes hyper-connected in place.

Any other stack of blocks x + f(norm(x)), once its checkpoint is loaded (keys change):

    import hc_compile as hc

    def hyper_connect(blocks, cfg):  # each block: x = x + block.f(block.norm(x))
        branches = [nn.Sequential(block.norm, block.f) for block in blocks]
        sites = [hc.HyperConnection(cfg, k, branch) for k, branch in enumerate(branches)]
        return nn.Sequential(hc.StreamExpand(cfg), *sites, hc.StreamReduce(cfg))

    model.blocks = hyper_connect(model.blocks, hc.HCConfig(dim=model.dim, preset="mhc"))
"""

import inspect
import sys
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from hc_compile.config import HCConfig
from hc_compile.integrations.prenorm import MODELS, Form, Site
from hc_compile.module import HyperConnection, StreamExpand, StreamReduce
from hc_compile.presets import PRESETS

TOLERANCE = 1e-9  # of the float64 check that a configuration starts as the plain residual


class _Layer:
    """A converted layer: the original's submodules, between the streams of two connections."""

    form: Form
    names: tuple[str, ...]  # of the original forward's arguments after the hidden state
    hc_expand: StreamExpand | None  # of the first layer alone
    hc_attn: HyperConnection
    hc_mlp: HyperConnection
    hc_reduce: StreamReduce | None  # of the last layer alone

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        """Streams to streams; [..., C] into the first layer and out of the last."""
        kwargs.update(zip(self.names, args, strict=False))
        for name in self.form.unused:
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"{name} must be None in a converted {type(self).__name__}")
        x = hidden_states if self.hc_expand is None else self.hc_expand(hidden_states)
        u, add_residual = self.hc_attn(x)
        x = add_residual(self._branch(self.form.attention, u, kwargs))
        u, add_residual = self.hc_mlp(x)
        x = add_residual(self._branch(self.form.mlp, u, {}))
        return x if self.hc_reduce is None else self.hc_reduce(x)

    def _branch(self, site: Site, u: Tensor, kwargs: dict[str, Any]) -> Tensor:
        y = getattr(self, site.branch)(getattr(self, site.norm)(u), **kwargs)
        y = y[0] if isinstance(y, tuple) else y
        for name in site.after:
            y = getattr(self, name)(y)
        return y


@cache
def _converted(original: type, form: Form) -> type:
    """The class that a layer's becomes; it keeps the name, by which transformers finds layers."""
    names = tuple(inspect.signature(original.forward).parameters)[2:]
    body = {"__module__": __name__, "form": form, "names": names}
    return type(original.__name__, (_Layer, original), body)


def convert(model: nn.Module, cfg: HCConfig) -> nn.Module:
    """Make a pretrained pre-norm transformer hyper-connected, in place, equal to what it was.

    Each layer's two residual sites x + F(x) become u = Σ_i pre_i x_i, x'_i = Σ_j res_ij x_j +
    post_i F(u) (HC, arXiv 2409.19606; mHC, arXiv 2512.24880, eq. 3–9) with layer_index 2k and
    2k + 1. The first layer makes the streams and the last one reduces them, so embedding, final
    norm and head stay as they are. Outputs and gradients of the model's own parameters equal the
    original's until the connections have learned, so training goes on from the checkpoint.

    Names, dtypes and ties of the model's own parameters stay; the connections' are further keys
    (`hc_attn`, `hc_mlp` of each layer, `hc_expand`, `hc_reduce`), float32 (float64 in a float64
    model) on the device of their layer. A checkpoint of a converted model loads into a freshly
    converted one. Whoever looks between layers sees streams: of transformers'
    `output_hidden_states` the first is the embedding [B, S, C] and the last is
    `last_hidden_state`, those between are [B, S, n, C], for `hc.reduce_streams`.

    Args:
        model: GPT-2 or one of `prenorm.LLAMA_LIKE` of transformers (>= 5.23), a VisionTransformer
            of timm, or a module that holds exactly one. Convert before compile, FSDP and DDP.
        cfg: dim is the model's width C; preset, reduction and options must start as the plain
            residual, so not "mhc-v4" or "ihc", "sum" or "head", or several proposals.

    Returns: `model`. Raises: ValueError, TypeError before anything is changed: naming the class
        of the module that was not understood, or the field of cfg.
    """
    if not isinstance(cfg, HCConfig):
        raise TypeError(f"cfg must be an HCConfig, got {type(cfg).__name__}")
    owner, original, form = _find(model)
    layers = list(getattr(owner, form.stack))
    _check_layers(layers, original, form)
    width = owner.embed_dim if hasattr(owner, "embed_dim") else owner.config.hidden_size  # type: ignore[union-attr]
    if cfg.dim != width:
        raise ValueError(
            f"cfg.dim must be the width of {type(owner).__name__}, {width}, got {cfg.dim}"
        )
    _check_start(cfg)
    for k, layer in enumerate(layers):
        ends = (k == 0, k == len(layers) - 1)
        for name, module in _connections(layer, cfg, k, *ends).items():
            setattr(layer, name, module)
        layer.__class__ = _converted(original, form)
    return model


def _connections(
    layer: nn.Module, cfg: HCConfig, k: int, first: bool, last: bool
) -> dict[str, nn.Module | None]:
    like = next(layer.parameters())
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    kind: dict[str, Any] = {"device": like.device, "dtype": wide}
    modules = {
        "hc_expand": StreamExpand(cfg, **kind) if first else None,
        "hc_attn": HyperConnection(cfg, 2 * k, **kind),
        "hc_mlp": HyperConnection(cfg, 2 * k + 1, **kind),
        "hc_reduce": StreamReduce(cfg, **kind) if last else None,
    }
    return {name: m if m is None else m.train(layer.training) for name, m in modules.items()}


def _find(model: nn.Module) -> tuple[nn.Module, type, Form]:
    """The only module of `model` that runs layers of a known class, that class and its form.

    A class whose module was never imported has no instance, so nothing is imported here.
    """
    known = {
        getattr(sys.modules[name], runs): (getattr(sys.modules[name], layer), form)
        for name, (runs, layer, form) in MODELS.items()
        if name in sys.modules
    }
    found = [
        (m, *row) for m in model.modules() for cls, row in known.items() if isinstance(m, cls)
    ]
    if len(found) > 1:
        names = [type(m).__name__ for m, *_ in found]
        raise ValueError(f"model must hold one stack of layers, got {names}: convert one of them")
    if not found:
        accepted = sorted(runs for runs, *_ in MODELS.values())
        raise ValueError(f"model must hold one of {accepted}, got {_describe(model)}")
    return found[0]


def _describe(model: nn.Module) -> str:
    """The model's class and, where it has a stack, that of the layers in the longest one."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m)]
    name = type(model).__name__
    if not lists:
        return name
    return f"{name} with layers of {type(max(lists, key=len)[0]).__name__}"


def _check_layers(layers: list[nn.Module], original: type, form: Form) -> None:
    name = original.__name__
    if len({id(layer) for layer in layers}) < max(len(layers), 1):
        raise ValueError(f"model must hold distinct layers, got none or a {name} twice")
    for layer in layers:
        if isinstance(layer, _Layer):
            raise ValueError(f"model must not be converted already, got a converted {name}")
        if type(layer) is not original:
            raise ValueError(f"model must have layers of {name}, got {type(layer).__name__}")
        if "forward" in vars(layer):
            raise ValueError(f"{name} must run the forward of its class, got another on a layer")
        for part, child in layer.named_children():
            if part not in form.parts:
                raise ValueError(
                    f"{name} must hold {form.parts} alone, got {part}: {type(child).__name__}"
                )


def _check_start(cfg: HCConfig) -> None:
    """Refuse a configuration whose sublayers are not x + F(x) at the start, in float64."""
    good = tuple(name for name, row in PRESETS.items() if row.equals_residual)
    if not cfg.row.equals_residual:
        raise ValueError(
            f"cfg.preset must equal the plain residual at the start, one of {good}, or the "
            f"checkpoint's function is lost; got {cfg.row.name!r}"
        )
    if (cfg.views, cfg.branches) != (1, 1):
        raise ValueError(
            f"cfg.views and cfg.branches must be 1, got {cfg.views} and {cfg.branches}"
        )
    small = replace(cfg, dim=4 * (cfg.fractions or 1), dropout=0.0, implementation="plain")
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=()), torch.no_grad(), torch.device("cpu"):
        h, y = torch.randn(2, 3, small.dim, generator=generator, dtype=torch.float64)
        x, error = StreamExpand(small, dtype=torch.float64)(h), 0.0
        for k in range(2):
            u, add_residual = HyperConnection(small, k, dtype=torch.float64)(x)
            x = add_residual(y)
            error = max(error, float((u - h - k * y).abs().max()))
        end = StreamReduce(small, dtype=torch.float64)(x)
        error = max(error, float((end - h - 2 * y).abs().max()))
    if not error <= TOLERANCE:
        raise ValueError(
            "cfg must start as the plain residual (reduce 'mean' or 'attention', proposals 1, "
            f"iterations >= 1), got an error of {error:.1e} from {cfg}"
        )
