"""The model benchmark runs on a tiny net without compiling, and its figures fit together."""

import json

import pytest
import torch

from profiles.dense_net import WAYS, Net, Trunk
from scripts.bench_model import main

NET = Net(16, heads=2, ffn=32, layers=1, batch=1, length=8, iterations=2)


def test_tiny_run(tmp_path, capsys):
    file = tmp_path / "model.json"
    files = ["--json", str(file), "--plot", str(tmp_path / "m.png")]
    main(["--device", "cpu", "--eager", "--commit", "abc", *files])
    out = capsys.readouterr().out
    data = json.loads(file.read_text())
    assert json.loads(out.splitlines()[-1]) == data
    assert data["machine"]["git_commit"] == "abc"
    steps = {r["way"]: r for r in data["model"]}
    base = steps["residual"]["step_ms"]
    for record in steps.values():
        assert record["overhead_percent"] == pytest.approx((record["step_ms"] / base - 1) * 100)
        assert record["launches"] > 0
    assert steps["ours, hc.compile"]["launches"] > steps["residual"]["launches"]
    assert (tmp_path / "m.png").stat().st_size > 0
    main(["--render", str(file)])
    assert f"| residual | 32 | {base:.2f} | +0.0 |" in capsys.readouterr().out


def test_chosen_ways(tmp_path):
    file = tmp_path / "model.json"
    main(["--device", "cpu", "--eager", "--ways", "ours, hc.compile", "--json", str(file)])
    names = [record["way"] for record in json.loads(file.read_text())["model"]]
    assert names == ["residual", "ours, hc.compile"]
    main(["--device", "cpu", "--eager", "--ways", "residual", "--json", str(file)])
    assert [r["way"] for r in json.loads(file.read_text())["model"]] == ["residual"]


def test_ways_compute_the_same_and_weights_keep_their_dtypes():
    outputs = []
    for name in ("compiled PyTorch", "ours, hc.compile"):
        torch.manual_seed(0)
        trunk = Trunk(NET, WAYS[name], "cpu")
        torch.manual_seed(1)
        outputs.append(trunk(torch.randn(1, 8, 16).bfloat16()))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=2e-2, atol=2e-2)
    for name, parameter in trunk.named_parameters():
        expected = torch.float32 if ".hc_" in name else torch.bfloat16
        assert parameter.dtype == expected, name
