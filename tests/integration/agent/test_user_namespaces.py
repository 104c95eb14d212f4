"""Pods with a user namespace of their own: root inside is nobody outside, and files look right from both sides."""

from __future__ import annotations

import os
from pathlib import Path

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess
from tests.support.pods import container_config, sandbox_config

FIRST = 300_000


def with_user_namespace(config: cri_pb2.NamespaceOption, first: int = FIRST) -> None:
    config.userns_options.mode = cri_pb2.POD
    config.userns_options.uids.add(host_id=first, container_id=0, length=65536)
    config.userns_options.gids.add(host_id=first, container_id=0, length=65536)


def user_pod(agent: AgentProcess, pid: cri_pb2.NamespaceMode) -> tuple[str, cri_pb2.PodSandboxConfig]:
    if not agent.client.call("Status", cri_pb2.StatusRequest()).runtime_handlers[0].features.user_namespaces:
        pytest.skip("the default runtime handler has no mapped mounts")
    sandbox = sandbox_config(agent)
    options = sandbox.linux.security_context.namespace_options
    options.pid = pid
    with_user_namespace(options)
    return agent.client.run_sandbox(sandbox), sandbox


@pytest.mark.parametrize("pid", [cri_pb2.CONTAINER, cri_pb2.POD])
def test_root_inside_is_nobody_outside(agent: AgentProcess, pid: cri_pb2.NamespaceMode) -> None:
    client = agent.client
    sandbox_id, sandbox = user_pod(agent, pid)
    config = container_config("main", "sleep", "1000")
    config.linux.security_context.namespace_options.CopyFrom(sandbox.linux.security_context.namespace_options)
    container_id = client.create(sandbox_id, config, sandbox)
    client.start(container_id)
    assert client.output(container_id, "cat", "/proc/self/uid_map").split() == ["0", str(FIRST), "65536"]
    assert client.output(container_id, "stat", "-c", "%u %g", "/bin/busybox", "/etc/hosts").split() == ["0"] * 4
    client.output(container_id, "sh", "-c", "touch /new /dev/shm/new")
    assert client.output(container_id, "stat", "-c", "%u", "/new").strip() == "0"
    written = agent.data / "containers" / container_id / "upper" / "new"
    assert written.stat().st_uid == FIRST
    assert client.output(container_id, "hostname").strip() == sandbox.hostname
    client.remove_sandbox(sandbox_id)


def test_init_of_a_shared_pid_namespace_shows_nothing_of_the_host(agent: AgentProcess) -> None:
    client = agent.client
    sandbox_id, sandbox = user_pod(agent, cri_pb2.POD)
    config = container_config("main", "sleep", "1000")
    config.linux.security_context.namespace_options.CopyFrom(sandbox.linux.security_context.namespace_options)
    config.linux.security_context.capabilities.add_capabilities.append("SYS_PTRACE")
    container_id = client.create(sandbox_id, config, sandbox)
    client.start(container_id)
    assert b"denied" in client.exec(container_id, "ls", "/proc/1/root/").stderr


def test_volume_with_mapped_ids_keeps_its_owner_on_the_host(agent: AgentProcess, tmp_path: Path) -> None:
    client = agent.client
    sandbox_id, sandbox = user_pod(agent, cri_pb2.CONTAINER)
    options = sandbox.linux.security_context.namespace_options
    config = container_config("main", "sleep", "1000")
    config.linux.security_context.namespace_options.CopyFrom(options)
    uids, gids = options.userns_options.uids, options.userns_options.gids
    config.mounts.add(container_path="/volume", host_path=str(tmp_path), uidMappings=uids, gidMappings=gids)
    container_id = client.create(sandbox_id, config, sandbox)
    client.start(container_id)
    client.output(container_id, "touch", "/volume/file")
    assert (tmp_path / "file").stat().st_uid == os.getuid()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda options: options.uids[0].__setattr__("container_id", 1), "id 0 is not mapped"),
        (lambda options: options.uids.add(host_id=FIRST, container_id=70000, length=1), "mapped twice"),
        (lambda options: options.__setattr__("mode", cri_pb2.CONTAINER), "use POD or NODE"),
    ],
)
def test_wrong_mappings_are_refused(agent: AgentProcess, change: object, words: str) -> None:
    sandbox = sandbox_config(agent)
    with_user_namespace(sandbox.linux.security_context.namespace_options)
    assert callable(change)
    change(sandbox.linux.security_context.namespace_options.userns_options)
    with pytest.raises(grpc.RpcError) as caught:
        agent.client.run_sandbox(sandbox)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert words in (caught.value.details() or "")
