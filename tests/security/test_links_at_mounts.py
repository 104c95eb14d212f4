"""Links of images and volumes that lead mounts, volumes and working directories into the kernel's file systems."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.agent.hardening import Attacker, import_image, like_kubelets
from tests.integration.conformance.support import refused
from tests.security.conftest import StartAttacker, pod_config
from tests.support.agent import AgentProcess
from tests.support.image_builder import entry, folder

MakeImage = Callable[..., str]


@pytest.fixture
def image(agent: AgentProcess, tmp_path: Path) -> Iterator[MakeImage]:
    """Imports an image of busybox with these links and entries. It is removed after the test."""
    made: list[str] = []

    def make(links: dict[str, str], *entries: Any, **config: object) -> str:
        layer = [entry(name, kind=tarfile.SYMTYPE, link=target, mode=0o777) for name, target in links.items()]
        made.append(import_image(agent, tmp_path, f"links{len(made)}", [*entries, *layer], config))
        return made[-1]

    yield make
    for reference in made:
        agent.client.call("RemoveImage", cri_pb2.RemoveImageRequest(image=cri_pb2.ImageSpec(image=reference)))


def refusal(attacker: StartAttacker, config: cri_pb2.ContainerConfig) -> str:
    """The error with which CreateContainer refuses a container."""
    with pytest.raises(grpc.RpcError) as raised:
        attacker(config)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT, raised.value.details()
    return raised.value.details() or ""


def test_nothing_is_mounted_below_devices_and_in_file_systems_without_folders(
    quiet_log: AgentProcess, attacker: StartAttacker, image: MakeImage, tmp_path: Path
) -> None:
    """An OCI runtime would make a folder instead of the device, or fail with an error that does not name the mount."""
    reference = image({"run": "/tmp/run", "tmp/run": "/dev/null"})
    led = "the link /tmp/run leads to"
    for destination, text in (
        ("/run", f"container_path /run: {led} /dev/null: /dev/null can only be a null device, which {tmp_path} is not"),
        (
            "/run/a/b",
            f"container_path /run/a/b: {led} /dev/null/a/b: nothing can be mounted below /dev/null, at /dev/null/a/b",
        ),
        *(
            (f"/dev/{name}/x", f"nothing can be mounted below /dev/{name}, at /dev/{name}/x")
            for name in ("full", "console", "ptmx", "pts", "mqueue")
        ),
    ):
        config = like_kubelets("main", image=reference)
        config.mounts.add(container_path=destination, host_path=str(tmp_path))
        assert f"mounts: {text}" in refusal(attacker, config)
    config = like_kubelets("main", image=image({"data": "/dev/zero"}, Volumes={"/data/x": {}}))
    volume = "VOLUME of the image: /data/x: the link /data leads to /dev/zero/x: nothing can be mounted below /dev/zero"
    assert volume in refusal(attacker, config)


@pytest.mark.usefixtures("quiet_log")
@pytest.mark.parametrize(
    ("link", "place"),
    [
        ("data -> /proc", "/proc"),
        ("data -> proc/sys", "/proc/sys"),
        ("data -> /etc/../sys", "/sys"),
        ("data -> /dev", "/dev"),
        ("data -> /dev/fd", "/dev/fd"),
        ("data -> /", "/"),
        ("etc/resolv.conf -> /proc/self/attr/exec", "/proc/self/attr/exec"),
    ],
)
def test_no_volume_is_mounted_through_a_link_over_kernel_files(
    attacker: StartAttacker, image: MakeImage, tmp_path: Path, link: str, place: str
) -> None:
    link, _, target = link.partition(" -> ")
    parents = [entry("etc/.wh.resolv.conf")] if link.startswith("etc/") else []
    config = like_kubelets("main", image=image({link: target}, *parents))
    if link == "data":
        config.mounts.add(container_path="/data", host_path=str(tmp_path))
    assert f"the link /{link} leads to {place}: use an image without" in refusal(attacker, config)


def test_no_volume_is_mounted_on_files_of_processes(
    quiet_log: AgentProcess, handler: str, user_namespace: bool, tmp_path: Path
) -> None:
    """crun writes the container's confinement there, and reads there what to close (CVE-2019-16884)."""
    sandbox = pod_config(quiet_log, user_namespace=user_namespace)
    sandbox_id = quiet_log.client.run_sandbox(sandbox, handler)
    config = like_kubelets("main")
    config.linux.security_context.namespace_options.CopyFrom(sandbox.linux.security_context.namespace_options)
    config.mounts.add(host_path=str(tmp_path))
    for place in (
        *("/proc/self", "/proc/self/attr", "/proc/thread-self/attr", "/proc/1/fd", "/proc/sys", "/proc/sys/kernel"),
        *("/proc/bus", "/dev/fd", "/dev/fd/3", "/dev/stdin", "/dev/zero"),
    ):
        config.mounts[0].container_path = place
        with refused(grpc.StatusCode.INVALID_ARGUMENT, f"mounts: .*{place}"):
            quiet_log.client.create(sandbox_id, config, sandbox)


def test_files_of_proc_that_tools_replace(quiet_log: AgentProcess, attacker: StartAttacker, tmp_path: Path) -> None:
    """As lxcfs does, so that programs see their limits instead of the node's memory."""
    for folder_above in (tmp_path.parent.parent, tmp_path.parent, tmp_path):
        folder_above.chmod(0o755)
    shown = tmp_path / "meminfo"
    shown.write_text("MemTotal: 1 kB\n")
    config = like_kubelets("main")
    config.mounts.add(container_path="/proc/meminfo", host_path=str(shown))
    assert attacker(config).shell("cat /proc/meminfo") == "MemTotal: 1 kB\n"


def test_a_volume_in_sys_is_mounted_only_on_existing_files(
    quiet_log: AgentProcess, attacker: StartAttacker, tmp_path: Path
) -> None:
    for folder_above in (tmp_path.parent.parent, tmp_path.parent, tmp_path):
        folder_above.chmod(0o755)
    for place in ("/sys/fs", "/sys/kernel"):
        volume = tmp_path / place.replace("/", "-")
        volume.mkdir()
        (volume / "file").touch()
        config = like_kubelets("main")
        config.mounts.add(container_path=place, host_path=str(volume))
        assert attacker(config).shell(f"ls {place}") == "file\n"
        assert [path.name for path in volume.iterdir()] == ["file"]
    config = like_kubelets("main")
    config.mounts.add(container_path="/sys/devices/new", host_path=str(tmp_path))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "mounts: /sys/devices/new does not exist in /sys"):
        attacker(config)


@pytest.mark.parametrize("through", ["/dev/pts", "/terminals"])
def test_no_terminal_is_opened_through_a_volume(
    quiet_log: AgentProcess, attacker: StartAttacker, image: MakeImage, tmp_path: Path, through: str
) -> None:
    """OCI runtimes open the file at the terminal's path for writing, chown it and mount it at /dev/console.

    This is the attack of CVE-2025-52565.
    """
    (tmp_path / "ptmx").symlink_to("/proc/self/root/dev/pts/ptmx")
    for number in range(64):
        (tmp_path / str(number)).symlink_to("/proc/sys/kernel/core_pattern")
    config = like_kubelets("main", image=image({"terminals": "/dev/pts"}), tty=True)
    config.mounts.add(container_path=through, host_path=str(tmp_path))
    led = "" if through == "/dev/pts" else " container_path /terminals: the link /terminals leads to /dev/pts:"
    assert f"mounts:{led} /dev/pts can only be the node's own /dev/pts" in refusal(attacker, config)


def test_no_mount_goes_through_a_link_of_a_volume_over_kernel_files(
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
def test_no_volume_of_an_image_covers_kernel_files(
    quiet_log: AgentProcess, attacker: StartAttacker, image: MakeImage, path: str
) -> None:
    config = like_kubelets("main", image=image({"data": "/sys/fs"}, Volumes={path: {}}))
    assert f"VOLUME of the image: {path}" in refusal(attacker, config)


@pytest.mark.parametrize(
    "target", ["/proc/1/root", "/proc/self/fd/5", "/data/../sys/class", "proc", "/dev/fd/3", "dev/../dev/stdin"]
)
def test_no_working_directory_is_reached_through_a_link_into_kernel_files(
    quiet_log: AgentProcess, attacker: StartAttacker, image: MakeImage, target: str
) -> None:
    config = like_kubelets("main", image=image({"w": target}), working_dir="/w")
    assert "working_dir '/w': the link /w leads to /" in refusal(attacker, config)


def test_mounts_and_directories_follow_other_links(
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
