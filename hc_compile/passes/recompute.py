"""Recompute: which streams the backward keeps, as tags that AOTAutograd's partitioner obeys.

kept x_k      x_k+1          x_k+2          x_k+every kept
    ═▶ post_pre ═▶ post_pre ═▶ …  ═▶ post_pre ═▶             forward
        ╲ y_k        ╲ y_k+1                                 branches: kept as ever
    ═▶ post_pre ─▶ post_pre ─▶ …                             again, in the backward, at need

Numerics-preserving: the same ops on the same values, none of them random. A branch is never run
again: x_k+1 comes from x_k, the coefficients of x_k and the branch's output.

Two halves. `annotate` numbers the hc:: ops before autograd; the numbers survive into the joint
graph of forward and backward, in which Inductor has decomposed the ops. There `Recompute` tags
what a number stands for: MUST_SAVE the streams that are kept, MUST_RECOMPUTE the rest, and nothing
for what a branch reads, which is the branch's activation. Where one kernel writes the streams and
projects them, the coefficients of kept streams (1 % of them) are kept too: to have them again, the
streams would have to be read once more. Whatever the policy, a cast of streams to a wider dtype is
not kept: left to itself the partitioner saves one of a network's last streams, in fp32. The row
that is left of the last streams is kept: to have it again, all of them would have to be read, but
the partitioner counts only what is kept.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from hc_compile.passes.graph import each, is_call, is_op, ops, value
from hc_compile.recompute import Policy, plan

KEY = "hc_op"  # in a node's meta["custom"], which every node traced from it inherits
WRITES = ("post", "post_pre")
CASTS = (torch.ops.prims.convert_element_type.default, torch.ops.aten._to_copy.default)


def annotate(graph: Graph) -> bool:
    """Number the hc:: ops, and the sums of coefficients between them; nothing else changes.

    Beside its number a node learns what its op writes: "streams", a "row", or nothing of them.
    """
    numbered = ops(graph)
    for number, node in enumerate(numbered):
        writes = any(is_op(node, name) for name in WRITES)
        kind = "row" if writes and _leaves_one(node) else "streams" if writes else "rest"
        for part in (node, *_sums(node, numbered)):
            part.meta["custom"] = part.meta.get("custom", {}) | {KEY: (number, kind)}
    return False


def _leaves_one(node: Node) -> bool:
    """Whether a write makes one stream of several."""
    made = value(node) if is_op(node, "post") else None
    return made is not None and made.shape[-2] == 1


def _sums(node: Node, numbered: list[Node]) -> Iterator[Node]:
    """Sums or means over streams that passes put between an op's coefficients and other ops."""
    for item in (user for user in node.users if is_call(user, "getitem")):
        for user in item.users:
            if is_call(user, "sum", "mean") and set(user.users) <= set(numbered):
                yield user


class Recompute(CustomGraphPass):
    """Tags a joint graph by a policy, then runs the user's own joint pass (or passes)."""

    def __init__(self, policy: Policy, then: Any = None):
        self.policy = policy
        self.then = then
        self.identity = self.uuid()  # as PassPipeline's

    def __call__(self, graph: Graph) -> None:
        tag(graph, self.policy)
        for run in each(self.then):
            run(graph)

    def uuid(self) -> Any | None:
        theirs = [
            run.uuid() if isinstance(run, CustomGraphPass) else None for run in each(self.then)
        ]
        own = (get_hash_for_files((__file__,)), str(self.policy))
        return None if None in theirs else (*own, *theirs)


def tag(graph: Graph, policy: Policy) -> None:
    """Tag the forward half of a joint graph; a graph without a backward half is left alone."""
    if not any(node.meta.get("partitioner_tag") == "is_backward" for node in graph.nodes):
        return
    groups: dict[tuple, list[Node]] = {}
    for node in graph.nodes:
        group = _group(node)
        if group is not None:
            groups.setdefault(group, []).append(node)
    wide = {g: n for g, nodes in groups.items() if (n := _largest(nodes)) is not None}
    streams = {group: node for group, node in wide.items() if group[1] == "streams"}
    every = _every(policy, groups, streams) if streams else 0
    for node in (node for nodes in groups.values() for node in nodes):
        if every or _widens(node):
            node.meta.setdefault("recompute", CheckpointPolicy.MUST_RECOMPUTE)
    for count, (group, node) in enumerate(streams.items(), start=1):
        if every and count % every == 0:
            _keep(node, groups[group])
    for group, nodes in groups.items() if every else ():
        written = list(_origins(streams[group]))[-1] if group in streams else None
        for node in _reads(nodes, streams):
            *parts, origin = _origins(node)
            if origin is not written:  # else one kernel makes the streams, too: it may run again
                siblings = () if _is_tensor(origin) else tuple(origin.users)
                parts += [origin, *siblings]
            for part in parts:
                part.meta.pop("recompute", None)
    for (_, kind), node in wide.items():
        if kind == "row":
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def _every(policy: Policy, groups: dict, streams: dict) -> int:
    """Every how many writes streams are kept, 0 for all and their coefficients too."""
    first = next(iter(streams.values())).meta["val"]
    size = max(_bytes(node) for node in streams.values())
    small = max(
        sum(_bytes(n) for n in _made(groups[group], streams) if not _leaves(n, hc=False))
        for group in streams
    )
    return plan(policy, len(streams), first.shape[-2], size, small)


def _group(node: Node) -> tuple | None:
    if node.op != "call_function" or node.meta.get("partitioner_tag") == "is_backward":
        return None
    return (node.meta.get("custom") or {}).get(KEY)


def _leaves(node: Node, hc: bool) -> bool:
    """Whether an op of the forward outside hc:: (with `hc`: anything outside its op) uses it."""
    for user in node.users:
        forward = user.meta.get("partitioner_tag") != "is_backward" and user.op != "output"
        if (hc and _group(user) != _group(node)) or (forward and _group(user) is None):
            return True
    return False


def _made(nodes: list[Node], streams: dict) -> Iterator[Node]:
    """What other parts of the graph use of an op, but not its streams."""
    for node in nodes:
        if _is_tensor(node) and _leaves(node, hc=True) and node not in streams.values():
            yield node


def _reads(nodes: list[Node], streams: dict) -> Iterator[Node]:
    """What a branch reads."""
    return (node for node in _made(nodes, streams) if _leaves(node, hc=False))


def _largest(nodes: list[Node]) -> Node | None:
    """What an op writes, streams or a row: the first of the largest tensors that leave it."""
    made = list(_made(nodes, {}))
    return max(made, key=_bytes) if made else None


def _keep(node: Node, nodes: list[Node]) -> None:
    """Save these streams; of a kernel that makes them everything, as the partitioner would."""
    *_, origin = _origins(node)
    if _is_tensor(origin):
        origin.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        return
    for part in nodes:
        part.meta.pop("recompute", None)


def _origins(node: Node) -> Iterator[Node]:
    """The node and, while it is a view or one of several results, what it comes from."""
    yield node
    while _is_view(node) and isinstance(node.args[0], Node) and _group(node.args[0]):
        node = node.args[0]
        yield node


def _widens(node: Node) -> bool:
    """Whether it casts streams to a wider dtype: saved, they would take the memory of two."""
    source = node.args[0] if node.args else None
    if not (isinstance(source, Node) and _is_tensor(source) and _is_tensor(node)):
        return False
    before, after = source.meta["val"], node.meta["val"]
    return node.target in CASTS and after.itemsize > before.itemsize and after.dim() > 2


def _is_view(node: Node) -> bool:
    if getattr(node.target, "__name__", "") == "getitem":
        return True
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _bytes(node: Node) -> int:
    made = node.meta["val"]
    count = made.numel()
    return int(count if isinstance(count, int) else count.node.hint) * made.element_size()
