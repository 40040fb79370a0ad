"""The op benchmark runs on tiny shapes, records what it says, and its check can fail."""

import copy
import json

import pytest
import torch

from profiles import tables
from scripts.bench_ops import main


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """One run on the CPU with the compiler off: the compiled ways run their eager code."""
    file = tmp_path_factory.mktemp("bench") / "ops.json"
    with torch._dynamo.config.patch(disable=True):
        options = ["--device", "cpu", "--json", str(file), "--plot", str(file.with_suffix(".png"))]
        assert main([*options, "--compile-budget", "5"]) == 0
    return file


def test_every_table_is_recorded(recorded):
    data = json.loads(recorded.read_text())
    assert {r["op"] for r in data["small"]} >= {"sinkhorn", "newton_schulz", "constrain"}
    assert {r["op"] for r in data["ops"]} >= {"project", "aggregate", "post", "pre", "post_pre"}
    assert {(r["way"], r["direction"]) for r in data["ops"]} == {
        (way, direction) for way in ("eager", "ours") for direction in ("forward", "backward")
    }
    assert [r["way"] for r in data["sublayer"]][:2] == ["eager PyTorch", "ours, eager"]
    assert "ours, hc.compile, chain of 4" in {r["way"] for r in data["sublayer"]}
    assert len(data["seam"]) == 1 and data["seam"][0]["us"] > 0
    assert recorded.with_suffix(".png").stat().st_size > 0


def test_a_run_that_ends_early_says_so_in_its_file(tmp_path):
    file = tmp_path / "small.json"
    options = ["--device", "cpu", "--tables", "small", "--seconds", "0", "--json", str(file)]
    assert main(options) == 0
    data = json.loads(file.read_text())
    assert data["failed"] == {"what follows in table small": "out of time"}
    assert len({r["op"] for r in data["small"]}) == 1


def test_floor_follows_from_the_recorded_traffic(recorded):
    data = json.loads(recorded.read_text())
    for r in data["ops"]:
        bytes_moved = r["units"] * r["tokens"] * r["width"] * 2
        assert r["gb_per_s"] == pytest.approx(bytes_moved / r["ms"] / 1e6)
        assert r["x_floor"] == pytest.approx(data["copy_gb_per_s"] / r["gb_per_s"])


def test_ours_keeps_less_than_eager(recorded):
    data = json.loads(recorded.read_text())
    saved = {r["way"]: r["saved_streams"] for r in data["sublayer"]}
    assert saved["ours, eager"] < saved["eager PyTorch"] / 2


def test_render_prints_the_recorded_figures(recorded, capsys):
    assert main(["--render", str(recorded)]) == 0
    printed, data = capsys.readouterr().out, json.loads(recorded.read_text())
    assert data["machine"]["hardware"] in printed
    for r in data["sublayer"]:
        assert f"| {r['way']} | {tables.place(r)} | {r['forward_ms']:.3f} |" in printed


def test_last_line_is_the_run_and_check_passes_against_itself(recorded, capsys, monkeypatch):
    data = json.loads(recorded.read_text())
    monkeypatch.setattr("scripts.bench_ops.run", lambda args, argv: data)
    assert main(["--device", "cpu", "--check", str(recorded)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == data


def test_check_fails_on_a_slower_run(recorded, capsys, monkeypatch):
    slower = copy.deepcopy(json.loads(recorded.read_text()))
    record = next(r for r in slower["ops"] if r["op"] == "post" and r["way"] == "ours")
    record["x_floor"] *= 1.2
    monkeypatch.setattr("scripts.bench_ops.run", lambda args, argv: slower)
    options = ["--device", "cpu", "--check", str(recorded)]
    assert main(options) == 1
    out = capsys.readouterr().out
    assert out.count("REGRESSION") == 1 and "post forward" in out
    assert main([*options, "--tolerance", "0.25"]) == 0


def test_check_needs_something_in_common(recorded):
    data = json.loads(recorded.read_text())
    with pytest.raises(ValueError, match="share at least one measurement"):
        tables.regressions(data, {"ops": []}, 0.1)
