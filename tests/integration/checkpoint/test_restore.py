"""A container that is made from a checkpoint continues where it was, in a new pod."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess, wait_for
from tests.support.checkpoints import (
    CHECKPOINT_IMAGE,
    COUNTER,
    checkpoint,
    image_of,
    lines_of,
    made_up,
    run_with,
    wait_for_lines,
)
from tests.support.pods import container_config, sandbox_config, shared_pids, wait_for_log


def create_from(agent: AgentProcess, image: str, *, shared: bool = False, **fields: Any) -> str:
    """A container in a new pod, created from a checkpoint."""
    sandbox = sandbox_config(agent)
    config = container_config("main", image=image, **fields)
    if shared:
        shared_pids(sandbox)
        shared_pids(config)
    sandbox_id = agent.client.run_sandbox(sandbox, "crun")
    return agent.client.create(sandbox_id, config, sandbox)


@pytest.mark.parametrize("shared", [False, True], ids=["own-pids", "shared-pids"])
def test_processes_continue_where_they_were(agent: AgentProcess, crun: str, tmp_path: Path, *, shared: bool) -> None:
    sandbox = sandbox_config(agent)
    config = container_config("main", *COUNTER)
    if shared:
        shared_pids(sandbox)
        shared_pids(config)
    sandbox_id = agent.client.run_sandbox(sandbox, "crun")
    first = agent.client.create(sandbox_id, config, sandbox)
    agent.client.start(first)
    wait_for_lines(agent, first, 20)
    checkpoint(agent, first, tmp_path / "it.tar")
    reached = int(lines_of(agent, first)[-1])
    agent.client.stop_sandbox(sandbox_id)
    agent.client.remove_sandbox(sandbox_id)

    second = create_from(agent, image_of(agent, tmp_path / "it.tar"), shared=shared)
    status = agent.client.status(second)
    assert status.state == cri_pb2.CONTAINER_CREATED
    assert lines_of(agent, second) == []
    agent.client.start(second)
    numbers = [int(line) for line in wait_for_lines(agent, second, 5)]
    assert 15 < numbers[0] <= reached + 1
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert agent.client.status(second).state == cri_pb2.CONTAINER_RUNNING
    assert agent.client.output(second, "cat", "/made/file") == "new\n"
    assert agent.client.output(second, "ls", "/home") == "it\n"
    assert agent.client.exec(second, "test", "-e", "/etc/passwd").exit_code == 1
    # It is a container like any other: its cgroup has all its processes, and it ends when it is stopped.
    assert agent.client.call("ContainerStats", cri_pb2.ContainerStatsRequest(container_id=second)).stats.memory
    checkpoint(agent, second, tmp_path / "again.tar")
    agent.client.stop(second, 0)
    assert agent.client.status(second).exit_code == 137
    agent.client.remove(second)


def archive_of(agent: AgentProcess, folder: Path, *command: str, **fields: Any) -> str:
    """An image of a checkpoint of a container that runs ``command``, whose pod is removed."""
    sandbox_id, container_id = run_with(agent, "crun", *command, **fields)
    wait_for_log(agent.client, container_id)
    checkpoint(agent, container_id, folder / "it.tar")
    agent.client.stop_sandbox(sandbox_id)
    agent.client.remove_sandbox(sandbox_id)
    return image_of(agent, folder / "it.tar")


TICKS = "i=0; echo ready; while :; do i=$((i+1)); echo $i; sleep 0.05; done"


def test_limits_shared_memory_and_volumes_are_the_new_pod_s(agent: AgentProcess, crun: str, tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "it").write_text(name)

    def mounts(name: str) -> list[cri_pb2.Mount]:
        return [cri_pb2.Mount(host_path=str(tmp_path / name), container_path="/data")]

    image = archive_of(agent, tmp_path, "sh", "-c", f"echo kept > /dev/shm/it; {TICKS}", mounts=mounts("old"))
    linux = cri_pb2.LinuxContainerConfig()
    linux.resources.memory_limit_in_bytes = 64 << 20
    container_id = create_from(agent, image, mounts=mounts("new"), linux=linux)
    agent.client.start(container_id)
    wait_for_lines(agent, container_id, 3)
    assert agent.client.output(container_id, "cat", "/dev/shm/it", "/data/it") == "kept\nnew"
    assert agent.client.status(container_id).resources.linux.memory_limit_in_bytes == 64 << 20
    stats = agent.client.call("ContainerStats", cri_pb2.ContainerStatsRequest(container_id=container_id)).stats
    assert 0 < stats.memory.usage_bytes.value < 64 << 20


def test_rights_are_those_of_the_new_configuration(agent: AgentProcess, crun: str, tmp_path: Path) -> None:
    image = archive_of(agent, tmp_path, "sh", "-c", TICKS)
    dropped = cri_pb2.LinuxContainerConfig()
    dropped.security_context.capabilities.drop_capabilities.append("ALL")
    nobody = cri_pb2.LinuxContainerConfig()
    nobody.security_context.run_as_user.value = 1000
    filtered = cri_pb2.LinuxContainerConfig()
    filtered.security_context.seccomp.profile_type = cri_pb2.SecurityProfile.RuntimeDefault
    hidden = cri_pb2.LinuxContainerConfig()
    hidden.security_context.masked_paths.append("/proc/keys")
    for linux, words in (
        (dropped, "capabilities that the configuration does not give"),
        (nobody, "does not have the configuration's user 1000"),
        (filtered, "seccomp"),
        (hidden, "/proc/keys"),
    ):
        with pytest.raises(grpc.RpcError) as failure:
            create_from(agent, image, linux=linux)
        assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT, failure.value.details()
        assert words in failure.value.details()
    assert not agent.client.call("ListContainers", cri_pb2.ListContainersRequest()).containers


def test_a_privileged_checkpoint_makes_no_privileged_container(agent: AgentProcess, crun: str, tmp_path: Path) -> None:
    sandbox = sandbox_config(agent)
    sandbox.linux.security_context.privileged = True
    config = container_config("main", "sh", "-c", TICKS)
    config.linux.security_context.privileged = True
    sandbox_id = agent.client.run_sandbox(sandbox, "crun")
    container_id = agent.client.create(sandbox_id, config, sandbox)
    agent.client.start(container_id)
    wait_for_log(agent.client, container_id)
    checkpoint(agent, container_id, tmp_path / "it.tar")
    image = image_of(agent, tmp_path / "it.tar")
    with pytest.raises(grpc.RpcError) as failure:
        create_from(agent, image)
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "that the configuration" in failure.value.details()


def test_what_is_not_restored_is_named(agent: AgentProcess, crun: str, tmp_path: Path) -> None:
    image = image_of(agent, made_up(tmp_path))
    config = container_config("main", image=image)
    terminal = container_config("main", image=image, tty=True)
    mapped = sandbox_config(agent)
    options = mapped.linux.security_context.namespace_options
    options.userns_options.mode = cri_pb2.POD
    for ids in (options.userns_options.uids, options.userns_options.gids):
        ids.add(host_id=300_000, container_id=0, length=65536)
    own = container_config("main", image=image)
    own.linux.security_context.namespace_options.CopyFrom(options)
    for handler, sandbox, each, words in (
        ("runc", sandbox_config(agent), config, "runtime handler 'runc' does not restore containers: use crun"),
        ("crun", sandbox_config(agent), terminal, "containers with a terminal are not restored"),
        ("crun", mapped, own, "containers in user namespaces are not restored"),
    ):
        sandbox_id = agent.client.run_sandbox(sandbox, handler)
        with pytest.raises(grpc.RpcError) as failure:
            agent.client.create(sandbox_id, each, sandbox)
        assert failure.value.code() is grpc.StatusCode.UNIMPLEMENTED, failure.value.details()
        assert words in failure.value.details()


def test_it_may_be_restored_many_times(agent: AgentProcess, crun: str, tmp_path: Path) -> None:
    image = archive_of(agent, tmp_path, "sh", "-c", TICKS)
    found = []
    for _ in range(2):
        container_id = create_from(agent, image)
        agent.client.start(container_id)
        found.append(wait_for_lines(agent, container_id, 3)[0])
    assert abs(int(found[0]) - int(found[1])) <= 1
    done = agent.client.call("ImageStatus", cri_pb2.ImageStatusRequest(image=cri_pb2.ImageSpec(image=CHECKPOINT_IMAGE)))
    assert done.HasField("image")


def test_killed_around_the_restore(own_agent: AgentProcess, able: dict[str, str], tmp_path: Path) -> None:
    if able.get("crun") != "able":
        pytest.skip(f"crun cannot make checkpoints here: {able.get('crun')}")
    image = archive_of(own_agent, tmp_path, "sh", "-c", TICKS)
    container_id = create_from(own_agent, image)
    own_agent.restart("StartContainer.runtime:after:kill")
    assert own_agent.client.status(container_id).state == cri_pb2.CONTAINER_CREATED
    with pytest.raises(grpc.RpcError):
        own_agent.client.start(container_id)
    own_agent.wait_dead()
    own_agent.start()
    assert own_agent.client.status(container_id).state == cri_pb2.CONTAINER_RUNNING
    wait_for_lines(own_agent, container_id, 3)
    own_agent.client.stop(container_id)
    own_agent.client.remove(container_id)
    wait_for(lambda: own_agent.client.findings() == [], what="nothing left")
    again = create_from(own_agent, image)
    own_agent.restart()
    own_agent.client.start(again)
    wait_for_lines(own_agent, again, 3)
