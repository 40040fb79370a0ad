"""Comparing traces: what vanished, what appeared, tables and the command."""

import json

from profiles.capture import capture
from profiles.compare import describe, difference, format_table, main, report, shorten
from profiles.trace import Kernel, Trace, category
from tests.profiles.test_trace import square


def trace(steps=1, **kernels):
    """Kernels given as name=(calls, micros)."""
    table = {name: Kernel(name, category(name), *numbers) for name, numbers in kernels.items()}
    calls = sum(kernel.calls for kernel in table.values())
    micros = sum(kernel.micros for kernel in table.values())
    return Trace("x", "cuda", steps, calls / steps, micros / steps, 100.0, None, table)


def test_difference_by_name_and_calls_per_step():
    before = trace(gemm=(2, 9.0), relu=(1, 1.0), norm=(1, 5.0), same=(3, 2.0))
    after = trace(steps=2, gemm=(2, 9.0), triton_x=(1, 3.0), same=(6, 1.0))
    change = difference(before, after)
    assert [kernel.name for kernel in change.vanished] == ["norm", "relu"]
    assert [kernel.name for kernel in change.appeared] == ["triton_x"]
    assert [old.name for old, _ in change.changed] == ["gemm"]


def test_a_trace_does_not_differ_from_itself():
    change = difference(trace(a=(1, 1.0)), trace(a=(1, 2.0)))
    assert (change.vanished, change.appeared, change.changed) == ([], [], [])


def test_description_counts_names_and_calls_per_step():
    text = describe(trace(steps=2, a=(4, 10.0), b=(2, 2.0)), trace(b=(1, 1.0)))
    assert "vanished: 1 names, 2 calls a step" in text
    assert "appeared: 0 names, 0 calls a step" in text
    assert "called more or less often: 0 names" in text


def test_report_has_a_column_a_trace_and_every_category():
    text = report({"one": trace(gemm=(2, 2000.0)), "two": trace(triton_a=(1, 500.0))})
    assert [line.split() for line in text.splitlines()[2:5]] == [
        ["matmul", "2", "/", "2.00", "0", "/", "0.00"],
        ["inductor", "0", "/", "0.00", "1", "/", "0.50"],
        ["all", "2", "/", "2.00", "1", "/", "0.50"],
    ]
    assert "one → two" in text


def test_table_aligns_and_names_are_cut_in_the_middle():
    text = format_table(["name", "n"], [["a", "1"], ["long", "100"]])
    assert text.splitlines() == ["name    n", "----  ---", "a       1", "long  100"]
    assert shorten("a" * 40 + "b" * 40, 21) == "a" * 10 + "…" + "b" * 10


def test_command_reads_folders_and_writes_json(tmp_path, capsys):
    for name in ("first", "second"):
        capture(square, tmp_path / name, steps=1)
    out = tmp_path / "out.json"
    folders = [str(tmp_path / "first"), str(tmp_path / "second")]
    main([*folders, "--kernels", "--json", str(out)])
    printed = capsys.readouterr().out
    assert "first → second" in printed and "aten::mm" in printed
    data = json.loads(out.read_text())
    assert list(data) == ["first", "second"]
    assert data["first"]["launches"] == data["second"]["launches"] > 0
