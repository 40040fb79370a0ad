"""The compile benchmark runs each way in a process of its own, and its table adds up."""

import json

import pytest

from scripts.bench_compile_time import main


def test_traced_run(tmp_path, capsys):
    file = tmp_path / "compile.json"
    ways = ["--ways", "residual", "mHC", "mHC, regional"]
    main(["--device", "cpu", "--layers", "2", "--traced", "--kernels", *ways, "--json", str(file)])
    data = json.loads(file.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == data
    assert [record["way"] for record in data["compile"]] == ways[1:]
    assert [record["graphs"] for record in data["compile"]] == [1, 1, 3]
    for record in data["compile"]:
        assert record["inductor"] == record["build"] == 0
        assert 0 < record["dynamo"] + record["aot"] <= record["seconds"]
    main(["--render", str(file)])
    shown = capsys.readouterr().out
    assert "| residual | 2 | 1 |" in shown and shown.count("| 1.00 |") == 1


def test_ways_are_named():
    with pytest.raises(SystemExit):
        main(["--ways", "other"])
