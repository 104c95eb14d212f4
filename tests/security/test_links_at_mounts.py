"""Mounts, volumes and working directories that links of images and volumes lead into the kernel's file systems."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.agent.hardening import Attacker, import_image, like_kubelets
from tests.security.conftest import StartAttacker
from tests.support.agent import AgentProcess
from tests.support.image_builder import entry, folder

MakeImage = Callable[..., str]


@pytest.fixture
def image(agent: AgentProcess, tmp_path: Path) -> Iterator[MakeImage]:
    """Imports an image of busybox with these links, and more entries; removed after the test."""
    made: list[str] = []

    def make(links: dict[str, str], *entries: Any, **config: object) -> str:
        layer = [entry(name, kind=tarfile.SYMTYPE, link=target, mode=0o777) for name, target in links.items()]
        made.append(import_image(agent, tmp_path, f"links{len(made)}", [*entries, *layer], config))
        return made[-1]

    yield make
    for reference in made:
        agent.client.call("RemoveImage", cri_pb2.RemoveImageRequest(image=cri_pb2.ImageSpec(image=reference)))


def refusal(attacker: StartAttacker, config: cri_pb2.ContainerConfig) -> str:
    """Why CreateContainer refuses a container."""
    with pytest.raises(grpc.RpcError) as refused:
        attacker(config)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT, refused.value.details()
    return refused.value.details() or ""


@pytest.mark.usefixtures("quiet_log")
@pytest.mark.parametrize(
    ("link", "place"),
    [
        ("data -> /proc", "/proc"),
        ("data -> proc/sys", "/proc/sys"),
        ("data -> /etc/../sys", "/sys"),
        ("data -> /dev", "/dev"),
        ("data -> /", "/"),
        ("etc/resolv.conf -> /proc/self/attr/exec", "/proc/self/attr/exec"),
    ],
)
def test_no_volume_is_mounted_through_a_link_over_what_the_kernel_shows(
    attacker: StartAttacker, image: MakeImage, tmp_path: Path, link: str, place: str
) -> None:
    link, _, target = link.partition(" -> ")
    parents = [entry("etc/.wh.resolv.conf")] if link.startswith("etc/") else []
    config = like_kubelets("main", image=image({link: target}, *parents))
    if link == "data":
        config.mounts.add(container_path="/data", host_path=str(tmp_path))
    assert f"the link /{link} leads to {place}: use an image without" in refusal(attacker, config)


def test_no_mount_goes_through_a_link_of_a_volume_over_what_the_kernel_shows(
    quiet_log: AgentProcess, attacker: StartAttacker, tmp_path: Path
) -> None:
    volume, other = tmp_path / "volume", tmp_path / "other"
    volume.mkdir()
    other.mkdir()
    (volume / "inner").symlink_to("/proc")
    config = like_kubelets("main")
    config.mounts.add(container_path="/volume/inner", host_path=str(other))
    config.mounts.add(container_path="/volume", host_path=str(volume))
    assert "the link /volume/inner leads to /proc" in refusal(attacker, config)


@pytest.mark.parametrize("path", ["/dev", "/sys", "/proc", "/proc/self/attr", "/data"])
def test_no_volume_of_an_image_covers_what_the_kernel_shows(
    quiet_log: AgentProcess, attacker: StartAttacker, image: MakeImage, path: str
) -> None:
    config = like_kubelets("main", image=image({"data": "/sys/fs"}, Volumes={path: {}}))
    assert f"VOLUME of the image: {path}" in refusal(attacker, config)


@pytest.mark.parametrize("target", ["/proc/1/root", "/proc/self/fd/5", "/data/../sys/class", "proc"])
def test_no_working_directory_is_reached_through_a_link_into_the_kernel_s(
    quiet_log: AgentProcess, attacker: StartAttacker, image: MakeImage, target: str
) -> None:
    config = like_kubelets("main", image=image({"w": target}), working_dir="/w")
    assert "working_dir '/w': the link /w leads to /" in refusal(attacker, config)


def test_mounts_and_directories_behind_other_links_are_where_the_links_lead(
    quiet_log: AgentProcess, attacker: StartAttacker, image: MakeImage, tmp_path: Path
) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "file").write_text("of the volume\n")
    reference = image({"run": "/tmp/run", "opt/app": "../srv/releases/1", "work": "/srv/new/work"}, folder("srv"))
    config = like_kubelets("main", image=reference, working_dir="/work")
    config.mounts.add(container_path="/run", host_path=str(tmp_path))
    config.mounts.add(container_path="/opt/app/data", host_path=str(tmp_path))
    started: Attacker = attacker(config)
    script = "pwd; cat /run/file /tmp/run/file /opt/app/data/file /srv/releases/1/data/file"
    assert started.shell(script).splitlines() == ["/srv/new/work", *["of the volume"] * 4]
