"""`hc.compile_blocks`: one graph a kind of block, shared by all of them, with every seam fused.

    whole net     compile time ∝ layers     embed ─ block ─ … ─ block ─ head      one graph
    its blocks    compile time of two       embed ─ [block] ═▶ [block] ═▶ … ─ [reduce] ─ head

Between blocks travels a `StreamState` (state.py) with the write that the next block does together
with its first read, so a seam at a block's edge is one op, as those within are. The first block
has no pending write and is a graph of its own; the other blocks share the second graph (a third
where streams need no gradient at first). With a KV cache every layer attends with buffers of its
own, which is a graph a layer: compile such a model whole.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from hc_compile.backend import backend_for
from hc_compile.module import HyperConnection, StreamExpand, StreamReduce
from hc_compile.recompute import Policy


def compile_blocks(
    model: nn.Module,
    blocks: Iterable[nn.Module] | None = None,
    *,
    recompute: Policy = "none",
    **kwargs: Any,
) -> nn.Module:
    """Compile the blocks of a deep model in place, each kind once, instead of the whole model.

    Equal blocks share a graph, so a cold compile takes as long at 32 layers as at 2. What lies
    outside the blocks stays eager, apart from a `StreamReduce`; whole-model graphs save that
    and fuse copied streams into the first read (`hc.compile`). Saved checkpoints do not change.

    Every `StreamExpand` of the model hands out a `StreamState` from now on, so blocks and what
    lies between them may only hand the streams to hyper-connections and on to each other. A model
    that calls `hc.expand_streams` wraps what it returns in `hc.StreamState(...)` itself.

    Args:
        model: holds its blocks in a ModuleList or Sequential.
        blocks: which modules to compile; by default those members of the outermost lists that
            hold a HyperConnection and its branch.
        recompute: as of `hc.compile`, within a block.
        **kwargs: of torch.compile (fullgraph, dynamic, mode, options, ...), except `backend`.

    Returns: `model`. Raises: ValueError when no block is found; TypeError, ValueError that name
        the argument.
    """
    chosen = blocks_of(model) if blocks is None else list(blocks)
    if not chosen:
        raise ValueError(
            "blocks must be given where no ModuleList or Sequential of the model holds any with "
            f"hyper-connections, got {type(model).__name__}"
        )
    compile_each(model, chosen, backend_for(recompute, kwargs), **kwargs)
    return model


def compile_each(model: nn.Module, blocks: list[nn.Module], backend: Any, **kwargs: Any) -> None:
    """Let `model` hand states from block to block, and compile blocks and its reduction."""
    inside = {id(m) for block in blocks for m in block.modules()}
    for module in model.modules():
        if isinstance(module, StreamExpand):
            module.lazy = True
        elif isinstance(module, StreamReduce) and module.cfg.n > 1 and id(module) not in inside:
            module.compile(backend=backend, **kwargs)
    for block in blocks:
        block.compile(backend=backend, **kwargs)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The members of a model's outermost lists that hold hyper-connections and their branches."""
    found: list[nn.Module] = []
    for child in model.children():
        listed = isinstance(model, nn.ModuleList | nn.Sequential)
        found += [child] if listed and _is_block(child) else blocks_of(child)
    return found


def _is_block(module: nn.Module) -> bool:
    if isinstance(module, HyperConnection):
        return module.branch is not None
    lists = nn.ModuleList | nn.Sequential
    return not isinstance(module, lists) and any(
        isinstance(m, HyperConnection) for m in module.modules()
    )
