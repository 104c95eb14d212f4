"""The reason OOMKilled: for an end that a kill for memory caused, not for one that came after it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess, wait_for
from tests.support.pods import container_config, run_container, sandbox_config, wait_for_log

LIMITS = cri_pb2.LinuxContainerConfig(resources=cri_pb2.LinuxContainerResources(memory_limit_in_bytes=32 << 20))
# The first child of the program is killed; the program keeps running.
LOSE_A_CHILD = "sh -c 'exec tail /dev/zero'; echo child $?"


def _information(agent: AgentProcess, container_id: str) -> dict[str, Any]:
    request = cri_pb2.ContainerStatusRequest(container_id=container_id, verbose=True)
    information: dict[str, Any] = json.loads(agent.client.call("ContainerStatus", request).info["info"])
    return information


def _end(agent: AgentProcess, container_id: str) -> tuple[int, str]:
    client = agent.client
    wait_for(lambda: client.status(container_id).state == cri_pb2.CONTAINER_EXITED, 20)
    status = client.status(container_id)
    return status.exit_code, status.reason


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        ("sleep 1.2; exit 137", "Error"),
        ("sleep 1.2; kill -9 $$; sleep 1.2; exit 137", "Error"),
        ("sleep 1.2; exec tail /dev/zero", "OOMKilled"),
        ("sleep 1.2; tail /dev/zero; exit $?", "OOMKilled"),
        ("exec tail /dev/zero", "OOMKilled"),
    ],
)
def test_ends_after_a_child_was_killed_for_memory(agent: AgentProcess, ending: str, reason: str) -> None:
    _, container_id = run_container(agent, "sh", "-c", f"{LOSE_A_CHILD}; {ending}", linux=LIMITS)
    wait_for_log(agent.client, container_id, "child 137")
    assert _end(agent, container_id) == (137, reason)


def test_a_kill_from_outside_soon_after_a_child_was_lost_is_an_error(agent: AgentProcess) -> None:
    _, container_id = run_container(agent, "sh", "-c", f"{LOSE_A_CHILD}; sleep 1000; true", linux=LIMITS)
    wait_for_log(agent.client, container_id, "child 137")
    wait_for((agent.run / "containers" / container_id / "survived-kills").exists, what="that it was seen alive")
    os.kill(_information(agent, container_id)["pid"], signal.SIGKILL)
    assert _end(agent, container_id) == (137, "Error")


def test_kills_in_another_container_of_the_pod_do_not_count(agent: AgentProcess) -> None:
    """cgroup v1 notifies all containers of a pod that the limit of the pod was reached."""
    client = agent.client
    sandbox = sandbox_config(agent)
    sandbox_id = client.run_sandbox(sandbox)
    containers = []
    for name, script in (
        ("other", "while [ ! -e /go ]; do sleep 0.02; done; exit 137"),
        ("hog", "while [ ! -e /go ]; do sleep 0.02; done; exec tail /dev/zero"),
    ):
        containers.append(client.create(sandbox_id, container_config(name, "sh", "-c", script), sandbox))
        client.start(containers[-1])
    other, hog = containers
    pod = Path(_information(agent, hog)["cgroup"].lstrip("/")).parent
    v1, v2 = Path("/sys/fs/cgroup/memory") / pod, Path("/sys/fs/cgroup") / pod
    limit = v1 / "memory.limit_in_bytes" if v1.is_dir() else v2 / "memory.max"
    limit.write_text(str(48 << 20))
    for container_id in (hog, other):
        Path(_information(agent, container_id)["rootfs"], "go").touch()
        assert _end(agent, container_id) == (137, "OOMKilled" if container_id == hog else "Error")
