"""Where paths of a container lead: through links of the image, through volumes, never out of both."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from host.errors import InvalidArgumentError
from runtime.specgen.mounts.container_paths import ContainerPaths

LINKS = {
    "data": "/proc",
    "descriptors": "/dev/fd",
    "up": "../../../../etc",
    "kernel": "a/../sys/fs",
    "chain": "data/self",
    "run": "/tmp/run",
    "top": "/.",
    "loop": "loop",
    "ping": "pong/x",
    "pong": "ping/x",
    "inside": "etc/../var",
    "devices": "dev/",
    "host": "/host/1/root",
}


@pytest.fixture
def paths(tmp_path: Path) -> ContainerPaths:
    rootfs = tmp_path / "rootfs"
    for name in ("etc", "var", "a", "proc", "volume"):
        (rootfs / name).mkdir(parents=True)
    (rootfs / "etc" / "passwd").touch()
    for name, target in LINKS.items():
        (rootfs / name).symlink_to(target)
    return ContainerPaths(rootfs)


@pytest.mark.parametrize(
    ("path", "place", "link", "exists"),
    [
        ("/", "/", "", True),
        ("/etc/passwd", "/etc/passwd", "", True),
        ("/etc/passwd/x", "/etc/passwd/x", "", False),
        ("/etc/./..//var", "/var", "", True),
        ("/../../etc", "/etc", "", True),
        ("/up/passwd", "/etc/passwd", "/up", True),
        ("/run", "/tmp/run", "/run", False),
        ("/run/lock/x", "/tmp/run/lock/x", "/run", False),
        ("/inside", "/var", "/inside", True),
        ("/top/etc", "/etc", "/top", True),
        ("/missing/../etc", "/etc", "", True),
        ("/devices/null", "/dev/null", "/devices", False),
    ],
)
def test_links_lead_inside_the_root(paths: ContainerPaths, path: str, place: str, link: str, exists: bool) -> None:
    found = paths.resolve(path)
    assert (found.path, found.link, found.exists) == (place, link, exists)
    assert (found.of_kernel, found.in_volume) == (False, False)


@pytest.mark.parametrize(
    ("path", "place", "link"),
    [
        ("/proc", "/proc", ""),
        ("/sys/fs/bpf", "/sys/fs/bpf", ""),
        ("/data", "/proc", "/data"),
        ("/data/../etc/../sys", "/sys", "/data"),
        ("/kernel/cgroup", "/sys/fs/cgroup", "/kernel"),
        ("/chain/attr", "/proc/self/attr", "/data"),
        ("/dev/stdin", "/dev/stdin", ""),
        ("/descriptors/7", "/dev/fd/7", "/descriptors"),
    ],
)
def test_what_is_of_the_kernel(paths: ContainerPaths, path: str, place: str, link: str) -> None:
    found = paths.resolve(path)
    assert (found.path, found.link, found.of_kernel) == (place, link, True)
    if not link:
        assert paths.destination(path, "mounts:").path == place
        return
    with pytest.raises(InvalidArgumentError, match=rf"mounts: {path}: the link {link} leads to {place}: use"):
        paths.destination(path, "mounts:")


@pytest.mark.parametrize("path", ["/top", "/devices"])
def test_nothing_is_mounted_by_links_on_the_root_or_dev(paths: ContainerPaths, path: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"the link {path} leads to"):
        paths.destination(path, "mounts:")


@pytest.mark.parametrize("path", ["/loop", "/ping", "/pong/y"])
def test_links_to_each_other(paths: ContainerPaths, path: str) -> None:
    with pytest.raises(InvalidArgumentError, match="too many links"):
        paths.resolve(path)


def test_links_of_volumes_lead_inside_the_container(paths: ContainerPaths, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    (volume / "deep").mkdir(parents=True)
    for name, target in {"proc": "/proc", "out": str(tmp_path), "etc": "../../etc", "back": "deep/.."}.items():
        (volume / name).symlink_to(target)
    paths.add("/volume", str(volume))
    assert paths.resolve("/volume").in_volume is False
    assert paths.resolve("/volume/deep").in_volume is True
    assert paths.resolve("/volume/etc/passwd").path == "/etc/passwd"
    assert paths.resolve("/volume/back/deep").path == "/volume/deep"
    assert paths.resolve("/volume/out").path == str(tmp_path)
    with pytest.raises(InvalidArgumentError, match="the link /volume/proc leads to /proc"):
        paths.destination("/volume/proc", "mounts:")


def test_links_of_processes_are_never_taken_at_their_word(paths: ContainerPaths) -> None:
    """A volume of the node's /proc: its links lead where no text says."""
    paths.add("/host", "/proc")
    found = paths.resolve("/host/1/root/etc")
    assert (found.path, found.link, found.of_kernel) == ("/host/1/root", "/host/1/root", True)
    assert paths.resolve("/host").of_kernel
    assert paths.resolve("/host/1").link == ""
    with pytest.raises(InvalidArgumentError, match="the link /host/self leads to"):
        paths.destination("/host/self/attr", "mounts:")


def test_names_that_no_text_can_hold(paths: ContainerPaths) -> None:
    (paths.rootfs / "latin").symlink_to(os.fsdecode(b"/caf\xe9"))
    with pytest.raises(InvalidArgumentError, match="not UTF-8"):
        paths.destination("/latin", "mounts:")
    (paths.rootfs / "long").symlink_to("x" * 4000)
    with pytest.raises(InvalidArgumentError, match="too many links"):
        paths.resolve("/long/" + "y" * 200)


def test_nothing_stays_open(paths: ContainerPaths) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for path in ("/", "/etc/passwd", "/data", "/loop", "/run/x"):
        try:
            paths.resolve(path)
        except InvalidArgumentError:
            continue
    assert len(list(Path("/proc/self/fd").iterdir())) == before
