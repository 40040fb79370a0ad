"""hc::project: p = φx and ss = Σx², not normalised, so that shards of C are partial sums.

Moves: n C-units forward; 2n + n backward (mHC eq. 5; the RMS scale is applied in constrain).
"""

import torch
from torch import Tensor

from custom_ops import reference
from custom_ops.registration import (
    compute_dtype,
    define,
    double_backward,
    matmul,
    use_triton,
)


def rows_of(x: Tensor, per_stream: bool, dtype: torch.dtype) -> Tensor:
    """Streams as the rows that φ multiplies: [..., n·C], or [..., n, C] per stream."""
    return x.to(dtype) if per_stream else x.to(dtype).flatten(-2)


def forward(
    x: Tensor, phi: Tensor, per_stream: bool, precision: str = "bf16x2"
) -> tuple[Tensor, Tensor]:
    if use_triton(x):
        from custom_ops.kernels import project as kernels

        rows = x.contiguous()
        rows = rows.unsqueeze(-2) if per_stream else rows
        return kernels.project(rows, phi.float().contiguous(), precision)
    dtype = compute_dtype(x, phi)
    rows = rows_of(x, per_stream, dtype)
    return matmul(rows, phi.to(dtype).mT), rows.square().sum(-1)


def backward(
    dp: Tensor, dss: Tensor, x: Tensor, phi: Tensor, per_stream: bool
) -> tuple[Tensor, Tensor]:
    if use_triton(x):
        from custom_ops.kernels import pre_backward as kernels

        rows = x.contiguous()
        rows = rows.unsqueeze(-2) if per_stream else rows
        dx, dphi = kernels.project_backward(
            dp.contiguous(), dss.contiguous(), rows, phi.float().contiguous()
        )
        return dx.squeeze(-2) if per_stream else dx, dphi.to(phi.dtype)
    dx, dphi = gradients(dp, dss, x, phi, per_stream)
    return dx.to(x.dtype), dphi.to(phi.dtype)


def gradients(
    dp: Tensor, dss: Tensor, x: Tensor, phi: Tensor, per_stream: bool
) -> tuple[Tensor, Tensor]:
    """∂x and ∂φ in the compute dtype, not rounded."""
    dtype = compute_dtype(x, phi)
    rows = rows_of(x, per_stream, dtype)
    dx = matmul(dp.to(dtype), phi.to(dtype)) + 2 * dss.to(dtype).unsqueeze(-1) * rows
    dphi = matmul(dp.to(dtype).flatten(0, -2).mT, rows.flatten(0, -2))
    return dx.reshape(x.shape), dphi


def _fake(x, phi, per_stream, precision="bf16x2"):
    dtype = compute_dtype(x, phi)
    lead = x.shape[:-1] if per_stream else x.shape[:-2]
    return (
        torch.empty((*lead, phi.shape[0]), dtype=dtype, device=x.device),
        torch.empty(lead, dtype=dtype, device=x.device),
    )


def _backward_fake(dp, dss, x, phi, per_stream):
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        torch.empty(phi.shape, dtype=phi.dtype, device=x.device),
    )


project = define("project", forward, _fake)
project_backward = define("project_backward", backward, _backward_fake)


def _setup_context(ctx, inputs, output):
    x, phi, ctx.per_stream, _ = inputs
    ctx.save_for_backward(x, phi)


def _autograd(ctx, dp, dss):
    x, phi = ctx.saved_tensors
    dx, dphi = torch.ops.hc.project_backward(dp, dss, x, phi, ctx.per_stream)
    return dx, dphi, None, None


project.register_autograd(_autograd, setup_context=_setup_context)
double_backward(project_backward, 2, 2, lambda prims, rest: list(reference.project(*prims, *rest)))
