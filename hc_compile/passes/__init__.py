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
from hc_compile.passes.fuse_post_pre import fuse_post_pre

GraphPass = Callable[[Graph], bool]
PASSES: tuple[GraphPass, ...] = (fuse_post_pre,)


def _sources() -> tuple[str, ...]:
    folders = (Path(__file__).parent, Path(custom_ops.__file__).parent)
    return tuple(sorted(str(f) for folder in folders for f in folder.rglob("*.py")))


class PassPipeline(CustomGraphPass):
    """The passes in order, then the user's own pre-grad pass.

    Its uuid hashes the passes' and the ops' sources (and the user's uuid), so compiled graphs are
    cached across processes and never outlive a change; a user's pass without uuid turns the cache
    off, as it would alone.
    """

    def __init__(self, passes: Sequence[GraphPass] = PASSES, then: Callable | None = None):
        self.passes = tuple(passes)
        self.then = then

    def __call__(self, graph: Graph) -> None:
        if any([run(graph) for run in self.passes]):
            graph.lint()
        if self.then is not None:
            self.then(graph)

    def uuid(self) -> Any | None:
        own = (get_hash_for_files(_sources()), *(run.__name__ for run in self.passes))
        if self.then is None:
            return own
        theirs = self.then.uuid() if isinstance(self.then, CustomGraphPass) else None
        return None if theirs is None else (*own, theirs)
