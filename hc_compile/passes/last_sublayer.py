"""Last sublayer: where its streams are only averaged (or added), they are never made.

before                                       after
    x' = hc.post(x, y, post, res, ghost)         h = hc.post(x, y, meanᵢ postᵢ, meanᵢ res_ij)
    h = x'.float().mean(-2).to(x'.dtype)           = Σⱼ (meanᵢ res_ij) xⱼ + (meanᵢ postᵢ) y

C-units: 3n + 2 become n + 2 forward, 7n + 5 about 6n + 6 backward.
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
    only_user,
    regions,
    untouched,
    value,
)


def last_sublayer(graph: Graph) -> bool:
    """Fold every mean or sum over the streams into the post it reads; returns whether it did."""
    region = regions(graph)
    posts = [node for node in graph.nodes if is_op(node, "post")]
    return any([_rewrite(graph, post, region) for post in posts])


def _rewrite(graph: Graph, post: Node, region: dict) -> bool:
    chain = _reduction(post)
    given = arguments(post, "post")
    if chain is None or any(region[node] != region[post] for node in chain if node):
        return False
    if not untouched(post, *given.values()):
        return False
    total, last = chain[1], chain[-1]
    assert total is not None and last is not None
    reduce = torch.mean if is_call(total, "mean") else torch.sum
    with graph.inserting_before(last):
        write = emit(graph, reduce, given["post"], -1, keepdim=True)
        mix = emit(graph, reduce, given["res"], -2, keepdim=True)
        one = emit(graph, torch.ops.hc.post.default, given["x"], given["y"], write, mix)
        h = emit(graph, torch.squeeze, one, -2)
    h.meta = dict(last.meta) | h.meta
    last.replace_all_uses_with(h)
    erase_unused(graph, *reversed(chain), post, given["ghost"])
    return True


def _reduction(post: Node) -> tuple[Node | None, ...] | None:
    """(widening cast or None, mean or sum over streams, cast back) if that is all x' is for."""
    fake, user = value(post), only_user(post)
    if fake is None or user is None:
        return None
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
