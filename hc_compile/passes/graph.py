"""What every pass needs: recognise nodes, read their arguments, emit new ones, and stay safe.

Dynamo leaves every node's fake result in `meta["example_value"]`: shapes, and by its version
whether something writes it in place. torch.export leaves it in `meta["val"]` without a version;
its graphs consist of overloads, whose schemas say what they write.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

RESHAPES = ("flatten", "unflatten")  # of contiguous tensors: the order of the elements stays


def ops(graph: Graph) -> list[Node]:
    """The graph's calls of hc:: ops, in order."""
    return [n for n in graph.nodes if getattr(n.target, "__module__", "") == "torch._ops.hc"]


def each(passes: Any) -> tuple[Callable, ...]:
    """The passes in one of Inductor's settings: none, one, or (from torch 2.13) several."""
    if passes is None:
        return ()
    return tuple(passes) if isinstance(passes, list | tuple) else (passes,)


def is_op(node: object, name: str) -> bool:
    """Whether `node` calls `hc::name`, as an overload or as the packet that Dynamo emits."""
    if not isinstance(node, Node) or node.op != "call_function":
        return False
    packet = getattr(torch.ops.hc, name)
    return node.target is packet or node.target is packet.default


def is_call(node: object, *names: str) -> bool:
    """Whether `node` calls a method, a torch function or an operator of one of these names."""
    if not isinstance(node, Node):
        return False
    if node.op == "call_method":
        return node.target in names
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.namespace == "aten" and node.target.overloadpacket.__name__ in names
    return node.op == "call_function" and any(
        node.target is getattr(home, name, node) for name in names for home in (torch, operator)
    )


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
    while is_call(origin, *RESHAPES):
        origin = origin.args[0]
    if origin is node or not _same_shape(origin, node):
        return node
    node.replace_all_uses_with(origin)
    while node is not origin and not node.users:
        node, unused = node.args[0], node
        unused.graph.erase_node(unused)
    return origin


def _same_shape(*nodes: object) -> bool:
    first, second = (value(n) if isinstance(n, Node) else None for n in nodes)
    if first is None or second is None or first.dim() != second.dim():
        return False
    pairs = zip(first.shape, second.shape, strict=True)
    return all(statically_known_true(a == b) for a, b in pairs)


def square(res: Node) -> bool:
    """Whether the mix keeps the number of streams, as far as the graph says."""
    fake = value(res)
    return fake is None or fake.shape[-2] == fake.shape[-1]


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


def only_user(node: Node) -> Node | None:
    """The node's user if it has exactly one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def take(graph: Graph, node: Node, index: int, like: Node | None = None) -> Node:
    """A getitem on `node` at the current insertion point, with the meta of `like` or its own."""
    item = graph.call_function(operator.getitem, (node, index))
    if like is not None:
        item.meta = dict(like.meta)
    elif value(node) is not None:
        item.meta["example_value"] = value(node)[index]
    return item


def emit(graph: Graph, target: Callable | str, *args: Any, **kwargs: Any) -> Node:
    """A call (of a method, if `target` is a name) at the insertion point, with its fake value."""
    method = isinstance(target, str)
    make = graph.call_method if method else graph.call_function
    node = make(target, args, kwargs)  # type: ignore[arg-type]
    if all(value(n) is not None for n in node.all_input_nodes):
        with torch.no_grad():
            fakes, named = map_arg((args, kwargs), value)
            call = getattr(fakes[0], target) if method else target
            node.meta["example_value"] = call(*fakes[1:] if method else fakes, **named)
    return node


def reissue(graph: Graph, node: Node, given: dict, region: dict[Node, tuple]) -> Node:
    """The call of an op again with other arguments, in place of a node that is unpacked."""
    with graph.inserting_before(node):
        new = emit(graph, node.target, *given.values())  # type: ignore[arg-type]
    new.meta = dict(node.meta) | new.meta
    region[new] = region[node]
    for index, items in outputs(node).items():
        for item in items:
            with graph.inserting_before(item):
                replacement = take(graph, new, index)
            replacement.meta = dict(item.meta) | replacement.meta
            region[replacement] = region[item]
            item.replace_all_uses_with(replacement)
            graph.erase_node(item)
    graph.erase_node(node)
    return new


def value(node: Node) -> Any:
    """The node's fake result, None where there is none."""
    return node.meta.get("example_value", node.meta.get("val"))


def erase_unused(graph: Graph, *nodes: Node | None) -> None:
    """Erase these nodes, users first, as long as nothing uses them."""
    for node in nodes:
        if node is not None and not node.users:
            graph.erase_node(node)


def untouched(*nodes: object) -> bool:
    """Whether nothing in the graph writes these values in place, directly or through a view."""
    return not any(
        _version(value(node)) or ("example_value" not in node.meta and _is_written(node))
        for node in nodes
        if isinstance(node, Node)
    )


def _is_written(node: Node) -> bool:
    """Whether an overload writes the memory that the node's value lies in."""
    base = _base(node)
    return any(_base(arg) is base for user in node.graph.nodes for arg in _written_by(user))


def _written_by(node: Node) -> list[Node]:
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return []
    given = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False))
    given |= node.kwargs
    written = (given.get(a.name) for a in node.target._schema.arguments if a.is_write)
    return [arg for arg in written if isinstance(arg, Node)]


def _base(node: Node) -> Node:
    """What a view looks at."""
    while isinstance(node.target, torch._ops.OpOverload) and node.target.is_view:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _version(fake: Any) -> int:
    tracked = isinstance(fake, torch.Tensor) and not fake.is_inference()
    return fake._version if tracked else 0


def regions(graph: Graph) -> dict[Node, tuple]:
    """The grad mode and the open autocast or inference regions of every node.

    An op must not move to another region: under no_grad it would lose its gradient.
    """
    grad, opened = torch.is_grad_enabled(), ()
    found = {}
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        if name == "_set_grad_enabled":
            grad = node.args[0]
        elif name.startswith("_enter_"):
            opened = (*opened, node)
        elif name.startswith("_exit_"):
            opened = tuple(enter for enter in opened if enter is not node.args[0])
        found[node] = (grad, opened)
    return found
