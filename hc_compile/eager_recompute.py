"""Recompute without a compiler: saved streams and coefficients become recipes, made at need.

forward     x_l ═▶ hc::post_pre ═▶ x_l+1   autograd saves x_l+1 and coefficients: their recipe goes
                                           in the place, and the memory is free
backward    unpack x_l+1 = post(x_l, y_l, coefficients(x_l)), down to the x that is kept
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from custom_ops import post as post_op
from custom_ops import pre as pre_op
from custom_ops.constraint import parse
from hc_compile.recompute import Policy, check_policy, plan


class Recipe:
    """How to make tensors again: a function and its arguments, which may be recipes' results."""

    def __init__(self, make: Callable[..., tuple], *arguments: Any):
        self.make = make
        self.arguments = arguments
        self.versions = [a._version for a in arguments if isinstance(a, Tensor)]
        self.made: tuple | None = None

    def __call__(self) -> tuple:
        """The tensors, made once for as long as something needs them."""
        if self.made is None:
            now = [a._version for a in self.arguments if isinstance(a, Tensor)]
            if now != self.versions:
                raise RuntimeError(
                    "one of the tensors needed to recompute streams was modified in place"
                )
            with torch.no_grad():
                self.made = self.make(*(_value(a) for a in self.arguments))
        return self.made


class Result:
    """One tensor of a recipe."""

    def __init__(self, recipe: Recipe, index: int):
        self.recipe, self.index = recipe, index


def _value(argument: Any) -> Any:
    return argument.recipe()[argument.index] if isinstance(argument, Result) else argument


def _write(x: Tensor, y: Tensor, post: Tensor, res: Tensor) -> tuple[Tensor]:
    return (post_op.forward(x, y, post, res),)


class _Recorder(TorchDispatchMode):
    """Sees the hc:: ops run, and knows by its storage what one of them made."""

    def __init__(self, policy: Policy, sublayers: int):
        super().__init__()
        self.policy, self.sublayers = policy, sublayers
        self.made: dict[int, tuple[StorageWeakRef, tuple, Result]] = {}
        self.writes = 0
        self.every = -1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name() if isinstance(func, torch._ops.OpOverload) else ""
        if name == "hc::post":
            self._wrote(out, *args[:4])
        elif name == "hc::pre":
            self._read(args[0], args[1:4], args[4], out[1:6])
        elif name == "hc::post_pre":
            self._wrote(out[0], *args[:4])
            self._read(out[0], args[4:7], args[7], out[2:7])
        return out

    def _wrote(self, streams: Tensor, x: Tensor, y: Tensor, post: Tensor, res: Tensor) -> None:
        if self.every < 0:
            small = sum(t.numel() * t.element_size() for t in (post, res))
            size = streams.numel() * streams.element_size()
            self.every = plan(self.policy, self.sublayers, streams.shape[-2], size, 3 * small)
        self.writes += 1
        if self.every > 1 and self.writes % self.every:
            sources = [self.source(t) for t in (x, y, post, res)]
            self._note(Recipe(_write, *sources), [streams])

    def _read(self, x: Tensor, parameters: tuple, spec: str, made: tuple) -> None:
        if self.every == 0:
            return
        recipe = Recipe(pre_op.coefficients, self.source(x), *parameters, parse(spec))
        self._note(recipe, made)

    def _note(self, recipe: Recipe, made: Any) -> None:
        self.made = {key: entry for key, entry in self.made.items() if not entry[0].expired()}
        for index, tensor in enumerate(made):
            weak = StorageWeakRef(tensor.untyped_storage())
            self.made[weak.cdata] = (weak, _layout(tensor), Result(recipe, index))

    def source(self, tensor: Tensor) -> Any:
        """The result that a tensor is, or the tensor."""
        entry = self.made.get(tensor.untyped_storage()._cdata)
        if entry is None or entry[0].expired() or entry[1] != _layout(tensor):
            return tensor.detach()
        return entry[2]


def _layout(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor._version


@contextmanager
def recomputing(recompute: Policy, sublayers: int | None = None) -> Iterator[None]:
    """Eager forward passes inside keep less of the streams, see hc_compile/recompute.py.

        with hc.recomputing("streams", sublayers=64):
            loss = model(tokens)
        loss.backward()

    Args:
        recompute: as of `hc.compile`, for one forward pass.
        sublayers: L, for "streams" and for bytes, which need to know how many will follow.
    Raises: TypeError, ValueError that name the argument; RuntimeError in the backward where a
        parameter or a branch's output was modified in place since.
    """
    check_policy(recompute)
    if recompute not in ("none", "coefficients") and (
        isinstance(sublayers, bool) or not isinstance(sublayers, int) or sublayers < 1
    ):
        raise ValueError(f"sublayers must be an int >= 1, got {sublayers!r}")
    recorder = _Recorder(recompute, sublayers or 1)
    with recorder, torch.autograd.graph.saved_tensors_hooks(recorder.source, _value):
        yield
