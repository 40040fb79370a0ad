"""The suite that the optimised hyper-connections describe, against the package they optimise.

pytest tests/test_hyper_connections_optimized.py::TestNumericalEquivalence
pytest tests/test_hyper_connections_optimized.py::TestPerformance -s   # prints its table
pytest tests/test_hyper_connections_optimized.py::TestEdgeCases
"""

import itertools

import pytest
import torch
from torch import nn

from hc_compile.compat.hyper_connections import HyperConnections, Residual, mHC
from hc_compile.compat.hyper_connections import get_init_and_expand_reduce_stream_functions as init
from hc_compile.compat.hyper_connections import hyper_connections_channel_first as channel_first
from tests.compat.oracle import Formula, assert_equal, assert_same, both, draw, randomised, run

package = pytest.importorskip("hyper_connections")
package_first = pytest.importorskip("hyper_connections.hyper_connections_channel_first")
SIZES = list(itertools.product((1, 2, 4), (1, 2, 4), (8, 32), (1, 3)))
STATIC = {
    "sinkhorn": {"sinkhorn_iters": 20, "sinkhorn_tau": 0.5},
    "orthostochastic": {"mhc_h_res_proj": "orthostochastic"},
}


def inputs_of(streams, dim, batch, place=(7,)):
    return [draw(batch * streams, *place, dim, seed=1), draw(batch, *place, dim, seed=2)]


def assert_doubly_stochastic(matrix, tolerance):
    assert matrix.min() >= 0
    for side in (-1, -2):
        assert (matrix.sum(side) - 1).abs().max() < tolerance


class TestNumericalEquivalence:
    """Outputs, gradients, shapes and constraints, in float64."""

    @pytest.mark.parametrize(("streams", "fracs", "dim", "batch"), SIZES)
    def test_basic_hyper_connections(self, streams, fracs, dim, batch):
        kinds = package.HyperConnections, HyperConnections
        pair = (kind(streams, dim=dim, num_fracs=fracs, layer_index=1) for kind in kinds)
        assert_same(*pair, both, inputs_of(streams, dim, batch))

    @pytest.mark.parametrize(("streams", "dim", "batch"), [(2, 8, 1), (4, 32, 3), (8, 16, 2)])
    def test_mhc(self, streams, dim, batch):
        pair = (kind(streams, dim=dim, layer_index=1) for kind in (package.mHC, mHC))
        assert_same(*pair, both, inputs_of(streams, dim, batch))

    @pytest.mark.parametrize("projection", STATIC)
    @pytest.mark.parametrize("streams", [2, 4, 8])
    def test_projection_of_static_mhc(self, projection, streams):
        """Written out in tests/compat/test_fork.py; here the constraint itself."""
        module = HyperConnections(streams, dim=8, mhc=True, layer_index=0, **STATIC[projection])
        u, new = both(module.double(), *inputs_of(streams, 8, 2))
        assert u.shape == (2, 7, 8) and new.shape == (2 * streams, 7, 8)
        _, _, res = module.manifold.coefficients(module)
        assert_doubly_stochastic(res, 2e-3)

    @pytest.mark.parametrize("place", [(7,), (3, 5)])
    def test_orthostochastic_equals_the_square_of_a_rotation(self, place):
        module = HyperConnections(3, dim=8, mhc=True, mhc_h_res_proj="orthostochastic").double()
        with torch.no_grad():
            module.H_res_logits.copy_(draw(3, 3) + 2 * torch.eye(3))
        polar = torch.linalg.svd(module.H_res_logits)
        truth = (polar.U @ polar.Vh).square()
        _, _, res = module.manifold.coefficients(module)
        assert (res.mT - truth).abs().max() < 0.05  # eight quintic steps
        x, y = inputs_of(3, 8, 2, place)
        assert both(module, x, y)[1].shape == x.shape

    @pytest.mark.parametrize("place", [(4, 5), (2, 3, 4)])
    def test_channel_first(self, place):
        """2-D against the package's convolutions; 3-D against the same numbers laid out in 2-D."""
        x, y = draw(8, 6, *place, seed=1), draw(2, 6, *place, seed=2)
        ours = channel_first.HyperConnections(4, dim=6, layer_index=1)
        flat = [t.flatten(2).unsqueeze(-1) for t in (x, y)]
        theirs = package_first.HyperConnections(4, dim=6, layer_index=1)
        assert_same(theirs, ours, both, flat)
        found = [t.flatten(2).unsqueeze(-1) for t in both(ours, x, y)]
        assert_equal(found, both(ours, *flat))

    @pytest.mark.parametrize("family", [HyperConnections, mHC])
    @pytest.mark.parametrize("place", [(4, 5), (2, 3, 4)])
    def test_channel_first_option(self, family, place):
        """Equal to channels last: the package's option is wrong or crashes (tests/compat)."""
        module = randomised(family(4, dim=6, layer_index=1))
        x, y = inputs_of(4, 6, 2, place)
        last = both(module, x, y)
        module.channel_first = True
        first = both(module, x.movedim(-1, 1), y.movedim(-1, 1))
        assert_equal([t.movedim(1, -1) for t in first], last)


class TestPerformance:
    """A benchmark that runs everywhere; scripts/bench_compat.py is the measured one."""

    @pytest.mark.parametrize("kind", ["HyperConnections", "mHC"])
    def test_forward_and_backward(self, kind):
        from profiles.timing import median_ms

        device = "cuda" if torch.cuda.is_available() else "cpu"
        dim, place = (1024, (2048,)) if device == "cuda" else (16, (8,))
        x = torch.randn(8, *place, dim, device=device, requires_grad=True)
        rows = []
        for name, module in (("package", package), ("ours", None)):
            source = {"HyperConnections": HyperConnections, "mHC": mHC}[kind]
            source = source if module is None else getattr(module, kind)
            layer = source(4, dim=dim, branch=nn.Identity(), layer_index=0).to(device)
            leaves = [x, *layer.parameters()]

            def step(layer=layer, leaves=leaves):
                return torch.autograd.grad(layer(x).sum(), leaves, allow_unused=True)

            forward = median_ms(torch.no_grad()(lambda layer=layer: layer(x)), device)
            rows.append((name, forward, median_ms(step, device)))
            assert all(g is None or g.isfinite().all() for g in step())
        print(f"\n{kind} on {device}:")
        for name, forward, whole in rows:
            print(f"  {name:8} forward {forward:8.3f} ms   forward and backward {whole:8.3f} ms")


class TestEdgeCases:
    """One stream, no branch, nothing written, several views."""

    @pytest.mark.parametrize("kind", ["HyperConnections", "mHC"])
    def test_single_stream(self, kind):
        classes = getattr(package, kind), {"HyperConnections": HyperConnections, "mHC": mHC}[kind]
        assert_same(*(c(1, dim=8, layer_index=0) for c in classes), both, inputs_of(1, 8, 2))

    def test_disabled_is_the_plain_residual(self):
        for make, expand, reduce in (init(4, dim=8, disable=True), init(1, dim=8)):
            layer = make(branch=nn.Linear(8, 8))
            x = draw(2, 7, 8).float()
            assert isinstance(layer, Residual)
            assert torch.equal(reduce(layer(expand(x))), layer.branch(x) + x)

    def test_no_branch(self):
        layer = HyperConnections(4, dim=8, layer_index=2)
        x = draw(8, 7, 8).float()
        u, add_residual = layer(x)
        assert torch.equal(u, x.unflatten(0, (2, 4))[:, 2])
        torch.testing.assert_close(add_residual(u), x + u.repeat_interleave(4, 0), rtol=0, atol=0)

    @pytest.mark.parametrize("kind", ["HyperConnections", "mHC"])
    def test_disabled_outputs(self, kind):
        classes = getattr(package, kind), {"HyperConnections": HyperConnections, "mHC": mHC}[kind]
        options = {"dim": 8, "layer_index": 0, "add_branch_out_to_residual": False}
        pair = [c(4, **options) for c in classes]
        assert_same(*pair, both, inputs_of(4, 8, 2))
        _, add_residual = pair[1](draw(8, 7, 8))
        marker = object()
        assert add_residual(marker) is marker

    @pytest.mark.parametrize("views", [2, 3])
    @pytest.mark.parametrize("family", ["hc", "mhc"])
    def test_multiple_input_views(self, views, family):
        kinds = {"hc": HyperConnections, "mhc": mHC}
        module = randomised(kinds[family](4, dim=12, num_input_views=views, layer_index=0))
        x, y = inputs_of(4, 12, 2)

        def formula(module, x, y):
            streams = x.unflatten(0, (2, 4)).movedim(1, -2)
            p = dict(module.named_parameters())
            u, new = Formula(family, 1, views)(p, streams, y)
            return u.movedim(-2, 0), new.movedim(-2, 1).flatten(0, 1)

        assert_equal(run(module, both, [x, y]), run(module, formula, [x, y]))
        assert module(x)[0].shape == (views, 2, 7, 12)
