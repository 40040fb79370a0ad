"""Parity with the hyper-connection modules of `transformers`: forward and every gradient."""

import pytest
import torch
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4
from transformers.models.hy_v4 import modeling_hy_v4 as hy

import hc_compile as hc
from custom_ops.constraint import Constraint
from tests.conftest import worst

DIM, N = 12, 4


class Settings:
    """The configuration fields that the modules read."""

    hidden_size, hc_mult, hc_sinkhorn_iters, hc_eps = DIM, N, 20, 1e-6
    rms_norm_eps, hc_magnitude = 1e-6, 2.0


def randomised(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return module


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compare(theirs, ours, leaves):
    """Outputs and gradients of two lists of tensors, in float32 against each other."""
    for a, b in zip(theirs, ours, strict=True):
        assert worst(b, a) < 2e-6
    cots = [draw(*o.shape, seed=k) for k, o in enumerate(theirs)]
    for a, b in zip(
        torch.autograd.grad(theirs, leaves, cots, retain_graph=True),
        torch.autograd.grad(ours, leaves, cots, retain_graph=True),
        strict=True,
    ):
        assert worst(b, a) < 2e-5


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_deepseek_v4_sublayer(scale):
    module = randomised(v4.DeepseekV4HyperConnection(Settings()))
    x = (scale * draw(2, 3, N, DIM, seed=5)).requires_grad_()
    y = draw(2, 3, DIM, seed=6).requires_grad_()
    leaves = [x, y, module.fn, module.base, module.scale]
    post, comb, u = module(x)
    merged = post.unsqueeze(-1) * y.unsqueeze(-2) + comb.transpose(-1, -2) @ x
    c = hc.HCConfig(DIM, N, "mhc-v4").constraint
    ours_u, _, ours_post, ours_res = hc.functional.pre(x, module.fn, module.scale, module.base, c)
    ours = hc.functional.post(x, y, ours_post, ours_res)
    compare([u, post, comb, merged], [ours_u, ours_post, ours_res.mT, ours], leaves)


def test_deepseek_v4_decoder_merge_is_the_one_tested():
    """The merge above is written inline in their decoder layer; this notices if it changes."""
    import inspect

    source = inspect.getsource(v4.DeepseekV4DecoderLayer.forward)
    assert "comb" in source and "post" in source and "transpose(-1, -2)" in source


def test_deepseek_v4_head():
    module = randomised(v4.DeepseekV4HyperHead(Settings()))
    cfg = hc.HCConfig(DIM, N, "mhc-v4")
    reduce = hc.StreamReduce(cfg)
    with torch.no_grad():
        reduce.head.phi.copy_(module.hc_fn)
        reduce.head.bias.copy_(module.hc_base)
        reduce.head.alpha.copy_(module.hc_scale)
    x = draw(2, 3, N, DIM, seed=5).requires_grad_()
    theirs, ours = module(x), reduce(x)
    compare([theirs], [ours], [x])
    cot = draw(2, 3, DIM, seed=1)
    reference = torch.autograd.grad(theirs, list(module.parameters()), cot)
    names = {"hc_fn": "phi", "hc_base": "bias", "hc_scale": "alpha"}
    own = dict(
        zip(
            [name for name, _ in reduce.head.named_parameters()],
            torch.autograd.grad(ours, list(reduce.head.parameters()), cot),
            strict=True,
        )
    )
    for (name, _), grad in zip(module.named_parameters(), reference, strict=True):
        assert worst(own[names[name]], grad) < 2e-5


class V41Settings(Settings):
    rms_norm_eps = 1e-20


def _v41_by_their_modules(modules, h):
    """V4.1's order of V4's modules: a read takes the pre of the one before, at first stream 0.

    Their module consumes pre, so it is made here from the module's own norm and parameters.
    """
    x = h.unsqueeze(-2).expand(*h.shape[:-1], N, DIM).contiguous()
    read = torch.eye(N)[0].expand(*h.shape[:-1], N)
    reads = []
    for module in modules:
        post, comb, _ = module(x)
        logits = torch.nn.functional.linear(module.input_norm(x.flatten(-2)), module.fn)[..., :N]
        own = torch.sigmoid(logits * module.scale[0] + module.base[:N]) + module.hc_eps
        u = (read.unsqueeze(-1) * x).sum(-2)
        x = post.unsqueeze(-1) * torch.tanh(u).unsqueeze(-2) + comb.transpose(-1, -2) @ x
        read = own
        reads.append(u)
    return [*reads, x, (read.unsqueeze(-1) * x).sum(-2)]


def test_deepseek_v41_network():
    modules = [randomised(v4.DeepseekV4HyperConnection(V41Settings())) for _ in range(3)]
    cfg = hc.HCConfig(DIM, N, "mhc-v4.1")
    layers = [hc.HyperConnection(cfg, k) for k in range(3)]
    for k, (layer, module) in enumerate(zip(layers, modules, strict=True)):
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(1 + 0.1 * k)
        ours = layer.coefficients
        ours.phi, ours.bias, ours.alpha = module.fn, module.base, module.scale
    h = draw(2, 3, DIM, seed=5).requires_grad_()
    x, reads = hc.expand_streams(h, cfg), []
    for layer in layers:
        u, add_residual = layer(x)
        x = add_residual(torch.tanh(u))
        reads.append(u)
    ours = [*reads, hc.resolve(x), hc.reduce_streams(x, cfg)]
    leaves = [h, *(p for module in modules for p in module.parameters())]
    compare(_v41_by_their_modules(modules, h), ours, leaves)


def test_hy_v4_sublayer():
    module = randomised(hy.HYV4HyperConnection(Settings()))
    x = draw(2, 3, N, DIM, seed=5).requires_grad_()
    leaves = [x, module.fn, module.base, module.scale]
    post, u = module(x)
    c = hc.HCConfig(DIM, N, "ihc").constraint
    alpha = torch.stack([module.scale[0], module.scale[1], module.scale[1]])
    ours_u, _, ours_post, ours_res = hc.functional.pre(x, module.fn, alpha, module.base, c)
    assert torch.equal(ours_res[0, 0], torch.eye(N))
    compare([u, post], [ours_u, ours_post], leaves)


def test_constraint_of_v4_is_pinned():
    """A change of any choice in the preset breaks parity; this says which at a glance."""
    c = hc.HCConfig(DIM, N, "mhc-v4").constraint
    assert c == Constraint(
        N,
        pre_eps=1e-6,
        start="softmax",
        first="row",
        denominator="add",
        eps=1e-6,
        transpose=True,
    )
