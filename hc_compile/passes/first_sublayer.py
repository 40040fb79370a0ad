"""First sublayer: its n streams are copies of one h, so it reads h alone.

before                                       after
    x = expand(unsqueeze(h), n)                  h₁ = unsqueeze(h)                    [..., 1, C]
    u, pre, post, res, p, ss, ghost =            p, ss = hc.project(h₁, Σᵢ φᵢ)
        hc.pre(x, φ, α, b)                       pre, post, res = hc.constrain(p, n·ss, α, b)
                                                 u = (Σᵢ preᵢ) h
    x' = hc.post(x, y, post, res, ghost)         x' = hc.post(h₁, y, post, Σⱼ res_ij)

C-units, n = 4: 5n + 3 become n + 5 forward (x is never made), and ∂x is never formed. u is plain
torch, so that Inductor makes it with what reads it, n + 3, and ∂h in one sum.
Numerics: the same sums in another order. x is exactly h, so nothing is lost: Σφ, Σpre and Σres are
fp32 sums of n terms in place of n products each, and x' and u are rounded once, as before. With
one φ for every stream (projection "stream") φ is not summed and p is bitwise the same.
Only where x has no other user than reads and writes of hyper-connections; a static constraint
(HC without dynamic coefficients) is left alone.
"""

from typing import Any

import torch
from torch.fx import Graph, Node

from custom_ops.constraint import Constraint, parse
from custom_ops.registration import compute_dtype
from hc_compile.passes.graph import (
    arguments,
    emit,
    erase_unused,
    is_call,
    is_op,
    only_unpacked,
    outputs,
    regions,
    take,
    untouched,
    value,
)

GHOST = 6  # index of the ghost among the outputs of hc::pre


def first_sublayer(graph: Graph) -> bool:
    """Rewrite the sublayers that read copies of one tensor; returns whether anything changed."""
    region = regions(graph)
    expanded = [node for node in graph.nodes if _row_of(node) is not None]
    return any([_rewrite(graph, x, region) for x in expanded])


def _row_of(x: Node) -> Node | None:
    """h [..., 1, C] if x [..., n, C] is it expanded over the streams and made contiguous."""
    if not is_call(x, "contiguous") or len(x.args) != 1 or x.kwargs:
        return None
    view: Any = x.args[0]
    row: Any = view.args[0] if is_call(view, "expand") else None
    if not is_call(row, "unsqueeze") or value(x) is None or value(row) is None:
        return None
    wide, one = value(x), value(row)
    same = wide.dim() == one.dim() and wide.dim() > 1 and one.shape[-2] == 1
    same = same and wide.shape[:-2] == one.shape[:-2] and wide.shape[-1] == one.shape[-1]
    return row if same else None


def _rewrite(graph: Graph, x: Node, region: dict) -> bool:
    row = _row_of(x)
    users = list(x.users)
    if row is None or not untouched(x, row) or any(region[u] != region[x] for u in users):
        return False
    if not any(is_op(u, "pre") for u in users) or not all(_is_ours(u, x) for u in users):
        return False
    for user in [_split(graph, u) if is_op(u, "post_pre") else u for u in users]:
        if is_op(user, "post"):
            _write(graph, user, row)
    for user in list(x.users):
        _read(graph, user, row)
    erase_unused(graph, x, x.args[0])  # type: ignore[arg-type]
    return True


def _is_ours(user: Node, x: Node) -> bool:
    """Whether `user` reads or writes x as streams, in a way that can be rewritten."""
    name = next((n for n in ("pre", "post", "post_pre") if is_op(user, n)), None)
    if name is None:
        return False
    given = arguments(user, name)
    if given["x"] is not x or list(user.all_input_nodes).count(x) != 1:
        return False
    if name == "post":
        return untouched(*given.values())
    if not only_unpacked(user) or not untouched(*given.values()):
        return False
    if name == "post_pre":
        return given["ghost"] is None and not given["weighed"]
    c = parse(given["spec"])
    if c.projection == "static" or c.read_norm != "none" or value(given["phi"]) is None:
        return False
    ghosts = [g for ghost in outputs(user).get(GHOST, []) for g in ghost.users]
    return all(is_op(g, "post") and arguments(g, "post")["x"] is x for g in ghosts)


def _split(graph: Graph, node: Node) -> Node:
    """hc::post_pre as a post, which is returned, and a pre."""
    given = arguments(node, "post_pre")
    with graph.inserting_before(node):
        written = [given[name] for name in ("x", "y", "post", "res")]
        post = emit(graph, torch.ops.hc.post.default, *written)
        names = ("phi", "alpha", "bias", "spec", "with_ghost", "weight", "shift", "carried")
        parameters = [given[name] for name in names]
        pre = emit(graph, torch.ops.hc.pre.default, post, *parameters)
    for index, items in outputs(node).items():
        for item in items:
            with graph.inserting_before(item):
                new = post if index == 0 else take(graph, pre, index - 1, like=item)
            item.replace_all_uses_with(new)
            graph.erase_node(item)
    graph.erase_node(node)
    return post


def _write(graph: Graph, post: Node, row: Node) -> None:
    """x' from one stream, each weighted by its row sum of res."""
    given = arguments(post, "post")
    with graph.inserting_before(post):
        weights = emit(graph, torch.sum, given["res"], -1, keepdim=True)
        new = emit(graph, torch.ops.hc.post.default, row, given["y"], given["post"], weights)
    new.meta = dict(post.meta) | new.meta
    post.replace_all_uses_with(new)
    graph.erase_node(post)


def _read(graph: Graph, pre: Node, row: Node) -> None:
    """u and the coefficients from one stream, by the sums of φ and of pre over the streams."""
    given = arguments(pre, "pre")
    c = parse(given["spec"])
    with graph.inserting_before(pre):
        p, ss = _project(graph, given["phi"], row, c)
        width = c.norm_width(int(value(row).shape[-1]))
        arguments_ = (p, ss, given["alpha"], given["bias"], width, c.spec)
        made = emit(graph, torch.ops.hc.constrain.default, *arguments_)
        coefficients = [take(graph, made, k) for k in range(3)]
        weights = coefficients[0] if given["carried"] is None else given["carried"]
        u = _scaled(graph, row, emit(graph, torch.sum, weights, -1, keepdim=True))
    new = dict(enumerate([u, *coefficients, p, ss]))
    for index, items in outputs(pre).items():
        for item in items:
            if index != GHOST:
                item.replace_all_uses_with(new[index])
            graph.erase_node(item)
    graph.erase_node(pre)


def _scaled(graph: Graph, row: Node, weights: Node) -> Node:
    """u [..., C] of weights [..., 1], [..., V, C] of [..., V, 1], rounded as by hc::aggregate."""
    views = value(weights).dim() == value(row).dim()
    h = row if views else row.args[0]
    assert isinstance(h, Node)
    wide = emit(graph, "to", h, compute_dtype(value(h), value(weights)))
    return emit(graph, "to", emit(graph, torch.mul, wide, weights), value(h).dtype)


def _project(graph: Graph, phi: Node, row: Node, c: Constraint) -> tuple[Node, Node]:
    """p and ss of n copies of the row."""
    per_stream = c.projection == "stream"
    if not per_stream:
        streams = emit(graph, "unflatten", phi, 1, (c.streams, -1))
        dtype = compute_dtype(value(row), value(phi))
        phi = emit(graph, torch.sum, streams, 1, dtype=dtype)
    made = emit(graph, torch.ops.hc.project.default, row, phi, per_stream, c.precision)
    p, ss = take(graph, made, 0), take(graph, made, 1)
    if not per_stream:
        return p, emit(graph, torch.mul, ss, c.streams)
    lead = [-1] * (value(row).dim() - 2)
    wide = emit(graph, "expand", p, *lead, c.streams, -1)
    return wide, emit(graph, "expand", ss, *lead, c.streams)
