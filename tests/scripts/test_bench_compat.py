"""The drop-ins' benchmark runs on tiny shapes, and its record renders."""

import json

from scripts.bench_compat import main


def test_tiny_run(tmp_path, capsys):
    file = tmp_path / "compat.json"
    main(["--device", "cpu", "--eager", "--quick", "--commit", "abc", "--json", str(file)])
    out = capsys.readouterr().out
    data = json.loads(file.read_text())
    assert json.loads(out.splitlines()[-1]) == data and data["failed"] == {}
    assert data["machine"]["git_commit"] == "abc"
    by_way = {(r["op"], r["way"]): r for r in data["records"]}
    for record in data["records"]:
        assert record["forward_ms"] > 0 and record["train_ms"] > 0
    for op in ("sinkhorn", "sinkhorn, 16 matrices"):
        # plain autograd keeps every iterate, ours the input, which the caller holds anyway
        assert by_way[op, "PyTorch"]["saved_mb"] > 20 * by_way[op, "ours"]["saved_mb"]
    assert by_way["stream mix", "ours"]["forward_floor_ms"] > 0
    main(["--render", str(file)])
    rendered = capsys.readouterr().out
    assert "| 1.85 → 0.32 |" in rendered and "| HyperConnections(mhc=True) | ours |" in rendered
