"""Initial values of b, one rule a function, in float64; layer_index k spreads the streams.

All rules but "zeros" and "ihc" make the network equal its plain pre-norm residual: rows of res
sum to 1, post = 1, Σ pre = 1. Those of mHC read the streams unevenly: with an even b_pre and
φ = 0 the streams would stay copies of each other.
"""

import torch
from torch import Tensor

from custom_ops.constraint import Constraint

OWN_SHARE = 0.75  # of pre on stream k mod n at the start
OFF_LOGIT = -3.0  # of res off the diagonal: small, but with a gradient
FRACTION_LOGIT = -6.0  # of reading another fraction through a sigmoid, which has no zero
SKEW = 0.3  # of the skew-symmetric part of mhc-ortho: at L = I the gradient of O∘O vanishes


def _one_hot(k: int, n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)[k % n]


def _uneven_logits(k: int, n: int) -> Tensor:
    """Logits whose sigmoids sum to 1, most of it on stream k mod n; of fractions of one stream
    the share alone."""
    if n == 1:
        return torch.logit(torch.full((1,), OWN_SHARE, dtype=torch.float64))
    rest = (1 - OWN_SHARE) / (n - 1)
    share = rest + (OWN_SHARE - rest) * _one_hot(k, n)
    return torch.logit(share)


def _mhc(k: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    res = OFF_LOGIT * (1 - torch.eye(n, dtype=torch.float64))
    return _uneven_logits(k, n), torch.zeros(n, dtype=torch.float64), res.flatten()


def _lite(k: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    count = Constraint(n, manifold="permutation").sizes[2]
    res = torch.full((count,), OFF_LOGIT, dtype=torch.float64)
    res[0] = 0.0
    return _uneven_logits(k, n), torch.zeros(n, dtype=torch.float64), res


def _kron(k: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    factors = Constraint(n, manifold="kronecker").sizes[2]
    res = torch.full((factors,), -OFF_LOGIT, dtype=torch.float64)
    return _uneven_logits(k, n), torch.zeros(n, dtype=torch.float64), res


def _ortho(k: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(k)
    noise = torch.randn(n, n, generator=generator, dtype=torch.float64)
    res = torch.eye(n, dtype=torch.float64) + SKEW * (noise - noise.mT)
    return _uneven_logits(k, n), torch.zeros(n, dtype=torch.float64), res.flatten()


def _hc(k: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    ones = torch.ones(n, dtype=torch.float64)
    return _one_hot(k, n), ones, torch.eye(n, dtype=torch.float64).flatten()


def _ihc(k: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    even = torch.full((n,), 1 / n if n > 1 else OWN_SHARE, dtype=torch.float64)
    empty = torch.zeros(0, dtype=torch.float64)
    return torch.logit(even), torch.zeros(n, dtype=torch.float64), empty


RULES = {
    "mhc": _mhc,
    "mhc-lite": _lite,
    "mhc-kron": _kron,
    "mhc-ortho": _ortho,
    "hc": _hc,
    "ihc": _ihc,
}


def initial_bias(
    rule: str, constraint: Constraint, layer_index: int, fractions: int = 1
) -> Tensor:
    """b [M] in the order [pre | post | res], float64.

    View v of a layer reads as layer_index + v would; each of its fractions reads its own.
    """
    if rule == "zeros":
        return torch.zeros(constraint.total, dtype=torch.float64)
    make, n = RULES[rule], constraint.streams // fractions
    other = 0.0 if constraint.pre == "linear" else FRACTION_LOGIT
    reads = []
    for view in range(constraint.views // fractions):
        own = make(layer_index + view, n)[0]
        for fraction in range(fractions):
            read = torch.full((n, fractions), other, dtype=torch.float64)
            read[:, fraction] = own
            reads.append(read.flatten())
    _, post, res = make(layer_index, constraint.streams)
    return torch.cat([*reads, post.repeat(constraint.branches), res])
