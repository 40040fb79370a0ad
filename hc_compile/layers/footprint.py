"""What a training step will hold: the step itself, run on tensors without memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MEGABYTE = 1e6


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators made and that are still alive; their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        weakref.finalize(storage, self._forget, key, size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def own(self, tensors: list[Tensor]) -> None:
        """Leave these out of the count: they were there before."""
        self._known |= {t.untyped_storage()._cdata for t in tensors}


def _next_token_loss(out: Tensor) -> Tensor:
    targets = torch.zeros(out.shape[:-1], dtype=torch.int64, device=out.device)
    wide = torch.promote_types(out.dtype, torch.float32)
    return F.cross_entropy(out.to(wide).flatten(0, -2), targets.flatten())


def compute_memory_footprint(
    model: nn.Module,
    batch_size: int = 1,
    seq_len: int = 512,
    *,
    inputs: tuple[Tensor, ...] | None = None,
    loss: Callable[[Any], Tensor] = _next_token_loss,
    optimizer_states: int = 2,
) -> dict[str, float]:
    """Megabytes (10⁶ bytes) that one eager training step of `model` needs at its peak.

    The forward, the loss and the backward run on fake tensors, which have sizes but no memory, as
    the model stands (mode, dtypes, checkpointing) and on its device, so that attention takes the
    kernel it would take there; every storage is counted while it lives. Buffers inside a kernel
    and the allocator's rounding are not seen.

    Args:
        model: on any device; "meta" is counted as a CPU.
        batch_size, seq_len: of the tokens [B, S] that the model is called with.
        inputs: instead of tokens: tensors to call the model with.
        loss: of the model's output; default cross-entropy over the last dimension, in fp32.
        optimizer_states: tensors of a parameter's size that the optimiser keeps; AdamW has 2.
    Returns: parameters_mb, buffers_mb, total_static_mb, gradients_mb, optimizer_mb,
        estimated_activation_mb (all else at the peak) and estimated_training_mb, the sum of
        parameters, buffers, gradients, optimiser and activations.
    Raises: ValueError when a size is not positive.
    """
    for name, value in (("batch_size", batch_size), ("seq_len", seq_len)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    parameters = sum(_size(p) for p in model.parameters())
    trained = sum(_size(p) for p in model.parameters() if p.requires_grad)
    buffers = sum(_size(b) for b in model.buffers())
    peak = _peak(model, (batch_size, seq_len), inputs, loss)
    found = {
        "parameters_mb": parameters,
        "buffers_mb": buffers,
        "total_static_mb": parameters + buffers,
        "gradients_mb": trained,
        "optimizer_mb": optimizer_states * trained,
        "estimated_activation_mb": peak - trained,
        "estimated_training_mb": parameters + buffers + optimizer_states * trained + peak,
    }
    return {name: value / MEGABYTE for name, value in found.items()}


class _Step(nn.Module):
    """The backward belongs inside, where checkpointing meets the fake parameters again.

    `out` lives until the end, as it does in most training loops.
    """

    def __init__(self, model: nn.Module, loss: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *inputs: Tensor) -> None:
        out = self.model(*inputs)
        self.loss(out).backward()


def _fake(tensor: Tensor) -> Tensor:
    """Its like without memory, to be called in a FakeTensorMode; "meta" stands for a CPU."""
    return torch.empty_strided(
        tensor.size(),
        tensor.stride(),
        dtype=tensor.dtype,
        device="cpu" if tensor.is_meta else tensor.device,
        requires_grad=tensor.requires_grad,
    )


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _peak(
    model: nn.Module,
    size: tuple[int, int],
    inputs: tuple[Tensor, ...] | None,
    loss: Callable[[Any], Tensor],
) -> int:
    """Peak of the bytes that the step adds; gradients are among them."""
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = {f"model.{name}": _fake(tensor) for name, tensor in state.items()}
        if inputs is None:
            device = next((t.device for t in fakes.values()), None)
            inputs = (torch.zeros(size, dtype=torch.int64, device=device),)
        given = tuple(_fake(tensor) for tensor in inputs)
        count = LiveBytes()
        count.own([*fakes.values(), *given])
        with count:
            torch.func.functional_call(_Step(model, loss), fakes, given)
    return count.peak
