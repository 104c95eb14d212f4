"""The agent has priority on its processors, and nothing that it starts has it."""

from __future__ import annotations

import os
from pathlib import Path

from tests.support.agent import AgentProcess
from tests.support.pods import run_container


def _niceness(pid: int, thread: int | None = None) -> int:
    fields = Path(f"/proc/{pid}/task/{thread or pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[16])


def test_only_the_loop_has_a_higher_priority(agent: AgentProcess) -> None:
    _, container_id = run_container(agent, "sleep", "1000")
    assert _niceness(agent.pid()) == -10
    assert agent.client.output(container_id, "cut", "-d ", "-f19", "/proc/self/stat").strip() == "0"
    assert agent.client.output(container_id, "cut", "-d ", "-f19", "/proc/1/stat").strip() == "0"
    threads = [int(entry.name) for entry in Path(f"/proc/{agent.pid()}/task").iterdir()]
    assert {_niceness(agent.pid(), thread) for thread in threads if thread != agent.pid()} == {0}
    assert os.sched_getscheduler(agent.pid()) & os.SCHED_RESET_ON_FORK
