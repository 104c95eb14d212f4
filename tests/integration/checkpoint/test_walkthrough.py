"""The warm start of docs/checkpoint.md, with its own files and commands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.agent import AgentProcess, wait_for

DOCUMENT = Path(__file__).parents[3] / "docs" / "checkpoint.md"


@pytest.mark.usefixtures("crun")
def test_the_warm_start_of_the_document(agent: AgentProcess, tmp_path: Path) -> None:
    section = DOCUMENT.read_text().split("\n## A warm start\n")[1].split("\n## ")[0]
    cold, warm = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    (commands,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    (tmp_path / "cold.yaml").write_text(cold)
    (tmp_path / "warm.yaml").write_text(warm)
    programs = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PODKEEL_SOCKET": agent.address}

    def shell(script: str) -> str:
        words = ["bash", "-euc", script]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    shell(commands)
    wait_for(lambda: len(shell("podkeel logs warm/service").split()) >= 3, what="its log", seconds=30)
    numbers = [int(line) for line in shell("podkeel logs warm/service").split()]  # and neither of the two words
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert "warm" in shell("podkeel ps")
