"""What the constrain kernels do to one part (pre, post or res) of every token.

A part is a tile [A, B, tokens]; the compile-time tuples PART, NORM, RES and RULE are
those of constrain.py.
"""

import triton
import triton.language as tl

from custom_ops.kernels.newton_schulz import hc_newton_schulz_backward, hc_newton_schulz_forward
from custom_ops.kernels.sinkhorn import (
    hc_line,
    hc_max,
    hc_sinkhorn_backward,
    hc_sinkhorn_forward,
    hc_sum,
)
from custom_ops.kernels.tile import hc_exp, hc_offsets, hc_valid

# What Newton–Schulz adds to the norm it divides by, inside `constrain`.
POLAR_EPS = tl.constexpr(1e-7)


@triton.jit
def hc_total(ptr, places, valid, stride, SPLITS: tl.constexpr):
    """Sum over the split-K partials, in their order."""
    total = tl.load(ptr + places, mask=valid, other=0.0).to(tl.float32)
    for i in tl.static_range(1, SPLITS):
        total += tl.load(ptr + places + i * stride, mask=valid, other=0.0).to(tl.float32)
    return total


@triton.jit
def hc_scale(
    ss_ptr,
    tokens,
    T,
    n: tl.constexpr,
    SPLITS: tl.constexpr,
    PART: tl.constexpr,
    NORM: tl.constexpr,
):
    """r and ∂r/∂Σx², one a token, or one a stream along the part's stream axis."""
    A: tl.constexpr = PART[2] if PART[8] == 0 else 1
    B: tl.constexpr = PART[3] if PART[8] == 1 else 1
    a: tl.constexpr = n if PART[8] == 0 else 1
    b: tl.constexpr = n if PART[8] == 1 else 1
    places = hc_offsets(tokens, a * b, 1 if a > 1 else 0, 1, A, B, tokens.shape[0])
    valid = hc_valid(tokens, T, a, b, A, B)
    ss = hc_total(ss_ptr, places, valid, tl.full((), a * b, tl.int64) * T, SPLITS)
    ss = tl.where(valid, ss, 1.0)
    mean = ss / NORM[2]
    if NORM[0] == "inside":
        scale = 1.0 / tl.sqrt(mean + NORM[1])
        slope = scale * scale * scale * (-0.5 / NORM[2])
    else:
        root = tl.sqrt(mean)
        scale = 1.0 / (root + NORM[1])
        slope = tl.where(root > 0, scale * scale / root * (-0.5 / NORM[2]), 0.0)
    return scale, slope


@triton.jit
def hc_tanh(x):
    """tanh, accurate near 0 too."""
    square = x * x
    series = 1 + square * (
        -1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))
    )
    decay = hc_exp(-2 * tl.abs(x))
    large = (1 - decay) / (1 + decay)
    return tl.where(tl.abs(x) < 0.25, x * series, tl.where(x < 0, -large, large))


@triton.jit
def hc_logits(
    inputs,
    sums_ptr,
    tokens,
    T,
    GAIN: tl.constexpr,
    n: tl.constexpr,
    M: tl.constexpr,
    SPLITS: tl.constexpr,
    PART: tl.constexpr,
    NORM: tl.constexpr,
):
    """z, squash(r·p) and the summed p of a part; writes the sum of split-K partials."""
    p_ptr, ss_ptr, alpha_ptr, bias_ptr = inputs
    places = hc_offsets(tokens, M, PART[5], PART[6], PART[2], PART[3], tokens.shape[0])
    places += PART[4]
    valid = hc_valid(tokens, T, PART[0], PART[1], PART[2], PART[3])
    p = hc_total(p_ptr, places, valid, tl.full((), M, tl.int64) * T, SPLITS)
    if SPLITS > 1:
        tl.store(sums_ptr + places, p, mask=valid)
    scale, _slope = hc_scale(ss_ptr, tokens, T, n, SPLITS, PART, NORM)
    hidden = p * scale
    if NORM[3] == "tanh":
        hidden = hc_tanh(hidden)
    # One bias a token: a load of another layout would decide the layout of everything after it.
    again = hc_offsets(tokens, 0, PART[1], 1, PART[2], PART[3], tokens.shape[0]) + PART[7]
    bias = tl.load(bias_ptr + again, mask=valid, other=0.0)
    alpha = tl.load(alpha_ptr + GAIN).to(tl.float32)
    return alpha * hidden + bias.to(tl.float32), hidden, p


@triton.jit
def hc_logits_backward(
    dz,
    hidden,
    p,
    inputs,
    dp_ptr,
    partial_ptr,
    tokens,
    T,
    GAIN: tl.constexpr,
    n: tl.constexpr,
    M: tl.constexpr,
    PART: tl.constexpr,
    NORM: tl.constexpr,
):
    """Write dp and this program's dbias and dalpha; returns the part's dss, unreduced."""
    _p_ptr, ss_ptr, alpha_ptr, _bias_ptr = inputs
    valid = hc_valid(tokens, T, PART[0], PART[1], PART[2], PART[3])
    dz = tl.where(valid, dz, 0.0)
    slot_ptr = partial_ptr + tl.program_id(0).to(tl.int64) * (M + 3)
    row = tl.arange(0, PART[2])[:, None]
    column = tl.arange(0, PART[3])[None, :]
    inside = (row < PART[0]) & (column < PART[1])
    tl.store(slot_ptr + PART[7] + row * PART[1] + column, tl.sum(dz, 2), mask=inside)
    gain = tl.sum(tl.sum(tl.sum(dz * hidden, 1), 0), 0)
    tl.store(slot_ptr + M + GAIN, gain)
    dhidden = tl.load(alpha_ptr + GAIN).to(tl.float32) * dz
    if NORM[3] == "tanh":
        dhidden = dhidden * (1 - hidden * hidden)
    scale, slope = hc_scale(ss_ptr, tokens, T, n, 1, PART, NORM)
    places = hc_offsets(tokens, M, PART[5], PART[6], PART[2], PART[3], tokens.shape[0])
    tl.store(dp_ptr + places + PART[4], dhidden * scale, mask=valid)
    if PART[8] == 0:  # one row a stream: [A, 1, tokens] -> [1, A, tokens]
        return tl.trans(hc_sum(dhidden * p, 1) * slope, (1, 0, 2))
    elif PART[8] == 1:
        return hc_sum(dhidden * p, 0) * slope
    else:
        return hc_sum(hc_sum(dhidden * p, 1), 0) * slope


@triton.jit
def hc_softmax(z, n: tl.constexpr):
    """softmax over the streams (axis 1)."""
    B: tl.constexpr = z.shape[1]
    if n != B:
        z = tl.where(hc_line(n, B, 0), z, float("-inf"))
    weights = hc_exp(z - hc_max(z, 1))
    if n != B:
        weights = tl.where(hc_line(n, B, 0), weights, 0.0)
    return weights / hc_sum(weights, 1)


@triton.jit
def hc_gate(z, n: tl.constexpr):
    """sigmoid of the real streams and its derivative, 0 elsewhere."""
    B: tl.constexpr = z.shape[1]
    decay = hc_exp(-tl.abs(z))
    gate = tl.where(z < 0, decay, 1.0) / (1 + decay)
    if n != B:
        gate = tl.where(hc_line(n, B, 0), gate, 0.0)
    return gate, decay / ((1 + decay) * (1 + decay))


@triton.jit
def hc_activate(z, n: tl.constexpr, PART: tl.constexpr):
    if PART[9] == "linear":
        return z
    elif PART[9] == "softmax":
        return PART[10] * hc_softmax(z, n) + PART[11]
    else:
        gate, _slope = hc_gate(z, n)
        if PART[9] == "sigmoid-sum":
            return PART[10] * gate / (hc_sum(gate, 1) + PART[11])
        else:
            return PART[10] * gate + PART[11]


@triton.jit
def hc_activate_backward(grad, z, n: tl.constexpr, PART: tl.constexpr):
    """Gradient of z (padding of grad: 0)."""
    if PART[9] == "linear":
        return grad
    elif PART[9] == "softmax":
        weights = hc_softmax(z, n)
        return PART[10] * weights * (grad - hc_sum(grad * weights, 1))
    else:
        gate, slope = hc_gate(z, n)
        if PART[9] == "sigmoid-sum":
            total = hc_sum(gate, 1) + PART[11]
            grad = (grad - hc_sum(grad * gate, 1) / total) / total
        return PART[10] * grad * slope


@triton.jit
def hc_mix(z, n: tl.constexpr, RES: tl.constexpr, RULE: tl.constexpr):
    """res tile [N, N, tokens] from its logits."""
    if RES[9] == "sinkhorn":
        return hc_sinkhorn_forward(z, n, RULE)
    elif RES[9] == "newton-schulz":
        polar = hc_newton_schulz_forward(z, POLAR_EPS, RULE)
        return polar * polar
    else:
        return z


@triton.jit
def hc_mix_backward(
    grad, z, n: tl.constexpr, CHUNK: tl.constexpr, RES: tl.constexpr, RULE: tl.constexpr
):
    """Gradient of the logits from that of res (padding of grad: 0)."""
    if RES[9] == "sinkhorn":
        return hc_sinkhorn_backward(grad, z, n, CHUNK, RULE)
    elif RES[9] == "newton-schulz":
        return hc_newton_schulz_backward(grad, z, True, POLAR_EPS, RULE)
    else:
        return grad
