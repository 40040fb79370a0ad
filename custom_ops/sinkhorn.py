"""hc::sinkhorn: truncated Sinkhorn–Knopp on [..., n, n] logits (mHC eq. 9).

Moves: 2n² floats a matrix forward, 3n² backward; no iteration leaves the registers on a GPU.
On a CPU the iteration is an opaque loop op: unrolled, it costs Inductor 9–47 s a sublayer.
"""

import torch
from torch import Tensor

from custom_ops import reference
from custom_ops.registration import define, define_opaque, double_backward, flat, use_triton


def sides(iterations: int, start: str, first: str) -> list[int]:
    """The axis summed by each half step, in order."""
    pair = [-1, -2] if first == "row" else [-2, -1]
    steps = pair * iterations
    return steps[1:] if start == "softmax" else steps


def begin(logits: Tensor, start: str, eps: float) -> Tensor:
    """The matrix before the first half step."""
    if start == "log":
        return logits
    if start == "softmax":
        return torch.softmax(logits, -1) + eps
    if start == "abs":
        return logits.abs() + eps
    if start == "exp-rowmax":
        return (logits - logits.amax(-1, keepdim=True)).exp()
    if start == "exp-globalmax":
        return (logits - logits.amax((-2, -1), keepdim=True)).exp()
    return logits.exp()


def divisor_of(total: Tensor, denominator: str, eps: float) -> Tensor:
    """What a line is divided by; infinite where it underflowed to zeros, which then stay zeros.

    Exact: such entries come from exp, whose derivative there is zero too.
    """
    divisor = total + eps if denominator == "add" else total.clamp_min(eps)
    return torch.where(total == 0, torch.inf, divisor)


def begin_backward(grad: Tensor, logits: Tensor, start: str, eps: float) -> Tensor:
    """Derivative of `begin`; the maximum's share is split among ties."""
    if start == "log":
        return grad
    if start == "abs":
        return grad * logits.sign()
    if start == "softmax":
        soft = torch.softmax(logits, -1)
        return soft * (grad - (grad * soft).sum(-1, keepdim=True))
    weighted = grad * begin(logits, start, eps)
    if start == "exp":
        return weighted
    axes = (-1,) if start == "exp-rowmax" else (-2, -1)
    top = (logits == logits.amax(axes, keepdim=True)).to(weighted.dtype)
    share = weighted.sum(axes, keepdim=True) / top.sum(axes, keepdim=True)
    return weighted - top * share


def _loop(
    logits: Tensor, iterations: int, start: str, first: str, denominator: str, eps: float
) -> Tensor:
    logits = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    matrix = begin(logits, start, eps)
    for side in sides(iterations, start, first):
        if start == "log":
            matrix = matrix - torch.logsumexp(matrix, side, keepdim=True)
            continue
        matrix = matrix / divisor_of(matrix.sum(side, keepdim=True), denominator, eps)
    return (matrix.exp() if start == "log" else matrix.clone()).contiguous()


def _loop_backward(
    grad: Tensor,
    logits: Tensor,
    iterations: int,
    start: str,
    first: str,
    denominator: str,
    eps: float,
) -> Tensor:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logits, grad = logits.to(dtype), grad.to(dtype)
    matrix = begin(logits, start, eps)
    history = []
    for side in sides(iterations, start, first):
        if start == "log":
            matrix = matrix - torch.logsumexp(matrix, side, keepdim=True)
            history.append((side, matrix, None))
            continue
        total = matrix.sum(side, keepdim=True)
        divisor = divisor_of(total, denominator, eps)
        live = divisor if denominator == "add" else torch.where(total >= eps, divisor, torch.inf)
        matrix = matrix / divisor
        history.append((side, matrix, (divisor, live)))
    if start == "log":
        grad = grad * matrix.exp()
    for side, after, divisors in reversed(history):
        if divisors is None:
            grad = grad - after.exp() * grad.sum(side, keepdim=True)
        else:
            divisor, live = divisors
            grad = grad / divisor - (grad * after).sum(side, keepdim=True) / live
    return begin_backward(grad, logits, start, eps).contiguous()


def _loop_fake(logits, iterations, start, first, denominator, eps):
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return torch.empty(logits.shape, dtype=dtype, device=logits.device)


def _loop_backward_fake(grad, logits, iterations, start, first, denominator, eps):
    return _loop_fake(logits, iterations, start, first, denominator, eps)


sinkhorn_loop = define_opaque("sinkhorn_loop", _loop, _loop_fake)
sinkhorn_loop_backward = define_opaque(
    "sinkhorn_loop_backward", _loop_backward, _loop_backward_fake
)


def forward(
    logits: Tensor, iterations: int, start: str, first: str, denominator: str, eps: float
) -> Tensor:
    if use_triton(logits):
        from custom_ops.kernels import sinkhorn as kernels

        matrices = flat(logits, 2)
        out = kernels.sinkhorn(matrices, iterations, start, first, denominator, eps)
        return out.reshape(logits.shape)
    out = sinkhorn_loop(logits, iterations, start, first, denominator, eps)
    return out.to(logits.dtype)


def backward(
    grad: Tensor,
    logits: Tensor,
    iterations: int,
    start: str,
    first: str,
    denominator: str,
    eps: float,
) -> Tensor:
    if use_triton(logits):
        from custom_ops.kernels import sinkhorn as kernels

        out = kernels.sinkhorn_backward(
            flat(grad, 2), flat(logits, 2), iterations, start, first, denominator, eps
        )
        return out.reshape(logits.shape)
    out = sinkhorn_loop_backward(grad, logits, iterations, start, first, denominator, eps)
    return out.to(logits.dtype)


def _fake(logits, iterations, start, first, denominator, eps):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _backward_fake(grad, logits, iterations, start, first, denominator, eps):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


sinkhorn = define("sinkhorn", forward, _fake)
sinkhorn_backward = define("sinkhorn_backward", backward, _backward_fake)


def _setup_context(ctx, inputs, output):
    logits, *ctx.options = inputs
    ctx.save_for_backward(logits)


def _autograd(ctx, grad):
    (logits,) = ctx.saved_tensors
    return torch.ops.hc.sinkhorn_backward(grad, logits, *ctx.options), *(None,) * 5


sinkhorn.register_autograd(_autograd, setup_context=_setup_context)
double_backward(sinkhorn_backward, 1, 1, lambda prims, rest: [reference.sinkhorn(prims[0], *rest)])
