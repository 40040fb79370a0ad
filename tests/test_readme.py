"""The README's before and after run as they stand, and its preset table is complete."""

import re
from pathlib import Path

import torch
from torch import nn

import hc_compile as hc
from scripts import recorded_tables

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


def test_benchmark_tables_are_recorded_runs():
    """Marked tables are their records to the digit; README.md has no other table of figures."""
    marked = 0
    for name in recorded_tables.READMES:
        text = (ROOT / name).read_text()
        assert recorded_tables.written(text) == text, f"{name}: python -m scripts.recorded_tables"
        assert text.count("<!-- table: ") == len(recorded_tables.MARKED.findall(text)), name
        marked += len(recorded_tables.MARKED.findall(text))
    assert marked >= 3
    rest = recorded_tables.MARKED.sub("", README)
    assert not re.search(r"^\|.*\| [\d.]+ \|", rest, re.M)


def test_a_marker_may_choose_records():
    file = "peers_h100_2026-11-27.json"
    rows = recorded_tables.table(f"{file} sublayer width=2560 'way=ours, eager|eager PyTorch'")
    assert len(rows.splitlines()) == 2 + 2 and "torch.compile" not in rows
