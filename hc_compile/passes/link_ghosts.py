"""Ghost links: a write sends its gradient to the read of the same streams, which forms all of ∂x.

before                                       after
    u, …, ghost = hc.pre(x, φ, α, b)             u, …, ghost = hc.pre(x, φ, α, b, with_ghost=True)
    x' = hc.post(x, y, post, res)                x' = hc.post(x, y, post, res, ghost)

and the same where the read is the second half of an hc.post_pre, the write the first half of the
next one: the chain that layers given a StreamState make. Without it every write forms resᵀg, which
the read then adds to its own ∂x: n more C-units written and n read a sublayer, backward.
Numerics-preserving: ∂x is the same sum, rounded once. Only where gradients are recorded, where
exactly one write has the streams, both stand in one region and nothing writes the streams in
place; other users of x are left alone.
"""

from torch.fx import Graph, Node

from hc_compile.passes.graph import (
    arguments,
    is_op,
    only_unpacked,
    outputs,
    regions,
    reissue,
    square,
    take,
    untouched,
    value,
)

READS = {"pre": 6, "post_pre": 7}  # index of the ghost among the outputs
WRITES = ("post", "post_pre")


def link_ghosts(graph: Graph) -> bool:
    """Link every read to the one write of its streams; returns whether anything changed."""
    region = regions(graph)
    changed = False
    for node in list(graph.nodes):
        name = next((n for n in READS if is_op(node, n)), None)
        if name is not None and region[node][0] and only_unpacked(node):
            changed |= _link(graph, node, name, region)
    return changed


def _link(graph: Graph, read: Node, name: str, region: dict) -> bool:
    given = arguments(read, name)
    streams = given["x"] if name == "pre" else _only_item(read, 0)
    if given["with_ghost"] or not isinstance(streams, Node) or not untouched(streams):
        return False
    writes = [(n, op) for n in streams.users for op in WRITES if _writes(n, op, streams)]
    if len(writes) != 1 or region[writes[0][0]] != region[read]:
        return False
    write, op = writes[0]
    taken = arguments(write, op)
    if taken["ghost"] is not None or value(read) is None or not square(taken["res"]):
        return False
    new = reissue(graph, read, given | {"with_ghost": True}, region)
    with graph.inserting_after(new):
        ghost = take(graph, new, READS[name])
    region[ghost] = region[write]
    taken = arguments(write, op)  # its x may be one of the replaced outputs
    write.args, write.kwargs = tuple((taken | {"ghost": ghost}).values()), {}
    return True


def _only_item(read: Node, index: int) -> Node | None:
    items = outputs(read).get(index, [])
    return items[0] if len(items) == 1 else None


def _writes(node: Node, op: str, streams: Node) -> bool:
    """Whether `node` is a write of exactly these streams."""
    return is_op(node, op) and arguments(node, op)["x"] is streams
