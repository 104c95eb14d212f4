"""Errors name their cause: mounts that cannot be made, programs that cannot be run, ranges of ids."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.agent.hardening import import_image
from tests.support.agent import AgentProcess
from tests.support.pods import container_config, sandbox_config


def refused(agent: AgentProcess, handler: str, config: cri_pb2.ContainerConfig) -> grpc.RpcError:
    """How CreateContainer refuses a container."""
    sandbox = sandbox_config(agent)
    sandbox_id = agent.client.run_sandbox(sandbox, handler)
    with pytest.raises(grpc.RpcError) as error:
        agent.client.create(sandbox_id, config, sandbox)
    assert agent.client.call("ListContainers", cri_pb2.ListContainersRequest()).containers == []
    agent.client.remove_sandbox(sandbox_id)
    return error.value


@pytest.mark.parametrize(
    ("destination", "words"),
    [
        ("/etc/passwd/x", "/etc/passwd is a file: mount at another path"),
        ("/etc/passwd", "/etc/passwd is a file in the container, and"),
        ("/etc", "/etc is a folder in the container, and"),
    ],
)
def test_a_mount_that_does_not_fit_is_refused_by_its_name(
    agent: AgentProcess, handler: str, tmp_path: Path, destination: str, words: str
) -> None:
    (tmp_path / "file").touch()
    config = container_config("main", "sh")
    config.mounts.add(container_path=destination, host_path=str(tmp_path / ("file" if destination == "/etc" else "")))
    error = refused(agent, handler, config)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"mounts: container_path {destination}: {words}" in (error.details() or "")


def test_a_volume_of_the_image_over_a_file_is_refused(agent: AgentProcess, handler: str, tmp_path: Path) -> None:
    reference = import_image(agent, tmp_path, "fileover", [], {"Volumes": {"/etc/passwd": {}}})
    error = refused(agent, handler, container_config("main", "sh", image=reference))
    agent.client.call("RemoveImage", cri_pb2.RemoveImageRequest(image=cri_pb2.ImageSpec(image=reference)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "VOLUME of the image: /etc/passwd: /etc/passwd is a file in the container" in (error.details() or "")


def test_a_mount_that_the_runtime_cannot_make_fails_the_making(
    agent: AgentProcess, handler: str, tmp_path: Path
) -> None:
    """What OCI runtimes say of it ends as what they say of a program that is missing."""
    config = container_config("main", "sh")
    config.mounts.add(container_path="/proc/nothing/there", host_path=str(tmp_path))
    error = refused(agent, handler, config)
    assert "proc/nothing" in (error.details() or "")
    assert 'exec "sh"' not in (error.details() or "")


@pytest.mark.parametrize("program", ["nothing", "/bin/nothing", "/etc/passwd", "/etc", "/etc/passwd/x"])
def test_a_program_that_cannot_be_run_fails_the_start(agent: AgentProcess, handler: str, program: str) -> None:
    sandbox = sandbox_config(agent)
    sandbox_id = agent.client.run_sandbox(sandbox, handler)
    container_id = agent.client.create(sandbox_id, container_config("main", program), sandbox)
    with pytest.raises(grpc.RpcError) as error:
        agent.client.start(container_id)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT, error.value.details()
    assert program in (error.value.details() or "")
    status = agent.client.status(container_id)
    assert (status.state, status.exit_code, status.reason) == (cri_pb2.CONTAINER_EXITED, 128, "StartError")
    assert program in status.message


@pytest.mark.parametrize("ranges", [341, 400, 5000])
def test_more_ranges_of_ids_than_the_kernel_takes_are_refused(agent: AgentProcess, ranges: int) -> None:
    config = sandbox_config(agent)
    options = config.linux.security_context.namespace_options.userns_options
    options.mode = cri_pb2.POD
    for mappings in (options.uids, options.gids):
        for number in range(ranges):
            mappings.add(container_id=number * 2, host_id=100_000 + number * 2, length=1)
    with pytest.raises(grpc.RpcError) as error:
        agent.client.run_sandbox(config)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"userns_options.uids: {ranges} ranges in " in (error.value.details() or "")


def test_as_many_ranges_as_the_kernel_takes_are_there(agent: AgentProcess) -> None:
    config = sandbox_config(agent)
    options = config.linux.security_context.namespace_options.userns_options
    options.mode = cri_pb2.POD
    for mappings in (options.uids, options.gids):
        for number in range(200):
            mappings.add(container_id=number * 2, host_id=100_000 + number * 2, length=1)
    agent.client.remove_sandbox(agent.client.run_sandbox(config))
    assert len(options.uids) == 200
