"""Runs this folder's kernel tests under Triton's interpreter, which needs its own process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.cases import INTERPRETED


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted process")
@pytest.mark.parametrize("name", ["test_streaming.py", "test_project.py"])
def test_under_the_interpreter(name):
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not gpu", str(folder / name)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
