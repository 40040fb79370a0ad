"""Each preset as a network: equal to its residual twin at the start, learning, causal."""

import pytest
import torch
from torch import nn

import hc_compile as hc
from custom_ops.constraint import takes_streams

DIM = 16
PRESETS = [name for name in hc.PRESETS if name != "residual"]
TWINS = [name for name in PRESETS if hc.PRESETS[name].equals_residual]


def takes(name, n):
    """Whether a preset is defined for n streams."""
    manifold = hc.PRESETS[name].constraint.get("manifold", "")
    return n <= (hc.PRESETS[name].max_streams or n) and takes_streams(manifold, n)


class Net(nn.Module):
    """Sublayers of norm + linear + tanh, the plain pre-norm network that HC wraps."""

    def __init__(self, cfg, layers=4, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        self.expand = hc.StreamExpand(cfg, dtype=dtype)
        self.reduce = hc.StreamReduce(cfg, dtype=dtype)
        self.connections = nn.ModuleList(
            hc.HyperConnection(cfg, k, dtype=dtype) for k in range(layers)
        )
        self.branches = nn.ModuleList(
            nn.Sequential(nn.RMSNorm(cfg.dim, eps=1e-6), nn.Linear(cfg.dim, cfg.dim), nn.Tanh())
            for _ in range(layers)
        ).to(dtype)
        self.norm = nn.RMSNorm(cfg.dim, eps=1e-6).to(dtype)
        with torch.no_grad():
            for branch in self.branches:
                for p in branch[1].parameters():
                    p.copy_(torch.randn(p.shape, generator=generator) / cfg.dim**0.5)

    def forward(self, h):
        x = self.expand(h)
        for connection, branch in zip(self.connections, self.branches, strict=True):
            u, add_residual = connection(x)
            x = add_residual(branch(u))
        return self.norm(self.reduce(x))

    def streams(self, h):
        x = self.expand(h)
        for connection, branch in zip(self.connections, self.branches, strict=True):
            u, add_residual = connection(x)
            x = add_residual(branch(u))
        return x


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("name", TWINS)
def test_equals_its_residual_twin_at_initialisation(name, n):
    if (name, n) in (("mhc-lite", 8), ("mhc-kron", 3), ("mhc-kron", 5)):
        with pytest.raises(ValueError, match=r"streams must be (<= 5|a power of two)"):
            hc.HCConfig(DIM, n, name)
        return
    twin = Net(hc.HCConfig(DIM, preset="residual"), dtype=torch.float64)
    net = Net(hc.HCConfig(DIM, n, name), dtype=torch.float64)
    h = draw(2, 7, DIM, dtype=torch.float64)
    assert (net(h) - twin(h)).abs().max() < 1e-12


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in TWINS])
def test_published_recipes_differ_from_the_twin(name):
    """The rows that claim no twin must not have one by accident, or the claim is stale."""
    twin = Net(hc.HCConfig(DIM, preset="residual"), dtype=torch.float64)
    net = Net(hc.HCConfig(DIM, preset=name), dtype=torch.float64)
    h = draw(2, 7, DIM, dtype=torch.float64)
    assert (net(h) - twin(h)).abs().max() > 1e-9


def train(net, steps, rate=1e-2):
    """A few steps of regression; returns the last gradients by name."""
    optimiser = torch.optim.Adam(net.parameters(), lr=rate)
    h, target = draw(4, 9, DIM, seed=2), draw(4, 9, DIM, seed=3)
    for _ in range(steps):
        optimiser.zero_grad()
        (net(h) - target).square().mean().backward()
        optimiser.step()
    return {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("name", PRESETS)
def test_every_parameter_learns_within_three_steps(name, n):
    net = Net(hc.HCConfig(DIM, n, name))
    grads = train(net, 3)
    c = net.connections[0].cfg.constraint
    constrained = c.manifold not in ("linear", "identity")
    for key, grad in grads.items():
        assert grad is not None and grad.isfinite().all(), key
        parts = [grad]
        if key.startswith("connections") and key.endswith("bias"):
            pre, post, res = grad.split(list(c.sizes))
            first, last = (key.startswith(f"connections.{k}.") for k in (0, 3))
            # The first sublayer reads copies, and its norm undoes the only thing pre can do to
            # them, their scale; for res see the next test.
            inert = constrained and (first or (last and net.reduce.head is None))
            parts = [*([] if first else [pre]), post, *([] if inert else [res])]
        for part in (p for p in parts if p.numel()):
            assert part.abs().max() > 1e-10, key


@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize("name", ["mhc", "mhc-log", "mhc-lite", "mhc-kron", "mhc-ortho"])
def test_res_of_the_first_and_last_sublayer_is_inert(name, layer):
    """The first mixes copies (rows sum to 1), the last is averaged (columns do): no gradient."""
    net = Net(hc.HCConfig(DIM, 4, name))
    train(net, 3)
    net = net.double()
    h = draw(2, 5, DIM, dtype=torch.float64)
    before = net(h)
    sizes = net.connections[layer].cfg.constraint.sizes
    with torch.no_grad():
        change = 0.3 * draw(sizes[2], seed=5, dtype=torch.float64)
        net.connections[layer].coefficients.bias[-sizes[2] :] += change
    assert (net(h) - before).abs().max() < 1e-5


@pytest.mark.parametrize("name", PRESETS)
def test_streams_diverge_in_training(name):
    net = Net(hc.HCConfig(DIM, 4, name))
    train(net, 20)
    x = hc.resolve(net.streams(draw(2, 5, DIM, seed=7)))
    spread = (x - x.mean(-2, keepdim=True)).abs().max() / x.abs().max()
    assert spread > 1e-2


@pytest.mark.parametrize("name", PRESETS)
def test_coefficients_are_causal_and_per_token(name):
    """Changing tokens >= t changes nothing before t, bitwise."""
    net = Net(hc.HCConfig(DIM, 4, name))
    train(net, 3)
    h = draw(2, 9, DIM, seed=8)
    other = h.clone()
    other[:, 4:] += 1.0
    a, b = net(h), net(other)
    assert torch.equal(a[:, :4], b[:, :4])
    assert not torch.equal(a[:, 4:], b[:, 4:])


@pytest.mark.parametrize("name", ["mhc", "mhc-v4", "dhc"])
def test_rms_divides_by_all_the_elements_it_saw(name):
    """RMS over n·C (or C per stream), on streams of different scale: a divisor of C is a bug."""
    cfg = hc.HCConfig(DIM, 4, name)
    layer = hc.HyperConnection(cfg, 1, dtype=torch.float64)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(draw(*p.shape, seed=11))
    x = draw(3, 4, DIM, dtype=torch.float64) * torch.tensor([1.0, 10.0, 0.1, 3.0]).view(4, 1)
    phi, alpha, bias = layer.coefficients()
    c = cfg.constraint
    if c.projection == "flat":
        flat = x.flatten(1)
        v = flat / (flat.square().mean(-1, keepdim=True) + c.norm_eps).sqrt()
        z = alpha[0] * (v @ phi[:4].T) + bias[:4]
        expected = torch.sigmoid(z) + c.pre_eps
    else:
        v = x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt()
        expected = alpha[0] * torch.tanh(v @ phi[0]) + bias[:4]
    pre, _, _ = hc.functional.coefficients(x, phi, alpha, bias, c)
    assert (pre - expected).abs().max() < 1e-12


@pytest.mark.parametrize("implementation", ["ops", "plain"])
@pytest.mark.parametrize("name", PRESETS)
def test_no_grad_changes_no_bit(name, implementation):
    """A path without gradients that drops an argument is a bug others shipped."""
    net = Net(hc.HCConfig(DIM, 4, name, implementation=implementation, expand="embedding"))
    train(net, 3)
    h = draw(2, 5, DIM)
    with torch.no_grad():
        without = net(h)
    assert torch.equal(net(h), without)


@pytest.mark.parametrize("name", PRESETS)
def test_construction_is_deterministic_under_a_seed(name):
    def build():
        torch.manual_seed(3)
        return hc.HyperConnection(hc.HCConfig(DIM, 4, name), layer_index=2).state_dict()

    first, second = build(), build()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert all(v.dim() > 0 and v.dtype == torch.float32 for v in first.values())


@pytest.mark.parametrize("name", PRESETS)
def test_plain_and_ops_agree(name):
    a, b = (Net(hc.HCConfig(DIM, 4, name, implementation=kind)) for kind in ("plain", "ops"))
    train(a, 3)
    b.load_state_dict(a.state_dict())
    h, cot = draw(2, 5, DIM), draw(2, 5, DIM, seed=1)
    a.zero_grad()
    results = []
    for net in (a, b):
        out = net(h)
        out.backward(cot)
        results.append((out, [p.grad for p in net.parameters()]))
    assert (results[0][0] - results[1][0]).abs().max() < 1e-5
    for p, q in zip(results[0][1], results[1][1], strict=True):
        assert (p - q).abs().max() <= 1e-4 * p.abs().max() + 1e-6


def test_parameters_in_bfloat16_keep_float32_arithmetic():
    """A blanket .to(bfloat16) rounds the parameters once (2^-8) and nothing after that."""
    cfg = hc.HCConfig(64, 4, "mhc-v4")
    layer = hc.HyperConnection(cfg, 1)
    x = draw(6, 4, 64)
    rounded = [p.to(torch.bfloat16) for p in layer.coefficients()]
    low = hc.functional.coefficients(x, *rounded, cfg.constraint)
    high = hc.functional.coefficients(x, *(p.float() for p in rounded), cfg.constraint)
    for a, b in zip(low, high, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_coefficients_that_many_streams_take():
    """What the README says of Kronecker products against Sinkhorn."""
    for n, few, many in ((8, 19, 80), (16, 36, 288)):
        assert (
            hc.HCConfig(DIM, n, "mhc-kron").constraint.total == few == 2 * n + n.bit_length() - 1
        )
        assert hc.HCConfig(DIM, n, "mhc").constraint.total == many == n * n + 2 * n
