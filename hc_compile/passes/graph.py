"""What every pass needs: recognise hc:: nodes, read their arguments, take their outputs."""

import operator
from typing import Any

import torch
from torch.fx import Graph, Node


def has_ops(graph: Graph) -> bool:
    """Whether the graph calls any hc:: op."""
    return any(getattr(node.target, "__module__", "") == "torch._ops.hc" for node in graph.nodes)


def is_op(node: object, name: str) -> bool:
    """Whether `node` calls `hc::name`, as an overload or as the packet that Dynamo emits."""
    if not isinstance(node, Node) or node.op != "call_function":
        return False
    packet = getattr(torch.ops.hc, name)
    return node.target is packet or node.target is packet.default


def arguments(node: Node, name: str) -> dict[str, Any]:
    """The node's arguments by name, defaults filled in."""
    schema = getattr(torch.ops.hc, name).default._schema.arguments
    given = {a.name: value for a, value in zip(schema, node.args, strict=False)}
    given |= node.kwargs
    return {a.name: given.get(a.name, a.default_value) for a in schema}


def outputs(node: Node) -> dict[int, list[Node]]:
    """The getitem nodes on a tuple-valued node, by index."""
    found: dict[int, list[Node]] = {}
    for user in node.users:
        if user.op == "call_function" and user.target is operator.getitem:
            found.setdefault(int(user.args[1]), []).append(user)  # type: ignore[arg-type]
    return found


def only_unpacked(node: Node) -> bool:
    """Whether a tuple-valued node is used through getitem alone."""
    return all(user.target is operator.getitem for user in node.users)


def take(graph: Graph, node: Node, index: int, like: Node | None) -> Node:
    """A getitem on `node` at the current insertion point, with the meta of `like`."""
    item = graph.call_function(operator.getitem, (node, index))
    if like is not None:
        item.meta = dict(like.meta)
    return item
