"""``make run`` as CI calls it, with separate folders, bridge and subnet."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.agent import AgentProcess

SCRIPT = Path(__file__).parents[3] / "scripts/run_demo.py"


def test_the_demonstration_runs_and_leaves_nothing(tmp_path: Path) -> None:
    agent = AgentProcess(tmp_path)  # never started: it lends its flags
    command = [sys.executable, str(SCRIPT), *agent.flags]
    environment = os.environ | {"RUN_ONCE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    told = {line[2:14].strip(): line[15:] for line in done.stdout.splitlines()}
    assert told["log client"] == "Hello from hello"
    assert "response:200" in told["log web"]
    assert "'Hello from hello'" in told["fetch"]
    assert "exit code 0" in told["exec web"]
    assert told["host"] == "all files removed"
    assert not agent.data.exists()
    assert not agent.run.exists()
