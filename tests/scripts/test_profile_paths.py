"""The profile of a step in several paths, tiny: one run, a model of one's own, exit codes."""

import copy
import json

import pytest
import torch
from torch import nn

import hc_compile as hc
from profiles.capture import capture
from profiles.path_run import PATHS, available, run_path
from profiles.paths import profile, profile_workload
from profiles.trace import find_trace
from profiles.workload import Workload
from scripts.profile_paths import main
from tests.profiles.report_records import record

TINY = "--device cpu --dim 16 --layers 1 --heads 2 --batch 2 --length 8 --iterations 1".split()
QUICK = ["--steps", "2", "--traced", "1"]


@pytest.mark.compile
def test_eager_and_fused_leave_page_plot_json_and_traces(tmp_path, capsys):
    options = ["--paths", "eager,fused", "--json", "--out", str(tmp_path)]
    assert main([*TINY, *QUICK, *options]) == 0
    printed = capsys.readouterr().out
    made = json.loads((tmp_path / "report.json").read_text())
    assert json.loads(printed.splitlines()[-1]) == made
    assert made["workload"]["preset"] == "mhc" and made["workload"]["dim"] == 16
    assert made["command"].startswith("python -m scripts.profile_paths --device cpu")
    eager, fused = made["paths"]["eager"], made["paths"]["fused"]
    assert list(made["paths"]) == ["eager", "fused"]
    # each path ran its own code
    names = {
        k: " ".join(x["name"] for x in p["trace"]["kernels"]) for k, p in made["paths"].items()
    }
    assert "cpp_fused" not in names["eager"] and "hc::" not in names["eager"]
    assert "cpp_fused" in names["fused"] and "hc::" in names["fused"]
    assert fused["launches"] < eager["launches"]
    assert 0 < fused["output_difference"] < 1e-5 and 0 < fused["gradient_difference"] < 1e-4
    assert eager["output_difference"] == eager["gradient_difference"] == 0
    # compilation
    assert eager["compile"]["seconds"] is None and eager["compile"]["graphs"] == 0
    assert (fused["compile"]["graphs"], fused["compile"]["graph_breaks"]) == (1, 0)
    assert 0 < sum(fused["compile"]["phases"].values()) <= fused["compile"]["seconds"] * 1.2
    # memory, categories, ops
    for path in (eager, fused):
        peak = path["peak_bytes"] - path["resident_bytes"]
        assert max(v for _, v in path["memory_curve"]) == pytest.approx(peak)
        total = sum(c["ms"] for c in path["categories"])
        assert total == pytest.approx(path["trace"]["step_micros"] / 1e3, rel=1e-6)
        assert find_trace(tmp_path / path["trace"]["path"].split("/")[0]).exists()
    assert eager["ops"] == [] and eager["floor"] is None
    # one layer: the passes read its one stream in and write its mean without making streams
    assert {"hc::project", "hc::project_backward"} <= {op["op"] for op in fused["ops"]}
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def plain_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), torch.ones(3, 4)


def hyper_connected():
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            cfg = hc.HCConfig(8, 2, "mhc", iterations=1)
            self.expand, self.reduce = hc.StreamExpand(cfg), hc.StreamReduce(cfg)
            self.hc = hc.HyperConnection(cfg, 0, branch=nn.Linear(8, 8))

        def forward(self, h):
            return self.reduce(self.hc(self.expand(h)))

    return Workload(Net(), kwargs={"h": torch.randn(3, 8)})


def test_a_model_of_ones_own_without_hyper_connections(tmp_path, capsys):
    target = ["--model", "tests.scripts.test_profile_paths:plain_model", "--device", "cpu"]
    assert main([*target, *QUICK, "--paths", "eager,fused", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "fused is left out: the model calls no hc:: op" in printed
    made = json.loads((tmp_path / "report.json").read_text())
    assert list(made["paths"]) == ["eager"] and made["workload"]["model"] == "Sequential"
    assert made["paths"]["eager"]["trace"]["kernels"][0]["calls"] >= 1
    assert any("no HCConfig" in note for note in made["notes"])
    assert made["paths"]["eager"]["what"] == "the model as it is, no compiler"


def test_one_line_in_python(tmp_path):
    model, inputs = plain_model()
    before = [p.detach().clone() for p in model.parameters()]
    made = profile(model, inputs, out=tmp_path, paths=["eager"], steps=1, traced=1, say=str)
    assert json.loads((tmp_path / "report.json").read_text()) == made
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_eager_runs_the_plain_functions_and_leaves_the_model_as_it_was(tmp_path):
    work = hyper_connected()
    made = profile_workload(work, tmp_path, paths=["eager"], steps=1, traced=1, say=str)
    names = [k["name"] for k in made["paths"]["eager"]["trace"]["kernels"]]
    assert names and not any("hc::" in name for name in names)
    assert work.model.hc.cfg.implementation == "ops"
    ops = capture(lambda: work.model(**work.kwargs), tmp_path / "ops", steps=1, warmup=0)
    assert any("hc::" in name for name in ops.kernels)


def test_wrong_input_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="paths must be some of eager, compiled"):
        available(["eager", "fast"], has_ops=True)
    work = Workload(*plain_model()[:1], (torch.ones(3, 4),))
    with pytest.raises(ValueError, match="steps and traced must be >= 1, got 0 and 3"):
        profile_workload(work, tmp_path, steps=0)
    for compiled in (torch.compile(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))):
        if isinstance(compiled, nn.Sequential):
            compiled[0].compile()
        with pytest.raises(ValueError, match="model must not be compiled, got a compiled"):
            profile(compiled, torch.ones(1, 2), out=tmp_path)
    for wrong, text in (
        (["--model", "x:y", "--dim", "8"], "--model brings its own sizes, got --dim"),
        (["--threshold", "0"], "--threshold must be > 0"),
        (["--compare", str(tmp_path / "none.json")], "--compare must be a file"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(wrong)
        assert stopped.value.code == 2 and text in capsys.readouterr().err


def saved(folder, name, data):
    file = folder / f"{name}.json"
    file.write_text(json.dumps(data))
    return str(file)


def test_comparing_sets_the_exit_code_both_ways(tmp_path, capsys):
    slower = copy.deepcopy(record())
    slower["paths"]["fused"]["step_ms"] *= 1.5
    old, new = saved(tmp_path, "old", record()), saved(tmp_path, "new", slower)
    out = ["--out", str(tmp_path / "out")]
    assert main(["--render", new, "--compare", old, *out]) == 1
    assert "fused: step ms 0.412 → 0.619" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Against old.json" in page and "regressed" in page
    assert main(["--render", old, "--compare", new, *out]) == 0
    assert main(["--render", new, "--compare", old, "--threshold", "0.6", *out]) == 0
    assert main(["--render", new, *out]) == 0
    assert "comparison" not in json.loads((tmp_path / "out" / "report.json").read_text())


def test_comparing_other_work_is_an_error_of_its_own(tmp_path, capsys):
    other = copy.deepcopy(record())
    other["workload"]["model"] = "Other"
    files = saved(tmp_path, "old", other), saved(tmp_path, "new", record())
    assert main(["--render", files[1], "--compare", files[0], "--out", str(tmp_path)]) == 2
    assert "of the same work, got another model" in capsys.readouterr().err


def test_every_path_starts_from_the_same_weights(tmp_path, monkeypatch):
    """A path's optimizer must not hand its weights on."""
    work = hyper_connected()
    work.optimizer = lambda model: torch.optim.SGD(model.parameters(), lr=1.0)
    seen = []

    def spy(name, work, *rest):
        seen.append([p.detach().clone() for p in work.model.parameters()])
        return run_path("eager", work, *rest)

    monkeypatch.setattr("profiles.paths.run_path", spy)
    monkeypatch.setattr("profiles.paths.warm_compiler", lambda device: None)
    made = profile_workload(
        work, tmp_path, paths=["eager", "compiled"], steps=2, traced=1, say=str
    )
    assert len(seen) == 2 and all(map(torch.equal, *seen))
    assert made["paths"]["compiled"]["output_difference"] == 0
    assert PATHS["compiled"].ops == "none"
