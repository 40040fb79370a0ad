"""StreamState: what travels between sublayers when a post is left for the next one to do.

    state = hc.StreamState(hc.expand_streams(h, cfg))
    for layer, branch in zip(layers, branches):
        u, add_residual = layer(state)      # does the pending post and this pre in one op
        state = add_residual(branch(u))     # only notes y, post and res
    h = hc.reduce_streams(state, cfg)

A graph pass can't reach across the end of a graph. Where every block is a graph of its own, let
the blocks take and return a state; the seam is then one op of the next graph, and of eager code:

    block.compile()                              # two graphs serve any depth: with a pending
    state = block(state)                         # write and without; hc.compile_blocks does this
    state = checkpoint(block, state, use_reentrant=False)
    leaves, form = pytree.tree_flatten(state)    # a pipeline stage sends the leaves that are
    state = pytree.tree_unflatten(leaves, form)  # tensors; the next stage does the write

With a delayed preset (DeepSeek-V4.1) the layers make states of tensors themselves, since the next
sublayer reads with the pre of this one; the code above stays the same without the first line.

A state costs y [..., C] and the coefficients on top of x where it is kept or sent; reading it
needs no call to `resolve`, which does the write on its own where no sublayer follows.
"""

from typing import NamedTuple

from torch import Tensor


class StreamState(NamedTuple):
    """Streams between sublayers.

    x: [..., n, C] streams before the pending write.
    pending: (y [..., C], post [..., n], res [..., n, n]) still to be applied, or None.
    pre: [..., n] weights of the next read, handed on by delayed presets, or None.
    """

    x: Tensor
    pending: tuple[Tensor, Tensor, Tensor] | None = None
    pre: Tensor | None = None
