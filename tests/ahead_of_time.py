"""Compiles the kernels that the launchers launch, for a GPU that need not be present.

Run as a program (`python -m tests.ahead_of_time 90 streams`), because it replaces Triton's
driver: the launchers run on CPU tensors, `launch` compiles instead, and one JSON object a kernel
comes out, with what the machine code takes of the target named by its compute capability.
"""

import json
import re
import subprocess
import sys
import tempfile
from functools import partial
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch
import triton

import custom_ops.kernels
from custom_ops.constraint import Constraint
from profiles.stand_in import Driver, modules

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MODULES = modules(custom_ops.kernels)
TOKENS = 48  # nothing is specialised on the number of tokens; Widened wants a multiple of 16
MHC = {"iterations": 20}
ORTHO = {"manifold": "newton-schulz"}


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread and the bytes of its stack, which only spilled registers take here."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return {"registers": found["REG"], "stack": found["STACK"] + found["LOCAL"]}


class Recorder:
    """What takes the place of `launch`."""

    def __init__(self, names_only: bool):
        self.case = ""
        self.names_only = names_only
        self.seen: set[str] = set()

    def __call__(self, kernel, grid, *args, **meta):
        if self.names_only:
            if kernel.__name__ not in self.seen:
                print(json.dumps({"kernel": kernel.__name__}))
            self.seen.add(kernel.__name__)
            return
        compiled = kernel.warmup(*args, grid=grid, **meta)
        if compiled.hash not in self.seen:
            self.seen.add(compiled.hash)
            shared = compiled.metadata.shared
            row = {"kernel": kernel.__name__, "case": self.case, "shared": shared}
            print(json.dumps(row | resources(compiled.asm["cubin"])), flush=True)


class Widened:
    """Takes the place of `launch`: do the kernels of small matrices still access words alone?

    Their layout hint is false where a token's matrix is not one number (tile.py), so no access
    may become a vector, not even with every argument's divisibility known, as Inductor has it.
    """

    case = ""

    def __call__(self, kernel, grid, *args, **meta):
        if kernel.__module__.rpartition(".")[2] not in ("constrain", "sinkhorn", "newton_schulz"):
            return
        if "slots" in kernel.__name__:
            return
        ptx = triton.jit(kernel.fn).warmup(*args, grid=grid, **meta).asm["ptx"]
        vectors = len(re.findall(r"(?:ld|st)\.global\S*\.v[248]", ptx))
        row = {"kernel": kernel.__name__, "case": self.case, "vectors": vectors}
        print(json.dumps(row), flush=True)


def streams(n, dtype=torch.bfloat16, width=2560, views=1, branches=1, coefficients=None):
    """Every kernel that walks the streams, forward and backward."""
    from custom_ops.kernels import aggregate, post, pre_backward, project

    def wide(*shape):
        return torch.empty(TOKENS, *shape, dtype=dtype)

    def small(*shape):
        return torch.empty(TOKENS, *shape)

    coefficients = coefficients or n * n + 2 * n
    x, g, du, y = wide(n, width), wide(n, width), wide(views, width), wide(branches, width)
    pre, mix, res = small(views, n), small(branches, n), small(n, n)
    phi, dp, dss = torch.empty(coefficients, n * width), small(coefficients), small()
    aggregate.aggregate(x, pre)
    aggregate.aggregate_backward(du, x, pre)
    pre_backward.aggregate_dots(du, x)
    post.post(x, y, mix, res)
    post.post_backward(g, x, y, mix, res, False)
    post.post_backward(g, x, y, mix, res, True)
    project.project(x, phi)
    pre_backward.pre_dx(x, du, pre, phi, dp, dss, g, res)
    if views == 1:
        pre_backward.pre_dx(x, du, pre, phi, dp, dss, g, res, with_dots=True)
    pre_backward.pre_dx(x, du, pre, phi, dp, dss)
    pre_backward.project_backward(dp, dss, x, phi)


def swift():
    """The kernels of 4 streams again, of which those differ that know a faster memory."""
    from custom_ops.kernels import pre_dx

    with patch.object(pre_dx, "memory_speed", return_value=4.9e12):
        streams(4)


def boundary(n, width=2560, dtype=torch.bfloat16):
    """The kernels of a fused boundary's forward, and of a read with its norm."""
    from custom_ops.kernels import aggregate_norm, post_pre

    c = Constraint(n)
    x, y = torch.empty(TOKENS, n, width, dtype=dtype), torch.empty(TOKENS, width, dtype=dtype)
    post, res = torch.empty(TOKENS, n), torch.empty(TOKENS, n, n)
    phi, alpha, bias = torch.empty(c.total, n * width), torch.empty(3), torch.empty(c.total)
    post_pre.post_pre(x, y, post, res, phi, alpha, bias, None, c)
    post_pre.post_pre(x, y, post, res, phi, alpha, bias, post, c)
    aggregate_norm.aggregate_norm(x, post, y[0], None, False, 1e-6)
    aggregate_norm.aggregate_norm(x, post, y[0], y[0], True, 1e-6)
    aggregate_norm.aggregate_norm_backward(y, x, post, y[0], False, False, 1e-6)
    aggregate_norm.aggregate_norm_backward(y, x, post, y[0], True, True, 1e-6)


def boundary_backward(incoming, outgoing, width=2560):
    """The backward of a boundary of 4 streams at once, with one stream in or one cotangent."""
    from custom_ops.kernels import boundary_backward as kernels

    def wide(*shape):
        return torch.empty(TOKENS, *shape, width, dtype=torch.bfloat16)

    vector = torch.empty(TOKENS, 4)
    write = (wide(incoming), wide(), vector, torch.empty(TOKENS, 4, incoming))
    read = (wide(4), wide(), wide(outgoing), vector, torch.empty(TOKENS, outgoing, 4))
    rest = (torch.empty(24, 4 * width), torch.empty(TOKENS, 24), torch.empty(TOKENS))
    for with_dots, ghost in product((True, False), (True, False) if incoming == 4 else (False,)):
        kernels.boundary_backward(*write, *read, *rest, with_dots, ghost)


def coefficients(width=2560, splits=4, **record):
    """The kernels that turn a projection into coefficients, forward and backward."""
    from custom_ops.kernels import constrain

    c = Constraint(**record)
    rows = (c.streams, c.rows) if c.projection == "stream" else (c.total,)
    squares = rows[:-1]
    alpha, bias = torch.empty(3), torch.empty(c.total)
    p, ss = torch.empty(splits, TOKENS, *rows), torch.empty(splits, TOKENS, *squares)
    constrain.constrain(p[0], ss[0], alpha, bias, width, c)
    if splits > 1:
        constrain.constrain(p, ss, alpha, bias, width, c, splits)
    shapes = ((c.views, c.streams), (c.branches, c.streams), (c.streams, c.streams))
    gradients = [torch.empty(TOKENS, *shape) for shape in shapes]
    constrain.constrain_backward(*gradients, p[0], ss[0], alpha, bias, width, c)


def matrices(n, sinkhorn=True):
    """Sinkhorn and Newton–Schulz on their own."""
    from custom_ops.kernels import newton_schulz as polar
    from custom_ops.kernels import sinkhorn as balance

    matrix, c = torch.empty(TOKENS, n, n), Constraint(4)
    if sinkhorn:
        rule = (c.iterations, c.start, c.first, c.denominator, c.eps)
        balance.sinkhorn(matrix, *rule)
        balance.sinkhorn_backward(matrix, matrix, *rule)
    polar.newton_schulz(matrix, c.schedule)
    polar.newton_schulz_backward(matrix, matrix, c.schedule)


GROUPS = {
    "four": {
        "bf16": partial(streams, 4),
        "fp32": partial(streams, 4, torch.float32),
        "fp16": partial(streams, 4, torch.float16),
        "odd width": partial(streams, 4, width=5129),
        "two views": partial(streams, 4, views=2, branches=2),
        "bf16 swift": swift,
    },
    "others": {
        "n=2": partial(streams, 2),
        "n=8": partial(streams, 8),
        "n=6": partial(streams, 6),
        "n=16": partial(streams, 16, width=1280),
        "n=5 fp32": partial(streams, 5, torch.float32),
    },
    "coefficients": {
        "mhc n=4": partial(coefficients, streams=4),
        "v4": partial(coefficients, streams=4, transpose=True, start="softmax", first="row",
                      denominator="add", splits=1),
        "ortho n=4": partial(coefficients, streams=4, splits=1, **ORTHO),
        "lite n=4": partial(coefficients, streams=4, manifold="permutation", splits=1),
        "kron n=4": partial(coefficients, streams=4, manifold="kronecker", splits=1),
        "kron n=16": partial(coefficients, streams=16, manifold="kronecker", splits=1),
        "dhc n=4": partial(coefficients, streams=4, projection="stream", manifold="linear",
                           squash="tanh", pre="linear", post="linear", views=2, splits=1),
        "tanh n=4": partial(coefficients, streams=4, projection="stream", manifold="linear",
                            pre="linear", post="linear", splits=1),
        "stream mhc n=4": partial(coefficients, streams=4, projection="stream", transpose=True,
                                  splits=1),
        "stream mhc n=8": partial(coefficients, streams=8, projection="stream", views=2,
                                  branches=2, splits=1),
        "mhc n=2": partial(coefficients, streams=2, splits=1),
        "mhc n=8": partial(coefficients, streams=8, splits=1),
        "ortho n=8": partial(coefficients, streams=8, splits=1, **ORTHO),
        "matrices n=4": partial(matrices, 4),
        "matrices n=8": partial(matrices, 8),
        "matrices n=16": partial(matrices, 16),
    },
    "boundary": {
        "n=4": partial(boundary, 4),
        "n=2": partial(boundary, 2),
        "n=4 wide": partial(boundary, 4, 7168),
        "backward": partial(boundary_backward, 4, 4),
        "backward, first": partial(boundary_backward, 1, 4),
        "backward, last": partial(boundary_backward, 4, 1),
    },
    "main": {
        "bf16": partial(streams, 4),
        "n=8": partial(streams, 8),
        "mhc n=4": partial(coefficients, streams=4, splits=1),
        "ortho n=8": partial(coefficients, streams=8, splits=1, **ORTHO),
    },
}  # fmt: skip


def kernels() -> set[str]:
    """Names of the kernels: jitted functions that no other jitted function calls."""
    found = {}
    for module in MODULES:
        for name, value in vars(module).items():
            if name.startswith("hc_") and isinstance(value, triton.runtime.JITFunction):
                found[name] = value.src
    called = {
        name
        for name in found
        for other, source in found.items()
        if other != name and re.search(rf"\b{name}\(", source)
    }
    return set(found) - called


def main(capability: int, groups: list[str]) -> None:
    """Compile the cases of some groups; with capability 0 only name what all would compile.

    Group "widened" compiles the coefficients for Widened instead of Recorder.
    """
    recorder = Widened() if groups == ["widened"] else Recorder(names_only=capability == 0)
    triton.runtime.driver.set_active(Driver(capability))
    for module in MODULES:
        if hasattr(module, "launch"):
            module.launch = recorder
        if hasattr(module, "generation"):
            module.generation = lambda device: capability // 10 or 9
    groups = ["coefficients"] if groups == ["widened"] else groups
    for group in groups or GROUPS:
        for recorder.case, compile_case in GROUPS[group].items():
            compile_case()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
