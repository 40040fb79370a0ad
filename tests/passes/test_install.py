"""hc.install(): plain torch.compile runs the passes, with the user's own pass, cached safely."""

import pickle

import pytest
import torch
from torch._inductor import config as inductor_config
from torch.utils.checkpoint import CheckpointPolicy

import hc_compile as hc
from hc_compile.passes import PASSES, PassPipeline
from hc_compile.passes.recompute import annotate
from tests.passes.harness import count
from tests.passes.test_fuse_post_pre import assert_close, run
from tests.test_presets import DIM, Net, draw


@pytest.fixture(autouse=True)
def _configuration():
    """Leave Inductor as it was, and compile afresh: a cache hit would skip the passes."""
    none = {"pre_grad_custom_pass": None, "joint_custom_post_pass": None}
    with inductor_config.patch(**none, force_disable_caches=True):
        yield


class Seen:
    """A user's pass: what it was shown."""

    def __init__(self):
        self.calls = {}

    def __call__(self, graph):
        count(graph.owning_module, self.calls)


@pytest.mark.compile
def test_plain_compile_fuses_and_the_users_pass_sees_it():
    net, h = Net(hc.HCConfig(DIM, 3, "shc"), layers=3), draw(3, DIM)
    eager = run(net, net, h)
    own = inductor_config.pre_grad_custom_pass = Seen()
    hc.install()
    hc.install()
    assert_close(eager, run(torch.compile(net), net, h))
    assert own.calls.get("post_pre") == 2
    hc.uninstall()
    assert inductor_config.pre_grad_custom_pass is own
    own.calls.clear()
    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(net)(h)
    assert own.calls and "post_pre" not in own.calls
    hc.uninstall()
    assert inductor_config.pre_grad_custom_pass is own


@pytest.mark.compile
def test_backend_does_not_run_installed_passes_twice():
    net, h = Net(hc.HCConfig(DIM, 2, "shc"), layers=2), draw(3, DIM)
    runs = []

    def once(graph):
        runs.append(graph)
        return False

    once.__name__ = "once"
    hc.install([once])
    torch.compile(net)(h)
    assert len(runs) == 1
    torch.compiler.reset()
    hc.compile(net)(h)
    assert len(runs) == 1  # the backend has its own pipeline


def test_lists_of_passes():
    """From torch 2.13 the configuration also holds lists."""
    own = Seen()
    assert PassPipeline(then=[own, PassPipeline()]).uuid() is None
    inductor_config.pre_grad_custom_pass = PassPipeline(then=own)
    hc.install(PASSES[:1])
    installed = inductor_config.pre_grad_custom_pass
    assert installed.passes == (*PASSES[:1], annotate)
    assert installed.then is own


class Joint:
    """A user's joint pass: the nodes that it was shown as tagged."""

    def __init__(self):
        self.tagged = []

    def __call__(self, graph):
        self.tagged.extend(n.meta["recompute"] for n in graph.nodes if "recompute" in n.meta)


@pytest.mark.compile
def test_plain_compile_keeps_the_row_that_is_left():
    """As hc.compile does without a policy; a joint pass of the user's runs after ours."""
    net, h = Net(hc.HCConfig(DIM, 4, "mhc-v4.1"), layers=3), draw(3, DIM)
    own = inductor_config.joint_custom_post_pass = Joint()
    eager = run(net, net, h)
    hc.install()
    hc.install()
    assert_close(eager, run(torch.compile(net), net, h))
    assert own.tagged == [CheckpointPolicy.MUST_SAVE]
    own.tagged.clear()
    torch.compiler.reset()
    hc.compile(net)(h).sum().backward()  # the backend has its own
    assert own.tagged == [CheckpointPolicy.MUST_SAVE]
    hc.uninstall()
    assert inductor_config.joint_custom_post_pass is own
    own.tagged.clear()
    torch.compiler.reset()
    torch.compile(net)(h).sum().backward()
    assert own.tagged == []


def test_cache_keys_carry_the_sources():
    """Where uuid() is not asked for, Inductor pickles the pass into its key."""
    assert pickle.dumps(PassPipeline()) == pickle.dumps(PassPipeline())
    changed = PassPipeline()
    changed.identity = (b"other", *changed.identity[1:])
    assert pickle.dumps(changed) != pickle.dumps(PassPipeline())
    assert PassPipeline(PASSES[:0]).uuid() != PassPipeline().uuid()
