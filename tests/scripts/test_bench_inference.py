"""The inference benchmark runs on a tiny net, and what it times is what the model computes."""

import json

import pytest
import torch

from profiles.inference import Phase, build, call_of
from scripts.bench_inference import CPU_NET, main


def test_tiny_run(tmp_path, capsys):
    file = tmp_path / "inference.json"
    main(["--device", "cpu", "--presets", "residual", "mhc", "--json", str(file)])
    data = json.loads(file.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == data
    records = {(r["preset"], r["phase"]): r for r in data["inference"]}
    phases = ["prefill 1×8", "prefill 1×32", "decode 1×1", "decode 8×1"]
    assert list(records) == [(preset, phase) for preset in ("residual", "mhc") for phase in phases]
    for (_, phase), record in records.items():
        batch, _, tokens = phase.split()[1].partition("×")
        count = int(batch) * int(tokens)
        assert record["tokens_per_s"] == pytest.approx(count / record["ms"] * 1e3)
    main(["--render", str(file)])
    ours, base = records["mhc", "decode 1×1"], records["residual", "decode 1×1"]
    more = (ours["ms"] / base["ms"] - 1) * 100
    assert f"{ours['tokens_per_s']:.0f} ({more:+.1f} % time)" in capsys.readouterr().out


def test_calls_repeat_and_stand_where_they_say():
    model = build(CPU_NET, "mhc", "cpu")
    dtypes = {(".hc_" in name, p.dtype) for name, p in model.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    for phase, at in ((Phase("prefill", 1, 8), 0), (Phase("decode", 2, 1), 16)):
        seen = []

        def run(tokens, cache, seen=seen):
            seen.append((tuple(tokens.shape), cache.length.tolist()))
            return model(tokens, cache=cache)

        call = call_of(model, run, phase, "cpu")
        assert torch.equal(call(), call())
        assert seen == [((phase.batch, phase.tokens), [at] * phase.batch)] * 2
