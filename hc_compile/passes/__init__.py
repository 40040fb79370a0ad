"""Graph passes over hc:: ops, run before autograd so that forward and backward both fuse.

A pass is `f(graph) -> changed` in a file of its own, with its before/after drawn in the docstring
and a label saying whether it preserves numerics. This file only orders them.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph

import custom_ops
from hc_compile.passes.first_sublayer import first_sublayer
from hc_compile.passes.fold_norm import fold_norm
from hc_compile.passes.fuse_post_pre import fuse_post_pre
from hc_compile.passes.graph import each, ops
from hc_compile.passes.last_sublayer import last_sublayer
from hc_compile.passes.link_ghosts import link_ghosts
from hc_compile.passes.recompute import Recompute

GraphPass = Callable[[Graph], bool]
PASSES: tuple[GraphPass, ...] = (
    first_sublayer,
    fuse_post_pre,
    last_sublayer,
    link_ghosts,
    fold_norm,
)


def _sources() -> tuple[str, ...]:
    folders = (Path(__file__).parent, Path(custom_ops.__file__).parent)
    files = [file for folder in folders for file in folder.rglob("*.py")]
    return tuple(sorted(map(str, [*files, folders[0].parent / "row_reductions.py"])))


class PassPipeline(CustomGraphPass):
    """The passes in order, then the user's own pre-grad pass (or, from torch 2.13, passes).

    A graph without hc:: ops goes to the user's pass as it came. The uuid hashes the sources of the
    passes, the ops and the backend's choices (and the user's uuid), so compiled graphs are cached
    across processes and never outlive a change; a user's pass without uuid turns the cache off,
    as it would alone.
    """

    def __init__(self, passes: Sequence[GraphPass] = PASSES, then: Any = None):
        self.passes = tuple(passes)
        self.then = then
        self.identity = self.uuid()  # pickled into the cache key where uuid() is not asked for

    def __call__(self, graph: Graph) -> None:
        if ops(graph) and any([run(graph) for run in self.passes]):
            graph.lint()
        for run in each(self.then):
            run(graph)

    def uuid(self) -> Any | None:
        own = (get_hash_for_files(_sources()), *(run.__name__ for run in self.passes))
        theirs = [
            run.uuid() if isinstance(run, CustomGraphPass) else None for run in each(self.then)
        ]
        return None if None in theirs else (*own, *theirs)


def without_pipeline(passes: Any) -> Any:
    """A value of `pre_grad_custom_pass` or `joint_custom_post_pass` without what is ours in it."""
    if isinstance(passes, PassPipeline | Recompute):
        return without_pipeline(passes.then)
    if isinstance(passes, list | tuple):
        kept = [without_pipeline(run) for run in passes]
        return type(passes)(run for run in kept if run is not None) or None
    return passes
