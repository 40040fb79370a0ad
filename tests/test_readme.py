"""The README's before and after run as they stand, and its preset table is complete."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import hc_compile as hc

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def run_block(number):
    """The Block class of one of the README's Python blocks, and its names."""
    names = {"nn": nn}
    exec(re.findall(r"```python\n(.*?)```", README, re.S)[number], names)
    return names


def parts(block):
    """Give a block its two branches and norms."""
    torch.manual_seed(0)
    block.norm1, block.norm2 = nn.LayerNorm(512), nn.LayerNorm(512)
    block.attn, block.mlp = nn.Linear(512, 512), nn.Linear(512, 512)
    return block


def test_after_equals_before_at_init():
    before, names = parts(run_block(0)["Block"]()), run_block(1)
    after, cfg = parts(names["Block"]()), names["cfg"]
    after.hc1 = hc.HyperConnection(cfg, layer_index=0)
    after.hc2 = hc.HyperConnection(cfg, layer_index=1)
    h = torch.randn(2, 3, 512)
    out = hc.reduce_streams(after(hc.expand_streams(h, cfg)), cfg)
    torch.testing.assert_close(out, before(h), rtol=1e-5, atol=1e-5)


def test_preset_table_lists_every_preset():
    rows = re.findall(r"^\| ((?:`[\w.-]+`(?:, )?)+) \|.*\| ([^|]+) \|$", README, re.M)
    listed = {name: end for names, end in rows for name in re.findall(r"`([\w.-]+)`", names)}
    assert list(listed) == list(hc.PRESETS)
    for name, row in hc.PRESETS.items():
        assert row.equals_residual == (not listed[name].startswith("no")), name


def test_code_you_already_have_imports():
    lines = re.findall(r"\| `(from hc_compile[\w. ]+ import [\w, ]+)` \|$", README, re.M)
    assert len(lines) == 6
    for line in lines:
        exec(line, {})


@pytest.mark.parametrize(
    "module, recorded, least",
    [
        ("scripts.bench_ops", "sublayer_h100_2026-11-23.json", 20),
        ("scripts.bench_model", "model_h100_2026-11-23.json", 4),
    ],
)
def test_benchmark_tables_are_recorded_runs(module, recorded, least):
    """Figures in the README come from recorded files, to the digit."""
    command = [sys.executable, "-m", module, "--render", f"profiles/results/{recorded}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(rows) >= least
    assert all(row in README for row in rows)
