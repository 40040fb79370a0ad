"""The hyper-connections of transformers' DeepSeek-V4, GLM-5-next and HY-V4 on the hc:: ops.

`apply(model)` swaps the classes of a loaded model's modules, `patch()` those of models loaded
later. Parameters stay where they are, so checkpoints load and save as before; the merge that the
decoder layers write inline becomes an hc::post that fuses with the next read.

Arithmetic of coefficients and merges is fp32 with one rounding of the streams; the originals of
DeepSeek-V4 and GLM-5-next round post and comb to the streams' dtype first.
"""

import importlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from custom_ops.constraint import Constraint
from hc_compile import functional
from hc_compile.presets import PRESETS

Streams = Tensor
AddResidual = Callable[[Tensor], Streams]


class _Described:
    """A module whose constraint says what the original's forward does."""

    describe: Callable[[], Constraint]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.adopt()

    def adopt(self) -> None:
        """Called once the module has the original's attributes."""
        self.constraint = self.describe()


class _Connection(_Described):
    """What replaces a HyperConnection: the same parameters, read by one op."""

    fn: Tensor
    base: Tensor
    scale: Tensor

    def alpha(self) -> Tensor:
        """Gains of pre, post and res, [3]."""
        return self.scale

    def read(self, x: Streams) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """u, pre, post, res and the ghost of streams [B, S, n, C]."""
        return functional.read(x, self.fn, self.alpha(), self.base, self.constraint)

    def sublayer(self, x: Streams) -> tuple[Tensor, AddResidual]:
        """The branch's input of streams [B, S, n, C], and what writes its output to them."""
        u, _, post, res, ghost = self.read(x)
        return u, partial(_write, x, post, res, ghost)


class _Sinkhorn(_Connection):
    def describe(self: Any) -> Constraint:
        eps = {"pre_eps": self.hc_eps, "eps": self.hc_eps, "norm_eps": self.input_norm.eps}
        row = PRESETS["mhc-v4"].constraint
        return Constraint(self.hc_mult, iterations=self.hc_sinkhorn_iters, **(row | eps))

    def forward(self, hidden_streams: Streams) -> tuple[Tensor, Tensor, Tensor]:
        """post, comb and the collapsed streams, as the original returns them."""
        u, _, post, res, _ = self.read(hidden_streams)
        return post, res.mT, u


class _Independent(_Connection):
    def describe(self: Any) -> Constraint:
        eps = {"pre_eps": self.hc_eps, "post_eps": self.hc_eps, "norm_eps": self.input_norm.eps}
        row = PRESETS["ihc"].constraint
        return Constraint(self.hc_mult, post_scale=self.hc_post_magnitude, **(row | eps))

    def alpha(self) -> Tensor:
        return torch.cat([self.scale, self.scale[1:]])

    def forward(self, hidden_streams: Streams) -> tuple[Tensor, Tensor]:
        """post and the collapsed streams, as the original returns them."""
        u, _, post, _, _ = self.read(hidden_streams)
        return post, u


class _Head(_Described):
    """The learned read of the last streams."""

    hc_fn: Tensor
    hc_base: Tensor
    hc_scale: Tensor

    def describe(self: Any) -> Constraint:
        eps = {"pre_eps": self.eps, "norm_eps": self.input_norm.eps}
        return Constraint(self.hc_mult, post="none", manifold="none", **eps)

    def forward(self, x: Streams) -> Tensor:
        """[B, S, n, C] -> [B, S, C]."""
        alpha = self.hc_scale.expand(3)
        return functional.pre(x, self.hc_fn, alpha, self.hc_base, self.constraint)[0]


class _Layer:
    """A decoder layer: attention, then MLP, each around its connection."""

    attn_hc: Any
    ffn_hc: Any
    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any


class _DeepseekV4Layer(_Layer):
    def forward(
        self, hidden_states: Streams, input_ids: Tensor | None = None, **kwargs: Any
    ) -> Streams:
        """Streams to streams."""
        u, add_residual = self.attn_hc.sublayer(hidden_states)
        out, _ = self.self_attn(self.input_layernorm(u), **kwargs)
        u, add_residual = self.ffn_hc.sublayer(add_residual(out))
        return add_residual(self.mlp(self.post_attention_layernorm(u), input_ids=input_ids))


class _IndexedLayer(_Layer):
    def forward(
        self,
        hidden_states: Streams,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        prev_topk_indices: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Streams, Tensor | None]:
        """Streams to streams, and the indices that the next layer's attention may share."""
        u, add_residual = self.attn_hc.sublayer(hidden_states)
        u = self.input_layernorm(u)
        topk_indices = None
        linear = getattr(self, "block_type", None) == "linear_attention"
        if past_key_values is not None:  # its name in transformers 5.23; from 5.24 it is `cache`
            kwargs["cache_params" if linear else "past_key_values"] = past_key_values
        if linear:
            out = self.self_attn(hidden_states=u, attention_mask=attention_mask, **kwargs)
        else:
            out, _, topk_indices = self.self_attn(
                hidden_states=u,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                prev_topk_indices=prev_topk_indices,
                **kwargs,
            )
        u, add_residual = self.ffn_hc.sublayer(add_residual(out))
        return add_residual(self.mlp(self.post_attention_layernorm(u))), topk_indices


# module of transformers: {class there: what it becomes}; GLM-5-next's head is a plain mean
FAMILIES: dict[str, dict[str, type]] = {
    "deepseek_v4": {
        "DeepseekV4HyperConnection": _Sinkhorn,
        "DeepseekV4HyperHead": _Head,
        "DeepseekV4DecoderLayer": _DeepseekV4Layer,
    },
    "glm5_next": {
        "Glm5NextTextHyperConnection": _Sinkhorn,
        "Glm5NextTextDecoderLayer": _IndexedLayer,
    },
    "hy_v4": {
        "HYV4HyperConnection": _Independent,
        "HYV4HyperHead": _Head,
        "HYV4DecoderLayer": _IndexedLayer,
    },
}


def _write(x: Streams, post: Tensor, res: Tensor, ghost: Tensor | None, y: Tensor) -> Streams:
    return functional.post(x, y, post, res, ghost=ghost)


@cache
def _replacements() -> dict[type, type]:
    """Every class of the installed transformers that is replaced, and its replacement.

    The replacement keeps the name, by which transformers finds modules that must not be split.
    """
    found = {}
    for family, classes in FAMILIES.items():
        name = f"transformers.models.{family}.modeling_{family}"
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        for original, body in classes.items():
            theirs = getattr(module, original)
            found[theirs] = type(original, (body, theirs), {"__module__": __name__})
    if not found:
        raise ImportError("transformers >= 5.23 must be installed, found no model to replace")
    return found


def apply(model: nn.Module) -> nn.Module:
    """Swap the hyper-connections and decoder layers of a loaded model for ours, in place.

    Args:
        model: a DeepSeek-V4, GLM-5-next or HY-V4 of transformers, or any module that holds one.

    Returns: `model`. Raises: ValueError when there is nothing to replace.
    """
    table = _replacements()
    swapped = 0
    for module in model.modules():
        replacement = table.get(type(module))
        if replacement is not None:
            module.__class__ = replacement
            if isinstance(module, _Described):
                module.adopt()
            swapped += 1
    if not swapped and not any(type(m) in table.values() for m in model.modules()):
        raise ValueError(
            f"model must hold layers of one of {tuple(FAMILIES)}, got {type(model).__name__}"
        )
    return model


def remove(model: nn.Module) -> nn.Module:
    """Give a model its own classes back. Returns: `model`."""
    back = {ours: theirs for theirs, ours in _replacements().items()}
    for module in model.modules():
        module.__class__ = back.get(type(module), type(module))
    return model


def patch() -> None:
    """Make every model that transformers loads from now on use ours."""
    from transformers.monkey_patching import register_patch_mapping

    register_patch_mapping({t.__name__: ours for t, ours in _replacements().items()}, True)


def unpatch() -> None:
    """Undo `patch` for models loaded from now on."""
    from transformers.monkey_patching import unregister_patch_mapping

    unregister_patch_mapping([theirs.__name__ for theirs in _replacements()])
