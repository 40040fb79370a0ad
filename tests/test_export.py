"""Models that leave this process: exported, packaged without Python, compiled once for others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor import aoti_compile_and_package
from torch._inductor import config as inductor_config

import hc_compile as hc
from hc_compile.passes import PassPipeline
from tests.away import WIDTH, model
from tests.passes.harness import count
from tests.passes.test_pipeline import net_and_input
from tests.test_presets import DIM, draw

ROOT = Path(__file__).parent.parent
FUSED = {"project": 1, "constrain": 1, "post": 1, "post_pre": 3}


def process(*command, cwd=ROOT, **environment):
    """The JSON that a fresh process prints last."""
    run = [sys.executable, *map(str, command)]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    done = subprocess.run(run, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def export(net, h):
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    with torch.no_grad():
        return torch.export.export(net.eval(), (h,), dynamic_shapes=({0: tokens},))


@pytest.mark.parametrize("name", ["mhc", "mhc-ortho", "shc", "dhc", "fhc"])
def test_the_passes_fuse_exported_programs(name):
    net, _ = net_and_input(name, 4, layers=4)
    h = draw(5, DIM, dtype=torch.float64)
    program = export(net, h).module(check_guards=False)
    count(program, before := {})
    assert (before["pre"], before["post"]) == (4, 4)
    PassPipeline()(program.graph)
    program.recompile()
    count(program, after := {})
    assert after["post_pre"] == 3
    assert name != "mhc" or after == FUSED
    with torch.no_grad():
        for rows in (2, 5, 70):
            h = draw(rows, DIM, dtype=torch.float64)
            torch.testing.assert_close(program(h), net(h), rtol=0, atol=1e-11)


class Writes(torch.nn.Module):
    """Streams written in place, directly or through a view, between two sublayers."""

    def __init__(self, net, view):
        super().__init__()
        self.net, self.view = net, view

    def forward(self, h):
        x = self.net.expand(h)
        for k, connection in enumerate(self.net.connections):
            u, add_residual = connection(x)
            x = add_residual(self.net.branches[k](u))
            if k == 1:
                (x[..., 0, :] if self.view else x).mul_(2)
        return self.net.norm(self.net.reduce(x))


@pytest.mark.parametrize("view", [False, True])
def test_writes_in_place_are_respected_in_exported_programs(view):
    net, _ = net_and_input("mhc", 4, layers=5)
    h, net = draw(5, DIM, dtype=torch.float64), Writes(net, view)
    program = export(net, h).module(check_guards=False)
    PassPipeline()(program.graph)
    program.recompile()
    count(program, after := {})
    assert after["post_pre"] == 2  # neither the seam that the write lies in nor the next
    with torch.no_grad():
        torch.testing.assert_close(program(h), net(h), rtol=0, atol=1e-11)


def test_a_saved_program_runs_in_a_fresh_process(tmp_path):
    net = model()
    torch.export.save(export(net, draw(5, WIDTH)), tmp_path / "model.pt2")
    found = process("-m", "tests.away", "exported", tmp_path / "model.pt2", 9)
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(found["out"]), net(draw(9, WIDTH)))


WITHOUT_US = """
import json, sys, torch
program = torch._inductor.aoti_load_package(sys.argv[1])
out = [program(torch.linspace(-1, 1, rows * 16).reshape(rows, 16)).tolist() for rows in (2, 300)]
assert not any(name.startswith(("hc_compile", "custom_ops")) for name in sys.modules)
print(json.dumps(out))
"""


@pytest.mark.compile
def test_a_package_runs_where_the_project_is_not_installed(tmp_path):
    """After `hc.install()`, AOTInductor's pre-grad passes are ours; ops leave none of Python."""
    net, seen = model(), {}
    with inductor_config.patch(pre_grad_custom_pass=lambda g: count(g.owning_module, seen)):
        hc.install()
        program = export(net, draw(5, WIDTH))
        aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        hc.uninstall()
    assert seen == {"project": 1, "constrain": 1, "post": 1, "post_pre": 1}
    found = process("-c", WITHOUT_US, tmp_path / "model.pt2", cwd=tmp_path)
    for rows, out in zip((2, 300), found, strict=True):
        h = torch.linspace(-1, 1, rows * WIDTH).reshape(rows, WIDTH)
        with torch.no_grad():
            torch.testing.assert_close(torch.tensor(out), net(h), rtol=1e-5, atol=1e-5)


@pytest.mark.compile
@pytest.mark.parametrize("mode", ["infer", pytest.param("train", marks=pytest.mark.full)])
def test_compiler_artifacts_serve_a_fresh_process(tmp_path, mode):
    """With a fresh cache folder AOTAutograd traces and Inductor generates nothing again."""
    file = tmp_path / "artifacts"
    away = ("-m", "tests.away")
    first = process(*away, "compile", file, mode, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "one"))
    again = process(*away, "reuse", file, mode, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "two"))
    assert (first["hit"], first["miss"]) == (0, 1) and first["generated"] > 0
    assert (again["hit"], again["miss"], again["generated"]) == (1, 0, 0)
    assert again["out"] == first["out"]
