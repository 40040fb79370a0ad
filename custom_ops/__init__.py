"""hc:: ops: hyper-connection mathematics on tensors, one file an op.

The corridor, in data-flow order: expand → project → constrain → aggregate → branch → post →
reduce. `reference.py` is the whole of it on one page; importing this package registers the ops.
"""

from custom_ops import (  # noqa: F401
    aggregate,
    constrain,
    newton_schulz,
    post,
    post_pre,
    pre,
    project,
    sinkhorn,
)
