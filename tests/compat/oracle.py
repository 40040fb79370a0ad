"""What the drop-in is held to: the package itself, in float64, and its formulas written out.

The package casts to float32 inside its mHC; `in_float64` lets it compute in float64 instead.
"""

import contextlib
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F

from tests.conftest import worst

B, S, C = 2, 4, 12


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@contextlib.contextmanager
def in_float64():
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        yield


def randomised(module, seed=0):
    """The module in float64 with every parameter drawn, in the order of their names."""
    module = module.double()
    with torch.no_grad():
        for k, (_, p) in enumerate(sorted(module.named_parameters())):
            p.copy_(draw(*p.shape, seed=seed + k))
    return module


def run(module, step, inputs):
    """Outputs of step(module, *inputs) and all gradients under random cotangents."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    outputs = step(module, *leaves)
    parameters = [p for _, p in sorted(module.named_parameters())]
    cots = [draw(*o.shape, seed=100 + k) for k, o in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, [*leaves, *parameters], cots, allow_unused=True)
    return [*outputs, *(None if g is None else g for g in grads)]


def assert_equal(ours, truth, limit=1e-9):
    for a, b in zip(ours, truth, strict=True):
        if a is None or b is None:
            assert all(t is None or t.abs().max() == 0 for t in (a, b))
            continue
        assert a.shape == b.shape and worst(a, b) < limit


def assert_same(theirs, ours, step, inputs, limit=1e-9):
    """State dicts load both ways; outputs and every gradient agree."""
    theirs = randomised(theirs)
    assert {k: v.shape for k, v in theirs.state_dict().items()} == {
        k: v.shape for k, v in ours.state_dict().items()
    }
    ours = ours.double()
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    with in_float64():
        truth = run(theirs, step, inputs)
    assert_equal(run(ours, step, inputs), truth, limit)


def both(module, x, y):
    """What a step gives: the branch's input and the new residuals."""
    u, add_residual = module(x)
    return u, add_residual(y)


@dataclass(frozen=True)
class Formula:
    """The package's mathematics index by index, for any fractions, views and proposals.

    family: "hc", "mhc" or "mhc2": they order fractions and streams differently.
    """

    family: str
    fracs: int = 1
    views: int = 1
    iterations: int = 20
    tanh: bool = True

    def __call__(self, p, x, y):
        """u [b, ..., V, C] and x' [b, ..., S, C] of x [b, ..., S, C], y [b, ..., C]."""
        f, shape = self.fracs, x.shape
        x = x.unflatten(-1, (f, -1))
        gain = (p["norm.gamma"].flatten() + 1) * x.shape[-1] ** 0.5
        source = x
        if "maybe_mix_streams.weight" in p:
            mix = p["maybe_mix_streams.weight"].flatten(1)
            source = torch.einsum("ts,...sfc->...tfc", mix, x)
        normed = F.normalize(source, dim=-1) * gain
        pre, res = self.read_and_mix(p, normed)
        beta = self.beta(p, normed)
        y = y.unflatten(-1, (f, -1))
        u = torch.einsum("...sfvg,...sfc->...vgc", pre, x)
        new = torch.einsum("...sftg,...sfc->...tgc", res, x)
        new = new + torch.einsum("...sfg,...fc->...sgc", beta, y)
        return u.flatten(-2), new.reshape(shape)

    def columns(self):
        """Columns of static_alpha of view (v, g), and of stream (t, g)."""
        f, v = self.fracs, self.views
        frac = torch.arange(f)
        view, stream = torch.arange(v)[:, None], torch.arange(S)[:, None]
        if self.family == "hc":
            return frac * (S + v) + view, frac * (S + v) + v + stream
        order = frac * S + stream if self.family == "mhc" else stream * f + frac
        return view * f + frac, v * f + order

    def rows(self):
        """Rows of static_alpha of stream (s, f)."""
        frac, stream = torch.arange(self.fracs), torch.arange(S)[:, None]
        return stream * self.fracs + frac if self.family == "mhc2" else frac * S + stream

    def read_and_mix(self, p, normed):
        """pre [..., s, f, v, g] and res [..., s, f, t, g]."""
        fn = p["dynamic_alpha_fn"]
        every = []
        for one in fn.reshape(-1, *fn.shape[-2:]):
            z, static = normed @ one, p["static_alpha"][self.rows()]
            view, stream = self.columns()
            if self.family == "hc":
                z = (torch.tanh(z) if self.tanh else z) * p["dynamic_alpha_scale"] + static
                every.append((z[..., view], z[..., stream]))
                continue
            pre = z[..., view] * p["pre_branch_scale"] + static[..., view]
            logits = z[..., stream] * p["residual_scale"] + static[..., stream]
            square = logits.flatten(-2).flatten(-3, -2)
            for _ in range(self.iterations):
                square = square.log_softmax(-2).log_softmax(-1)
            every.append((pre.sigmoid(), square.exp().reshape(logits.shape)))
        pre, res = zip(*every, strict=True)
        return torch.stack(pre).mean(0), torch.stack(res).mean(0)

    def beta(self, p, normed):
        """beta [..., s, f, g]: what branch fraction f sends to fraction g of stream s."""
        f = self.fracs
        z = normed @ p["dynamic_beta_fn"].reshape(-1, f)
        static = p["static_beta"].view(S, f)
        static = static.unsqueeze(-1) if self.family == "mhc2" else static.unsqueeze(1)
        if self.family == "hc":
            z = torch.tanh(z) if self.tanh else z
            return z * p["dynamic_beta_scale"] + static
        return 2 * (z * p["h_post_scale"] + static).sigmoid()


def formula_step(formula, folded=True, channel_first=False):
    """A step like `both` that computes with the formula on a module's parameters."""

    def step(module, x, y):
        if folded:
            x = x.unflatten(0, (B, S))
            x = x.movedim(2, -1) if channel_first else x
            x = x.movedim(1, -2)
        y = y.movedim(1, -1) if channel_first else y
        u, new = formula(dict(module.named_parameters()), x, y)
        u = u.squeeze(-2) if formula.views == 1 else u.movedim(-2, 0)
        if channel_first:
            u = u.movedim(-1, 1 if formula.views == 1 else 2)
        if folded:
            new = new.movedim(-2, 1)
            new = (new.movedim(-1, 2) if channel_first else new).flatten(0, 1)
        return u, new

    return step
