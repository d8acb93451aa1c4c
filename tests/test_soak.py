"""A minute of `make soak`."""

import os
import subprocess
import sys

import pytest

from tests.processes import ROOT

pytestmark = [pytest.mark.process, pytest.mark.long]


def test_a_minute_of_faults_costs_no_wrong_answer_no_hang_and_no_memory(embedded_model: str) -> None:
    env = {**os.environ, "SOAK_MINUTES": "1.2"}
    command = [sys.executable, "-m", "tests.soak"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
