"""HyperConnection(hidden_size, expansion_rate, use_tanh, static_weights), called after the layer.

    before: x = hc(layer(norm(x)), x)            # merges the streams at every layer
    after:  x = hc(layer(norm(hc.read(x))), x)   # x [B, S, n, C]: the paper's hyper-connection

One `hc_compile.HyperConnection` does the work; it also serves x [B, S, C], for a block used alone.
"""

from __future__ import annotations

from torch import Tensor, nn

import hc_compile as hc
from hc_compile.models.with_hc_layer import variant


class HyperConnection(nn.Module):
    """The paper's hyper-connection under the signature (layer_output, input_hidden).

    Args:
        hidden_size: C. expansion_rate: n.
        use_tanh: DHC with tanh or without. static_weights: SHC.
        layer_index: place of the sublayer in the network, see `hc_compile.HyperConnection`.
    Source: HC, arXiv 2409.19606.
    """

    def __init__(
        self,
        hidden_size: int,
        expansion_rate: int = 4,
        use_tanh: bool = True,
        static_weights: bool = False,
        *,
        layer_index: int = 0,
    ) -> None:
        super().__init__()
        cfg = hc.HCConfig(hidden_size, expansion_rate, variant(use_tanh, static_weights))
        self.core = hc.HyperConnection(cfg, layer_index)

    def read(self, x: Tensor) -> Tensor:
        """What the layer reads: u = Σ_i pre_i x_i, [B, S, n, C] -> [B, S, C]."""
        return self.core(x)[0]

    def forward(self, layer_output: Tensor, input_hidden: Tensor) -> Tensor:
        """Write the layer's output to the streams: x'_i = Σ_j res_ij x_j + post_i y.

        Args:
            layer_output: y [B, S, C].
            input_hidden: streams x [B, S, n, C] that `read` saw; or [B, S, C], which is expanded
                here and averaged again.
        Returns: the shape of input_hidden.
        """
        if input_hidden.dim() == layer_output.dim():
            streams = hc.expand_streams(input_hidden, self.core.cfg)
            return hc.reduce_streams(self(layer_output, streams), self.core.cfg)
        return self.core(input_hidden)[1](layer_output)
