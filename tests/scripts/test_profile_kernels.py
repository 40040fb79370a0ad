"""The script runs what ncu counts, records what ncu wrote, and names what a machine lacks."""

import contextlib
import json

import pytest
import torch

from profiles import counters
from profiles.machine import ROOT
from profiles.sublayer import Shape
from scripts import profile_kernels, recorded, recorded_tables
from tests.profiles.ncu_output import KERNELS, ncu_csv

MACHINE = {"hardware": "a GPU", "versions": {"torch": "2.11"}, "date": "2026-11-26T00:00:00"}
NCU = """#!/bin/sh
[ "$1" != --version ] || { echo "Version 2025.3.1.0 (build 1)"; exit; }
pwd | tee "$0.pwd"
printf '%s\\n' "$@" > "$0.argv"
while [ $# -gt 0 ]; do [ "$1" != --log-file ] || cp "$0.csv" "$2"; shift; done
exit $(cat "$0.status")
"""


@pytest.fixture
def ncu(tmp_path, monkeypatch):
    """A stand-in that leaves a log as ncu does, on a machine that seems to have a GPU."""
    file = tmp_path / "ncu"
    file.write_text(NCU)
    file.chmod(0o755)
    (tmp_path / "ncu.csv").write_text(ncu_csv())
    (tmp_path / "ncu.status").write_text("0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(counters, "find_ncu", lambda: str(file))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(recorded, "describe", lambda device: json.loads(json.dumps(MACHINE)))
    monkeypatch.setattr(profile_kernels, "measuring", contextlib.nullcontext)
    monkeypatch.setattr(profile_kernels, "copy_bandwidth", lambda device: 3e12)
    return file


def record():
    """A run of project forward at 3 TB/s."""
    head = {"command": "python -m scripts.profile_kernels", "machine": MACHINE}
    return head | profile_kernels.summed(counters.read(ncu_csv()), 3e12)


def test_a_run_is_recorded_with_ncus_version(ncu, tmp_path, capfd):
    file, kept = tmp_path / "kernels.json", tmp_path / "kept.csv"
    options = ["--device", "cuda", "--ops", "project", "--json", str(file), "--csv", str(kept)]
    profile_kernels.main(options)
    printed = capfd.readouterr().out
    data = json.loads(file.read_text())
    assert json.loads(printed.splitlines()[-1]) == data and printed.startswith("Counted on")
    assert data["kind"] == "profile_kernels" and data["copy_gb_per_s"] == 3000
    assert data["machine"]["versions"]["ncu"] == "2025.3.1.0"
    assert [r["kernel"] for r in data["kernels"]] == list(KERNELS)
    assert kept.read_text() == ncu_csv()
    profile_kernels.main(["--render", str(file)])
    assert capfd.readouterr().out.strip() == printed.rpartition("\n{")[0].strip()


def test_ncu_is_given_this_script_as_its_child(ncu):
    chosen = ["--ops", "project", "post_pre, delayed", "--shapes", "64x32", "8192x2560x2"]
    profile_kernels.main(["--device", "cuda", *chosen])
    argv = ncu.with_suffix(".argv").read_text().splitlines()
    child = argv[argv.index("scripts.profile_kernels") + 1 :]
    args = profile_kernels.parse(child)
    assert ncu.with_suffix(".pwd").read_text().strip() == str(ROOT)  # where its modules are
    assert args.child and args.device == "cuda"
    assert args.ops == ["project", "post_pre, delayed"]
    assert args.shapes == [Shape(64, 32, 4), Shape(8192, 2560, 2)]


def test_the_child_counts_every_op_in_both_directions(monkeypatch):
    counted = []

    def count(op, direction, shape, call):
        assert not torch.autograd.is_multithreading_enabled()
        outputs = call()
        tensors = outputs if isinstance(outputs, tuple) else (outputs,)
        assert any(t is not None and t.isfinite().all() for t in tensors)
        counted.append((op, direction, shape))

    monkeypatch.setattr(counters, "count", count)
    try:
        chosen = ["--ops", "sinkhorn", "post_pre, delayed", "--shapes", "8x16", "4x16x2"]
        profile_kernels.main(["--child", "--device", "cpu", *chosen])
    finally:
        torch.autograd.set_multithreading_enabled(True)
    assert counted == [
        (op, direction, shape)
        for op in ("sinkhorn", "post_pre, delayed")
        for shape in (Shape(8, 16, 4), Shape(4, 16, 2))
        for direction in ("forward", "backward")
    ]


def test_sums_stand_against_the_floor_of_mandatory_bytes():
    found = record()
    (op,) = found["ops"]
    assert op["micros"] == pytest.approx(3.552 + 65.888 + 4.096)
    assert op["mandatory_bytes"] == 4 * 8192 * 2560 * 2  # the streams once, in bfloat16
    assert op["floor_micros"] == pytest.approx(op["mandatory_bytes"] / 3e6)
    assert op["x_floor"] == pytest.approx(73.536 / 55.924, rel=1e-4)
    product = found["kernels"][1]
    assert product["share"] == pytest.approx(65.888 / 73.536)
    assert product["gb_per_s"] == pytest.approx((169_764_608 + 4_172_032) / 65_888)
    assert sum(r["share"] for r in found["kernels"]) == pytest.approx(1)


def test_small_matrices_have_no_floor():
    (op,) = profile_kernels.summed(counters.read(ncu_csv("sinkhorn")), 3e12)["ops"]
    assert op["x_floor"] is None and op["micros"] > 0
    data = record() | profile_kernels.summed(counters.read(ncu_csv("sinkhorn")), 3e12)
    assert "no floor: moves no streams |" in profile_kernels.table(data)


def test_render_has_a_line_a_kernel_and_the_sum():
    text = profile_kernels.render(record())
    assert "gaps between launches do not show" in text and "caches before each" in text
    assert "project forward, 8192×2560, n = 4:" in text
    cells = "65.9 | 169.8 + 4.2 | 2640 | 79 | 293.6 | 77 | 33 | 12 | 106 | 103,746"
    stalls = "long_scoreboard 1.5, barrier 1.4, wait 1.0"
    assert f"| `hc_project` | {cells} | {stalls} |" in text
    assert "| sum | 73.5 | 174.0 + 4.2 |" in text
    assert "| 1.31 × floor, 55.9 µs for 167.8 MB |" in text


def test_render_shows_dashes_for_what_is_unknown_and_says_what_spilled():
    text = ncu_csv(dram_write_bytes="n/a", registers="", shared_conflicts="n/a", spills="9,408")
    data = record() | profile_kernels.summed(counters.read(text), 3e12)
    product = next(x for x in profile_kernels.table(data).splitlines() if "`hc_project`" in x)
    assert "| 169.8 + – | – | 79 |" in product and "| –, spills | – |" in product
    assert "| sum | 73.5 | 174.0 + – |" in profile_kernels.table(data)


def test_a_readme_may_show_one_op(tmp_path, monkeypatch):
    results = tmp_path / "profiles" / "results"
    results.mkdir(parents=True)
    both = counters.read(ncu_csv()) + counters.read(ncu_csv("post_pre, delayed"))
    data = record() | profile_kernels.summed(both, 3e12)
    (results / "kernels.json").write_text(json.dumps(data))
    monkeypatch.setattr(recorded_tables, "ROOT", tmp_path)
    assert recorded_tables.table("kernels.json kernels") == profile_kernels.table(data)
    one = recorded_tables.table("kernels.json kernels op=project direction=forward")
    assert one == profile_kernels.table(record())


def test_a_machine_without_gpu_and_ncu_is_told_so(monkeypatch):
    monkeypatch.setattr(counters, "PLACES", ())
    monkeypatch.setattr(counters.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match=r"CUDA GPU that torch sees, got cpu; .*ncu must be on"):
        profile_kernels.main(["--device", "cpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit, match="profile_kernels: Nsight Compute's ncu must be on PATH"):
        profile_kernels.main(["--device", "cuda"])
    monkeypatch.setattr(counters, "find_ncu", lambda: "ncu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"must be a CUDA GPU that torch sees, got cuda$"):
        profile_kernels.main(["--device", "cuda"])


@pytest.mark.parametrize("status", ["0", "1"])
def test_ncus_own_errors_are_passed_on(ncu, status):
    log = "==PROF== Connected\n==ERROR== ERR_NVGPUCTRPERM - no permission\n"
    (ncu.parent / "ncu.csv").write_text(log)
    (ncu.parent / "ncu.status").write_text(status)
    with pytest.raises(SystemExit, match=rf"exit status {status}\); .*: ERR_NVGPUCTRPERM"):
        profile_kernels.main(["--device", "cuda"])


def test_a_failing_child_leaves_no_record(ncu, tmp_path):
    """Even where some kernels were counted before it."""
    (ncu.parent / "ncu.status").write_text("1")
    with pytest.raises(SystemExit, match="exit status 1"):
        profile_kernels.main(["--device", "cuda", "--json", str(tmp_path / "kernels.json")])
    assert not (tmp_path / "kernels.json").exists()


def test_without_options_it_counts_what_record_sh_keeps():
    args = profile_kernels.parse([])
    assert args.ops == ["project", "post_pre", "post_pre, delayed"]
    assert args.shapes == [Shape(8192, 2560, 4)]


def test_an_unknown_op_is_refused(capsys):
    with pytest.raises(SystemExit):
        profile_kernels.parse(["--ops", "nothing"])
    assert "invalid choice: 'nothing'" in capsys.readouterr().err
