"""Requests that say as little as possible: neither namespaces nor host name, log folder or user."""

from __future__ import annotations

import time
from pathlib import Path

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.conformance.support import Pod, refused
from tests.support.agent import AgentProcess, wait_for

RUNNING, EXITED = cri_pb2.CONTAINER_RUNNING, cri_pb2.CONTAINER_EXITED


def _sandbox(name: str = "plain", uid: str = "uid", **fields: object) -> cri_pb2.PodSandboxConfig:
    config = cri_pb2.PodSandboxConfig(
        metadata=cri_pb2.PodSandboxMetadata(name=name, uid=uid, namespace="default", attempt=2)
    )
    config.linux.SetInParent()
    for field, value in fields.items():
        setattr(config, field, value)
    return config


def _container(name: str, *command: str, image: str = "busybox") -> cri_pb2.ContainerConfig:
    return cri_pb2.ContainerConfig(
        metadata=cri_pb2.ContainerMetadata(name=name, attempt=2), image=cri_pb2.ImageSpec(image=image), command=command
    )


@pytest.fixture
def plain(agent: AgentProcess) -> Pod:
    return Pod.run(agent, _sandbox())


def test_stop_signal_reaches_what_would_ignore_it_as_a_first_process(plain: Pod) -> None:
    """Processes are shared by the pod unless it says otherwise, so a container has no first process."""
    client = plain.agent.client
    container_id = plain.start(_container("main", "top"))
    assert client.status(container_id).state == RUNNING
    begin = time.monotonic()
    client.stop(container_id, timeout=55)
    assert time.monotonic() - begin < 50  # a signal that is ignored would take the grace of 55 s
    status = client.status(container_id)
    assert (status.state, status.exit_code) == (EXITED, 143)
    client.remove(container_id)
    wanted = cri_pb2.ContainerFilter(id=container_id)
    assert not client.call("ListContainers", cri_pb2.ListContainersRequest(filter=wanted)).containers


def test_command_past_its_time_is_gone_from_the_pod(plain: Pod) -> None:
    container_id = plain.start(_container("main", "top"))
    with refused(grpc.StatusCode.DEADLINE_EXCEEDED):
        plain.agent.client.exec(container_id, "sleep", "4321", timeout=1)
    answer = plain.agent.client.exec(container_id, "sh", "-c", "pidof sleep || true", timeout=30)
    assert (answer.stdout, answer.stderr, answer.exit_code) == (b"", b"", 0)


def test_command_without_line_end(plain: Pod) -> None:
    container_id = plain.start(_container("main", "top"))
    answer = plain.agent.client.exec(container_id, "echo", "-n", "hello", timeout=30)
    assert (answer.stdout, answer.stderr) == (b"hello", b"")


def test_log_path_without_a_log_folder_is_no_log(plain: Pod) -> None:
    config = _container("main", "echo", "lost")
    status = plain.finished(config)
    assert (status.log_path, status.exit_code) == ("", 0)


def test_volumes_with_labels_where_there_are_none(plain: Pod, tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (real / "flag").touch()
    link = tmp_path / "link"
    link.symlink_to(real)
    for name, path in (("folder", real), ("link", link)):
        config = _container(name, "top")
        config.mounts.add(host_path=str(path), container_path=str(path), selinux_relabel=True)
        assert plain.agent.client.output(plain.start(config), "ls", "-A", str(path)) == "flag\n"


def test_same_name_with_another_uid_is_another_pod(plain: Pod) -> None:
    client = plain.agent.client
    other = client.run_sandbox(_sandbox(uid="other"))
    assert other != plain.id
    assert client.run_sandbox(plain.config) == plain.id
    assert {item.id for item in client.call("ListPodSandbox", cri_pb2.ListPodSandboxRequest()).items} == {
        plain.id,
        other,
    }


def test_retries_after_a_deadline_come_to_one_pod(agent: AgentProcess) -> None:
    request = cri_pb2.RunPodSandboxRequest(config=_sandbox())
    for milliseconds in (1, 5, 20):
        try:
            agent.client.call("RunPodSandbox", request, timeout=milliseconds / 1000)
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    sandbox_id = agent.client.run_sandbox(request.config)
    (item,) = agent.client.call("ListPodSandbox", cri_pb2.ListPodSandboxRequest()).items
    assert (item.id, item.state) == (sandbox_id, cri_pb2.SANDBOX_READY)


def test_pods_of_no_network_namespace_take_the_port_mappings_of_their_containers(agent: AgentProcess) -> None:
    """With host network a container port is the host port, and nothing is mapped, also twice on one node."""
    for number in range(2):
        config = _sandbox(f"hosted{number}")
        config.linux.security_context.namespace_options.network = cri_pb2.NODE
        config.port_mappings.add(container_port=12003, host_port=12003)
        agent.client.run_sandbox(config)


def test_empty_dns_configuration_is_that_of_the_node(agent: AgentProcess) -> None:
    config = _sandbox()
    config.dns_config.SetInParent()
    pod = Pod.run(agent, config)
    shown = agent.client.output(pod.start(_container("main", "top")), "cat", "/etc/resolv.conf")
    assert shown.strip() == Path("/etc/resolv.conf").read_text().strip()


def test_relative_log_path_is_below_the_log_folder(agent: AgentProcess, tmp_path: Path) -> None:
    pod = Pod.run(agent, _sandbox(log_directory=str(tmp_path)))
    config = _container("main", "sh", "-c", "echo $(id -u):$(id -g)")
    config.log_path = "main.log"
    status = pod.finished(config)
    assert status.log_path == str(tmp_path / "main.log")
    assert Path(status.log_path).read_text().endswith(" stdout F 0:0\n")


def test_image_says_what_runs(agent: AgentProcess, plain: Pod) -> None:
    """Neither command nor arguments: what the image has."""
    container_id = plain.start(_container("main", image="busybox:latest"))
    wait_for(lambda: agent.client.status(container_id).state == EXITED, what="the end of a shell without input")


def test_user_namespace_of_the_pod_is_that_of_its_containers(agent: AgentProcess, tmp_path: Path) -> None:
    config = _sandbox(log_directory=str(tmp_path))
    options = config.linux.security_context.namespace_options
    options.userns_options.mode = cri_pb2.POD
    for mappings in (options.userns_options.uids, options.userns_options.gids):
        mappings.add(container_id=0, host_id=1000, length=100_000)
    pod = Pod.run(agent, config)
    container = _container("main", "cat", "/proc/self/uid_map")
    container.linux.security_context.namespace_options.CopyFrom(options)
    container.log_path = "main.log"
    assert pod.printed(container).split() == ["0", "1000", "100000"]


def test_user_namespace_of_the_node(agent: AgentProcess, tmp_path: Path) -> None:
    config = _sandbox(log_directory=str(tmp_path))
    config.linux.security_context.namespace_options.userns_options.mode = cri_pb2.NODE
    container = _container("main", "cat", "/proc/self/uid_map")
    container.linux.security_context.namespace_options.CopyFrom(config.linux.security_context.namespace_options)
    container.log_path = "main.log"
    assert Pod.run(agent, config).printed(container).split() == Path("/proc/self/uid_map").read_text().split()
