"""The benchmark of host time, in a process of its own because it replaces Triton's driver."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def test_tiny_run():
    command = [sys.executable, "-m", "scripts.bench_host", "--device", "cpu", "--ops", "post"]
    command += ["--width", "64", "--calls", "10"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    records = json.loads(done.stdout.splitlines()[-1])["host"]
    assert [r["direction"] for r in records] == ["no grad", "forward", "backward"]
    assert all(r["launches"] == 1 and 0 < r["us"] < 1e6 for r in records)
