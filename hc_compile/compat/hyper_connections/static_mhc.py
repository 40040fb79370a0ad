"""The fork's `mhc=True`: static H_pre, H_post (softmax) and H_res (Sinkhorn or orthostochastic).

H_res is applied transposed, x'_t = Σ_s H_res[s, t] x_s; with the identity mix it is
(1 − a) I + a S, a = σ(H_res_alpha_logit). Initial logits differ from the fork's, with which H_res
could not learn: −8 off the diagonal is −8/τ = −160 inside the exponential, of gradient exactly 0
in float32, and under Newton–Schulz the same matrix is a Householder one, whose square is uniform.
Ours are −8 τ, and for Newton–Schulz those of preset "mhc-ortho".
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from custom_ops.constraint import Constraint, check_count
from hc_compile import functional
from hc_compile.compat.hyper_connections.connection import Connection
from hc_compile.compat.hyper_connections.stats import manifold_stats
from hc_compile.initial import initial_bias

PROJECTIONS = ("sinkhorn", "orthostochastic")
OFF_LOGIT = -8.0


@dataclass(frozen=True)
class StaticManifold:
    """The options of the static form; the parameters are the owning layer's."""

    projection: str
    iterations: int
    tau: float
    ns_steps: int
    ns_eps: float
    ns_coeffs: tuple

    def __post_init__(self):
        if self.projection not in PROJECTIONS:
            raise ValueError(
                f"mhc_h_res_proj must be one of {PROJECTIONS}, got {self.projection!r}"
            )
        check_count("sinkhorn_iters", self.iterations, least=1)
        check_count("ns_steps", self.ns_steps, least=1)
        if self.tau <= 0:
            raise ValueError(f"sinkhorn_tau must be > 0, got {self.tau}")
        if self.projection == "orthostochastic":
            self.schedule()

    def schedule(self) -> tuple[tuple[float, float, float], ...]:
        """(a, b, c) of each step, from one triple and a count, or a triple a step."""
        if isinstance(self.ns_coeffs[0], tuple | list):
            steps = tuple(tuple(step) for step in self.ns_coeffs)
            if len(steps) != self.ns_steps:
                raise ValueError(
                    f"ns_steps must be the number of ns_coeffs = {len(steps)}, got {self.ns_steps}"
                )
        else:
            steps = (tuple(self.ns_coeffs),) * self.ns_steps
        if any(len(step) != 3 for step in steps):
            raise ValueError(f"ns_coeffs must hold (a, b, c) triples, got {self.ns_coeffs!r}")
        return steps  # type: ignore[return-value]

    def make_parameters(self, owner: Connection, start: int, alpha: float | None) -> None:
        """Give `owner` its logits; alpha is the initial share of S, None without identity mix."""
        n = owner.num_residual_streams
        owner.H_res_logits = nn.Parameter(self.initial_res(n, start))
        pre = torch.full((n,), OFF_LOGIT)
        pre[start] = 0.0
        owner.H_pre_logits = nn.Parameter(pre)
        if owner.add_branch_out_to_residual:
            owner.H_post_logits = nn.Parameter(torch.zeros(n))
        if alpha is not None:
            if not 0 < alpha < 1:
                raise ValueError(f"mhc_residual_alpha must be in (0, 1), got {alpha}")
            owner.H_res_alpha_logit = nn.Parameter(torch.tensor(math.log(alpha / (1 - alpha))))

    def initial_res(self, n: int, start: int) -> Tensor:
        """Logits whose H_res is near the identity and has a gradient."""
        if self.projection == "orthostochastic" and n > 1:
            c = Constraint(n, manifold="newton-schulz")
            logits = initial_bias("mhc-ortho", c, start)[-n * n :].unflatten(0, (n, n))
        else:
            logits = OFF_LOGIT * self.tau * (1 - torch.eye(n))
        return logits.to(torch.get_default_dtype())

    def coefficients(self, owner: Any) -> tuple[Tensor, Tensor, Tensor]:
        """pre [n], post [n] and res [n, n], which is H_res transposed."""
        logits = wide(owner.H_res_logits)
        if self.projection == "sinkhorn":
            h_res = functional.sinkhorn(
                logits / self.tau, self.iterations, start="log", first="row"
            )
        else:
            h_res = functional.newton_schulz(logits, self.schedule(), eps=self.ns_eps).square()
        if hasattr(owner, "H_res_alpha_logit"):
            share = wide(owner.H_res_alpha_logit).sigmoid()
            eye = torch.eye(h_res.shape[-1], dtype=h_res.dtype, device=h_res.device)
            h_res = (1 - share) * eye + share * h_res
        pre = wide(owner.H_pre_logits).softmax(-1)
        writes = owner.add_branch_out_to_residual
        post = wide(owner.H_post_logits).softmax(-1) if writes else torch.ones_like(pre)
        return pre, post, h_res.mT

    def stats(self, pre: Tensor, post: Tensor | None, res: Tensor) -> dict[str, Tensor]:
        """`manifold_stats` of H_res as the fork orients it."""
        return manifold_stats(pre, post, res.mT)


def wide(t: Tensor) -> Tensor:
    """Static logits in float32 at least, whatever the layer was cast to."""
    return t if t.dtype == torch.float64 else t.float()
