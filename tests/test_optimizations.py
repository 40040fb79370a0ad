"""The layers' functions against float64 formulas, eager and compiled; one cache; checkpointing."""

from functools import partial

import pytest
import torch
from torch import nn

from hc_compile.layers import (
    GradientCheckpointMixin,
    RMSNorm,
    RotaryEmbedding,
    SwiGLUMLP,
    fused_qk_norm,
    fused_rms_norm,
    fused_rope,
    fused_swiglu,
    get_activation,
    rope_tables,
)
from tests.conftest import outputs_and_gradients, worst

S, D = 9, 8
COS, SIN = rope_tables(S, D, dtype=torch.float64)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def turn(x, interleaved):
    """Rotary positions as a complex product, float64."""
    pairs = x.unflatten(-1, (-1, 2)) if interleaved else torch.stack(x.chunk(2, -1), -1)
    turned = torch.view_as_real(torch.complex(*pairs.unbind(-1)) * torch.complex(COS, SIN))
    return turned.flatten(-2) if interleaved else torch.cat(turned.unbind(-1), -1)


def rope(interleaved):
    def run(x):
        tables = (COS, SIN) if x.dtype == torch.float64 else (COS.float(), SIN.float())
        return (fused_rope(x, *tables, interleaved),)

    return run


def qk_rope(q, k, temperature):
    tables = (COS, SIN) if q.dtype == torch.float64 else (COS.float(), SIN.float())
    q, k = fused_qk_norm(q, k, D**0.5, temperature)
    return fused_rope(q, *tables), fused_rope(k, *tables)


def unit(x):
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


HEADS = [randn(2, 4, S, D), randn(2, 2, S, D, seed=1)]
# name: function, float64 formula, inputs
CASES = {
    "rms_norm": (
        lambda x, w: (fused_rms_norm(x, w, 1e-5),),
        lambda x, w: (x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w,),
        [randn(3, 5, 33), randn(33, seed=1)],
    ),
    "rms_norm without weight": (
        lambda x: (fused_rms_norm(x, None),),
        lambda x: (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt(),),
        [randn(7, 64)],
    ),
    "rope": (rope(False), lambda x: (turn(x, False),), HEADS[:1]),
    "rope, interleaved": (rope(True), lambda x: (turn(x, True),), HEADS[:1]),
    "qk_norm": (
        lambda q, k, t: fused_qk_norm(q, k, D**0.5, t),
        lambda q, k, t: (unit(q) * D**0.5, unit(k) * D**0.5 * t),
        [*HEADS, torch.tensor([0.7], dtype=torch.float64)],
    ),
    "qk_norm and rope": (
        qk_rope,
        lambda q, k, t: (turn(unit(q) * D**0.5, True), turn(unit(k) * D**0.5 * t, True)),
        [*HEADS, torch.tensor([0.7], dtype=torch.float64)],
    ),
    "swiglu": (
        lambda gate, up: (fused_swiglu(gate, up),),
        lambda gate, up: (gate / (1 + torch.exp(-gate)) * up,),
        [3 * randn(4, 17), randn(4, 17, seed=1)],
    ),
}
# Rounding of inputs, result and a few steps between, in units of the dtype's resolution.
UNITS = {torch.float64: 50, torch.float32: 50, torch.bfloat16: 8, torch.float16: 8}


@pytest.mark.parametrize("dtype", UNITS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_the_formulas(name, dtype):
    function, formula, inputs = CASES[name]
    rounded = [t.to(dtype) for t in inputs]
    truth = outputs_and_gradients(formula, [t.double() for t in rounded])
    found = outputs_and_gradients(function, rounded)
    for values, expected in zip(found, truth, strict=True):
        for value, true in zip(values, expected, strict=True):
            assert value.dtype == dtype and value.shape == true.shape
            assert worst(value, true) <= UNITS[dtype] * torch.finfo(dtype).eps


def errors(function, name, dtype):
    """Worst error of every output and gradient."""
    rounded = [t.to(dtype) for t in CASES[name][2]]
    truth = outputs_and_gradients(CASES[name][1], [t.double() for t in rounded])
    found = outputs_and_gradients(function, rounded)
    return [
        worst(value, true)
        for values, expected in zip(found, truth, strict=True)
        for value, true in zip(values, expected, strict=True)
    ]


@pytest.mark.parametrize("name", CASES)
def test_traces_whole(name):
    compiled = torch.compile(CASES[name][0], fullgraph=True, backend="aot_eager")
    traced = errors(compiled, name, torch.float32)
    plain = errors(CASES[name][0], name, torch.float32)
    assert all(a <= 2 * b + 1e-6 for a, b in zip(traced, plain, strict=True))


@pytest.mark.compile
@pytest.mark.parametrize("name", ["rms_norm", "qk_norm and rope", "swiglu"])
def test_compiled_code_is_as_exact_as_eager(name):
    function = CASES[name][0]
    compiled = torch.compile(function, fullgraph=True)
    for dtype in (torch.bfloat16, torch.float32):
        eps = torch.finfo(dtype).eps
        pairs = zip(errors(compiled, name, dtype), errors(function, name, dtype), strict=True)
        for fused, plain in pairs:
            assert fused <= 2 * plain + eps


def test_bf16_norms_accumulate_wider():
    """A sum of squares in bf16 would be off by whole per cents at this width."""
    x = randn(4, 4096, dtype=torch.bfloat16)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert worst(fused_rms_norm(x, torch.ones(4096)), exact) < 2**-8
    assert worst(fused_qk_norm(x, x)[0], unit(x.double())) < 2**-8


def test_a_head_of_zeros_stays_zero_with_finite_gradient():
    q = torch.zeros(2, 4, requires_grad=True)
    out, _ = fused_qk_norm(q, q)
    out.backward(torch.ones(2, 4))
    assert torch.equal(out, torch.zeros(2, 4)) and q.grad.isfinite().all()


def test_gradients_are_not_clamped():
    """A backward that clamps at ±100 is wrong without saying so."""
    x = (1e-4 * randn(3, 16)).requires_grad_()
    (grad,) = torch.autograd.grad(fused_rms_norm(x, None, 1e-12), x, 1e3 * randn(3, 16, seed=1))
    assert grad.abs().max() > 1e4


def test_modules_are_their_functions():
    x = randn(2, 5, 12, dtype=torch.float32)
    norm, bare = RMSNorm(12, eps=1e-5), RMSNorm(12, elementwise_affine=False)
    nn.init.normal_(norm.weight)
    assert torch.equal(norm(x), fused_rms_norm(x, norm.weight, 1e-5))
    assert torch.equal(bare(x), fused_rms_norm(x, None)) and not list(bare.parameters())
    mlp = SwiGLUMLP(12, 20, dropout=0.5, bias=True).eval()
    gate, up = mlp.gate_up(x).chunk(2, -1)
    assert torch.equal(mlp(x), mlp.down(fused_swiglu(gate, up)))
    assert (mlp.train()(x) == 0).float().mean() > 0.3
    assert isinstance(get_activation("swish"), nn.SiLU)
    assert get_activation("gelu") is not get_activation("gelu")


# one cache for all layers


class Layered(nn.Module):
    """24 attention layers that are given a rotary embedding, or make their own."""

    def __init__(self, shared):
        super().__init__()
        rope = RotaryEmbedding(64, 8192) if shared else None
        self.ropes = nn.ModuleList(rope or RotaryEmbedding(64, 8192) for _ in range(24))


def test_one_rotary_cache_serves_24_layers():
    def size(model):
        return sum(b.numel() * b.element_size() for b in model.buffers())

    own, shared = Layered(False), Layered(True)
    assert size(shared) == 2 * 8192 * 32 * 4  # cos and sin, fp32
    assert size(own) == 24 * size(shared)
    shared.to(torch.float64)
    assert len({id(rope.cos) for rope in shared.ropes}) == 1


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_embedding_continues_from_a_position(interleaved):
    rope = RotaryEmbedding(D, S, interleaved=interleaved)
    x = randn(2, 3, S, D, dtype=torch.float32)
    assert torch.equal(rope(x, S)[:, :, 4:], rope(x[:, :, 4:], start=4))
    assert worst(rope(x), turn(x.double(), interleaved)) < 1e-6
    assert not rope.state_dict()


def test_rotary_tables_stay_wide_in_a_bfloat16_model():
    rope = RotaryEmbedding(64, 4096)
    model = nn.ModuleList([rope]).to(torch.bfloat16)
    assert rope.cos.dtype == torch.float32
    x = randn(1, 1, 4096, 64, dtype=torch.bfloat16)
    cos, sin = rope_tables(4096, 64, dtype=torch.float64)
    exact = fused_rope(x.double(), cos, sin)
    assert worst(model[0](x), exact) < 2**-8
    half = RotaryEmbedding(64, 16, scaling_factor=2.0)
    assert torch.equal(half.cos[2:16:2], rope.cos[1:8])


# gradient checkpointing


class MyModel(nn.Module, GradientCheckpointMixin):
    """As people write it."""

    def __init__(self):
        super().__init__()
        self._gradient_checkpointing = False
        self.layers = nn.ModuleList([SwiGLUMLP(16, 64) for _ in range(6)])

    def forward(self, x):
        if self._gradient_checkpointing and self.training:
            from torch.utils.checkpoint import checkpoint

            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False)
        else:
            for layer in self.layers:
                x = layer(x)
        return x


def _keep(kept, tensor):
    kept.append(tensor)
    return tensor


def test_checkpointing_saves_less_and_changes_nothing():
    torch.manual_seed(0)
    outer = nn.Module()
    model = outer.inner = MyModel()
    x, grads, saved = randn(32, 16, dtype=torch.float32), [], []
    for switch in (model.disable_gradient_checkpointing, model.enable_gradient_checkpointing):
        switch()
        kept = []
        keep = partial(_keep, kept)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = model(x)
        saved.append(sum(t.numel() for t in kept))
        model.zero_grad()
        out.backward(randn(32, 16, seed=1, dtype=torch.float32))
        grads.append([p.grad.clone() for p in model.parameters()])
    assert model.is_gradient_checkpointing
    assert saved[1] < 0.6 * saved[0]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_switch_reaches_submodules():
    class Outer(nn.Module, GradientCheckpointMixin):
        def __init__(self):
            super().__init__()
            self.inner = MyModel()

    outer = Outer()
    assert not outer.is_gradient_checkpointing
    outer.enable_gradient_checkpointing()
    assert outer.inner.is_gradient_checkpointing
    outer.disable_gradient_checkpointing()
    assert not outer.inner.is_gradient_checkpointing


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: get_activation("mish"), r"name must be one of .* got 'mish'"),
        (lambda: SwiGLUMLP(4, 0), "hidden_dim must be at least 1, got 0"),
        (lambda: RotaryEmbedding(3), "head_dim must be even and positive, got 3"),
        (lambda: rope_tables(2, 4, scaling_factor=0.0), "scaling_factor must be positive"),
        (
            lambda: RotaryEmbedding(4, 8)(torch.ones(1, 1, 9, 4)),
            r"within max_seq_len = 8, got 0 \+ 9",
        ),
        (lambda: RotaryEmbedding(4, 8)(torch.ones(1, 1, 5, 4), 4), "seq_len must be S = 5, got 4"),
        (lambda: fused_swiglu(torch.ones(2), torch.ones(3)), r"gate's shape \[2\], got \[3\]"),
        (
            lambda: fused_rope(torch.ones(1, 1, 3, 4), torch.ones(2, 3, 2), torch.ones(3, 2)),
            r"cos and sin must be \[S, D/2\] or",
        ),
        (lambda: fused_qk_norm(torch.ones(2, 4), torch.ones(2, 3)), r"k must be \[..., 4\]"),
    ],
)
def test_errors_name_what_was_expected(call, text):
    with pytest.raises(ValueError, match=text):
        call()
