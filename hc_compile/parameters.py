"""HC parameters: a submodule of their own (fp32, none 0-d), and their weight-decay rule."""

from typing import Any

import torch
from torch import Tensor, nn

from custom_ops.constrain import static_forward
from custom_ops.constraint import Constraint
from custom_ops.registration import compute_dtype
from hc_compile.checks import transforming
from hc_compile.config import HCConfig
from hc_compile.initial import initial_bias

PROPOSAL_STD = 0.02  # of φ with several proposals: equal ones would have equal gradients forever


class CoefficientParameters(nn.Module):
    """φ [M, K] ([P, M, K] with P proposals), α and b [M]; calling it gives the op arguments.

    mix [N, N], where asked for, is the identity that mixes the streams before the norm.
    """

    def __init__(
        self,
        cfg: HCConfig,
        layer_index: int,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ):
        super().__init__()
        self._made: tuple | None = None
        c, row = cfg.constraint, cfg.row
        self.alpha_index = row.alpha_index
        bias = initial_bias(row.bias_init, c, layer_index, cfg.fractions or 1)
        self.bias = nn.Parameter(bias.to(device=device, dtype=dtype))
        self.mix = None
        if cfg.mix_before_norm:
            self.mix = nn.Parameter(torch.eye(c.streams, device=device, dtype=dtype))
        if c.projection == "static":
            self.register_parameter("phi", None)
            self.register_parameter("alpha", None)
            return
        shape = (c.rows, c.norm_width(cfg.width))
        several = cfg.proposals > 1
        shape = (cfg.proposals, *shape) if several else shape
        std = max(row.phi_std, PROPOSAL_STD) if several else row.phi_std
        self.phi = nn.Parameter(_normal(shape, std, device, dtype))
        self.alpha = nn.Parameter(torch.tensor(row.alpha, device=device, dtype=dtype))

    def forward(self) -> tuple[Tensor | None, Tensor | None, Tensor]:
        alpha = self.alpha
        if alpha is not None and self.alpha_index != (0, 1, 2):
            alpha = torch.stack([alpha[i] for i in self.alpha_index])
        return self.phi, alpha, self.bias

    def constants(self, x: Tensor, constraint: Constraint) -> tuple[Tensor, ...] | None:
        """pre, post and res that depend on nothing but b: in eval without gradients, made once.

        They are made again after anything that PyTorch counts as a change of b (an optimiser's
        step, load_state_dict, a write in place), train() and a move; not after a write through
        `b.data`, which PyTorch does not see. None where they depend on the tokens or may get
        gradients, and in compiled code and CUDA graphs, which make them from b.
        """
        fixed = constraint.projection == "static" and not (self.training or transforming())
        if not fixed or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if type(self.bias) is not nn.Parameter or self.bias.is_inference():
            return None
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        dtype = compute_dtype(x, self.bias)
        key = (self.bias._version, self.bias.data_ptr(), dtype)
        if self._made is None or self._made[0] is not self.bias or self._made[1] != key:
            made = static_forward(self.bias.to(dtype), constraint)
            self._made = (self.bias, key, made)
        return self._made[2]

    def train(self, mode: bool = True) -> "CoefficientParameters":
        """As of nn.Module; constants are made again."""
        self._made = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> "CoefficientParameters":
        self._made = None
        return super()._apply(*args, **kwargs)


class HeadParameters(nn.Module):
    """φ [n, K], α [1] and b [n] of the learned sigmoid head (DeepSeek-V4's `hc_head`)."""

    def __init__(self, cfg: HCConfig, device: torch.device | str | None, dtype: torch.dtype):
        super().__init__()
        c = cfg.head_constraint()
        shape = (c.rows, c.norm_width(cfg.dim))
        self.phi = nn.Parameter(_normal(shape, cfg.row.phi_std, device, dtype))
        self.alpha = nn.Parameter(torch.ones(1, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(c.total, device=device, dtype=dtype))

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.phi, self.alpha.expand(3), self.bias


class StreamEmbedding(nn.Module):
    """Learned offset [n, C] of each stream, zero at the start."""

    def __init__(self, cfg: HCConfig, device: torch.device | str | None, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(cfg.n, cfg.dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight.to(x.dtype)


class AttentionPool(nn.Module):
    """W [C, C] of the attention over streams, the identity at the start."""

    def __init__(self, cfg: HCConfig, device: torch.device | str | None, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(cfg.dim, device=device, dtype=dtype))


def _normal(shape: tuple[int, ...], std: float, device, dtype: torch.dtype) -> Tensor:
    phi = torch.zeros(shape, device=device, dtype=dtype)
    return phi.normal_(0.0, std) if std else phi


STATIC = CoefficientParameters | HeadParameters | StreamEmbedding | AttentionPool


def parameter_groups(model: nn.Module, weight_decay: float = 0.1) -> list[dict]:
    """Optimiser groups with the papers' rule: no weight decay on static HC weights.

    b, α, embeddings, mixes and pools of streams are not decayed, φ is (HC, arXiv 2409.19606,
    section 4); outside hyper-connections, matrices are decayed and vectors are not.

    Args:
        model: any module that contains hyper-connections (or none).
        weight_decay: of the first group.

    Returns: [{"name": "decay", ...}, {"name": "no_decay", ...}] for a torch optimiser; every
        trainable parameter is in exactly one of them.
    """
    static = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, STATIC)
        for name, parameter in module.named_parameters(recurse=False)
        if name != "phi"
    }
    trainable = [p for p in model.parameters() if p.requires_grad]
    keep = [p for p in trainable if id(p) in static or p.dim() < 2]
    kept = {id(p) for p in keep}
    decay = [p for p in trainable if id(p) not in kept]
    return [
        {"name": "decay", "params": decay, "weight_decay": weight_decay},
        {"name": "no_decay", "params": keep, "weight_decay": 0.0},
    ]
