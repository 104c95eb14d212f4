"""A new agent finds out what happened to containers while no agent was running."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.faults.conftest import Stage
from tests.integration.agent.test_frozen import freezer_of_process, frozen
from tests.support.agent import PATIENCE, wait_for
from tests.support.pods import POLITE, container_config, run_container, sandbox_config, wait_for_log


def _information(stage: Stage, container_id: str) -> dict[str, Any]:
    request = cri_pb2.ContainerStatusRequest(container_id=container_id, verbose=True)
    information: dict[str, Any] = json.loads(stage.agent.client.call("ContainerStatus", request).info["info"])
    return information


def _alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


@pytest.mark.parametrize(
    ("number", "code", "reason"), [(signal.SIGTERM, 3, "Error"), (signal.SIGKILL, 137, "Error")], ids=["exit", "kill"]
)
def test_an_end_while_no_agent_ran(stage: Stage, number: signal.Signals, code: int, reason: str) -> None:
    _, container_id = run_container(stage.agent, *POLITE)
    wait_for_log(stage.agent.client, container_id)
    pid = _information(stage, container_id)["pid"]
    stage.agent.kill()
    begin = time.time_ns()
    os.kill(pid, number)
    record = stage.agent.run / "exits" / container_id
    wait_for(record.exists)
    end = time.time_ns()
    stage.agent.start()
    status = stage.agent.client.status(container_id)
    assert (status.state, status.exit_code, status.reason) == (cri_pb2.CONTAINER_EXITED, code, reason)
    assert begin - 10_000_000 <= status.finished_at <= end  # files have the time of the kernel's last tick
    assert status.message == ""
    stage.assert_whole()


def test_out_of_memory_while_no_agent_ran(stage: Stage) -> None:
    limits = cri_pb2.LinuxContainerConfig(resources=cri_pb2.LinuxContainerResources(memory_limit_in_bytes=32 << 20))
    eat = "while [ ! -e /go ]; do sleep 0.02; done; exec tail /dev/zero"
    _, container_id = run_container(stage.agent, "sh", "-c", eat, linux=limits)
    information = _information(stage, container_id)
    stage.agent.kill()
    Path(information["rootfs"], "go").touch()
    wait_for((stage.agent.run / "exits" / container_id).exists)
    stage.agent.start()
    status = stage.agent.client.status(container_id)
    assert (status.state, status.exit_code, status.reason) == (cri_pb2.CONTAINER_EXITED, 137, "OOMKilled")


@pytest.mark.parametrize(
    ("ending", "reason"),
    [("sleep 2.2; exit 137", "Error"), ("exec tail /dev/zero", "OOMKilled"), ("tail /dev/zero; exit $?", "OOMKilled")],
)
@pytest.mark.parametrize("seen", [True, False], ids=["child lost before", "child lost meanwhile"])
def test_an_end_without_an_agent_after_a_child_was_killed_for_memory(
    stage: Stage, ending: str, reason: str, seen: bool
) -> None:
    limits = cri_pb2.LinuxContainerConfig(resources=cri_pb2.LinuxContainerResources(memory_limit_in_bytes=32 << 20))
    wait, lose = "while [ ! -e /go ]; do sleep 0.02; done", "sh -c 'exec tail /dev/zero'; echo child $?"
    script = f"{lose}; {wait}; {ending}" if seen else f"{wait}; {lose}; {ending}"
    _, container_id = run_container(stage.agent, "sh", "-c", script, linux=limits)
    information = _information(stage, container_id)
    if seen:
        wait_for((stage.agent.run / "containers" / container_id / "survived-kills").exists)
    stage.agent.kill()
    Path(information["rootfs"], "go").touch()
    wait_for((stage.agent.run / "exits" / container_id).exists)
    stage.agent.start()
    status = stage.agent.client.status(container_id)
    assert (status.state, status.exit_code, status.reason) == (cri_pb2.CONTAINER_EXITED, 137, reason)


def test_a_child_killed_before_a_restart_is_not_the_reason_of_a_later_end(stage: Stage) -> None:
    limits = cri_pb2.LinuxContainerConfig(resources=cri_pb2.LinuxContainerResources(memory_limit_in_bytes=32 << 20))
    script = "while [ ! -e /go ]; do sleep 0.02; done; sh -c 'exec tail /dev/zero'; echo child $?; sleep 1000; true"
    _, container_id = run_container(stage.agent, "sh", "-c", script, linux=limits)
    information = _information(stage, container_id)
    stage.agent.kill()
    Path(information["rootfs"], "go").touch()
    folder = stage.agent.run / "containers" / container_id
    wait_for((folder / "oom").exists)
    stage.agent.start()
    wait_for((folder / "survived-kills").exists, what="that it was seen alive")
    os.kill(information["pid"], signal.SIGKILL)
    client = stage.agent.client
    wait_for(lambda: client.status(container_id).state == cri_pb2.CONTAINER_EXITED)
    assert (client.status(container_id).exit_code, client.status(container_id).reason) == (137, "Error")


def test_commands_of_a_killed_agent_end(stage: Stage) -> None:
    client = stage.agent.client
    _, container_id = run_container(stage.agent, "sleep", "1000")
    procs = _cgroup_procs(stage, container_id)
    command = ["sh", "-c", "sleep 2000 & sleep 3000"]
    future = client.future("ExecSync", cri_pb2.ExecSyncRequest(container_id=container_id, cmd=command))
    wait_for(lambda: len(procs.read_text().split()) == 3, what="the command")
    pids = {int(pid) for pid in procs.read_text().split()} - {_information(stage, container_id)["pid"]}
    stage.agent.kill()
    future.cancel()
    stage.agent.start()
    wait_for(lambda: not any(map(_alive, pids)), what="the end of the commands")
    assert stage.agent.client.output(container_id, "echo", "works") == "works\n"
    stage.assert_whole()


def _cgroup_procs(stage: Stage, container_id: str) -> Path:
    cgroup = str(_information(stage, container_id)["cgroup"]).lstrip("/")
    v1 = Path("/sys/fs/cgroup/pids") / cgroup
    return (v1 if v1.is_dir() else Path("/sys/fs/cgroup") / cgroup) / "cgroup.procs"


@pytest.mark.parametrize("restarted", [False, True], ids=["same agent", "restarted agent"])
def test_a_container_keeps_running_without_its_conmon(stage: Stage, restarted: bool) -> None:
    _, container_id = run_container(stage.agent, "sleep", "1000")
    information = _information(stage, container_id)
    if restarted:
        stage.agent.kill()
    os.kill(information["conmonPid"], signal.SIGKILL)
    if restarted:
        stage.agent.start()
    client = stage.agent.client
    wait_for(lambda: _information(stage, container_id)["conmonPid"] == 0, what="noticing conmon's end")
    assert client.status(container_id).state == cri_pb2.CONTAINER_RUNNING
    assert client.output(container_id, "echo", "works") == "works\n"
    os.kill(information["pid"], signal.SIGKILL)
    wait_for(lambda: client.status(container_id).state == cri_pb2.CONTAINER_EXITED)
    status = client.status(container_id)
    assert (status.exit_code, status.reason) == (255, "Error")
    assert "monitor was killed" in status.message
    assert status.finished_at > status.started_at
    client.remove(container_id)
    stage.assert_whole()


def test_a_container_without_conmon_can_be_stopped(stage: Stage) -> None:
    _, container_id = run_container(stage.agent, *POLITE)
    wait_for_log(stage.agent.client, container_id)
    os.kill(_information(stage, container_id)["conmonPid"], signal.SIGKILL)
    wait_for(lambda: _information(stage, container_id)["conmonPid"] == 0, what="noticing conmon's end")
    stage.agent.client.stop(container_id, timeout=20)
    assert stage.agent.client.status(container_id).state == cri_pb2.CONTAINER_EXITED
    stage.assert_whole()


def test_subscribers_in_the_first_minute_get_ends_while_no_agent_ran(stage: Stage) -> None:
    _, container_id = run_container(stage.agent, *POLITE)
    wait_for_log(stage.agent.client, container_id)
    pid = _information(stage, container_id)["pid"]
    stage.agent.kill()
    os.kill(pid, signal.SIGTERM)
    wait_for((stage.agent.run / "exits" / container_id).exists)
    stage.agent.start()
    for _ in range(2):  # a second subscriber gets the events too
        stream = stage.agent.client.stream("GetContainerEvents", cri_pb2.GetEventsRequest(), timeout=20)
        event = next(event for event in stream if event.container_id == container_id)
        stream.cancel()  # type: ignore[attr-defined]  # the iterator is the call
        assert event.container_event_type == cri_pb2.CONTAINER_STOPPED_EVENT
        (status,) = event.containers_statuses
        assert (status.id, status.state, status.exit_code) == (container_id, cri_pb2.CONTAINER_EXITED, 3)


@pytest.mark.parametrize("above", [False, True], ids=["container", "pod"])
def test_a_frozen_incomplete_container_does_not_delay_a_start(stage: Stage, above: bool) -> None:
    """A killed process in a frozen cgroup only ends when the cgroup is thawed."""
    agent = stage.agent
    begin = time.monotonic()
    agent.restart()
    usual = time.monotonic() - begin
    sandbox = sandbox_config(agent)
    sandbox_id = agent.client.run_sandbox(sandbox)
    agent.plant("CreateContainer.runtime:after:kill")
    with pytest.raises(grpc.RpcError):
        agent.client.create(sandbox_id, container_config("main", *POLITE), sandbox)
    agent.wait_dead()
    agent.plant("")
    folders = agent.run / "oci/crun"
    [folder] = set(folders.iterdir()) - {folders / stage.bystander.container_id}
    group = freezer_of_process(json.loads((folder / "status").read_text())["pid"])
    with frozen(group.parent if above else group):
        begin = time.monotonic()
        agent.start()
        assert time.monotonic() - begin < usual + 4 * PATIENCE
        agent.client.remove_sandbox(sandbox_id)
    stage.assert_whole()
