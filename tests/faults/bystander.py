"""A pod that runs all the time and must not be affected by faults of its agent."""

from __future__ import annotations

import json
from pathlib import Path

from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess, wait_for
from tests.support.pods import log_lines, run_container

_COUNT = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.05; done"


class Bystander:
    """Writes increasing numbers to its log."""

    def __init__(self, agent: AgentProcess) -> None:
        self._agent = agent
        self.sandbox_id, self.container_id = run_container(agent, "sh", "-c", _COUNT)
        self._status = agent.client.status(self.container_id)
        self._pid = self._read_pid()
        self._address = agent.client.sandbox_status(self.sandbox_id).network.ip

    def _read_pid(self) -> int:
        request = cri_pb2.ContainerStatusRequest(container_id=self.container_id, verbose=True)
        answer = self._agent.client.call("ContainerStatus", request)
        return int(json.loads(answer.info["info"])["pid"])

    def _lines(self) -> list[str]:
        return log_lines(self._status.log_path)

    def assert_undisturbed(self) -> None:
        """Assert that the same process still runs, and that its log has every line."""
        client = self._agent.client
        assert client.status(self.container_id) == self._status
        assert self._read_pid() == self._pid
        assert Path(f"/proc/{self._pid}").exists()
        sandbox = client.sandbox_status(self.sandbox_id)
        assert (sandbox.state, sandbox.network.ip) == (cri_pb2.SANDBOX_READY, self._address)
        before = len(self._lines())
        wait_for(lambda: len(self._lines()) > before, what="another line of the bystander")
        lines = self._lines()
        assert lines == [str(number) for number in range(len(lines))]
