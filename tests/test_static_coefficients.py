"""Coefficients that depend on no token: made once in eval, again after every change of b."""

import copy

import pytest
import torch

import hc_compile as hc
from tests.passes.harness import op_counts, with_passes
from tests.passes.test_pipeline import net_and_input


@pytest.fixture
def net_and_streams():
    net, h = net_and_input("shc", 4)
    return net.eval(), h.detach()


def expected(net, h):
    """What the ops make of the parameters as they are: gradients are on, so nothing is kept."""
    return net(h.clone().requires_grad_()).detach()


@torch.no_grad()
def made(net):
    return [connection.coefficients._made for connection in net.connections]


def test_they_are_made_once(net_and_streams):
    net, h = net_and_streams
    with torch.no_grad():
        assert torch.equal(net(h), expected_outside(net, h))
        first = made(net)
        assert op_counts(lambda: net(h)) == {"aggregate": 3, "post": 3}
    assert all(a is b and a is not None for a, b in zip(first, made(net), strict=True))


def expected_outside(net, h):
    with torch.enable_grad():
        return expected(net, h)


def step(net):
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    expected_loss = net(torch.ones(1, 1, net.norm.weight.numel(), dtype=torch.float64)).sum()
    expected_loss.backward()
    optimizer.step()


def load(net):
    changed = {k: v + 0.3 if k.endswith("bias") else v for k, v in net.state_dict().items()}
    net.load_state_dict(changed)


def assign(net):
    changed = {k: v + 0.3 if k.endswith("bias") else v for k, v in net.state_dict().items()}
    net.load_state_dict(changed, assign=True)


def in_place(net):
    with torch.no_grad():
        for connection in net.connections:
            connection.coefficients.bias.mul_(1.5)


def new_storage(net):
    for connection in net.connections:
        bias = connection.coefficients.bias
        bias.data = bias.data + 0.5


def through_data_and_train(net):
    for connection in net.connections:
        connection.coefficients.bias.data.add_(0.5)
    net.train().eval()


@pytest.mark.parametrize(
    "change", [step, load, assign, in_place, new_storage, through_data_and_train]
)
def test_a_change_of_b_makes_them_again(net_and_streams, change):
    net, h = net_and_streams
    with torch.no_grad():
        before = net(h)
    change(net)
    with torch.no_grad():
        after = net(h)
    assert not torch.equal(before, after)
    assert torch.equal(after, expected(net, h))


def test_training_and_gradients_never_see_them(net_and_streams):
    net, h = net_and_streams
    net(h)
    net.train()
    with torch.no_grad():
        net(h)
    assert made(net) == [None] * 3


def test_other_dtypes_and_copies(net_and_streams):
    net, h = net_and_streams
    with torch.inference_mode():
        net(h)
    with torch.no_grad():
        single = net.float()(h.float())
        assert torch.equal(single, expected_outside(net, h.float()))
        twin = copy.deepcopy(net)
        in_place(twin)
        assert torch.equal(twin(h.float()), expected_outside(twin, h.float()))
        assert torch.equal(net(h.float()), single)


def test_a_carried_state(net_and_streams):
    net, h = net_and_streams

    def lazily():
        state = hc.StreamState(net.expand(h))
        for connection, branch in zip(net.connections, net.branches, strict=True):
            u, add_residual = connection(state)
            state = add_residual(branch(u))
        return net.norm(net.reduce(state))

    with torch.no_grad():
        torch.testing.assert_close(lazily(), expected_outside(net, h), rtol=0, atol=1e-12)


def test_compiled_code_makes_them_from_b(net_and_streams):
    """One graph, which the passes fuse as ever and which sees a changed b."""
    net, h = net_and_streams
    with torch.no_grad():
        net(h)
        compiled = with_passes(net, counts=(counts := {}))
        compiled(h)
        assert counts == {"pre": 1, "post_pre": 2, "post": 1}
        in_place(net)
        torch.testing.assert_close(compiled(h), net(h), rtol=0, atol=1e-12)
