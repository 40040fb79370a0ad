"""Layers around hyper-connections: pure functions that Inductor fuses, and thin modules."""

from hc_compile.layers.training import (
    GradientCheckpointMixin,
)

__all__ = [
    "GradientCheckpointMixin",
]
