"""Drop-in for the PyPI package hyper-connections: the same names, parameters and results.

`from hc_compile.compat.hyper_connections import …` for `from hyper_connections import …`, also for
its submodules. hc_compile/compat/README.md lists every name and difference.
"""

from hc_compile.compat.hyper_connections.hyper_connections import (
    HyperConnections,
    get_init_and_expand_reduce_stream_functions,
)
from hc_compile.compat.hyper_connections.manifold_constrained_hyper_connections import (
    ManifoldConstrainedHyperConnections,
    mHC,
)
from hc_compile.compat.hyper_connections.manifold_constrained_hyper_connections import (
    get_expand_reduce_stream_functions as mc_get_expand_reduce_stream_functions,
)
from hc_compile.compat.hyper_connections.manifold_constrained_hyper_connections import (
    get_init_and_expand_reduce_stream_functions as mc_get_init_and_expand_reduce_stream_functions,
)
from hc_compile.compat.hyper_connections.residual import Residual
from hc_compile.compat.hyper_connections.streams import (
    AttentionPoolReduceStream,
    StreamEmbed,
    get_expand_reduce_stream_functions,
)

__all__ = [
    "AttentionPoolReduceStream",
    "HyperConnections",
    "ManifoldConstrainedHyperConnections",
    "Residual",
    "StreamEmbed",
    "get_expand_reduce_stream_functions",
    "get_init_and_expand_reduce_stream_functions",
    "mHC",
    "mc_get_expand_reduce_stream_functions",
    "mc_get_init_and_expand_reduce_stream_functions",
]
