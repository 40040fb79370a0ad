"""Every step of scripts/record.sh calls a script with options that it has."""

import importlib
import os
import shlex
import subprocess

import pytest

from profiles.machine import ROOT

STAND_IN = """#!/usr/bin/env bash
call="$(printf '%q ' "$CUDA_VISIBLE_DEVICES" "$@")"
[ "$2" = pytest ] || echo "$call" | tee -a "$CALLS"
"""


@pytest.mark.parametrize("gpus", [1, 3])
def test_every_step_is_called_with_options_that_exist(tmp_path, gpus):
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    calls = tmp_path / "calls"
    given = {"PYTHON": str(python), "CALLS": str(calls), "COMMIT": "abc", "GPUS": str(gpus)}
    env = os.environ | given | {"CUDA_VISIBLE_DEVICES": "5,6,7"}
    command = ["bash", "scripts/record.sh", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, check=True)
    assert done.stdout.count(": exit 0 after") == 20
    lines = [shlex.split(line) for line in calls.read_text().splitlines()]
    assert len(lines) == 18
    for devices, _, script, *options in lines:
        args = importlib.import_module(script).parse(options)
        assert args.commit == "abc"
        assert devices == "5,6,7" if gpus == 1 else devices in ("5", "6", "7")


def test_an_unknown_step_is_refused(tmp_path):
    command = ["bash", "scripts/record.sh", str(tmp_path), "nothing"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 2 and "STEP must be one of gate small" in done.stderr
