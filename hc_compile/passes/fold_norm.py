"""Norm folding: the RMSNorm or LayerNorm of what a branch reads becomes part of the read.

before                                       after
    u, pre, … = hc.pre(x, φ, α, b, spec)         v, pre, … = hc.pre(x, φ, α, b, spec + norm,
    v = norm(u) · weight + shift                                    weight, shift)

and the same after hc.post_pre. C-units: 2 fewer forward (u is never in memory), 2 fewer backward.
Numerics: u is rounded as before, the norm is computed in fp32 and rounded once; a norm that
rounded again before its weight (as Llama's does) differs from it by that rounding.

Recognised: torch.nn.functional.rms_norm and layer_norm over the last dimension, with a weight, and
an RMSNorm written out: u.to(fp32), square or pow 2, mean, + eps, rsqrt, times u, times weight and
back to u's dtype, in either order. u must have no other user; a norm without weight or a constant
eps stays.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from custom_ops.constraint import parse
from hc_compile.passes.graph import (
    arguments,
    is_call,
    is_op,
    only_unpacked,
    only_user,
    outputs,
    regions,
    untouched,
    value,
)

READS = {"pre": 0, "post_pre": 1}  # index of u among the outputs


@dataclass(frozen=True)
class Norm:
    """A norm found in the graph; `end` is its result."""

    end: Node
    kind: str
    weight: Node
    shift: Node | None
    eps: float


def fold_norm(graph: Graph) -> bool:
    """Fold every norm that is the only user of a read; returns whether anything changed."""
    region = regions(graph)
    order = {node: position for position, node in enumerate(graph.nodes)}
    reads = [n for n in graph.nodes if any(is_op(n, name) for name in READS)]
    return any([_fold(graph, node, region, order) for node in reads])


def _fold(graph: Graph, node: Node, region: dict, order: dict) -> bool:
    name = "pre" if is_op(node, "pre") else "post_pre"
    given = arguments(node, name)
    items = outputs(node).get(READS[name], [])
    c = parse(given["spec"])
    if len(items) != 1 or not only_unpacked(node) or c.read_norm != "none" or c.views > 1:
        return False
    if name == "post_pre" and given["carried"] is not None:
        return False  # one pass makes u while x' is written; its norm would need a second
    norm = _norm_of(items[0])
    if norm is None or region[node] != region[norm.end] or region[node][1]:
        return False
    parameters = [p for p in (norm.weight, norm.shift) if p is not None]
    if any(order[p] > order[node] for p in parameters) or not untouched(items[0], *parameters):
        return False
    spec = replace(c, read_norm=norm.kind, read_eps=norm.eps).spec
    given |= {"spec": spec, "weight": norm.weight, "shift": norm.shift}
    node.args, node.kwargs = tuple(given.values()), {}
    norm.end.replace_all_uses_with(items[0])
    _erase_between(graph, items[0], norm.end)
    return True


def _erase_between(graph: Graph, read: Node, end: Node) -> None:
    """Erase a norm's nodes, last first."""
    found = {end}
    for node in reversed(graph.nodes):
        if node in found and node is not read:
            found |= {n for n in node.all_input_nodes if n.op.startswith("call")}
            if not node.users:
                graph.erase_node(node)


def _norm_of(u: Node) -> Norm | None:
    """The norm that alone uses u and gives back its shape and dtype."""
    user = only_user(u)
    norm = None if user is None else _called(user)
    norm = norm or _written_out(u)
    if norm is None or norm.eps <= 0 or value(u) is None or value(norm.end) is None:
        return None
    before, after = value(u), value(norm.end)
    parameters = [value(p) for p in (norm.weight, norm.shift) if p is not None]
    if any(p is None or p.shape != before.shape[-1:] for p in parameters):
        return None
    return norm if before.shape == after.shape and before.dtype == after.dtype else None


def _called(node: Node) -> Norm | None:
    """rms_norm or layer_norm as one call."""
    if node.target in (F.rms_norm, torch.rms_norm):
        kind, names = "rms", ("input", "normalized_shape", "weight", "eps")
    elif node.target in (F.layer_norm, torch.layer_norm):
        kind, names = "layer", ("input", "normalized_shape", "weight", "bias", "eps")
    else:
        return None
    given: dict[str, Any] = {"eps": 1e-5 if kind == "layer" else None}
    given |= dict(zip(names, node.args, strict=False)) | node.kwargs
    weight, eps = given.get("weight"), given["eps"]
    if not isinstance(weight, Node) or len(given["normalized_shape"]) != 1:
        return None
    if not isinstance(eps, float):  # none, or a symbol where floats are dynamic
        return None
    return Norm(node, kind, weight, given.get("bias"), eps)


def _written_out(u: Node) -> Norm | None:
    """An RMSNorm in its steps, each with the one use that the norm makes of it."""
    first = only_user(u)
    wide = first if first is not None and is_call(first, "to", "float") else u
    square = next((n for n in wide.users if is_call(n, "square") or _is_square(n)), None)
    mean = _then(square, "mean")
    plus = _then(mean, "add")
    root = _then(plus, "rsqrt")
    unit = _then(root, "mul")
    if mean is None or plus is None or root is None or unit is None or not _over_last(mean):
        return None
    eps = next((a for a in plus.args if isinstance(a, float)), None)
    if (
        eps is None
        or set(unit.all_input_nodes) != {wide, root}
        or set(wide.users) != {square, unit}
    ):
        return None
    narrowed = _then(unit, "to", "type_as")
    factor = narrowed or unit
    end = _then(factor, "mul")
    weight = next((a for a in end.args if a is not factor), None) if end is not None else None
    if end is None or not isinstance(weight, Node):
        return None
    end = end if narrowed else _then(end, "to", "type_as") or end
    return Norm(end, "rms", weight, None, eps)


def _then(node: Node | None, *names: str) -> Node | None:
    """The only user of a node, if it does one of these."""
    user = None if node is None else only_user(node)
    return user if user is not None and is_call(user, *names) else None


def _is_square(node: Node) -> bool:
    return is_call(node, "pow") and len(node.args) == 2 and node.args[1] in (2, 2.0)


def _over_last(mean: Node) -> bool:
    given = dict(zip(("dim", "keepdim"), mean.args[1:], strict=False)) | mean.kwargs
    return given.get("dim") in (-1, [-1], (-1,)) and given.get("keepdim") is True
