"""One way to register every hc:: op: schema, body, fake, autograd, double backward.

A body is written once with a branch: Triton kernels where `use_triton` says so, plain torch
otherwise. `triton_op` lets Inductor see through the body; interpreted kernels can't be traced, so
under TRITON_INTERPRET=1 the same body becomes an opaque `custom_op`.
"""

import os
import sys
from collections.abc import Callable, Iterable
from functools import reduce
from operator import add

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SWITCHES = ("HC_DISABLE_TRITON", "HYDRA_DISABLE_TRITON")  # the second for code ported from HYDRA
_state = {"enabled": all(os.environ.get(name, "0") in ("", "0") for name in SWITCHES)}


def set_triton_enabled(enabled: bool) -> None:
    """Choose kernels (True) or plain torch (False) for calls and compilations from now on."""
    _state["enabled"] = enabled


def triton_enabled() -> bool:
    """Whether the kill switch leaves the Triton kernels on."""
    return _state["enabled"]


def use_triton(x: Tensor) -> bool:
    """Whether an op on `x` runs its Triton kernel: a CUDA (or interpreted) tensor, not float64."""
    on_device = INTERPRETED or x.is_cuda
    return on_device and _state["enabled"] and x.dtype != torch.float64


def define(name: str, body: Callable, fake: Callable):
    """Register `hc::name`; the schema comes from the body's annotations."""
    make = torch.library.custom_op if INTERPRETED else torch.library.triton_op
    op = make(f"hc::{name}", body, mutates_args=())
    op.register_fake(fake)
    return op


def define_opaque(name: str, body: Callable, fake: Callable):
    """Register `hc::name` as a call that Inductor does not look into, and return how to make it.

    Where Inductor compiles ahead of time, for a process without Python, the body is inlined.
    """
    op = torch.library.custom_op(f"hc::{name}", body, mutates_args=())
    op.register_fake(fake)

    def call(*arguments):
        inductor = sys.modules.get("torch._inductor.virtualized")
        packaging = inductor is not None and inductor.V.aot_compilation
        return (body if packaging else op)(*arguments)

    return call


def double_backward(op, cotangents: int, primals: int, reference: Callable) -> None:
    """Give a backward op its own derivative through the reference mathematics.

    `op(*cotangents, *primals, *rest)` returns one gradient a primal; `reference(primals, rest)`
    returns one output a cotangent, None where it can't (a ghost). Tensors in `rest` are functions
    of the primals and get no gradient of their own.
    """
    count = cotangents + primals

    def setup_context(ctx, inputs, output):
        tensors = inputs[:count]
        ctx.save_for_backward(*tensors)
        ctx.rest = [None if isinstance(r, Tensor) else r for r in inputs[count:]]
        ctx.set_materialize_grads(False)

    def backward(ctx, *outer):
        with torch.enable_grad():
            leaves = [
                None if t is None else t.detach().requires_grad_() for t in ctx.saved_tensors
            ]
            cots, prims = leaves[:cotangents], leaves[cotangents:]
            outputs = reference(prims, ctx.rest)
            pairs = [(o, c) for o, c in zip(outputs, cots, strict=True) if c is not None]
            if any(o is None for o, _ in pairs):
                raise RuntimeError(
                    "double backward through a ghost is not supported; call hc.functional instead"
                )
            pairs = [(o, c) for o, c in pairs if o.requires_grad]
            wanted = [p for p in prims if p is not None]
            first = torch.autograd.grad(
                [o for o, _ in pairs],
                wanted,
                [c for _, c in pairs],
                create_graph=True,
                allow_unused=True,
            )
            gradients = iter(first)
            inner = [None if p is None else next(gradients) for p in prims]
            terms = [
                (i, o)
                for i, o in zip(inner, outer, strict=False)
                if i is not None and o is not None and i.requires_grad
            ]
            targets = [t for t in leaves if t is not None]
            if not terms:
                return (None,) * (count + len(ctx.rest))
            second = iter(
                torch.autograd.grad(
                    [i for i, _ in terms], targets, [o for _, o in terms], allow_unused=True
                )
            )
        found = [None if t is None else next(second) for t in leaves]
        return (*found, *(None,) * len(ctx.rest))

    op.register_autograd(backward, setup_context=setup_context)


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any input is float64, else float32."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the dtype of its arguments, whatever autocast says."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def flat(t: Tensor, keep: int) -> Tensor:
    """`t` with its leading dimensions flattened to one and the last `keep` kept, contiguous."""
    if t.dim() != keep + 1:
        t = t.reshape(-1, *t.shape[t.dim() - keep :])
    return t.contiguous()


def total(terms: Iterable[Tensor]) -> Tensor:
    """The terms added left to right."""
    return reduce(add, terms)
