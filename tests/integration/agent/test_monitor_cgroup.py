"""Where conmon and the inits of pods run: outside of the cgroup of the agent, which a service manager may kill."""

from __future__ import annotations

import json
import os
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from host.cgroups import discover
from host.files.procfs import all_pids, read_bounded
from host.processes import start_time
from proto.runtime.v1 import cri_pb2
from runtime.cgroups.tree import CgroupTree
from tests.support.agent import AgentProcess, wait_for
from tests.support.cri import CriClient
from tests.support.pods import container_config, run_container, sandbox_config, shared_pids

if Path("/run/systemd/system").is_dir():
    pytest.skip("systemd makes the cgroup here: tests/vm/test_service.py", allow_module_level=True)

SERVICE = "podkeel-test-service"


@pytest.fixture
def service(own_agent: AgentProcess, tmp_path: Path) -> Iterator[AgentProcess]:
    """An agent in a separate cgroup of each hierarchy, as service managers start it."""
    own_agent.stop()
    tree = CgroupTree.of_host("cgroupfs")
    tree.make(SERVICE)
    script = tmp_path / "service"
    enter = "".join(f"echo $$ > {shlex.quote(str(file))}\n" for file in tree.entrances(SERVICE))
    script.write_text(f'#!/bin/sh\n{enter}exec {own_agent.program} "$@"\n')
    script.chmod(0o755)
    program, own_agent.program = own_agent.program, script
    own_agent.start()
    yield own_agent
    own_agent.program = program
    own_agent.kill()
    wait_for(lambda: not members(), what="the end of all processes of the service")
    tree.remove(SERVICE)


def members() -> list[int]:
    """The processes that are in the service's cgroup in any hierarchy, without those that have ended."""
    return [pid for pid in all_pids() if f"/{SERVICE}" in cgroups_of(pid) and start_time(pid) is not None]


def cgroups_of(pid: int) -> str:
    return read_bounded(f"/proc/{pid}/cgroup", 65536).decode()


def monitor_of(client: CriClient, container_id: str) -> int:
    request = cri_pb2.ContainerStatusRequest(container_id=container_id, verbose=True)
    return int(json.loads(client.call("ContainerStatus", request).info["info"])["conmonPid"])


def own_cgroup(agent: AgentProcess) -> str:
    return f"podkeel-monitors-{(agent.data / 'agent-id').read_text().strip()}"


def test_a_kill_of_the_whole_service_leaves_containers_and_their_monitors(service: AgentProcess) -> None:
    client = service.client
    config = sandbox_config(service)
    shared_pids(config)
    wanted = container_config("sharing", "sleep", "100000")
    shared_pids(wanted)
    sharing = client.create(client.run_sandbox(config), wanted, config)
    client.start(sharing)
    _, alone = run_container(service, "sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.1; done")
    wait_for(lambda: members() == [service.pid()], what="the end of commands that the agent ran")

    for pid in members():
        os.kill(pid, signal.SIGKILL)
    service.restart()
    client = service.client
    for container_id in (sharing, alone):
        assert client.status(container_id).state == cri_pb2.CONTAINER_RUNNING
        assert client.output(container_id, "echo", "here").strip() == "here"
    client.stop(alone, 30)
    assert client.status(alone).exit_code == 3  # which conmon has recorded

    # An agent of an older version left them in its own cgroup.
    monitor = monitor_of(client, sharing)
    for file in CgroupTree.of_host("cgroupfs").entrances(SERVICE):
        file.write_text(str(monitor))
    assert {service.pid(), monitor} <= set(members())
    service.restart()
    wait_for(lambda: members() == [service.pid()], what="the end of commands that the agent ran")
    assert f"/{own_cgroup(service)}" in cgroups_of(monitor)


def test_a_monitor_cgroup_that_was_removed_is_made_again(service: AgentProcess) -> None:
    folders = [Path(root) / own_cgroup(service) for root in {*discover().v1.values(), discover().unified or ""}]
    made = [folder for folder in folders if folder.is_dir()]
    assert made
    for folder in made:
        folder.rmdir()
    _, container_id = run_container(service, "sleep", "100000")
    monitor = monitor_of(service.client, container_id)
    assert f"/{own_cgroup(service)}" in cgroups_of(monitor)
    wait_for(lambda: members() == [service.pid()], what="the end of commands that the agent ran")
    assert "monitors: cgroup" in service.log.read_text()
