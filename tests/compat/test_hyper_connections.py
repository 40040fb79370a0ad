"""The hyper-connections drop-in against the package and, where that is defective, float64."""

import itertools

import pytest
import torch
from torch import nn

from hc_compile.compat.hyper_connections import HyperConnections, mHC, mHCv2
from tests.compat.oracle import (
    B,
    C,
    Formula,
    S,
    assert_equal,
    assert_same,
    both,
    draw,
    formula_step,
    in_float64,
    randomised,
    run,
)

package = pytest.importorskip("hyper_connections")
package_v2 = pytest.importorskip("hyper_connections.mHCv2")
PackageHC, PackageMHC = package.HyperConnections, package.mHC

FAMILIES = {"hc": HyperConnections, "mhc": mHC, "mhc2": mHCv2.mHC}
PACKAGE = {"hc": PackageHC, "mhc": PackageMHC, "mhc2": package_v2.mHC}


def inputs_of(family, spatial=(5,), channel_first=False):
    place = (C, *spatial) if channel_first else (*spatial, C)
    x = (B, *spatial, S, C) if family == "mhc2" else (B * S, *place)
    return [draw(*x, seed=50), draw(B, *place, seed=51)]


@pytest.mark.parametrize("writes", [True, False])
@pytest.mark.parametrize("tanh", [True, False])
@pytest.mark.parametrize(("fracs", "views"), list(itertools.product((1, 2, 3), (1, 2))))
def test_hc_equals_the_package(fracs, views, tanh, writes):
    options = {
        "num_fracs": fracs, "num_input_views": views, "tanh": tanh, "layer_index": 1,
        "add_branch_out_to_residual": writes,
    }  # fmt: skip
    pair = (kind(S, dim=C, **options) for kind in (PackageHC, HyperConnections))
    assert_same(*pair, both, inputs_of("hc"))


MHC_OPTIONS = [
    {},
    {"log_domain_sinkhorn": True},
    {"sinkhorn_iters": 3},
    {"num_dynamic_alpha_proposals": 3},
    {"add_branch_out_to_residual": False},
    {"residual_mix_constraint_fn": lambda t: t.softmax(-2)},
    {"residual_mix_constraint_fn": lambda t: t.softmax(-2), "num_dynamic_alpha_proposals": 2},
    {"depth_residual_fn": lambda new, old: new * 2 - old},
]


@pytest.mark.parametrize("options", range(len(MHC_OPTIONS)))
@pytest.mark.parametrize("family", ["mhc", "mhc2"])
def test_mhc_equals_the_package(family, options):
    options = MHC_OPTIONS[options] | {"layer_index": 1}
    pair = (kind[family](S, dim=C, **options) for kind in (PACKAGE, FAMILIES))
    assert_same(*pair, both, inputs_of(family))


V2_OPTIONS = [
    {"num_fracs": 2},
    {"num_fracs": 3, "num_dynamic_alpha_proposals": 2},
    {"mix_streams_before_norm": True},
    {"mix_streams_before_norm": True, "num_fracs": 2, "num_dynamic_alpha_proposals": 2},
    {"use_triton_sinkhorn": True},
]


@pytest.mark.parametrize("options", range(len(V2_OPTIONS)))
def test_mhc_v2_equals_the_package(options):
    options = V2_OPTIONS[options] | {"layer_index": 1}
    pair = (kind["mhc2"](S, dim=C, **options) for kind in (PACKAGE, FAMILIES))
    assert_same(*pair, both, inputs_of("mhc2"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spatial", [(), (3, 2)])
def test_any_number_of_positions(family, spatial):
    pair = (kind[family](S, dim=C, layer_index=1) for kind in (PACKAGE, FAMILIES))
    assert_same(*pair, both, inputs_of(family, spatial))


@pytest.mark.parametrize("family", ["mhc", "mhc2"])
def test_residual_transform(family):
    def make(kind):
        torch.manual_seed(0)
        return kind[family](S, dim=C, layer_index=0, residual_transform=nn.Linear(C, C))

    assert_same(make(PACKAGE), make(FAMILIES), both, inputs_of(family))


CASES = [
    (family, f, v, first, p)
    for family, f, v, first, p in itertools.product(
        FAMILIES, (1, 2, 3), (1, 2), (False, True), (1, 2)
    )
    if not (family == "hc" and p > 1) and not (family == "mhc2" and first)
]


@pytest.mark.parametrize(("family", "fracs", "views", "first", "proposals"), CASES)
def test_every_combination_follows_the_formula(family, fracs, views, first, proposals):
    """Also where the package crashes or is wrong; 2-D positions."""
    options: dict = {"num_fracs": fracs, "num_input_views": views, "layer_index": 1}
    if family != "hc":
        options["num_dynamic_alpha_proposals"] = proposals
    if family == "mhc2":
        options["mix_streams_before_norm"] = True
    else:
        options["channel_first"] = first
    module = randomised(FAMILIES[family](S, dim=C, **options))
    step = formula_step(Formula(family, fracs, views), family != "mhc2", first)
    inputs = inputs_of(family, (3, 2), first)
    assert_equal(run(module, both, inputs), run(module, step, inputs))


def package_crashes(kind, inputs, **options):
    with pytest.raises(Exception), in_float64():  # noqa: B017  (einops', torch's, whatever)
        both(randomised(kind(S, dim=C, **options)), *inputs)


class TestDefectsOfThePackage:
    """Each test states one; what ours does instead is in the test above."""

    @pytest.mark.parametrize("family", ["mhc", "mhc2"])
    def test_views_crash_its_mhc(self, family):
        package_crashes(PACKAGE[family], inputs_of(family), num_input_views=2)

    def test_channel_first_crashes_its_mhc(self):
        inputs = inputs_of("mhc", (3, 2), True)
        package_crashes(PackageMHC, inputs, channel_first=True)

    def test_channel_first_crashes_its_fractions(self):
        inputs = inputs_of("hc", (3, 3), True)
        package_crashes(PackageHC, inputs, channel_first=True, num_fracs=2)

    def test_channel_first_adds_its_branch_output_up_over_positions(self):
        x, y = inputs_of("hc", (3,), True)
        y[..., 1:] = 0
        theirs = randomised(PackageHC(S, dim=C, channel_first=True))
        ours = HyperConnections(S, dim=C, channel_first=True).double()
        ours.load_state_dict(theirs.state_dict())
        written = [both(m, x, y)[1] - both(m, x, 0 * y)[1] for m in (theirs, ours)]
        assert written[0][..., 1:].abs().max() > 0.1  # positions whose branch output is zero
        assert written[1][..., 1:].abs().max() == 0

    def test_views_of_channel_first_come_out_as_channels_first_of_all(self):
        x, _ = inputs_of("hc", (3,), True)
        options = {"dim": C, "channel_first": True, "num_input_views": 2}
        assert PackageHC(S, **options).double()(x)[0].shape == (B, C, 2, 3)
        assert HyperConnections(S, **options).double()(x)[0].shape == (2, B, C, 3)

    def test_fractions_of_its_mhc_are_not_doubly_stochastic(self):
        """Equal fractions of equal streams stay so under any doubly stochastic mix."""
        x = draw(B, 1, 5, C // 2).expand(B, S, 5, C // 2).reshape(B * S, 5, C // 2).repeat(1, 1, 2)
        y = torch.zeros(B, 5, C, dtype=torch.float64)
        theirs = randomised(PackageMHC(S, dim=C, num_fracs=2))
        ours = mHC(S, dim=C, num_fracs=2).double()
        ours.load_state_dict(theirs.state_dict())
        with in_float64():
            assert (both(theirs, x, y)[1] - x).abs().max() > 0.1
        assert (both(ours, x, y)[1] - x).abs().max() < 1e-3  # 20 iterations on one side

    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_fraction_reads_one_fraction_at_its_start(self, family):
        """With one stream and HC's linear read, the branch should see its input unchanged."""
        f = 3
        ours = FAMILIES[family](1, dim=C, num_fracs=f, layer_index=0)
        theirs = PACKAGE[family](1, dim=C, num_fracs=f, layer_index=0)
        x = torch.eye(f, C // f).flatten().expand(B, 5, C)  # fraction k is unit vector k
        x = x.unsqueeze(-2) if family == "mhc2" else x
        weights = [m(x)[0].unflatten(-1, (f, -1))[0, 0, :, :f] for m in (theirs, ours)]
        own = list(range(f))
        assert weights[0].argmax(-1).tolist() != own and weights[1].argmax(-1).tolist() == own
        assert family != "hc" or torch.equal(weights[1], torch.eye(f))

    def test_its_hc_fractions_lose_streams_at_the_start(self):
        """With a branch of zeros nothing should change; theirs copies fraction 0 over others."""
        x, y = draw(B * S, 5, C).float(), torch.zeros(B, 5, C)
        step = [both(kind(S, dim=C, num_fracs=2), x, y)[1] for kind in (PackageHC, FAMILIES["hc"])]
        assert (step[0] - x).abs().max() > 0.1
        assert torch.equal(step[1], x)


@pytest.mark.parametrize("family", FAMILIES)
def test_starts_as_the_package(family):
    options = {"dim": C, "layer_index": 6}
    theirs, ours = (kind[family](S, **options).state_dict() for kind in (PACKAGE, FAMILIES))
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_a_layer_without_an_index_is_reproducible():
    def starts():
        torch.manual_seed(3)
        return [HyperConnections(S, dim=C).static_alpha[:, 0].argmax() for _ in range(20)]

    assert starts() == starts() and len(set(map(int, starts()))) > 1
