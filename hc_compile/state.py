"""StreamState: what travels between sublayers when a post is left for the next one to do.

    state = hc.StreamState(hc.expand_streams(h, cfg))
    for layer, branch in zip(layers, branches):
        u, add_residual = layer(state)      # does the pending post and this pre in one op
        state = add_residual(branch(u))     # only notes y, post and res
    h = hc.reduce_streams(state, cfg)

It is a NamedTuple, so a pytree: it crosses block, checkpoint and pipeline edges, and the seam
between two sublayers is one op in eager code and in the next graph.
"""

from typing import NamedTuple

from torch import Tensor


class StreamState(NamedTuple):
    """Streams between sublayers.

    x: [..., n, C] streams before the pending write.
    pending: (y [..., C], post [..., n], res [..., n, n]) still to be applied, or None.
    pre: [..., n] coefficients carried to the next sublayer by delayed-pre variants, or None.
    """

    x: Tensor
    pending: tuple[Tensor, Tensor, Tensor] | None = None
    pre: Tensor | None = None
