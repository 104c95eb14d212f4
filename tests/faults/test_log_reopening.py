"""An agent is killed before a conmon has opened its new log."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.agent.test_frozen import monitor_pid
from tests.support.agent import AgentProcess, wait_for
from tests.support.pods import log_lines, run_container

_COUNT = ("sh", "-c", "i=0; while :; do echo $((i=i+1)); sleep 0.01; done")


def _counting(agent: AgentProcess) -> tuple[str, Path, int]:
    """A container that logs numbers. Returns its id, its log and its conmon's pid."""
    _, container_id = run_container(agent, *_COUNT)
    path = Path(agent.client.status(container_id).log_path)
    wait_for(lambda: path.exists() and path.stat().st_size > 100, what="some lines")
    return container_id, path, monitor_pid(agent, container_id)


def _reopen(agent: AgentProcess, container_id: str) -> None:
    agent.client.call("ReopenContainerLog", cri_pb2.ReopenContainerLogRequest(container_id=container_id))


def _assert_whole(agent: AgentProcess, container_id: str, *logs: Path) -> None:
    wait_for(lambda: logs[-1].stat().st_size > 100, what="lines in the new log")
    agent.client.stop(container_id)
    assert agent.client.status(container_id).exit_code == 137
    numbers = [int(line) for log in logs for line in log_lines(log)]
    assert numbers == list(range(1, len(numbers) + 1))
    agent.client.remove(container_id)
    assert agent.client.findings() == []


@pytest.mark.parametrize("goes_on", ["without an agent", "with the next", "asked again by the next", "at its end"])
def test_a_conmon_notified_by_a_killed_agent_opens_the_new_log(own_agent: AgentProcess, goes_on: str) -> None:
    container_id, path, monitor = _counting(own_agent)
    os.kill(monitor, signal.SIGSTOP)
    rotated = path.rename(path.with_suffix(".1"))
    with pytest.raises(grpc.RpcError, match="did not open"):
        _reopen(own_agent, container_id)
    own_agent.kill()
    if goes_on != "without an agent":
        own_agent.start()
    if goes_on == "asked again by the next":
        with pytest.raises(grpc.RpcError, match="did not open"):
            _reopen(own_agent, container_id)
    if goes_on == "at its end":
        own_agent.client.stop(container_id)
        assert own_agent.client.status(container_id).exit_code == 137
        own_agent.client.remove(container_id)
        assert own_agent.client.findings() == []
        return
    os.kill(monitor, signal.SIGCONT)
    wait_for(lambda: path.stat().st_size > 100, what="lines in the new log")
    if goes_on == "without an agent":
        own_agent.start()
    _reopen(own_agent, container_id)
    newest = path.rename(path.with_suffix(".2"))
    _reopen(own_agent, container_id)
    assert monitor_pid(own_agent, container_id) == monitor
    _assert_whole(own_agent, container_id, rotated, newest, path)


def test_a_conmon_not_notified_by_a_killed_agent_is_notified_by_the_next(own_agent: AgentProcess) -> None:
    container_id, path, _ = _counting(own_agent)
    bundle = own_agent.run / "containers" / container_id
    own_agent.kill()
    (bundle / "log-0").touch()
    (bundle / "log.tmp").symlink_to(bundle / "log-0")
    own_agent.start()
    rotated = path.rename(path.with_suffix(".1"))
    _reopen(own_agent, container_id)
    assert not list(bundle.glob("log-*"))
    _assert_whole(own_agent, container_id, rotated, path)
