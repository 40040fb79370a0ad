"""Last sublayer: where its streams are only averaged, added or weighed, they are never made.

before                                       after
    x' = hc.post(x, y, post, res, ghost)         h = hc.post(x, y, Σᵢ postᵢ, Σᵢ res_ij, ghost) / n
    h = x'.float().mean(-2).to(x'.dtype)           = (Σⱼ (Σᵢ res_ij) xⱼ + (Σᵢ postᵢ) y) / n

The cotangent of every x'ᵢ is then the same, so the ghost of x carries one stream to the backward
of the pre that made it. The same for sums. Where n is no power of two or fp16 might overflow, the
mean is taken of post and res and ∂x is formed twice. h = hc.aggregate(x', pre), by which
DeepSeek-V4.1 leaves its streams, is folded with Σᵢ preᵢ in place of the mean; where one
hc.post_pre made x, pre and res, its ghost is one row (`weighed`), else ∂x is formed twice, too.

C-units: 3n + 2 become n + 2 forward; backward, with that of the read before, 7n + 5 become 4n + 6.
Numerics: better, not the same. x' is no longer rounded to the streams' dtype before the mean, so h
differs by what that rounding was (at most half a unit in the last place of the largest |x'ᵢ|);
the means of the coefficients are fp32 sums of n terms.
Only where x' has no other user. A learned head needs x' for its coefficients and stays.
"""

from typing import Any

import torch
from torch.fx import Graph, Node

from hc_compile.passes.graph import (
    arguments,
    emit,
    erase_unused,
    is_call,
    is_op,
    only_unpacked,
    only_user,
    outputs,
    regions,
    reissue,
    take,
    untouched,
    value,
)

STREAMS, PRE, RES, GHOST = 0, 2, 4, 7  # among the outputs of hc::post_pre


def last_sublayer(graph: Graph) -> bool:
    """Fold every reduction of the streams into the post it reads; returns whether it did."""
    region = regions(graph)
    posts = [node for node in graph.nodes if is_op(node, "post")]
    return any([_rewrite(graph, post, region) for post in posts])


def _rewrite(graph: Graph, post: Node, region: dict) -> bool:
    chain = _reduction(post)
    given = arguments(post, "post")
    if chain is None or any(region[node] != region[post] for node in chain if node):
        return False
    total, last = chain[1], chain[-1]
    assert total is not None and last is not None
    if not untouched(post, *given.values(), *total.all_input_nodes):
        return False
    ghost = given["ghost"] if _alike(total, value(post)) else None
    seam = _seam(given, total, region)
    if seam is not None:
        ghost = _weighed(graph, seam, region)
        given = arguments(post, "post")  # of the new seam
    with graph.inserting_before(last):
        write = _reduced(graph, total, given["post"], -1, ghost is not None)
        mix = _reduced(graph, total, given["res"], -2, ghost is not None)
        one = emit(graph, torch.ops.hc.post.default, given["x"], given["y"], write, mix, ghost)
        h = emit(graph, torch.squeeze, one, -2)
        if ghost is not None and is_call(total, "mean"):
            h = emit(graph, torch.mul, h, 1.0 / value(post).shape[-2])
    h.meta = dict(last.meta) | h.meta
    last.replace_all_uses_with(h)
    erase_unused(graph, *reversed(chain), post, given["ghost"])
    return True


def _seam(given: dict[str, Any], total: Node, region: dict) -> Node | None:
    """The hc::post_pre that made x, the weights of `total` and res, if nobody has its ghost."""
    if not is_op(total, "aggregate") or not isinstance(given["x"], Node):
        return None
    seam = given["x"].args[0] if given["x"].op == "call_function" else None
    if not isinstance(seam, Node) or not is_op(seam, "post_pre") or not only_unpacked(seam):
        return None
    if value(seam) is None or not region[seam][0] or region[seam] != region[total]:
        return None
    items, weights = outputs(seam), arguments(total, "aggregate")["pre"]
    needed = zip((STREAMS, PRE, RES), (given["x"], weights, given["res"]), strict=True)
    if any(node not in items.get(index, []) for index, node in needed):
        return None
    taken = given["ghost"] is not None or arguments(seam, "post_pre")["with_ghost"]
    return None if taken or value(given["x"]).shape[-2] == 1 else seam


def _weighed(graph: Graph, seam: Node, region: dict) -> Node:
    """The ghost of the seam as one row, of which x' with its weights is the only user."""
    changed = {"with_ghost": True, "weighed": True}
    new = reissue(graph, seam, arguments(seam, "post_pre") | changed, region)
    with graph.inserting_after(new):
        ghost = take(graph, new, GHOST)
    region[ghost] = region[new]
    return ghost


def _alike(total: Node, streams: torch.Tensor) -> bool:
    """Whether the reduction is a sum, or one over a power of two, whose scaling is exact."""
    count = streams.shape[-2]
    if is_op(total, "aggregate") or not isinstance(count, int) or streams.dtype == torch.float16:
        return False
    return is_call(total, "sum") or count & (count - 1) == 0


def _reduced(graph: Graph, total: Node, coefficient: Node, dim: int, sums: bool) -> Node:
    """post or res as `total` reduces the streams; `sums`: added even for a mean."""
    if not is_op(total, "aggregate"):
        reduce = torch.mean if is_call(total, "mean") and not sums else torch.sum
        return emit(graph, reduce, coefficient, dim, keepdim=True)
    weights = arguments(total, "aggregate")["pre"]
    weights = emit(graph, torch.unsqueeze, weights, -1) if dim == -2 else weights
    weighed = emit(graph, torch.mul, weights, coefficient)
    return emit(graph, torch.sum, weighed, dim, keepdim=True)


def _reduction(post: Node) -> tuple[Node | None, ...] | None:
    """(widening cast or None, reduction over streams, cast back) if that is all x' is for."""
    fake, user = value(post), only_user(post)
    if fake is None or user is None:
        return None
    if is_op(user, "aggregate"):
        parts = [arguments(user, "aggregate")["pre"], arguments(post, "post")["y"]]
        single = [value(p) is not None and value(p).dim() < fake.dim() for p in parts]
        return (None, user) if all(single) else None  # one view, one branch
    cast = user if _casts(user) and _holds(user, fake.dtype) else None
    total = only_user(user) if cast is not None else user
    if total is None or not is_call(total, "mean", "sum") or value(total) is None:
        return None
    if not _over_streams(total, fake.dim()):
        return None
    last = total
    if value(total).dtype != fake.dtype:
        last = only_user(total)
        if last is None or not _casts(last) or value(last).dtype != fake.dtype:
            return None
    return (cast, total) if last is total else (cast, total, last)


def _casts(node: Node) -> bool:
    """Whether the node changes at most the dtype of a tensor."""
    source = node.args[0] if node.args else None
    if not is_call(node, "to", "float", "double", "bfloat16", "half", "type_as"):
        return False
    if not isinstance(source, Node) or value(source) is None or value(node) is None:
        return False
    return value(source).device == value(node).device


def _holds(node: Node, dtype: torch.dtype) -> bool:
    """Whether every value of `dtype` survives the cast."""
    return torch.promote_types(value(node).dtype, dtype) == value(node).dtype


def _over_streams(total: Node, dims: int) -> bool:
    given: dict[str, Any] = dict(zip(("x", "dim", "keepdim"), total.args, strict=False))
    given |= total.kwargs
    dim = given.get("dim")
    dim = dim[0] if isinstance(dim, list | tuple) and len(dim) == 1 else dim
    plain = not given.get("keepdim", False) and given.get("dtype") is None
    return plain and dim in (-2, dims - 2)
