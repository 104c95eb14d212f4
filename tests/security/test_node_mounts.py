"""A container's mounts in a bidirectional volume are removed from the node when it ends. Other mounts there stay."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from host import libc
from host.files import mounts
from proto.runtime.v1 import cri_pb2
from runtime.specgen import config
from runtime.specgen.mounts.shared_volumes import targets_on_node
from tests.support.agent import AgentProcess, wait_for
from tests.support.pods import container_config, sandbox_config


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Path]:
    """A folder of the node with shared mount propagation, with a file and folders, and ``pod`` with a file."""
    folder = tmp_path / "shared"
    folder.mkdir()
    libc.mount("tmpfs", str(folder), "tmpfs", 0, "")
    libc.mount("", str(folder), "", mounts.MS_SHARED, "")
    for name in ("volume/folder", "volume/below", "pod"):
        (folder / name).mkdir(parents=True)
    (folder / "volume/resolv.conf").write_text("of the node")
    (folder / "pod/resolv.conf").write_text("of the pod")
    try:
        yield folder / "volume"
    finally:
        for target in mounts.mounts_below(folder):
            libc.umount(target, mounts.MNT_DETACH)


def config_with(volume: Path, propagation: int = cri_pb2.PROPAGATION_PRIVATE) -> cri_pb2.ContainerConfig:
    """A container with the bidirectional volume, and with a folder and a file of the pod in it."""
    pod = volume.parent / "pod"
    inside = {"/data/folder": pod, "/data/below": volume / "below", "/data/resolv.conf": pod / "resolv.conf"}
    wanted = [cri_pb2.Mount(container_path="/data", host_path=str(volume))]
    wanted[0].propagation = cri_pb2.PROPAGATION_BIDIRECTIONAL
    for place, source in inside.items():
        wanted.append(cri_pb2.Mount(container_path=place, host_path=str(source)))
        wanted[-1].propagation = propagation  # type: ignore[assignment]  # the stubs have a class for each enum
    return container_config("main", "sleep", "1000", mounts=wanted)


def create(agent: AgentProcess, wanted: cri_pb2.ContainerConfig, handler: str = "") -> tuple[str, str]:
    sandbox = sandbox_config(agent)
    sandbox_id = agent.client.run_sandbox(sandbox, handler)
    container_id = agent.client.create(sandbox_id, wanted, sandbox)
    agent.client.start(container_id)
    return sandbox_id, container_id


def seen(volume: Path) -> list[str]:
    """The node's mounts below the volume."""
    return [target.removeprefix(f"{volume}/") for target in mounts.mounts_below(volume) if target != str(volume)]


@pytest.mark.parametrize("propagation", [cri_pb2.PROPAGATION_PRIVATE, cri_pb2.PROPAGATION_BIDIRECTIONAL])
def test_no_mount_of_a_container_outlives_it(agent: AgentProcess, handler: str, volume: Path, propagation: int) -> None:
    for _ in range(3):
        _, container_id = create(agent, config_with(volume, propagation), handler)
        assert sorted(seen(volume)) == ["below", "folder", "resolv.conf"], "they multiply"
        assert (volume / "resolv.conf").read_text() == "of the pod"
        agent.client.stop(container_id)
        wait_for(lambda: seen(volume) == [], what="the end of its mounts")
        assert (volume / "resolv.conf").read_text() == "of the node"


def test_mounts_of_several_containers_are_removed_with_the_last_one(agent: AgentProcess, volume: Path) -> None:
    containers = [create(agent, config_with(volume))[1] for _ in range(3)]
    for container_id in containers:
        assert (volume / "resolv.conf").read_text() == "of the pod"
        assert agent.client.output(container_id, "cat", "/data/resolv.conf") == "of the pod"
        agent.client.stop(container_id)
        agent.client.remove(container_id)
    wait_for(lambda: seen(volume) == [], what="the end of their mounts")
    assert mounts.mounts_below(volume.parent / "pod") == []


def test_other_mounts_in_the_volume_stay(agent: AgentProcess, volume: Path) -> None:
    """For example volumes of a driver, which its next container still serves."""
    _, container_id = create(agent, config_with(volume, cri_pb2.PROPAGATION_BIDIRECTIONAL))
    inner = volume / "below/inner"
    inner.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "of-a-driver", inner], check=True)
    (inner / "file").write_text("kept")
    agent.client.stop(container_id)
    agent.client.remove(container_id)
    wait_for(lambda: "folder" not in seen(volume), what="the end of the others")
    assert (inner / "file").read_text() == "kept"
    assert "below" in seen(volume)
    while inner.is_mount():
        libc.umount(str(inner), 0)
    _, other = create(agent, config_with(volume))
    agent.client.stop(other)
    wait_for(lambda: seen(volume) == [], what="the end of all")


@pytest.mark.parametrize("stage", ["runtime:after", "commit:after"])
def test_a_killed_agent_unmounts_them_later(own_agent: AgentProcess, volume: Path, stage: str) -> None:
    own_agent.restart(f"CreateContainer.{stage}:kill")
    with pytest.raises(grpc.RpcError):
        create(own_agent, config_with(volume))
    own_agent.wait_dead()
    assert (volume / "resolv.conf").read_text() == "of the pod"
    own_agent.start()
    listed = own_agent.client.call("ListContainers", cri_pb2.ListContainersRequest()).containers
    assert len(listed) == (stage == "commit:after")
    for container in listed:
        own_agent.client.stop(container.id)
    wait_for(lambda: seen(volume) == [], what="the end of its mounts")


def test_the_node_keeps_its_own_resolv_conf_while_a_pod_has_its_folder(
    agent: AgentProcess, handler: str, volume: Path
) -> None:
    wanted = container_config("main", "sleep", "1000")
    wanted.mounts.add(container_path="/etc", host_path=str(volume), propagation=cri_pb2.PROPAGATION_BIDIRECTIONAL)
    _, container_id = create(agent, wanted, handler)
    assert agent.client.output(container_id, "cat", "/etc/resolv.conf") == "of the node"
    assert (volume / "resolv.conf").read_text() == "of the node"
    assert sorted(path.name for path in volume.iterdir()) == ["below", "folder", "resolv.conf"]
    assert seen(volume) == []


def test_only_what_is_directly_in_a_bidirectional_volume_appears_on_the_node() -> None:
    def bind(place: str, source: str, *options: str) -> config.Mount:
        return config.Mount(destination=place, type="bind", source=source, options=["rbind", *options])

    assert targets_on_node(
        [
            config.Mount(destination="/proc", type="proc", source="proc"),
            *[bind("/a", "/node/a", "rshared"), bind("/a/b", "/x", "rprivate"), bind("/a/b/c", "/y", "rshared")],
            *[bind("/a/b/c/d/e", "/z"), bind("/ab", "/z"), bind("/p", "/node/p", "rslave"), bind("/p/q", "/z")],
            *[bind("/root", "/", "shared"), bind("/root/f", "/z")],
        ]
    ) == ["/node/a/b", "/y/d/e", "/f"]
