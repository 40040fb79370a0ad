"""Errors at the public door: what was named, what it must be, what it was."""

from collections.abc import Sequence

import torch
from torch import Tensor


def require_float(name: str, value: object) -> None:
    """Raise unless `value` is a floating-point tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")


def require_shape(name: str, value: Tensor, legend: str, expected: Sequence[int]) -> None:
    """Raise unless `value` has the expected shape, e.g. `res must be [T, n, n] = [8, 4, 4], …`."""
    require_float(name, value)
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name} must be {legend} = {list(expected)}, got {list(value.shape)}")


def require_streams(x: Tensor, streams: int | None = None, dim: int | None = None) -> None:
    """Raise unless x is [..., n, C] with n, C >= 1 and, where given, this n and this C."""
    require_float("x", x)
    n = "n" if streams is None else str(streams)
    width = "C" if dim is None else str(dim)
    wrong = x.dim() < 2 or x.shape[-2] < 1 or x.shape[-1] < 1
    wrong = wrong or (streams is not None and x.shape[-2] != streams)
    wrong = wrong or (dim is not None and x.shape[-1] != dim)
    if wrong:
        raise ValueError(
            f"x must be [..., n, C] = [..., {n}, {width}] with n, C >= 1, got {list(x.shape)}"
        )


def require_device(like: Tensor, **tensors: Tensor | None) -> None:
    """Raise unless every tensor is on the device of `like`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != like.device:
            raise ValueError(f"{name} must be on {like.device} (as x), got {tensor.device}")


def require_square(name: str, value: Tensor) -> None:
    """Raise unless `value` is [..., n, n] with n >= 1."""
    require_float(name, value)
    if value.dim() < 2 or value.shape[-1] != value.shape[-2] or value.shape[-1] < 1:
        raise ValueError(f"{name} must be [..., n, n] with n >= 1, got {list(value.shape)}")


def transforming() -> bool:
    """Whether a torch.func transform or forward-mode AD is active (an op's jvp would be 0)."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )
