"""A model with its inputs as a training step that every path runs, and ways to compile it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import hc_compile as hc

Forward = Callable[..., Any]


@dataclass
class Workload:
    """What is profiled.

    Attributes:
        model: owns the parameters; every path starts from its weights as they are.
        args: positional inputs of the model.
        kwargs: keyword inputs of the model.
        loss: output -> scalar; None takes ⟨output, fixed random⟩ over all floating outputs.
        optimizer: model -> optimizer whose step ends the training step; None has none.
        about: facts for the report (preset, sizes).
    """

    model: nn.Module
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    loss: Callable[[Any], Tensor] | None = None
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """Where the first parameter or input lies."""
        tensors = [*self.model.parameters(), *input_tensors(self)]
        return tensors[0].device.type if tensors else "cpu"

    def to(self, device: str) -> Workload:
        """The model moved, and the inputs."""
        moved = tree_map_only(Tensor, lambda t: move(t, device), (self.args, self.kwargs))
        return replace(self, model=self.model.to(device), args=moved[0], kwargs=moved[1])


def move(tensor: Tensor, device: str) -> Tensor:
    """An input on a device, a leaf that wants gradients if it was one."""
    return tensor.detach().to(device).requires_grad_(tensor.requires_grad)


def input_tensors(workload: Workload) -> list[Tensor]:
    """The tensors among the inputs."""
    leaves = tree_leaves((workload.args, workload.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def as_workload(made: Any) -> Workload:
    """What a user's function returned: a Workload, or (model, inputs).

    Raises:
        TypeError: when it is neither.
    """
    if isinstance(made, Workload):
        return made
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], nn.Module):
        raise TypeError(
            "the function must return (model, inputs) or a profiles.workload.Workload, "
            f"got {type(made).__name__}"
        )
    model, inputs = made
    if isinstance(inputs, dict):
        return Workload(model, kwargs=inputs)
    return Workload(model, inputs if isinstance(inputs, tuple) else (inputs,))


class TrainingStep:
    """Forward, backward and (if there is one) optimizer step of one path.

    Calling it runs one step. `gradients()` runs a forward and a backward alone and returns the
    outputs and gradients, to compare paths.
    """

    def __init__(
        self,
        workload: Workload,
        forward: Forward,
        around_backward: AbstractContextManager | None = None,
    ) -> None:
        self.workload, self.forward = workload, forward
        self.around_backward = around_backward or nullcontext()
        self.optimizer = workload.optimizer(workload.model) if workload.optimizer else None
        self.cotangents: list[Tensor] = []

    def __call__(self) -> None:
        self._backward(self._run())
        if self.optimizer is not None:
            self.optimizer.step()
        self._clear()

    def gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """Floating outputs, and gradients of parameters and inputs, on the CPU in float32."""
        torch.manual_seed(0)
        out = self._run()
        values = [t.detach().float().cpu() for t in floating(out)]
        with self.around_backward:
            self._backward(out)
        grads = [t.grad.float().cpu() for t in self._leaves() if t.grad is not None]
        self._clear()
        return values, grads

    def resident_bytes(self) -> int:
        """Parameters, buffers, inputs and optimizer state: what stays between steps."""
        w = self.workload
        state = self.optimizer.state.values() if self.optimizer else ()
        kept = [v for slot in state for v in slot.values() if isinstance(v, Tensor)]
        tensors = [*w.model.parameters(), *w.model.buffers(), *input_tensors(w), *kept]
        return sum(t.numel() * t.element_size() for t in tensors)

    def _run(self) -> Any:
        return self.forward(*self.workload.args, **self.workload.kwargs)

    def _backward(self, out: Any) -> None:
        if self.workload.loss is not None:
            self.workload.loss(out).backward()
            return
        outputs = [t for t in floating(out) if t.requires_grad]
        if not outputs:
            raise ValueError("the model must return a floating tensor that wants gradients")
        if not self.cotangents:
            generator = torch.Generator().manual_seed(1)
            drawn = [torch.randn(t.shape, generator=generator) for t in outputs]
            self.cotangents = [d.to(t) for d, t in zip(drawn, outputs, strict=True)]
        torch.autograd.backward(outputs, self.cotangents)

    def _leaves(self) -> list[Tensor]:
        inputs = [t for t in input_tensors(self.workload) if t.requires_grad]
        return [*self.workload.model.parameters(), *inputs]

    def _clear(self) -> None:
        for leaf in self._leaves():
            leaf.grad = None


def floating(out: Any) -> list[Tensor]:
    """The floating-point tensors of an output, however nested."""
    leaves = tree_leaves(out)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def compile_blocks(model: nn.Module) -> nn.Module:
    """torch.compile block by block: every child of the outermost ModuleLists, else the whole.

    Blocks of one shape share one compilation; Sinkhorn's unrolled iterations make the plain code
    of a whole model dear to compile.
    """
    blocks = list(outer_blocks(model))
    for block in blocks or [model]:
        block.compile()
    return model


def outer_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Children of every ModuleList that lies in no other."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from outer_blocks(child)


def uncompile(model: nn.Module) -> None:
    """Undo `Module.compile` in a model and everything in it."""
    for module in model.modules():
        module._compiled_call_impl = None


def configurations(model: nn.Module) -> list[tuple[nn.Module, str, hc.HCConfig]]:
    """Every (module, attribute, HCConfig) in a model."""
    return [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, hc.HCConfig)
    ]


@contextmanager
def implementation(model: nn.Module, name: str) -> Iterator[None]:
    """Run every hyper-connection of a model by "ops" or "plain" inside."""
    found = configurations(model)
    for module, attribute, cfg in found:
        setattr(module, attribute, replace(cfg, implementation=name))
    try:
        yield
    finally:
        for module, attribute, cfg in found:
            setattr(module, attribute, cfg)
