"""Pods with a user namespace: root inside has no rights outside, and files look right from both sides."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import grpc
import pytest

from host.files.mounts import mount_table, mounts_below, unmount
from proto.runtime.v1 import cri_pb2
from tests.integration.agent.hardening import import_image
from tests.support import image_builder
from tests.support.agent import BUSYBOX, AgentProcess
from tests.support.pods import container_config, sandbox_config

FIRST = 300_000


def with_user_namespace(config: cri_pb2.NamespaceOption, first: int = FIRST) -> None:
    config.userns_options.mode = cri_pb2.POD
    config.userns_options.uids.add(host_id=first, container_id=0, length=65536)
    config.userns_options.gids.add(host_id=first, container_id=0, length=65536)


@pytest.fixture(params=["crun", "runc"])
def handler(request: pytest.FixtureRequest, agent: AgentProcess) -> str:
    """A runtime handler that has user namespaces here."""
    handlers = agent.client.call("Status", cri_pb2.StatusRequest()).runtime_handlers
    if request.param not in [handler.name for handler in handlers if handler.features.user_namespaces]:
        pytest.skip(f"{request.param} has no user namespaces here")
    return str(request.param)


def user_pod(
    agent: AgentProcess, handler: str, pid: cri_pb2.NamespaceMode = cri_pb2.CONTAINER
) -> tuple[str, cri_pb2.PodSandboxConfig]:
    sandbox = sandbox_config(agent)
    options = sandbox.linux.security_context.namespace_options
    options.pid = pid
    with_user_namespace(options)
    return agent.client.run_sandbox(sandbox, handler), sandbox


def user_container(sandbox: cri_pb2.PodSandboxConfig) -> cri_pb2.ContainerConfig:
    config = container_config("main", "sleep", "1000")
    config.linux.security_context.namespace_options.CopyFrom(sandbox.linux.security_context.namespace_options)
    return config


@pytest.mark.parametrize("pid", [cri_pb2.CONTAINER, cri_pb2.POD])
def test_root_of_a_container_is_an_unprivileged_user_of_the_node(
    agent: AgentProcess, handler: str, pid: cri_pb2.NamespaceMode
) -> None:
    client = agent.client
    sandbox_id, sandbox = user_pod(agent, handler, pid)
    config = user_container(sandbox)
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


def test_init_of_a_shared_pid_namespace_shows_nothing_of_the_host(agent: AgentProcess, handler: str) -> None:
    client = agent.client
    sandbox_id, sandbox = user_pod(agent, handler, cri_pb2.POD)
    config = user_container(sandbox)
    config.linux.security_context.capabilities.add_capabilities.append("SYS_PTRACE")
    container_id = client.create(sandbox_id, config, sandbox)
    client.start(container_id)
    assert b"denied" in client.exec(container_id, "ls", "/proc/1/root/").stderr


def add_mapped(
    config: cri_pb2.ContainerConfig, path: str, source: Path, *, first: int = FIRST, **fields: object
) -> None:
    """A volume whose ids are mapped like those of the pods here."""
    mapping = [cri_pb2.IDMapping(host_id=first, container_id=0, length=65536)]
    config.mounts.append(
        cri_pb2.Mount(container_path=path, host_path=str(source), uidMappings=mapping, gidMappings=mapping, **fields)  # type: ignore[arg-type]  # any fields of Mount that a test gives
    )


@pytest.mark.parametrize("pid", [cri_pb2.CONTAINER, cri_pb2.POD])
def test_volumes_with_mapped_ids_keep_their_owners_on_the_host(
    agent: AgentProcess, handler: str, tmp_path: Path, pid: cri_pb2.NamespaceMode
) -> None:
    client = agent.client
    sandbox_id, sandbox = user_pod(agent, handler, pid)
    config = user_container(sandbox)
    for name in ("volume", "kept"):
        (tmp_path / name).mkdir()
    (tmp_path / "kept" / "file").write_text("kept")
    (tmp_path / "single").write_text("one file")
    os.chown(tmp_path / "single", 1000, 1000)
    tmp_path.chmod(0o700)  # folders above a volume need not allow the pod's root to pass
    add_mapped(config, "/volume", tmp_path / "volume")
    add_mapped(config, "/made", tmp_path / "made")
    add_mapped(config, "/kept", tmp_path / "kept", readonly=True)
    add_mapped(config, "/single", tmp_path / "single")
    container_id = client.create(sandbox_id, config, sandbox)
    client.start(container_id)
    client.output(container_id, "touch", "/volume/file", "/made/file")
    assert client.output(container_id, "stat", "-c", "%u", "/volume", "/made/file", "/kept", "/single").split() == [
        "0",
        "0",
        "0",
        "1000",
    ]
    assert client.exec(container_id, "touch", "/kept/other").exit_code != 0
    assert client.output(container_id, "cat", "/single") == "one file"
    assert (tmp_path / "volume" / "file").stat().st_uid == os.getuid()
    assert (tmp_path / "made" / "file").stat().st_uid == os.getuid()
    client.stop(container_id)
    client.remove(container_id)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["file", "file", "file", "single"]
    assert not [entry for entry in mount_table() if container_id in entry.target]


def test_volume_with_other_mappings_than_the_pod_s(agent: AgentProcess, handler: str, tmp_path: Path) -> None:
    client = agent.client
    sandbox_id, sandbox = user_pod(agent, handler)
    config = user_container(sandbox)
    add_mapped(config, "/volume", tmp_path, first=FIRST + 7)
    container_id = client.create(sandbox_id, config, sandbox)
    client.start(container_id)
    assert client.output(container_id, "stat", "-c", "%u", "/volume").strip() == "7"


def test_mapped_volume_shows_what_is_mounted_below_and_leaves_it_alone(
    agent: AgentProcess, handler: str, tmp_path: Path
) -> None:
    client = agent.client
    sandbox_id, sandbox = user_pod(agent, handler)
    # Of a real file system: ids of a tmpfs cannot be mapped before Linux 6.3.
    volume, below = tmp_path / "volume", tmp_path / "below"
    for folder in (volume / "before", volume / "later", below):
        folder.mkdir(parents=True)
    (below / "mark").touch()
    subprocess.run(["mount", "--bind", volume, volume], check=True)
    try:
        subprocess.run(["mount", "--make-rshared", volume], check=True)
        subprocess.run(["mount", "--bind", below, volume / "before"], check=True)
        config = user_container(sandbox)
        add_mapped(config, "/volume", volume, propagation=cri_pb2.MountPropagation.PROPAGATION_HOST_TO_CONTAINER)
        container_id = client.create(sandbox_id, config, sandbox)
        client.start(container_id)
        subprocess.run(["mount", "--bind", below, volume / "later"], check=True)
        # crun (1.8) does not take along what is mounted below a volume in a user namespace.
        where = "/volume" if handler == "runc" else "/volume/later"
        found = client.output(container_id, "find", where, "-name", "mark").split()
        assert len(found) == (2 if handler == "runc" else 1)
        client.remove_sandbox(sandbox_id)
        assert (volume / "before" / "mark").exists()
        assert (volume / "later" / "mark").exists()
        wrong = user_container(sandbox)
        add_mapped(wrong, "/volume", volume, propagation=cri_pb2.MountPropagation.PROPAGATION_BIDIRECTIONAL)
        other_id, other = user_pod(agent, handler)
        with pytest.raises(grpc.RpcError) as refused:
            client.create(other_id, wrong, other)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    finally:
        for target in mounts_below(volume):
            unmount(target)


def test_volume_on_a_file_system_without_mapped_mounts_is_refused(
    agent: AgentProcess, handler: str, tmp_path: Path
) -> None:
    client = agent.client
    sandbox_id, sandbox = user_pod(agent, handler)
    config = user_container(sandbox)
    add_mapped(config, "/volume", Path("/sys/kernel"))
    with pytest.raises(grpc.RpcError) as refused:
        client.create(sandbox_id, config, sandbox)
    assert "/sys/kernel cannot be mounted with mapped ids" in (refused.value.details() or "")
    assert not client.call("ListContainers", cri_pb2.ListContainersRequest()).containers


def test_image_as_a_volume_belongs_to_root_inside(agent: AgentProcess, handler: str) -> None:
    client = agent.client
    sandbox_id, sandbox = user_pod(agent, handler)
    config = user_container(sandbox)
    add_mapped(config, "/image", Path(), readonly=True, image=cri_pb2.ImageSpec(image=BUSYBOX))
    config.mounts[0].host_path = ""
    container_id = client.create(sandbox_id, config, sandbox)
    client.start(container_id)
    assert client.output(container_id, "stat", "-c", "%u", "/image", "/image/bin/busybox").split() == ["0", "0"]
    assert client.exec(container_id, "touch", "/image/new").exit_code != 0


def test_volumes_of_an_image_belong_to_root_inside(agent: AgentProcess, handler: str, tmp_path: Path) -> None:
    content = [image_builder.folder("data"), image_builder.entry("data/file", "of the image")]
    image = import_image(agent, tmp_path, "volumes", content, {"Volumes": {"/data": {}, "/new": {}}})
    client = agent.client
    sandbox_id, sandbox = user_pod(agent, handler)
    config = user_container(sandbox)
    config.image.image = image
    container_id = client.create(sandbox_id, config, sandbox)
    client.start(container_id)
    assert client.output(container_id, "stat", "-c", "%u", "/data", "/data/file", "/new").split() == ["0"] * 3
    client.output(container_id, "touch", "/data/written", "/new/written")
    volumes = agent.data / "containers" / container_id / "volumes"
    assert {path.stat().st_uid for path in volumes.rglob("*")} == {FIRST}
    client.remove_sandbox(sandbox_id)
    client.call("RemoveImage", cri_pb2.RemoveImageRequest(image=cri_pb2.ImageSpec(image=image)))


def test_mapped_volumes_outlive_the_agent_and_go_with_the_container(own_agent: AgentProcess, tmp_path: Path) -> None:
    client = own_agent.client
    volume = tmp_path / "volume"
    volume.mkdir()
    (volume / "file").write_text("kept")
    sandbox_id, sandbox = user_pod(own_agent, "")
    config = user_container(sandbox)
    add_mapped(config, "/volume", volume)
    container_id = client.create(sandbox_id, config, sandbox)
    client.start(container_id)
    own_agent.restart()
    client = own_agent.client
    assert client.output(container_id, "cat", "/volume/file") == "kept"
    client.stop(container_id)
    client.remove_sandbox(sandbox_id)
    assert client.findings() == []
    assert (volume / "file").read_text() == "kept"


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
