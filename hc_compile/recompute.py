"""Recompute as a policy: what of the streams is kept between forward and backward.

    step = hc.compile(model, recompute="streams")                    # or an int: bytes
    torch.compile(model, backend="hc_inductor", options={"recompute": "streams"})

"none" keeps the streams x and the coefficients of every sublayer. "coefficients" keeps x alone.
"streams" keeps every L_r-th x, L_r ≈ √(nL/(n+2)) of L sublayers (mHC, arXiv 2512.24880),
and makes those between again: x_l+1 = post(x_l, y_l, coefficients of x_l). A number of bytes takes
the cheapest plan whose streams fit. The branches are never run again: their outputs y stay, as
do what they read and their other activations, whatever the policy. The unit is a graph: inputs of
a graph are kept, so with one graph a block only what lies within a block can be made again.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.flop_counter import flop_registry

import custom_ops  # noqa: F401  (registers torch.ops.hc)

Policy = str | int
NAMED = ("none", "coefficients", "streams")


def check_policy(recompute: Policy) -> None:
    """Raise unless `recompute` is "none", "coefficients", "streams" or a positive int."""
    if isinstance(recompute, bool) or not isinstance(recompute, str | int):
        raise TypeError(
            f"recompute must be one of {NAMED} or an int, got {type(recompute).__name__}"
        )
    if isinstance(recompute, str) and recompute not in NAMED:
        raise ValueError(f"recompute must be one of {NAMED} or an int, got {recompute!r}")
    if isinstance(recompute, int) and recompute <= 0:
        raise ValueError(f"recompute must be a positive number of bytes, got {recompute}")


def plan(
    policy: Policy, sublayers: int, streams: int, stream_bytes: int, coefficient_bytes: int
) -> int:
    """Every how many sublayers x is kept; 0 keeps all, and the coefficients too.

    Args:
        policy: as of `hc.compile`, checked.
        sublayers: L, that write streams.
        streams: n.
        stream_bytes, coefficient_bytes: of one sublayer.
    Raises: ValueError for bytes in which not one x fits.
    """
    if isinstance(policy, str):
        period = round(math.sqrt(streams * sublayers / (streams + 2)))
        return {"none": 0, "coefficients": 1, "streams": max(2, period)}[policy]
    if sublayers * (stream_bytes + coefficient_bytes) <= policy:
        return 0
    room = policy // stream_bytes
    if room == 0:
        raise ValueError(f"recompute must be at least {stream_bytes} bytes, one x, got {policy}")
    return -(-sublayers // room)


KEPT = {
    "coefficients": (torch.ops.hc.post.default, torch.ops.hc.post_pre.default),
    "streams": (),
}


def recompute_policy(recompute: str) -> Callable[[], Any]:
    """The `context_fn` of `torch.utils.checkpoint` that runs hc:: ops again, and no matmul.

        checkpoint(blocks, x, use_reentrant=False, context_fn=hc.recompute_policy("streams"))

    What PyTorch counts FLOPs of (matmuls, attention, convolutions) is kept, other ops of the
    branches run again, as checkpointing has it; `hc.recomputing` leaves branches alone.

    Args:
        recompute: "coefficients" runs the reads again, "streams" the writes too; the input of each
            checkpointed region is what is kept of the streams. hc::post_pre, the boundary that a
            StreamState makes, counts as a write.
    Raises: ValueError.
    """
    if recompute not in KEPT:
        raise ValueError(f"recompute must be one of {tuple(KEPT)}, got {recompute!r}")
    return partial(create_selective_checkpoint_contexts, partial(_select, KEPT[recompute]))


def _select(kept: tuple, ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    heavy = getattr(op, "overloadpacket", op) in flop_registry
    return CheckpointPolicy.MUST_SAVE if heavy or op in kept else CheckpointPolicy.MUST_RECOMPUTE
