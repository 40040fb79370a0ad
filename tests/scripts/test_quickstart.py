"""The main job, tiny: three paths, table, plot, traces and record."""

import json

import pytest
import torch

from profiles.compare import main as compare
from scripts.quickstart import PATHS, main
from scripts.report import path_record, table

TINY = "--device cpu --dim 16 --layers 1 --batch 2 --length 16 --steps 6".split()


def run(tmp_path, *options):
    text = tmp_path / "words.txt"
    text.write_text("streams in, streams out. " * 400)
    main([*TINY, "--text", str(text), "--out", str(tmp_path / "out"), *options])
    return json.loads((tmp_path / "out" / "quickstart.json").read_text())


@pytest.mark.compile
def test_three_paths_agree_and_leave_their_record(tmp_path, capsys):
    data = run(tmp_path, "--iterations", "3")
    printed = capsys.readouterr().out
    assert list(data["paths"]) == list(PATHS) == ["eager", "compiled", "custom-op"]
    for name, path in data["paths"].items():
        assert path["first_logits_difference"] < 1e-5, name
        assert path["largest_loss_difference"] < 1e-4, name
        assert path["peak_bytes"] > 0 and path["step_ms"] > 0
        assert len(path["losses"]) == 6
    # each path really ran its own code
    names = {
        name: " ".join(kernel["name"] for kernel in path["trace"]["kernels"])
        for name, path in data["paths"].items()
    }
    assert "cpp_fused" not in names["eager"] and "hc::" not in names["eager"]
    assert "cpp_fused" in names["compiled"] and "hc::" not in names["compiled"]
    assert "cpp_fused" in names["custom-op"] and "hc::" in names["custom-op"]
    assert (
        data["paths"]["compiled"]["trace"]["launches"]
        < 0.5 * (data["paths"]["eager"]["trace"]["launches"])
    )
    assert "custom-op (ops, decomposed)" in printed and "eager → custom-op" in printed
    assert (tmp_path / "out" / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    compare([str(tmp_path / "out" / name) for name in PATHS])


def test_record_places_its_numbers(tmp_path, capsys):
    data = run(tmp_path, "--paths", "eager", "--preset", "residual", "--seed", "3")
    assert data["preset"] == "residual" and data["training"]["seed"] == 3
    machine = data["machine"]
    assert machine["versions"]["torch"] and machine["cores"] >= 1 and machine["date"]
    assert machine["hardware"] in capsys.readouterr().out
    assert data["sample"].startswith("streams in, streams out. streams")


class Fixed:
    """An outcome with known numbers."""

    def __init__(self, losses, shift):
        self.losses, self.final_loss = losses, losses[-1]
        self.median_seconds, self.compile_seconds = 0.5, 2.0
        self.step_seconds = [0.5] * len(losses)
        self.first_logits = torch.zeros(2) + shift
        self.peak_bytes, self.held_out, self.cached = 3 * 2**20, 1.0, True
        self.result, self.trace = self, self

    def to_json(self):
        return {}


def test_differences_are_the_largest_from_the_first_path():
    base, other = Fixed([3.0, 2.0, 1.0], 0.0), Fixed([3.0, 1.5, 1.25], -0.125)
    row = path_record(other, base, tokens_per_step=100, label="other")
    assert row["largest_loss_difference"] == 0.5
    assert row["first_logits_difference"] == 0.125
    assert row["tokens_per_second"] == 200
    line = table({"paths": {"compiled": row}}).splitlines()[2].split()
    assert line == [
        "other",
        "500.0",
        "200",
        "3",
        "2.0",
        "(cached)",
        "1.2500",
        "5.0e-01",
        "1.2e-01",
    ]
