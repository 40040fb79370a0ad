"""Every op on a CUDA device: against float64, repeatable, batch-independent, capturable."""

import importlib
import pathlib

import pytest
import torch
import triton

import hc_compile as hc
from custom_ops.catalog import CATALOG, ROWS, make_inputs
from hc_compile.backend import hc_inductor
from tests.conftest import cotangents, outputs_and_gradients, worst
from tests.test_presets import PRESETS, Net, draw

pytestmark = pytest.mark.gpu

CASES = [(row.name, variant) for row in ROWS for variant in row.variants]
STREAM_CASES = [c for c in CASES if CATALOG[c[0]].streams]
FULL_PRECISION = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def _inputs(name, variant, tokens, n, width, dtype):
    n = CATALOG[name].takes(variant, n)
    return make_inputs(CATALOG[name], variant, tokens, n, width, dtype, "cuda")


def _check(name, variant, tokens, n, width, dtype):
    row = CATALOG[name]
    inputs = _inputs(name, variant, tokens, n, width, dtype)
    wide = [t.double() for t in inputs]
    cots = cotangents(row.call(variant, *inputs))
    truth = outputs_and_gradients(lambda *t: row.reference(variant, *t), wide, cots)
    ours = outputs_and_gradients(lambda *t: row.call(variant, *t), inputs, cots)
    eager = outputs_and_gradients(lambda *t: row.reference(variant, *t), inputs, cots)
    rounding = FULL_PRECISION[dtype] * (10 if "newton" in name + variant else 1)
    for a, e, b in zip(ours[0] + ours[1], eager[0] + eager[1], truth[0] + truth[1], strict=True):
        assert a.shape == b.shape
        assert worst(a, b) <= 2 * worst(e, b) + rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_against_float64(name, variant, dtype):
    _check(name, variant, 65, 4, 320, dtype)


@pytest.mark.parametrize("width", [1, 7, 33, 64, 129, 1280, 2560, 4096, 5129, 7168])
@pytest.mark.parametrize("name", ["pre", "post", "aggregate", "post_pre"])
def test_every_width(name, width):
    variant = next(iter(CATALOG[name].variants))
    _check(name, variant, 33, 4, width, torch.bfloat16)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 7, 8, 16])
@pytest.mark.parametrize("name", ["pre", "post", "sinkhorn", "newton_schulz"])
def test_every_stream_count(name, n):
    variant = next(iter(CATALOG[name].variants))
    if name == "newton_schulz" or name == "sinkhorn":
        _check(name, variant, 70, n, 0, torch.float32)
        return
    for tokens in (1, 70):
        _check(name, variant, tokens, n, 264, torch.bfloat16)


@pytest.mark.parametrize("name", list(CATALOG))
def test_no_tokens(name):
    row = CATALOG[name]
    variant = next(iter(row.variants))
    inputs = _inputs(name, variant, 0, 4, 64, torch.float32)
    _, grads = outputs_and_gradients(lambda *t: row.call(variant, *t), inputs)
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize(("name", "variant"), STREAM_CASES)
def test_bitwise_from_run_to_run(name, variant):
    row = CATALOG[name]
    inputs = _inputs(name, variant, 300, 4, 1280, torch.bfloat16)
    cots = cotangents(row.call(variant, *inputs))
    first = outputs_and_gradients(lambda *t: row.call(variant, *t), inputs, cots)
    for _ in range(20):
        poison = torch.full((64 << 20,), float("nan"), device="cuda")
        del poison  # fresh outputs come from poisoned memory
        again = outputs_and_gradients(lambda *t: row.call(variant, *t), inputs, cots)
        for a, b in zip(first[0] + first[1], again[0] + again[1], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["pre", "post", "post_pre"])
def test_two_hundred_runs(name):
    variant = next(iter(CATALOG[name].variants))
    row = CATALOG[name]
    inputs = _inputs(name, variant, 2049, 4, 2560, torch.bfloat16)
    cots = cotangents(row.call(variant, *inputs))
    first = outputs_and_gradients(lambda *t: row.call(variant, *t), inputs, cots)
    for _ in range(200):
        again = outputs_and_gradients(lambda *t: row.call(variant, *t), inputs, cots)
        assert all(
            torch.equal(a, b)
            for a, b in zip(first[0] + first[1], again[0] + again[1], strict=True)
        )


@pytest.mark.parametrize("name", ["project", "constrain", "aggregate", "post", "pre", "post_pre"])
def test_a_token_does_not_depend_on_the_batch(name):
    row = CATALOG[name]
    variant = next(iter(row.variants))
    inputs = _inputs(name, variant, 257, 4, 1280, torch.bfloat16)
    whole = row.call(variant, *inputs)
    tokens = inputs[0].shape[0]
    for start, stop in ((0, 1), (100, 133), (256, 257)):
        part = [t[start:stop] if t.shape[0] == tokens else t for t in inputs]
        for a, b in zip(row.call(variant, *part), whole, strict=True):
            assert torch.equal(a, b[start:stop])


def test_dphi_over_many_tokens_keeps_float32_accuracy():
    generator = torch.Generator(device="cuda").manual_seed(0)
    x = torch.randn(65536, 4, 64, generator=generator, device="cuda").bfloat16()
    phi = torch.randn(24, 256, generator=generator, device="cuda").requires_grad_()
    dp = torch.randn(65536, 24, generator=generator, device="cuda") + 0.5
    p, _ = torch.ops.hc.project(x + 0.5, phi, False)
    (grad,) = torch.autograd.grad(p, phi, dp)
    flat = (x + 0.5).flatten(1)
    exact = dp.double().T @ flat.double()
    eager = dp.T @ flat.float()
    ours, theirs = ((g.double() - exact).norm() / exact.norm() for g in (grad, eager))
    assert ours <= 2 * theirs + 1e-6


@pytest.mark.parametrize("name", ["residual", *PRESETS])
def test_inductor_fused_training_step(name):
    """eager ≡ fused on the device; where two presets stand for all, with CUDA graphs too."""
    cfg = hc.HCConfig(64, 1 if name == "residual" else 4, name)
    net = Net(cfg, layers=2).cuda()
    h = draw(48, 64).cuda()
    cot = draw(48, 64, seed=1).cuda()

    def step(function):
        net.zero_grad()
        out = function(h)
        out.backward(cot)
        return [out.detach().clone(), *(p.grad.clone() for p in net.parameters())]

    eager = step(net)
    modes = ({}, {"mode": "reduce-overhead"}) if name in ("mhc", "dhc") else ({},)
    for kwargs in modes:
        compiled = hc.compile(net, fullgraph=True, **kwargs)
        for _ in range(3):
            results = step(compiled)
        for a, b in zip(eager, results, strict=True):
            assert (a - b).abs().max() <= 1e-3 * a.abs().max() + 1e-5
        torch.compiler.reset()


def test_plain_torch_compile_also_works():
    net = Net(hc.HCConfig(64, 4, "mhc"), layers=2).cuda()
    h = draw(48, 64).cuda()
    a = run_on(net, net, h)
    b = run_on(torch.compile(net, fullgraph=True), net, h)
    assert_close_loosely(a, b)


def run_on(function, net, h):
    net.zero_grad()
    out = function(h)
    out.backward(torch.ones_like(out) * torch.linspace(-1, 1, out.shape[-1], device="cuda"))
    return [out.detach().clone(), *(p.grad.clone() for p in net.parameters())]


def assert_close_loosely(first, second):
    for a, b in zip(first, second, strict=True):
        assert (a - b).abs().max() <= 1e-3 * a.abs().max() + 1e-5


def test_graph_capture_of_eager_forward_and_backward_replays_bitwise():
    row = CATALOG["post_pre"]
    inputs = [
        t.requires_grad_() for t in _inputs("post_pre", "sinkhorn", 64, 4, 256, torch.bfloat16)
    ]
    cots = cotangents(row.call("sinkhorn", *inputs))
    eager = outputs_and_gradients(lambda *t: row.call("sinkhorn", *t), inputs, cots)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            outs = row.call("sinkhorn", *inputs)
            torch.autograd.grad(outs, inputs, cots)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = row.call("sinkhorn", *inputs)
        grads = torch.autograd.grad(outs, inputs, cots)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(eager[0] + eager[1], [*outs, *grads], strict=True):
        assert torch.equal(a, b)


def test_lengths_share_graphs_and_kernels():
    """T from 1 to 5000: at most two graphs, and no kernel compiled after the first few."""
    from torch._dynamo.testing import CompileCounterWithBackend

    net = Net(hc.HCConfig(64, 4, "mhc"), layers=2).cuda()
    counter = CompileCounterWithBackend(hc_inductor)
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for tokens in (300, 1, 2, 17, 64, 1000, 4999, 5000):
        h = draw(tokens, 64).cuda()
        if tokens > 1:
            torch._dynamo.mark_dynamic(h, 0)
        out = compiled(h)
        out.sum().backward()
        assert (out - net(h)).abs().max() < 1e-3
    assert counter.frame_count <= 2


def test_no_kernel_is_compiled_for_another_length():
    """Triton's caches after T = 2 are those after any other T: nothing specialises on it."""
    import custom_ops.kernels as package

    def compiled_variants():
        found = 0
        for path in pathlib.Path(package.__path__[0]).glob("*.py"):
            module = importlib.import_module(f"custom_ops.kernels.{path.stem}")
            for kernel in vars(module).values():
                if isinstance(kernel, triton.runtime.jit.JITFunction):
                    found += sum(len(cache[0]) for cache in kernel.device_caches.values())
        return found

    def step(tokens):
        inputs = _inputs("post_pre", "sinkhorn", tokens, 4, 320, torch.bfloat16)
        call = CATALOG["post_pre"].call
        outputs_and_gradients(lambda *t: call("sinkhorn", *t), inputs)

    step(2)
    before = compiled_variants()
    assert before >= 6
    for tokens in (1, 16, 17, 100, 1024, 4999):
        step(tokens)
    assert compiled_variants() == before


@pytest.mark.full
def test_offsets_beyond_two_to_the_thirty_one():
    """T·n·C just above 2³¹ elements, checked at the far end."""
    tokens, n, width = 65600, 4, 8192
    x = torch.randn(tokens, n, width, device="cuda", dtype=torch.bfloat16)
    pre = torch.randn(tokens, n, device="cuda")
    res = torch.randn(tokens, n, n, device="cuda")
    phi = torch.randn(24, n * width, device="cuda") / 100
    tail = slice(tokens - 7, tokens)
    y = x[:, 0].contiguous()
    u = torch.ops.hc.aggregate(x, pre)
    assert torch.equal(u[tail], torch.ops.hc.aggregate(x[tail].contiguous(), pre[tail]))
    p, ss = torch.ops.hc.project(x, phi, False)
    small = torch.ops.hc.project(x[tail].contiguous(), phi, False)
    assert torch.equal(p[tail], small[0]) and torch.equal(ss[tail], small[1])
    out = torch.ops.hc.post(x, y, pre, res)
    assert torch.equal(
        out[tail], torch.ops.hc.post(x[tail].contiguous(), y[tail], pre[tail], res[tail])
    )
