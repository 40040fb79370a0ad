"""Hyper-connections for PyTorch, made for torch.compile."""

from hc_compile import functional
from hc_compile.backend import compile, install, uninstall
from hc_compile.blocks import compile_blocks
from hc_compile.config import HCConfig
from hc_compile.eager_recompute import recomputing
from hc_compile.integrations.convert import convert
from hc_compile.module import (
    HyperConnection,
    StreamExpand,
    StreamReduce,
    expand_streams,
    reduce_streams,
    resolve,
)
from hc_compile.parameters import parameter_groups
from hc_compile.presets import PRESETS, Preset
from hc_compile.recompute import recompute_policy
from hc_compile.state import StreamState

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "HCConfig",
    "HyperConnection",
    "Preset",
    "StreamExpand",
    "StreamReduce",
    "StreamState",
    "compile",
    "compile_blocks",
    "convert",
    "expand_streams",
    "functional",
    "install",
    "parameter_groups",
    "recompute_policy",
    "recomputing",
    "reduce_streams",
    "resolve",
    "uninstall",
]
