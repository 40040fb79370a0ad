"""Drop-in for mHC-Triton's `mhc`: one import line changes.

Its coefficients, in our terms: pre = σ(z)/(Σσ(z) + eps), post = 2σ(z), res = rows then columns of
|z| + eps normalised `sinkhorn_iters` times, each by its sum + eps (mHC, arXiv 2512.24880, eq. 5–8,
with |·| for exp). Differences, each on purpose: any number of streams; coefficients per token
unless pooling is asked for; H_res_base starts OFF_DIAGONAL off its diagonal, as |z| has no
derivative at 0 and an exact identity could never learn.
"""

import math
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from custom_ops.constraint import Constraint, check_count
from hc_compile import functional
from hc_compile.checks import require_float, require_shape, require_streams

__all__ = [
    "HyperConnection",
    "fused_add_residual",
    "fused_dynamic_weights",
    "fused_stream_mix",
    "sinkhorn_knopp",
]

OFF_DIAGONAL = 1e-3


def _constraint(n: int, iterations: int, eps: float, dynamic: bool = True) -> Constraint:
    return Constraint(
        n,
        projection="flat" if dynamic else "static",
        norm_eps=eps,
        pre="sigmoid-sum",
        pre_eps=eps,
        post_scale=2.0 if dynamic else 1.0,
        start="abs",
        first="row",
        denominator="add",
        eps=eps,
        iterations=iterations,
    )


def sinkhorn_knopp(M: Tensor, num_iters: int = 20, eps: float = 1e-8) -> Tensor:
    """Rows then columns of |M| + eps, each divided by its sum + eps, num_iters times.

    Args:
        M: [..., n, n], any floating dtype.
        num_iters: >= 0.
        eps: see above.

    Returns: [..., n, n]; the backward recomputes the iterates and saves only M.
    Raises: ValueError, TypeError for a wrong shape, dtype or count.
    """
    return functional.sinkhorn(M, num_iters, start="abs", first="row", denominator="add", eps=eps)


def _per_token(name: str, coefficient: Tensor, x: Tensor, own: tuple[int, ...]) -> Tensor:
    """A coefficient [b, *own] of a sequence, or [..., *own] of every token, as the latter."""
    require_float(name, coefficient)
    lead = x.shape[:-2]
    if coefficient.dim() == 1 + len(own) and len(lead) > 1:
        require_shape(name, coefficient, "[b, ...]", (lead[0], *own))
        middle = (1,) * (len(lead) - 1)
        coefficient = coefficient.reshape(lead[0], *middle, *own)
        return coefficient.expand(*lead, *own)
    require_shape(name, coefficient, "[b, s, ...]", (*lead, *own))
    return coefficient


def fused_stream_mix(H: Tensor, H_pre: Tensor, H_res: Tensor) -> tuple[Tensor, Tensor]:
    """Both reads of the streams in one pass: Σ_i pre_i x_i and Σ_j res_ij x_j (mHC eq. 3).

    Args:
        H: [b, s, n, d] streams.
        H_pre: [b, n], or [b, s, n] per token.
        H_res: [b, n, n] applied [out, in], or [b, s, n, n] per token.

    Returns: branch_input [b, s, d], H_residual [b, s, n, d], in the dtype of H.
    Raises: ValueError, TypeError that name the argument.
    Moves: 2n + 1 C-units.
    """
    require_streams(H)
    n = H.shape[-2]
    pre = _per_token("H_pre", H_pre, H, (n,))
    res = _per_token("H_res", H_res, H, (n, n))
    mixed = functional.aggregate(H, torch.cat([pre.unsqueeze(-2), res], -2))
    return mixed[..., 0, :], mixed[..., 1:, :]


def fused_add_residual(H_residual: Tensor, branch_output: Tensor, H_post: Tensor) -> Tensor:
    """x'_i = x_i + post_i y: what a branch adds to mixed streams (mHC eq. 3).

    Args:
        H_residual: [b, s, n, d] mixed streams.
        branch_output: [b, s, d].
        H_post: [b, n], or [b, s, n] per token.

    Returns: [b, s, n, d] in the dtype of H_residual.
    Raises: ValueError, TypeError that name the argument.
    Moves: 2n + 1 C-units.
    """
    require_streams(H_residual)
    n = H_residual.shape[-2]
    post = _per_token("H_post", H_post, H_residual, (n,))
    identity = torch.eye(n, dtype=post.dtype, device=post.device)
    return functional.post(H_residual, branch_output, post, identity)


def fused_dynamic_weights(
    x: Tensor,
    phi: Tensor,
    bias: Tensor,
    alpha_pre: Tensor,
    alpha_post: Tensor,
    alpha_res: Tensor,
    sinkhorn_iters: int = 20,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of flattened streams (mHC eq. 5–8, the module docstring's activations).

    Args:
        x: [..., n·d].
        phi: [n·d, n² + 2n].
        bias: [n² + 2n] in the order [pre | post | res].
        alpha_pre, alpha_post, alpha_res: gates of one element each.
        sinkhorn_iters, eps: as `sinkhorn_knopp`; eps is also that of the RMS norm and of Σσ.

    Returns: H_pre [..., n], H_post [..., n], H_res [..., n, n].
    Raises: ValueError, TypeError that name the argument.
    """
    require_float("x", x)
    require_float("bias", bias)
    n = math.isqrt(bias.numel() + 1) - 1
    if bias.dim() != 1 or n < 1 or n * n + 2 * n != bias.numel():
        raise ValueError(f"bias must be [n*n + 2*n] for some n >= 1, got {list(bias.shape)}")
    if x.dim() < 1 or x.shape[-1] % n:
        raise ValueError(f"x must be [..., n*d] with n = {n}, got {list(x.shape)}")
    require_shape("phi", phi, "[n*d, n*n + 2*n]", (x.shape[-1], bias.numel()))
    alpha = torch.cat([alpha_pre.reshape(1), alpha_post.reshape(1), alpha_res.reshape(1)])
    c = _constraint(n, sinkhorn_iters, eps)
    return functional.coefficients(x.unflatten(-1, (n, -1)), phi.mT, alpha, bias, c)


class HyperConnection(nn.Module):
    """mHC-Triton's layer: streams [b, s, n, d] to (branch_input, add_residual).

    Args:
        dim: d, width of one stream.
        num_streams: n >= 1.
        layer_idx: the stream whose pre is largest at the start is layer_idx mod n.
        dynamic: coefficients from the streams; otherwise parameters alone, with post = σ.
        sinkhorn_iters: >= 0.
        init_scale: initial gates of the dynamic part.
        eps: of the norm and the normalisations.
        pool_sequence: coefficients from the mean over the sequence, as the original. Then every
            token sees the whole sequence, also what follows it: not for causal models, and a
            warning says so.

    Source: mHC, arXiv 2512.24880, eq. 3–8.
    Raises: ValueError, TypeError that name the argument.
    """

    def __init__(
        self,
        dim: int,
        num_streams: int = 4,
        layer_idx: int = 0,
        dynamic: bool = True,
        sinkhorn_iters: int = 20,
        init_scale: float = 0.1,
        *,
        eps: float = 1e-6,
        pool_sequence: bool = False,
    ):
        super().__init__()
        check_count("dim", dim, least=1)
        check_count("num_streams", num_streams, least=1)
        check_count("layer_idx", layer_idx, least=0)
        if pool_sequence and not dynamic:
            raise ValueError("pool_sequence must be False unless dynamic, got True")
        if pool_sequence:
            warnings.warn(
                "pool_sequence=True makes every token's coefficients depend on the whole "
                "sequence: the layer is not causal",
                stacklevel=2,
            )
        self.dim, self.num_streams, self.layer_idx = dim, num_streams, layer_idx
        self.dynamic, self.sinkhorn_iters, self.init_scale = dynamic, sinkhorn_iters, init_scale
        self.eps, self.pool_sequence = eps, pool_sequence
        self.constraint = _constraint(num_streams, sinkhorn_iters, eps, dynamic)
        n = num_streams
        self.H_pre_base = nn.Parameter(torch.empty(n))
        self.H_post_base = nn.Parameter(torch.empty(n))
        self.H_res_base = nn.Parameter(torch.empty(n, n))
        if dynamic:
            self.phi = nn.Parameter(torch.empty(n * dim, n * n + 2 * n))
            self.alpha_pre = nn.Parameter(torch.empty(1))
            self.alpha_post = nn.Parameter(torch.empty(1))
            self.alpha_res = nn.Parameter(torch.empty(1))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set every parameter to its initial value, also after `to_empty` from a meta device."""
        nn.init.ones_(self.H_post_base)
        nn.init.zeros_(self.H_pre_base)
        self.H_pre_base[self.layer_idx % self.num_streams] = 1.0
        nn.init.eye_(self.H_res_base).clamp_(min=OFF_DIAGONAL)
        if self.dynamic:
            nn.init.zeros_(self.phi)
            for alpha in (self.alpha_pre, self.alpha_post, self.alpha_res):
                nn.init.constant_(alpha, self.init_scale)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_streams={self.num_streams}, dynamic={self.dynamic}, "
            f"sinkhorn_iters={self.sinkhorn_iters}"
        )

    def forward(self, H: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Read the streams.

        Args:
            H: [b, s, n, d]; any leading dimensions unless the sequence is pooled.

        Returns: branch_input [b, s, d], and add_residual: [b, s, d] -> [b, s, n, d].
        """
        require_streams(H, self.num_streams, self.dim)
        parts = self.H_pre_base, self.H_post_base, self.H_res_base.flatten()
        bias = torch.cat(parts)
        phi = alpha = None
        if self.dynamic:
            phi = self.phi.mT
            alpha = torch.cat([self.alpha_pre, self.alpha_post, self.alpha_res])
        if not self.pool_sequence:
            made = functional.read(H, phi, alpha, bias, self.constraint)
            u, _, post, res, ghost = made
            return u, partial(_write, H, post, res, ghost)
        if H.dim() != 4:
            raise ValueError(f"H must be [b, s, n, d] to pool the sequence, got {list(H.shape)}")
        pooled = functional.coefficients(H.mean(1), phi, alpha, bias, self.constraint)
        lead = H.shape[:2]
        pre, post, res = (t.unsqueeze(1).expand(*lead, *t.shape[1:]) for t in pooled)
        return functional.aggregate(H, pre), partial(_write, H, post, res, None)


def _write(x: Tensor, post: Tensor, res: Tensor, ghost: Tensor | None, y: Tensor) -> Tensor:
    return functional.post(x, y, post, res, ghost=ghost)
