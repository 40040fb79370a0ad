"""On a CUDA device: compiled functions against float64, memory against the allocator, monitors."""

import pytest
import torch

import hc_compile as hc
from hc_compile import monitor
from hc_compile.layers import compute_memory_footprint, flexible_attention, set_attention_backend
from profiles.memory_bench import Model, measure_memory
from tests.conftest import outputs_and_gradients, worst
from tests.layers.test_attention import written_out
from tests.test_optimizations import CASES
from tests.test_presets import DIM, Net, draw

pytestmark = pytest.mark.gpu

MODELS = (
    Model("residual", "with_hc", 512, 6, 8, 8, 512, streams=1),
    Model("DHC", "with_hc", 512, 6, 8, 8, 512),
    Model("DHC, checkpointed", "with_hc", 512, 6, 8, 8, 512, checkpointed=True),
    Model("mHC", "mhc", 512, 6, 8, 8, 512),
)


def tables_to(monkeypatch, device):
    import tests.test_optimizations as page

    monkeypatch.setattr(page, "COS", page.COS.to(device))
    monkeypatch.setattr(page, "SIN", page.SIN.to(device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_compiled_functions_against_float64(name, dtype, monkeypatch):
    tables_to(monkeypatch, "cuda")
    function, formula, inputs = CASES[name]
    rounded = [t.to("cuda", dtype) for t in inputs]
    truth = outputs_and_gradients(formula, [t.double() for t in rounded])
    plain = outputs_and_gradients(function, rounded)
    fused = outputs_and_gradients(torch.compile(function, fullgraph=True), rounded)
    for a, e, b in zip(fused[0] + fused[1], plain[0] + plain[1], truth[0] + truth[1], strict=True):
        assert worst(a, b) <= 2 * worst(e, b) + torch.finfo(dtype).eps


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_estimate_is_within_15_percent_of_the_allocators_peak(model):
    record = measure_memory(model, "cuda", 1)
    assert abs(record["estimated_mb"] / record["measured_mb"] - 1) < 0.15


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_monitors_in_compiled_code_and_cuda_graphs(mode):
    nets = []
    for _ in range(2):
        net = Net(hc.HCConfig(DIM, 4))
        with torch.no_grad():
            for k, p in enumerate(net.connections.parameters()):
                p.copy_(draw(*p.shape, seed=k))
        monitor.watch(net.cuda())
        nets.append(net)
    plain, net = nets
    run = torch.compile(net, fullgraph=True, mode=mode)
    for seed in range(4):  # graphs are recorded in the second call and replayed from the third
        h = draw(2, 64, DIM, seed=seed).cuda()
        plain(h)
        net.zero_grad(set_to_none=True)  # a graph's gradients last until its next replay
        run(h).sum().backward()
        expected = monitor.report(plain)
        for name, values in monitor.report(net).items():
            assert values == pytest.approx(expected[name], rel=1e-3, abs=1e-4)


def test_flex_attention_compiled_forward_and_backward():
    set_attention_backend("flex")
    try:
        shapes = ((2, 4, 128, 64), (2, 2, 128, 64), (2, 2, 128, 64))
        inputs = [draw(*shape, seed=k).cuda() for k, shape in enumerate(shapes)]
        run = torch.compile(lambda *t: (flexible_attention(*t),), fullgraph=True)
        found = outputs_and_gradients(run, inputs)
        truth = outputs_and_gradients(
            lambda *t: (written_out(*(u.cpu() for u in t)).cuda(),), [t.double() for t in inputs]
        )
    finally:
        set_attention_backend("auto")
    for a, b in zip(found[0] + found[1], truth[0] + truth[1], strict=True):
        assert worst(a, b) < 2e-2


def test_footprint_leaves_the_device_alone():
    model = MODELS[0].build("cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    compute_memory_footprint(model, 64, 512)
    assert torch.cuda.memory_allocated() == before
