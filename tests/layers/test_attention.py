"""flexible_attention against softmax written out: every backend, grouped heads, both masks."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from hc_compile.layers import attention, flexible_attention, set_attention_backend
from tests.conftest import outputs_and_gradients, worst


@pytest.fixture(autouse=True)
def _auto():
    yield
    set_attention_backend("auto")


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def written_out(q, k, v, mask=None, is_causal=True, scale=None):
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    rows, columns = scores.shape[-2:]
    if is_causal:
        hidden = torch.ones(rows, columns).triu(1 + columns - rows).bool()
        scores = scores.masked_fill(hidden, float("-inf"))
    if mask is not None:
        floating = mask.is_floating_point()
        scores = scores + mask if floating else scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


MASKS = {
    "none": None,
    "bool": (randn(2, 1, 5, 7, seed=4) > -0.5) | torch.eye(5, 7).bool(),
    "float": randn(4, 5, 7, seed=5),
}
HEADS = [(4, 4), (4, 2), (4, 1)]


@pytest.mark.parametrize("backend", ["auto", "sdpa", "flex"])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_matches_softmax(backend, is_causal, mask, heads):
    set_attention_backend(backend)
    q, k, v = (
        randn(2, heads[0], 5, 8),
        randn(2, heads[1], 7, 8, seed=1),
        randn(2, heads[1], 7, 8, seed=2),
    )
    bias = MASKS[mask]
    options = dict(is_causal=is_causal, scale=0.3)
    if backend == "flex":  # FlexAttention has no backward on a CPU
        low = bias.float() if bias is not None and bias.is_floating_point() else bias
        found = flexible_attention(q.float(), k.float(), v.float(), low, **options)
        assert worst(found, written_out(q, k, v, bias, **options)) < 1e-5
        return
    found = outputs_and_gradients(lambda *t: (flexible_attention(*t, bias, **options),), (q, k, v))
    truth = outputs_and_gradients(lambda *t: (written_out(*t, bias, **options),), (q, k, v))
    for values, expected in zip(found, truth, strict=True):
        assert all(worst(a, b) < 1e-12 for a, b in zip(values, expected, strict=True))


def test_last_query_stands_at_the_last_key():
    """One query over cached keys sees them all; torch's own is_causal would show it only one."""
    q, k, v = randn(1, 2, 1, 4), randn(1, 2, 6, 4, seed=1), randn(1, 2, 6, 4, seed=2)
    whole = flexible_attention(q, k, v, is_causal=False)
    assert torch.allclose(flexible_attention(q, k, v), whole)
    first_only = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert not torch.allclose(first_only, whole)


def test_dropout_is_what_it_is_told():
    q = k = v = randn(1, 2, 30, 4)
    assert torch.equal(flexible_attention(q, k, v), flexible_attention(q, k, v))
    torch.manual_seed(0)
    a, b = (flexible_attention(q, k, v, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(a, b)


class HalfOnGpu(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = property(lambda self: True)  # type: ignore[assignment]


def flash(q, k, v, *, dropout_p, softmax_scale, causal):
    """flash-attn's layout: [B, S, H, D], fewer key heads allowed."""
    assert q.shape[2] % k.shape[2] == 0 and dropout_p == 0
    out = written_out(*(t.transpose(1, 2) for t in (q, k, v)), None, causal, softmax_scale)
    return out.transpose(1, 2)


class BottomRight:
    """Stands for xformers' mask."""


def efficient(q, k, v, *, attn_bias, p, scale):
    """xformers' layout: [B, S, H, D], as many key heads as query heads."""
    assert q.shape[2] == k.shape[2] and p == 0
    is_causal = isinstance(attn_bias, BottomRight)
    return written_out(*(t.transpose(1, 2) for t in (q, k, v)), None, is_causal, scale).transpose(
        1, 2
    )


def install(monkeypatch, name):
    if name == "flash":
        module = ModuleType("flash_attn")
        module.flash_attn_func = flash
        monkeypatch.setitem(sys.modules, "flash_attn", module)
        monkeypatch.setattr(attention, "FLASH_ATTN_AVAILABLE", True)
    else:
        module = ModuleType("xformers.ops")
        module.memory_efficient_attention = efficient
        bias = SimpleNamespace(LowerTriangularFromBottomRightMask=BottomRight)
        module.fmha = SimpleNamespace(attn_bias=bias)
        monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
        monkeypatch.setitem(sys.modules, "xformers.ops", module)
        monkeypatch.setattr(attention, "XFORMERS_AVAILABLE", True)


@pytest.mark.parametrize("name", ["flash", "xformers"])
@pytest.mark.parametrize("chosen", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
def test_installed_packages_get_their_own_layout(monkeypatch, name, chosen, is_causal):
    """Stand-ins for the packages, which need a GPU, hold the call to their documented layout."""
    install(monkeypatch, name)
    if chosen:
        set_attention_backend(name)
    q, k, v = (
        randn(2, heads, rows, 8, seed=seed, dtype=torch.float16).as_subclass(HalfOnGpu)
        for heads, rows, seed in ((4, 5, 0), (2, 7, 1), (2, 7, 2))
    )
    out = flexible_attention(q, k, v, is_causal=is_causal)
    truth = written_out(q.double(), k.double(), v.double(), None, is_causal)
    assert worst(out.as_subclass(torch.Tensor), truth.as_subclass(torch.Tensor)) < 5e-3


@pytest.mark.parametrize("name", ["flash", "xformers"])
def test_auto_passes_over_what_cannot_serve_and_a_choice_does_not(monkeypatch, name):
    install(monkeypatch, name)
    q = randn(1, 2, 5, 8)
    expected = written_out(q, q, q)
    assert torch.allclose(flexible_attention(q, q, q), expected)  # float64 on a CPU: sdpa
    set_attention_backend(name)
    with pytest.raises(ValueError, match=f"for backend '{name}', got torch.float64 on cpu"):
        flexible_attention(q, q, q)
    half = q.half().as_subclass(HalfOnGpu)
    with pytest.raises(ValueError, match="and a mask"):
        flexible_attention(half, half, half, torch.ones(5, 5).bool())


@pytest.mark.parametrize("name", ["flash", "xformers"])
def test_choosing_what_is_not_installed_is_an_error(monkeypatch, name):
    flag = "FLASH_ATTN_AVAILABLE" if name == "flash" else "XFORMERS_AVAILABLE"
    monkeypatch.setattr(attention, flag, False)
    with pytest.raises(ImportError, match=f"backend '{name}' needs the package"):
        set_attention_backend(name)
    assert attention.get_attention_backend() == "auto"


def test_compiles_whole():
    q, k = randn(1, 4, 5, 8), randn(1, 2, 5, 8, seed=1)
    run = torch.compile(flexible_attention, fullgraph=True, backend="aot_eager")
    assert torch.allclose(run(q, k, k), written_out(q, k, k))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: set_attention_backend("naive"), r"backend must be one of .* got 'naive'"),
        (lambda: flexible_attention(*[torch.ones(2, 3)] * 3), r"must be \[B, H, S, D\]"),
        (
            lambda: flexible_attention(randn(1, 3, 2, 4), randn(1, 2, 2, 4), randn(1, 2, 2, 4)),
            "k's heads must divide q's 3, got 2",
        ),
        (
            lambda: flexible_attention(randn(1, 2, 2, 4), randn(1, 2, 2, 4), randn(1, 2, 3, 4)),
            r"got \[1, 2, 2, 4\] and \[1, 2, 3, 4\]",
        ),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_flex_refuses_dropout():
    set_attention_backend("flex")
    q = randn(1, 1, 2, 4)
    with pytest.raises(ValueError, match=r"dropout_p must be 0 for backend 'flex', got 0.1"):
        flexible_attention(q, q, q, dropout_p=0.1)
