"""Boundary fusion: the post of one sublayer and the pre of the next become one op.

before                                       after
    x' = hc.post(x, y, post, res, ghost)         x', u, pre', post', res', p, ss, ghost' =
    u, pre', post', res', p, ss, ghost' =            hc.post_pre(x, y, post, res, φ, α, b,
        hc.pre(x', φ, α, b)                                      spec, ghost)

Numerics-preserving: the same mathematics in the same order; ∂x' is no longer rounded between the
two. x' may have other users, and reshapes that undo each other may lie between the two. A post
without a pre, or a pre without a post, stays as it is; so do a pair whose values something writes
in place, a pair in different grad or autocast regions, and a post that changes the number of
streams and takes a ghost.
"""

from typing import Any

import torch
from torch.fx import Graph, Node

from hc_compile.passes.graph import (
    arguments,
    is_op,
    only_unpacked,
    outputs,
    regions,
    skip_reshapes,
    square,
    take,
    untouched,
    value,
)


def fuse_post_pre(graph: Graph) -> bool:
    """Fuse every hc::post with the hc::pre that reads it; returns whether anything changed."""
    changed = False
    region = regions(graph)
    order = {node: position for position, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if not is_op(node, "pre"):
            continue
        post = skip_reshapes(arguments(node, "pre")["x"])
        if is_op(post, "post") and only_unpacked(node) and _fuse(graph, post, node, region, order):
            changed = True
    return changed


def _fuse(graph: Graph, post: Node, pre: Node, region: dict, order: dict) -> bool:
    write, read = arguments(post, "post"), arguments(pre, "pre")
    first_user = min(post.users, key=order.__getitem__)
    tail = [read["phi"], read["alpha"], read["bias"]]
    more = [read["weight"], read["shift"], read["carried"]]
    if any(isinstance(t, Node) and order[t] >= order[first_user] for t in tail + more):
        return False
    if not region[post] == region[first_user] == region[pre]:
        return False
    if not untouched(post, *write.values(), *tail, *more):
        return False
    if not square(write["res"]) and write["ghost"] is not None:
        return False
    with graph.inserting_before(first_user):
        inputs = (write["x"], write["y"], write["post"], write["res"], *tail, read["spec"])
        ghosts = (write["ghost"], read["with_ghost"])
        fused = graph.call_function(torch.ops.hc.post_pre.default, (*inputs, *ghosts, *more))
        fused.meta = dict(pre.meta) | _example_values(post, pre)
        streams = take(graph, fused, 0, like=post)
    post.replace_all_uses_with(streams, delete_user_cb=lambda user: user is not pre)
    cursor = streams
    made = {fused: pre, streams: pre}
    for index, items in sorted(outputs(pre).items()):
        for item in items:
            with graph.inserting_after(cursor):
                cursor = take(graph, fused, index + 1, like=item)
            made[cursor] = item
            item.replace_all_uses_with(cursor)
            graph.erase_node(item)
    for new, old in made.items():  # the new nodes stand at the first user, no later than the old
        order[new], region[new] = order[first_user] - 0.5, region[old]
    graph.erase_node(pre)
    graph.erase_node(post)
    return True


def _example_values(post: Node, pre: Node) -> dict[str, Any]:
    values = value(pre)
    if values is None or "example_value" not in post.meta:
        return {}
    return {"example_value": (post.meta["example_value"], *values)}
