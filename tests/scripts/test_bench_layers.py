"""The layer benchmark runs on tiny sizes, its ways compute the same, and its figures fit."""

import json

import pytest
import torch

from hc_compile.layers import compute_memory_footprint
from profiles.layer_bench import CASES
from profiles.memory_bench import rotary_cache_mb
from scripts import bench_layers


def test_tiny_run_records_and_renders(tmp_path, capsys):
    file = tmp_path / "layers.json"
    with torch._dynamo.config.patch(disable=True):  # the compiled ways run their eager code
        bench_layers.main(["--device", "cpu", "--commit", "abc", "--json", str(file)])
    out = capsys.readouterr().out
    data = json.loads(file.read_text())
    assert json.loads(out.splitlines()[-1]) == data
    assert data["machine"]["git_commit"] == "abc"
    ways = [(case, way) for case in CASES for way in ("eager", "Inductor", "hc.compile")]
    ways[-2] = (ways[-2][0], "hc.compile, watched")
    assert [(r["case"], r["way"]) for r in data["layers"]] == ways
    for record in data["layers"]:
        assert record["difference"] < 1e-5
        assert record["train_launches"] > record["forward_launches"] > 0
        assert (record["x_floor"] is None) == record["case"].startswith("mHC")
    kept, again = data["memory"][:2]
    assert kept["model"] == again["model"] and again["checkpointed"]
    assert again["estimated_activation_mb"] < kept["estimated_activation_mb"]
    bench_layers.main(["--render", str(file)])
    printed = capsys.readouterr().out
    first = data["layers"][0]
    assert f"| RMSNorm | 32×32 | eager | {first['forward_ms']:.4f} |" in printed
    assert "50.3 MB of their own, 2.1 MB shared" in printed


def test_estimate_of_a_row_is_the_public_functions():
    model = bench_layers.CPU_MODELS[0]
    record = bench_layers.measure_memory(model, "cpu", 1)
    torch.manual_seed(0)
    found = compute_memory_footprint(model.build("cpu"), model.batch, model.length)
    assert record["estimated_mb"] == pytest.approx(found["estimated_training_mb"])
    assert record["measured_mb"] is None


def test_rotary_cache_is_24_times_smaller_when_shared():
    found = rotary_cache_mb(24, 64, 8192)
    assert found["own"] == 24 * found["shared"]


def test_a_failing_peer_is_noted_and_anything_else_ends_the_run(monkeypatch):
    def failing(after):
        def measure(name, *_):
            for way in ("eager", "hc.compile")[:after]:
                yield {"case": name, "way": way, "train_ms": 1.0}
            raise RuntimeError("no kernel")

        return measure

    size, effort = bench_layers.CPU_SIZE, bench_layers.Effort()
    monkeypatch.setattr(bench_layers, "measure_case", failing(2))
    records = bench_layers.bench_layers([size], "cpu", effort, lambda records: None)
    assert [r["failed"] for r in records if "failed" in r] == ["no kernel"] * len(CASES)
    monkeypatch.setattr(bench_layers, "measure_case", failing(1))
    with pytest.raises(RuntimeError, match="no kernel"):
        bench_layers.bench_layers([size], "cpu", effort, lambda records: None)
