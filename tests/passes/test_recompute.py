"""Recompute in compiled graphs: equal results, what is kept, what runs again, clear errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import hc_compile as hc
from hc_compile import backend
from hc_compile.backend import hc_inductor
from hc_compile.passes.recompute import Recompute
from hc_compile.recompute import plan
from profiles.saved import saved_by
from tests.passes.harness import assert_equal, results
from tests.passes.test_edges import Block, through
from tests.passes.test_pipeline import net_and_input
from tests.test_presets import DIM, Net, draw

ROOT = Path(__file__).parent.parent.parent
X = torch.empty(2, 5, 4, DIM, dtype=torch.float64)
ONE = X.numel() * X.element_size()


@pytest.mark.parametrize(
    "name, policy, streams",
    [
        ("mhc", "none", 3),
        ("mhc", "coefficients", 3),
        ("mhc", "streams", 1),
        ("shc", "streams", 1),
        pytest.param("fhc", "streams", 1, marks=pytest.mark.full),
        ("mhc-v4.1", "none", 3),
        ("mhc-v4.1", "streams", 1),
    ],
)
def test_nothing_changes_and_less_is_kept(name, policy, streams):
    net, h = net_and_input(name, 4, layers=4)
    compiled, kept = saved_by(net, policy, X)
    assert_equal(results(compiled, net, h), results(net, net, h))
    assert kept.streams == streams * ONE
    numbers = kept.coefficients // (4 * 8 * X.shape[:-2].numel())  # a token and sublayer
    assert (numbers > 4) == (policy == "none")


def test_a_carried_state_and_a_lone_post():
    """Seams that the module makes, and a monitor that needs streams which are not kept."""
    net, h = net_and_input("mhc", 4, layers=5)
    blocks = [Block(*pair) for pair in zip(net.connections, net.branches, strict=True)]

    def function(h):
        state = hc.StreamState(net.expand(h))
        for block in blocks[:3]:
            state = block(state)
        x = hc.resolve(state)
        return through(net, blocks, h), x.tanh()

    compiled, kept = saved_by(function, "streams", X)
    assert_equal(results(compiled, net, h), results(function, net, h))
    assert kept.streams <= 5 * ONE


def test_32_sublayers_keep_a_fifth_and_run_no_branch_again():
    sublayers = 32
    net = Net(hc.HCConfig(DIM, 4, "mhc"), sublayers)
    net.branches = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(sublayers))
    compiled, kept = saved_by(net, "streams", X.float())
    compiled(draw(2, 5, DIM).requires_grad_()).sum().backward()
    assert 0 < kept.streams / (ONE // 2) <= 0.2 * sublayers
    assert kept.coefficients < 0.05 * kept.streams
    assert kept.backward["aten.addmm.default"] == 0


@pytest.mark.full
def test_64_sublayers_keep_a_fifth():
    net = Net(hc.HCConfig(DIM, 4, "mhc"), 64)
    compiled, kept = saved_by(net, "streams", X.float())
    compiled(draw(2, 5, DIM).requires_grad_()).sum().backward()
    assert 0 < kept.streams / (ONE // 2) <= 0.2 * 64


@pytest.mark.parametrize("preset", ["mhc", "mhc-v4.1"])
@pytest.mark.parametrize("policy, kept, written", [("none", 7, 0), ("streams", 3, 4)])
def test_kernels_of_a_gpu(policy, kept, written, preset):
    """Kernels are opaque, and nothing wider than x is kept; only the streams between run again.

    Every boundary, those at the ends, too, has its backward in one kernel. The row that is left of
    the last streams is kept (a mean's after its scaling): to have it again is to read them.
    """
    command = [sys.executable, "-m", "tests.partitioned", "8", policy, preset]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kept"] == kept and found["rows"] == (preset == "mhc-v4.1")
    assert found["forward"]["hc_post_project"] == 7
    assert found["backward"].get("hc_post_project", 0) == written
    assert found["backward"]["hc_boundary_backward"] == 7
    assert "hc_aggregate" not in found["backward"]  # what a branch reads is the branch's


@pytest.mark.compile
def test_inductor_obeys():
    """The streams between two sublayers are made again from h and the branch's output, in C++."""
    net, h = net_and_input("mhc", 4, layers=2)
    expected = results(net, net, h)
    saved = []
    with torch._inductor.config.patch(force_disable_caches=True):
        step = hc.compile(net, recompute="streams", fullgraph=True)

        def function(h):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                return step(h)

        def keep(tensor):
            saved.append(tensor.shape)
            return tensor

        assert_equal(results(function, net, h), expected)
    assert saved and saved.count(X.shape) == 0


def test_dynamic_shapes_are_planned_by_their_first_sizes():
    net, h = net_and_input("mhc", 4, layers=4)
    torch._dynamo.mark_dynamic(h, 1)
    compiled, kept = saved_by(net, 2 * ONE, X)
    assert_equal(results(compiled, net, h), results(net, net, h))
    assert kept.streams == ONE
    more = draw(2, 9, DIM, seed=2, dtype=torch.float64).requires_grad_()
    with torch.compiler.set_stance("fail_on_recompile"):
        ours = results(compiled, net, more)
    assert_equal(ours, results(net, net, more))


def test_every_way_to_ask_reaches_inductor(monkeypatch):
    given = []

    def inductor(graph_module, inputs, inner, config_patches):
        given.append(config_patches["joint_custom_post_pass"])
        return graph_module

    monkeypatch.setattr(backend, "compile_fx", inductor)
    net, h = net_and_input("mhc", 4, layers=1)
    options = {"recompute": "streams", "joint_custom_post_pass": print}
    torch.compile(net, backend=hc_inductor, options=options)(h)
    hc.compile(net, recompute="streams")(h)
    hc.compile(net, recompute="streams", mode="reduce-overhead")(h)
    hc.compile(net, recompute=7, options={"max_fusion_size": 8})(h)
    hc.compile(net)(h)
    assert [joint.policy for joint in given] == ["streams", "streams", "streams", 7, "none"]
    assert [joint.then for joint in given] == [print, None, None, None, None]


def test_plans():
    """√(nL/(n+2)) of 64 sublayers is 6.5; bytes take the cheapest plan that fits."""
    assert plan("none", 64, 4, 100, 1) == 0
    assert plan("coefficients", 64, 4, 100, 1) == 1
    assert plan("streams", 64, 4, 100, 1) == 7
    assert [plan(size, 10, 4, 100, 1) for size in (1010, 1009, 1000, 999, 500, 499, 100)] == [
        0, 1, 1, 2, 2, 3, 10,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="recompute must be at least 100 bytes, one x, got 99"):
        plan(99, 10, 4, 100, 1)


@pytest.mark.parametrize(
    "value, error, text",
    [
        ("all", ValueError, "recompute must be one of .* got 'all'"),
        (0, ValueError, "positive number of bytes, got 0"),
        (True, TypeError, "got bool"),
        (1.5, TypeError, "got float"),
        (None, TypeError, "got NoneType"),
    ],
)
def test_bad_policies_are_refused(value, error, text):
    with pytest.raises(error, match=text):
        hc.compile(nn.Identity(), recompute=value)
    with pytest.raises(error, match=text), hc.recomputing(value):
        pass


def test_a_budget_below_one_x_is_refused_when_compiling():
    net, h = net_and_input("mhc", 4)
    with pytest.raises(Exception, match=f"recompute must be at least {ONE} bytes"):
        saved_by(net, ONE - 1, X)[0](h)


def test_the_cache_key_knows_the_policy_and_the_users_pass():
    assert Recompute("streams").uuid() != Recompute("coefficients").uuid()
    assert Recompute("streams").uuid() == Recompute("streams").uuid()
    seen = []
    own = Recompute("streams", then=seen.append)
    assert own.uuid() is None
    graph = torch.fx.symbolic_trace(nn.Identity()).graph
    own(graph)
    assert seen == [graph]
