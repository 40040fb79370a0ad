"""A model and its inputs as a training step; switching and compiling its parts."""

import pytest
import torch
from torch import nn

import hc_compile as hc
from profiles.workload import (
    TrainingStep,
    Workload,
    as_workload,
    compile_blocks,
    implementation,
    outer_blocks,
    uncompile,
)


def test_what_a_function_may_return():
    model, x = nn.Linear(3, 2), torch.ones(4, 3)
    assert as_workload((model, x)).args == (x,)
    assert as_workload((model, (x,))).args == (x,)
    assert as_workload((model, {"input": x})).kwargs == {"input": x}
    whole = Workload(model, (x,))
    assert as_workload(whole) is whole
    for wrong in (model, (model,), (x, model)):
        with pytest.raises(TypeError, match="must return"):
            as_workload(wrong)


def test_the_step_is_the_gradient_of_a_fixed_random_cotangent():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    step = TrainingStep(Workload(model, (x,)), model)
    values, gradients = step.gradients()
    assert torch.equal(values[0], model(x))
    (cotangent,) = step.cotangents
    assert cotangent.std() > 0.1  # not constant
    torch.testing.assert_close(gradients[0], cotangent.T @ x)
    again = TrainingStep(Workload(model, (x,)), model).gradients()
    assert all(torch.equal(a, b) for a, b in zip(gradients, again[1], strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_loss_and_optimizer_of_ones_own():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    before = model.weight.detach().clone()
    work = Workload(
        model,
        (x,),
        loss=lambda out: out.square().mean(),
        optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.5),
    )
    loss = work.loss(model(x)).item()
    step = TrainingStep(work, model)
    step()
    assert work.loss(model(x)).item() < loss and not torch.equal(model.weight, before)
    assert step.resident_bytes() == 4 * (6 + 2 + 12)


def test_outputs_must_want_gradients():
    model = nn.Linear(3, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="wants gradients"):
        TrainingStep(Workload(model, (torch.ones(1, 3),)), model)()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.layers = nn.ModuleList(nn.ModuleList([nn.ReLU()]) for _ in range(2))
        self.heads = nn.ModuleList([nn.Linear(2, 2)])


def test_blocks_are_children_of_the_outermost_lists():
    net = Net()
    assert list(outer_blocks(net)) == [*net.inner.layers, *net.heads]
    compile_blocks(net)
    assert net.heads[0]._compiled_call_impl is not None
    assert net._compiled_call_impl is None
    uncompile(net)
    assert net.heads[0]._compiled_call_impl is None
    alone = nn.Linear(2, 2)
    assert compile_blocks(alone)._compiled_call_impl is not None


def test_implementation_is_switched_and_put_back():
    cfg = hc.HCConfig(8, 2, "mhc", iterations=2)
    module = hc.HyperConnection(cfg, 0)
    with implementation(module, "plain"):
        assert module.cfg.implementation == "plain" and module.cfg.constraint == cfg.constraint
    assert module.cfg is cfg
    with pytest.raises(KeyError), implementation(module, "plain"):
        raise KeyError
    assert module.cfg is cfg
