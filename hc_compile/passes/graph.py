"""What every pass needs: recognise hc:: nodes, read their arguments, take their outputs."""

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

RESHAPES = ("flatten", "unflatten")  # of contiguous tensors: the order of the elements stays


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


def skip_reshapes(node: Any) -> Any:
    """`node`, or in its place its origin where the reshapes between them change nothing.

    Merged fractions that are split again are such.
    """
    origin: Any = node
    while isinstance(origin, Node) and origin.op == "call_method" and origin.target in RESHAPES:
        origin = origin.args[0]
    if origin is node or not _same_shape(origin, node):
        return node
    node.replace_all_uses_with(origin)
    while node is not origin and not node.users:
        node, unused = node.args[0], node
        unused.graph.erase_node(unused)
    return origin


def _same_shape(*nodes: object) -> bool:
    values = [n.meta.get("example_value") if isinstance(n, Node) else None for n in nodes]
    shapes = [value.shape if isinstance(value, Tensor) else None for value in values]
    first, second = shapes
    if first is None or second is None or len(first) != len(second):
        return False
    return all(statically_known_true(a == b) for a, b in zip(first, second, strict=True))


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
