"""The integrations' benchmark runs on tiny models without compiling, and its record renders."""

import json

import pytest

pytest.importorskip("transformers")
from profiles import integration_bench
from scripts.bench_integrations import main

EAGER = ["original, eager", "ours, eager"]


def broken(network):
    raise RuntimeError("no such backend")


def test_tiny_run(tmp_path, capsys, monkeypatch):
    """Ours takes the original's place, and a way that fails is told, not fatal."""
    failing = integration_bench.Way(False, broken)
    monkeypatch.setitem(integration_bench.WAYS, "original, torch.compile", failing)
    file = tmp_path / "integrations.json"
    ways = [*EAGER[::-1], "original, torch.compile"]
    options = ["--device", "cpu", "--commit", "abc", "--repeats", "1", "--ways", *ways]
    main([*options, "--json", str(file)])
    out = capsys.readouterr().out
    data = json.loads(file.read_text())
    assert json.loads(out.splitlines()[-1]) == data and data["failed"] == {}
    assert data["machine"]["git_commit"] == "abc"
    records = {(r["model"], r["way"]): r for r in data["integrations"]}
    assert len(records) == 3 * len(integration_bench.MODELS)
    for model in integration_bench.MODELS:
        assert "no such backend" in records[model, "original, torch.compile"]["failed"]
        assert records[model, EAGER[0]]["difference"] == 0
        ours = records[model, EAGER[1]]
        assert 0 < ours["worst_difference"] < 1e-4 and ours["step_ms"] > 0
    main(["--render", str(file)])
    rendered = capsys.readouterr().out
    assert "| Llama → mHC, 4 × 32 | original, eager |" in rendered and "| 1.00 |" in rendered
    assert "Not measured: HY-V4, original, torch.compile (RuntimeError: no such" in rendered


def test_logits_that_differ_are_not_timed(monkeypatch):
    monkeypatch.setattr(integration_bench, "TOLERANCE", -1.0)
    batch = integration_bench.Batch(2, 8, 64)
    (record,) = integration_bench.measure_model("llama", [EAGER[0]], 1, batch, "cpu", 1)
    assert "logits must agree" in record["failed"] and "step_ms" not in record
